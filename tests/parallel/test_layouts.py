"""Every layout gives what a dense computation in float64 gives: log-probs, losses, gradients, weights after a step.

Tolerance: MULTIPLE times the error that the dense computation itself makes in float32, of the same quantity. Measured: at
most 0.7 times for log-probs, 1.0 for gradients, 1.2 for weights (and 5e-7, relative, of the gradient's norm).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.parallel import oracle
from tests.parallel.oracle import Dense
from tests.parallel.pool import Pool
from tests.parallel.problems import LEARNING, MODELS, make_model, make_pairs
from toolkit.training.layout import ParallelLayout

MULTIPLE = 4

ONE = ParallelLayout()
TP2 = ParallelLayout(tensor=2, world_size=2)
SP2 = ParallelLayout(tensor=2, world_size=2, sequence_parallel=True)
PP2 = ParallelLayout(pipeline=2, world_size=2)
DP2 = ParallelLayout(world_size=2)
TP2_PP2 = ParallelLayout(tensor=2, pipeline=2, world_size=4, sequence_parallel=True)
DP2_PP2 = ParallelLayout(pipeline=2, world_size=4)
PP4 = ParallelLayout(pipeline=4, world_size=4)
DP2_TP2 = ParallelLayout(tensor=2, world_size=4)

CASES = [
    ("llama", ONE, {}),
    ("llama", ONE, {"micro_batch_pairs": 1}),
    ("llama", TP2, {}),
    ("llama", PP2, {}),
    ("llama", DP2, {"distributed_optimizer": True}),
    ("llama", TP2_PP2, {}),
    ("llama", DP2_PP2, {"micro_batch_pairs": 1}),
    ("llama-bias", SP2, {}),
    ("qwen2", ONE, {"recompute": "full"}),
    ("qwen2", SP2, {"recompute": "selective"}),
    ("qwen2", PP2, {"micro_batch_pairs": 1}),
    ("qwen2", DP2, {}),
    ("qwen2", DP2_PP2, {"distributed_optimizer": True}),
    ("qwen2", PP4, {}),
    ("qwen3", ONE, {}),
    ("qwen3", TP2, {}),
    ("qwen3", SP2, {}),
    ("qwen3", TP2_PP2, {"recompute": "full"}),
    ("qwen3", DP2_TP2, {"distributed_optimizer": True}),
]


def identify(value: str | ParallelLayout | dict) -> str:
    if isinstance(value, ParallelLayout):
        return f"{'sp' if value.sequence_parallel else 'tp'}{value.tensor}-pp{value.pipeline}-dp{value.data}"
    return "-".join(f"{name}={v}" for name, v in value.items()) if isinstance(value, dict) else value


@dataclass(frozen=True)
class Problem:
    folder: Path
    model: Path
    exact: Dense  # float64
    single: Dense  # float32

    def error(self, quantity: str) -> float:
        """The largest error of the float32 computation."""
        return largest(getattr(self.single, quantity), getattr(self.exact, quantity))


def largest(found: Tensor | dict[str, Tensor], expected: Tensor | dict[str, Tensor]) -> float:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        return max(largest(found[name], tensor) for name, tensor in expected.items())
    return float((found.double() - expected).abs().max())


@pytest.fixture(scope="session")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Problem]:
    def make(name: str) -> Problem:
        folder = tmp_path_factory.mktemp(name)
        model = make_model(name, folder / "model")
        config, weights = oracle.load(model, torch.float64)
        noise = np.random.default_rng(1).normal(0.0, 3.0, (8, 4))
        reference = oracle.pair_logprobs(config, weights, make_pairs()).numpy() + noise
        np.save(folder / "reference.npy", reference)
        results = (oracle.step(model, make_pairs(), reference, dtype) for dtype in (torch.float64, torch.float32))
        return Problem(folder, model, *results)

    return {name: make(name) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_the_dense_computation_is_that_of_transformers(problems: dict[str, Problem], name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(problems[name].model, attn_implementation="eager")
    config, weights = oracle.load(problems[name].model, torch.float32)
    tokens = torch.arange(100) % 131
    with torch.no_grad():
        torch.testing.assert_close(
            oracle.logits(config, weights, tokens), model(tokens[None]).logits[0], atol=2e-5, rtol=1e-5
        )


@pytest.mark.parametrize(("name", "layout", "settings"), CASES, ids=identify)
def test_a_step_equals_the_dense_one(
    problems: dict[str, Problem], pool: Pool, tmp_path: Path, name: str, layout: ParallelLayout, settings: dict
) -> None:
    problem = problems[name]
    folder = problem.folder / tmp_path.name
    folder.mkdir()
    ranks = pool.run("tests.parallel.cases:train", layout, model=problem.model, folder=folder, **settings)
    result = ranks[0]
    assert all(rank == result for rank in ranks), "every rank gets the same result"

    exact = problem.exact
    logprobs = torch.tensor(result["extras"]["logprobs"])
    assert largest(logprobs, exact.logprobs) <= MULTIPLE * problem.error("logprobs")
    assert largest(torch.tensor(result["extras"]["loss"]), exact.losses) <= MULTIPLE * problem.error("losses")
    assert result["extras"]["position"] == list(range(8))
    assert result["seen"] == [pytest.approx(float(exact.losses.sum()), rel=1e-5)]
    present = torch.tensor([[s is not None for s in pair.sequences] for pair in make_pairs()])
    assert not logprobs[~present].any()
    torch.testing.assert_close(torch.tensor(result["scores"]), logprobs[present], atol=1e-4, rtol=0)

    assert result["norm"] == pytest.approx(exact.norm, rel=2e-6)
    assert result["norm"] > LEARNING["clip_gradient"], "the problem must exercise clipping"
    assert (result["stepped"], result["learning_rate"]) == (True, LEARNING["learning_rate"])
    assert result["tokens"] == sum(len(s) for pair in make_pairs() for s in pair.sequences if s is not None)
    gradients = {n: t for file in folder.glob("gradients-*") for n, t in load_file(file).items()}
    if settings.get("distributed_optimizer"):
        assert not gradients
    else:
        assert largest(gradients, exact.gradients) <= MULTIPLE * problem.error("gradients")
    for file in folder.glob("gradients-*"):
        file.unlink()
    config, weights = oracle.load(folder, torch.float64)
    assert largest(weights, exact.weights) <= MULTIPLE * problem.error("weights")
    after = oracle.pair_logprobs(config, weights, make_pairs())[present]
    torch.testing.assert_close(torch.tensor(result["after"]).double(), after, atol=1e-4, rtol=0)
