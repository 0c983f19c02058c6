"""What the processes of the pool run: each function is called on every rank of a layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file
from torch import Tensor

from tests.parallel.problems import LEARNING, make_pairs, meta_weighted_dpo
from toolkit.conversion.weights import stage_weights
from toolkit.training.engine import EngineSettings, PolicyEngine, StepResult
from toolkit.training.export import gather_weight
from toolkit.training.layout import ParallelLayout
from toolkit.training.microbatches import PairBatch
from toolkit.training.optimizer import OptimizerSettings


def engine(layout: ParallelLayout, model: str, steps: int = 10, **settings: Any) -> PolicyEngine:
    """An fp32 engine that learns as ``problems.LEARNING`` says."""
    settings = {"dtype": "float32", "micro_batch_pairs": 2, **settings}
    policy = PolicyEngine(layout, model, EngineSettings(optimizer=OptimizerSettings(**LEARNING), **settings))
    policy.restart_schedule(steps)
    return policy


def step(policy: PolicyEngine, reference: np.ndarray, seed: int = 0, before_update: Any = None) -> StepResult:
    """One step on the pairs of ``seed``."""
    pairs = make_pairs(seed)
    table = torch.from_numpy(reference).float()

    def loss(logprobs: Tensor, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses = meta_weighted_dpo(logprobs, table[positions], pairs, positions)
        return losses, {"loss": losses.detach(), "position": positions}

    real = sum(pair.sequences[0] is not None for pair in pairs)
    return policy.train_step(PairBatch(pairs), loss, real, before_update)


def write_gradients(policy: PolicyEngine, folder: Path) -> None:
    """Save the gradients under their Hugging Face names, one file per pipeline stage."""
    parameters = {policy._names[name]: parameter for name, parameter in policy.module.named_parameters()}
    stage, stages = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    gradients: dict[str, Tensor] = {}
    for weight in stage_weights(policy.shape, stage, stages):
        gradients |= gather_weight(weight, parameters[weight.name].main_grad, policy.shape)
    if gradients and parallel_state.get_data_parallel_rank() == 0:
        save_file({name: g.clone() for name, g in gradients.items()}, folder / f"gradients-{stage}.safetensors")


def train(layout: ParallelLayout, rank: int, model: str, folder: str, **settings: Any) -> dict[str, Any]:
    """Score, one step, score again; gradients and the exported policy go to ``folder``."""
    policy = engine(layout, model, **settings)
    reference = np.load(Path(folder).parent / "reference.npy")
    sequences = [(pair.prompt_length, s) for pair in make_pairs() for s in pair.sequences if s is not None]
    lengths, tokens = zip(*sequences, strict=True)
    scores = policy.score(tokens, lengths)
    seen: list[float] = []

    def before_update(extras: dict[str, np.ndarray]) -> None:
        seen.append(float(extras["loss"].sum()))
        if not policy.settings.distributed_optimizer:
            write_gradients(policy, Path(folder))

    result = step(policy, reference, before_update=before_update)
    policy.export(folder)
    return {
        "scores": scores.tolist(),
        "extras": {name: value.tolist() for name, value in result.extras.items()},
        "norm": result.gradient_norm,
        "learning_rate": result.learning_rate,
        "tokens": result.tokens,
        "stepped": result.stepped,
        "seen": seen,
        "after": policy.score(tokens, lengths).tolist(),
    }


def round_trip(layout: ParallelLayout, rank: int, model: str, folder: str, dtype: str) -> list[list[str]]:
    """Load and export; each rank's files."""
    files = PolicyEngine(layout, model, EngineSettings(dtype=dtype)).export(folder)
    gathered: list[list[str]] = [[]] * layout.world_size
    dist.all_gather_object(gathered, files)
    return gathered
