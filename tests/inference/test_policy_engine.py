"""The real engine, compared with transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.inference.conftest import CONTEXT, EOS, VOCABULARY, Model
from tests.inference.engine_process import listening
from toolkit.errors import UserError
from toolkit.inference.engine import PolicyEngine, Probe, Rejected, is_nodes_fault, tolerance
from toolkit.inference.settings import SamplingSettings

FREE = SamplingSettings(samples=2, max_new_tokens=24)
# Each longer than a block of the prefix cache (128 tokens), and together more than the engine computes in one step (4096).
PROMPTS = [[10 + i] * 140 + [50 - i, 7] for i in range(40)]


def seeds(prompts: list[list[int]], samples: int = 2) -> list[list[int]]:
    return [[1000 * i + k for k in range(samples)] for i in range(len(prompts))]


def assert_is(engine: PolicyEngine, model: Model) -> None:
    """The engine samples from this model, by long prompts that an engine with another policy may have cached."""
    answers = engine.sample(PROMPTS[:4], seeds(PROMPTS[:4]), FREE, [])
    for prompt, responses in zip(PROMPTS, answers, strict=False):
        for response in responses:
            assert response.logprob == pytest.approx(model.logprob(prompt, response.token_ids), abs=1e-4)


def test_logprobs_are_those_of_transformers(policy: PolicyEngine, first: Model) -> None:
    sequences = [[5, 6, 7, 8, 9], PROMPTS[0], list(range(VOCABULARY))]
    found = policy._logprobs(sequences, [2, 100, 1])
    expected = [first.logprob(ids[:n], ids[n:]) for ids, n in zip(sequences, [2, 100, 1], strict=True)]
    assert found == pytest.approx(expected, abs=1e-4)


def test_behaviour_logprob_is_the_policys_own_before_temperature_and_top_p(policy: PolicyEngine, first: Model) -> None:
    settings = SamplingSettings(samples=4, temperature=0.7, top_p=0.8, max_new_tokens=16)
    [responses] = policy.sample([[3, 4, 5]], [[1, 2, 3, 4]], settings, [])
    for response in responses:
        assert response.logprob == pytest.approx(first.logprob([3, 4, 5], response.token_ids), abs=1e-4)


def test_a_response_depends_on_prompt_and_seed_alone(policy: PolicyEngine) -> None:
    together = policy.sample(PROMPTS, seeds(PROMPTS), FREE, [2])
    again = policy.sample(PROMPTS, seeds(PROMPTS), FREE, [2])
    backwards = policy.sample(PROMPTS[::-1], seeds(PROMPTS)[::-1], FREE, [2])[::-1]
    alone = [policy.sample([p], [s], FREE, [2])[0] for p, s in zip(PROMPTS[:3], seeds(PROMPTS), strict=False)]
    assert together == again == backwards
    assert together[:3] == alone
    assert len({tuple(response.token_ids) for responses in together for response in responses}) == 2 * len(PROMPTS)


def test_temperature_zero_takes_the_likeliest_token(policy: PolicyEngine, first: Model) -> None:
    [[response]] = policy.sample([[3, 4, 5]], [[1]], SamplingSettings(1, temperature=0.0, max_new_tokens=1), [])
    with torch.no_grad():
        assert response.token_ids == [first.model(torch.tensor([[3, 4, 5]])).logits[0, -1].argmax().item()]


def test_prompts_are_rejected_one_by_one(policy: PolicyEngine) -> None:
    prompts = [[], [3, 4], [5] * CONTEXT, [3, VOCABULARY], [-1, 3], [5] * (CONTEXT - 1)]
    answers = policy.sample(prompts, seeds(prompts), FREE, [])
    reasons = [answer.reason if isinstance(answer, Rejected) else "" for answer in answers]
    assert [bool(reason) for reason in reasons] == [True, False, True, True, True, False]
    assert "no tokens" in reasons[0]
    assert f"{CONTEXT} tokens" in reasons[2]
    assert f"token id {VOCABULARY} " in reasons[3]
    assert policy.sample([[3, 4]], [seeds(prompts)[1]], FREE, []) == [answers[1]]


def test_only_the_stop_set_ends_a_response(policy: PolicyEngine) -> None:
    settings = SamplingSettings(samples=8, max_new_tokens=200)
    [free] = policy.sample([[3, 4, 5]], [list(range(8))], settings, [])
    assert any(EOS in response.token_ids[:-1] for response in free)
    assert {(response.finish_reason, len(response.token_ids)) for response in free} == {("length", 200)}
    [stopped] = policy.sample([[3, 4, 5]], [list(range(8))], settings, list(range(40, 60)))
    for response, without in zip(stopped, free, strict=True):
        length = next(i for i, token in enumerate(without.token_ids) if 40 <= token < 60) + 1
        assert (response.finish_reason, response.token_ids) == ("stop", without.token_ids[:length])


def test_the_end_of_the_context_cuts_as_the_length_limit_does(policy: PolicyEngine) -> None:
    [[response]] = policy.sample([[5] * (CONTEXT - 3)], [[1]], FREE, [])
    assert (response.finish_reason, len(response.token_ids)) == ("length", 3)


def test_nothing_to_sample(policy: PolicyEngine) -> None:
    assert policy.sample([], [], FREE, []) == []


def test_a_reload_replaces_weights_and_cached_prefixes(policy: PolicyEngine, first: Model, second: Model) -> None:
    assert_is(policy, first)
    policy.load(second.folder, second.probes)
    assert_is(policy, second)
    policy.load(first.folder, first.probes)
    assert_is(policy, first)


def test_probes_tell_another_version(policy: PolicyEngine, first: Model, second: Model) -> None:
    with pytest.raises(RuntimeError, match=r"second.*Probe 0: expected a sum of -\d.*, got -\d"):
        policy.load(second.folder, first.probes)
    with pytest.raises(RuntimeError, match="no policy is loaded"):
        policy.sample([[3, 4]], [[1]], FREE, [])
    policy.load(second.folder, second.probes)
    assert_is(policy, second)


def test_a_policy_needs_a_probe_that_fits(policy: PolicyEngine, first: Model) -> None:
    too_long = Probe([5] * 200, [6] * 56, 0.0, "float32")
    with pytest.raises(UserError, match="none of its 1 probe"):
        policy.load(first.folder, [too_long])
    with pytest.raises(UserError, match="none of its 0 probe"):
        policy.load(first.folder, [])
    policy.load(first.folder, [too_long, *first.probes])


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
FAULTS = {
    "no file": (lambda folder: (folder / "model.safetensors").unlink(), UserError, "cannot read the weights"),
    "truncated": (truncate, UserError, "cannot read the weights"),
    "missing tensor": (edit(lambda tensors: tensors.pop(DOWN)), UserError, f"1 missing: {DOWN}"),
    "unknown tensor": (edit(lambda tensors: tensors.update(x=torch.zeros(1))), UserError, "1 unknown: x"),
    "other shape": (
        edit(lambda tensors: tensors.update({NORM: torch.ones(32)})),
        UserError,
        "model.norm.weight .32,., expected .64,.",
    ),
    "one damaged value": (edit(lambda tensors: tensors[DOWN][3].mul_(1.5)), RuntimeError, "Probe 0: expected"),
    "not finite": (edit(lambda tensors: tensors[NORM].fill_(float("nan"))), RuntimeError, "got nan"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_weights_are_refused_and_good_ones_load_afterwards(
    policy: PolicyEngine, second: Model, tmp_path: Path, fault: str
) -> None:
    damage, error, message = FAULTS[fault]
    shutil.copytree(second.folder, tmp_path / "policy")
    damage(tmp_path / "policy")
    with pytest.raises(error, match=message):
        policy.load(tmp_path / "policy", second.probes)
    policy.load(second.folder, second.probes)
    assert_is(policy, second)


def test_weights_that_vllm_cannot_load_leave_the_engine_usable(
    policy: PolicyEngine, second: Model, tmp_path: Path
) -> None:
    shutil.copytree(second.folder, tmp_path / "policy")
    (tmp_path / "policy" / "extra.safetensors").write_bytes(b"junk")  # beside the good file: only vLLM looks at it
    with pytest.raises(UserError, match="vLLM cannot load the weights"):
        policy.load(tmp_path / "policy", second.probes)
    policy.load(second.folder, second.probes)
    assert_is(policy, second)


def test_the_engines_listen_to_this_machine_only(pool: ProcessPoolExecutor, policy: PolicyEngine) -> None:
    assert set(pool.submit(listening).result()) <= {"127.0.0.1", "::1"}


# ---------------------------------------------------------------------------------------------- how far apart is the same


@pytest.mark.parametrize(
    ("dtypes", "tokens", "on_cpu", "noise"),
    [
        (
            {"float32"},
            64,
            True,
            5e-6 * 64**0.5,
        ),  # measured against transformers, the worst of 120 responses of 4 to 400 tokens
        ({"float32", "bfloat16"}, 3, True, 0.004),  # measured: an fp32 engine with the policy of a bf16 trainer
        ({"bfloat16"}, 2, True, 0.5),  # bf16 logits of 16 to 32 are 0.125 apart
        ({"bfloat16"}, 200, False, 0.0135 * 200**0.5),
        ({"float32"}, 64, False, 1e-3 * 64**0.5),  # TF32: attention rounds to 10 bits
    ],
)
def test_the_tolerance_leaves_room_for_rounding(dtypes: set[str], tokens: int, on_cpu: bool, noise: float) -> None:
    assert noise < tolerance(dtypes, tokens, on_cpu)


def test_the_tolerance_is_no_wider_than_precision_and_length_ask() -> None:
    assert tolerance({"float32"}, 10, True) < 1e-4
    assert tolerance({"float32"}, 100, True) <= 3.01e-4
    assert tolerance({"float32"}, 100, False) < 0.1
    assert tolerance({"bfloat16"}, 200, False) < 2.0  # a stale policy is off by more over a response of median length
    assert tolerance({"bfloat16"}, 400, True) < 2 * tolerance({"bfloat16"}, 100, True)


def test_the_probes_of_a_bf16_trainer_prove_an_fp32_engine_and_tell_another_policy(
    policy: PolicyEngine, first: Model, second: Model
) -> None:
    first_probes, second_probes = ([replace(p, dtype="bfloat16") for p in model.probes] for model in (first, second))
    policy.load(first.folder, [replace(p, logprob=p.logprob + 0.1) for p in first_probes])
    with pytest.raises(RuntimeError, match="did not take the weights"):
        policy.load(first.folder, second_probes)


# ---------------------------------------------------------------------------------------------- whose fault a failure is


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("Free memory on device cuda:0 (3.1/79.1 GiB) on startup is less than desired"), True),
        (OSError(5, "Input/output error"), True),
        (ValueError("To serve at least one request, more KV cache is needed"), False),
        (OSError("Can't load tokenizer for 'x'"), False),
    ],
)
def test_a_start_that_another_node_could_make_is_not_refused(error: Exception, expected: bool) -> None:
    assert is_nodes_fault(error) is expected


def test_a_disk_that_fails_during_a_reload_is_not_the_policys_fault(
    policy: PolicyEngine, second: Model, tmp_path: Path
) -> None:
    shutil.copytree(second.folder, tmp_path / "policy")
    (
        tmp_path / "policy" / "extra.safetensors"
    ).mkdir()  # cannot be read; beside the good file, so only vLLM looks at it
    with pytest.raises(OSError, match="os error"):
        policy.load(tmp_path / "policy", second.probes)
    policy.load(second.folder, second.probes)
