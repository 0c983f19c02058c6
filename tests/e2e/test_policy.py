"""The exported policy is what was trained: transformers and vLLM give the trainer's log-probs."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolkit.exchange import layout
from toolkit.exchange.run import Run
from toolkit.inference.engine import tolerance


def test_transformers_gives_the_trainers_log_probs(finished_run: Run) -> None:
    manifest = finished_run.records.require(layout.policy(finished_run.plan.rounds))
    folder = manifest.directory / Path(manifest.files[0].path).parent
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert AutoTokenizer.from_pretrained(folder).chat_template
    for probe in manifest.attributes["probes"]:
        ids = torch.tensor([probe["prompt_ids"] + probe["response_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        start = len(probe["prompt_ids"])
        total = sum(float(logprobs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
        assert abs(total - probe["logprob"]) <= 1e-4


def test_vllm_proved_every_policy_by_its_probes(finished_run: Run) -> None:
    """A worker evaluates a policy only after its engine gave the probes' log-probs (PolicyEngine.load)."""
    for version in range(finished_run.plan.rounds + 1):
        policy = finished_run.records.require(layout.policy(version))
        evaluation = finished_run.records.require(layout.evaluation(version))
        assert policy.attributes["probes"]
        assert all(tolerance({"float32"}, len(p["response_ids"]), True) <= 1e-4 for p in policy.attributes["probes"])
        assert evaluation.attributes["policy"] == policy.digest
