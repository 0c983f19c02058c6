"""A real run of the preset `metaapo_reference_code` equals the single-process port of the official algorithm, step by step.

The port trains a transformers model with torch.optim in one process on the run's recorded samples. Only what is random is taken
from the records (the draws u, the sampled pairs); gate decisions, weights, losses, learning rates, meta-learner and policy are the
port's own.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.algorithms.official_port import LogProbs, OfficialRun, train_round
from tests.e2e.conftest import metaapo
from toolkit.exchange import derive, layout
from toolkit.exchange.run import Run
from toolkit.reporting import metrics

PAIRS = 640  # two rounds of 20 steps of 16: one meta update in each, at step 16
HALVES = (("chosen_ids", "rejected_ids"), ("online_chosen_ids", "online_rejected_ids"))


@pytest.fixture(scope="module")
def run(toy_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("reference_code") / "run"
    metaapo(
        "launch",
        "experiment=quickstart",
        "method=metaapo_reference_code",
        f"run={folder}",
        f"toy={toy_world}",
        f"data.max_pairs={PAIRS}",
        "data.heldout_prompts=8",
        "method.rounds=2",
        "method.global_batch=16",
        "method.shard_size=64",
    )
    return Run.open(folder)


def folder_of(run: Run, version: int) -> Path:
    manifest = run.records.require(layout.policy(version))
    return manifest.directory / Path(manifest.files[0].path).parent


def logprob(model: torch.nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    ids = torch.tensor([prompt + response])
    logprobs = model(ids).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0].sum()


def rows_of(run: Run, index: int) -> list[dict]:
    """The round's pairs with their draws and, where there is one, their online half."""
    found = []
    for shard in range(run.plan.shards(index)):
        pairs = run.pairs(index, shard)
        requests = run.records.table(run.records.require(layout.requests(index, shard)))
        annotations = run.records.table(run.records.require(layout.annotations(index, shard)))
        online = {row["pair_id"]: row for row in annotations.to_pylist() if row["outcome"] == "pair"}
        for pair, request in zip(pairs.to_pylist(), requests.to_pylist(), strict=True):
            half = online.get(pair["pair_id"])
            found.append(
                pair
                | request
                | {f"online_{side}_ids": half[f"{side}_ids"] if half else None for side in ("chosen", "rejected")}
            )
    return found


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Warm-up over 3 % of the steps, then a cosine to a tenth; restarted in every round."""
    warmup = math.ceil(0.03 * steps)
    if step <= warmup:
        return highest * step / warmup
    return highest * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def test_every_step_is_the_official_one(run: Run) -> None:
    torch.set_num_threads(1)
    official = OfficialRun(beta=0.1, interval=16)
    highest = run.config.method.optimizer.learning_rate
    policy = AutoModelForCausalLM.from_pretrained(folder_of(run, 0), dtype=torch.float32).train()
    recorded_steps = {line["step"]: line for line in metrics.steps(run.root)}
    updates = 0
    for index in range(2):
        rows, steps = rows_of(run, index), run.plan.steps_in_round(index)
        reference = AutoModelForCausalLM.from_pretrained(folder_of(run, max(0, index - 1)), dtype=torch.float32).eval()

        def halves(model: torch.nn.Module, picked: list[dict], which: int) -> tuple[Tensor, Tensor]:
            chosen, rejected = HALVES[which]
            return (
                torch.stack([logprob(model, row["prompt_ids"], row[chosen]) for row in picked]),
                torch.stack([logprob(model, row["prompt_ids"], row[rejected]) for row in picked]),
            )

        with torch.no_grad():
            scores = LogProbs(*halves(policy, rows, 0), *halves(reference, rows, 0))
        w, sampled = official.gate(scores, torch.tensor([row["u"] for row in rows]))
        assert torch.allclose(w, torch.tensor([row["w_gate"] for row in rows]), atol=2e-5)
        assert sampled.tolist() == [row["sampled"] for row in rows]
        kept = torch.tensor([row["online_chosen_ids"] is not None for row in rows])

        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

        def log_probs(
            picked: Tensor, rows: list[dict] = rows, reference: torch.nn.Module = reference
        ) -> tuple[LogProbs, LogProbs]:
            chosen = [rows[int(position)] for position in picked]
            with torch.no_grad():
                references = [halves(reference, chosen, which) for which in (0, 1)]
            return (
                LogProbs(*halves(policy, chosen, 0), *references[0]),
                LogProbs(*halves(policy, chosen, 1), *references[1]),
            )

        batches = [torch.arange(start, start + 16) for start in range(0, len(rows), 16)]
        first = run.plan.first_step[index]

        def with_rates(
            batches: list[Tensor] = batches, optimizer: torch.optim.Optimizer = optimizer, steps: int = steps
        ):
            for number, batch in enumerate(batches):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(number, steps, highest)
                yield batch

        for number, step in enumerate(train_round(official, with_rates(), kept, log_probs, optimizer)):
            line = recorded_steps[first + number]
            assert line["counted"] == len(step.losses)
            assert line["loss"] == pytest.approx(float(step.losses.mean()), rel=1e-4)
            assert line["w"] == pytest.approx(float(step.weights.mean()), abs=1e-4)
            assert line["learning_rate"] == pytest.approx(learning_rate(number, steps, highest), rel=1e-6)
            if step.updated:
                updates += 1
                ours = derive.phi_state(run, updates).parameters
                for name, value in official.parameters().items():
                    assert torch.allclose(ours[name], value, atol=2e-5), name
    assert updates == len(run.plan.boundaries) == 2
    trained = load_file(next(folder_of(run, 2).glob("*.safetensors")))
    for name, value in policy.state_dict().items():
        if name in trained:
            assert float((trained[name] - value).abs().max()) < 2e-5, name


def test_what_is_not_sampled_is_dropped(run: Run) -> None:
    for line in metrics.steps(run.root):
        assert line["counted"] == line["online"] < line["pairs"]
