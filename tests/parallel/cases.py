"""What the processes of the pool run: each function is called on every rank of a layout."""

from __future__ import annotations

import ctypes
import errno
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file
from torch import Tensor

from tests.parallel.problems import LEARNING, make_pairs, meta_weighted_dpo
from toolkit.conversion.registry import read_shape
from toolkit.conversion.weights import stage_weights
from toolkit.errors import UserError
from toolkit.exchange.run import Run
from toolkit.signals import StopFlag
from toolkit.training import checkpoint, device, export
from toolkit.training.control import Control
from toolkit.training.engine import EngineSettings, PolicyEngine, StepResult
from toolkit.training.export import gather_weight
from toolkit.training.layout import ParallelLayout
from toolkit.training.microbatches import MASKED, PairBatch
from toolkit.training.model import build_model, transformer_config
from toolkit.training.optimizer import OptimizerSettings
from toolkit.training.trainer import Trainer


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


NO_REFERENCE = np.zeros((8, 4))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def make(folder: Path, rank: int) -> Path:
    """A new empty directory, made by the first rank."""
    if rank == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    return folder


def save_and_continue(layout: ParallelLayout, rank: int, model: str, folder: str, **settings: Any) -> dict[str, Any]:
    """Two steps, a checkpoint, two more; then the last two again from the checkpoint, in an engine of its own."""
    policy = engine(layout, model, **settings)
    extra = {name: weight.float() * 0.5 for name, weight in policy.weights().items()}
    for seed in (0, 1):
        step(policy, NO_REFERENCE, seed)
    saved = policy.weights()
    files = policy.save(make(Path(folder) / "checkpoint", rank), extra)
    policy.export(make(Path(folder) / "saved", rank))
    norms = [step(policy, NO_REFERENCE, seed).gradient_norm for seed in (2, 3)]
    last = policy.weights()
    policy.export(make(Path(folder) / "last", rank))

    resumed = engine(layout, model, steps=99, **settings)
    restored = resumed.restore(Path(folder) / "checkpoint")
    return {
        "files": files,
        "weights": same(saved, resumed.weights()),
        "extra": restored is not None and same(extra, restored),
        "norms": norms == [step(resumed, NO_REFERENCE, seed).gradient_norm for seed in (2, 3)],
        "last": same(last, resumed.weights()),
    }


def continue_from(layout: ParallelLayout, rank: int, model: str, checkpoint: str, folder: str, **settings: Any) -> None:
    """Restore a checkpoint of another layout, export; two steps, export."""
    policy = engine(layout, model, steps=99, **settings)
    policy.restore(checkpoint)
    policy.export(make(Path(folder) / "restored", rank))
    for seed in (2, 3):
        step(policy, NO_REFERENCE, seed)
    policy.export(make(Path(folder) / "last", rank))


def unstepped(layout: ParallelLayout, rank: int, model: str, folder: str, **settings: Any) -> dict[str, Any]:
    """A checkpoint before the first step: as if it had never been."""
    policy = engine(layout, model, **settings)
    policy.save(make(Path(folder), rank))
    first = step(policy, NO_REFERENCE)
    weights = policy.weights()
    extra = policy.restore(folder)
    again = step(policy, NO_REFERENCE)
    return {
        "extra": extra,
        "norms": first.gradient_norm == again.gradient_norm,
        "weights": same(weights, policy.weights()),
    }


def message(action: Any) -> str:
    """The message of the UserError that ``action`` raises."""
    try:
        action()
    except (UserError, ConnectionError) as error:
        return str(error)
    return "no error"


def failure(action: Any) -> str:
    """The message of the RuntimeError that ``action`` raises: another attempt may do better."""
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return "no error"


def checkpoint_errors(layout: ParallelLayout, rank: int, model: str, other: str, folder: str) -> dict[str, str]:
    """What is said about directories that can't be saved to or restored from."""
    policy = engine(layout, model)
    saved = make(Path(folder) / "saved", rank)
    policy.save(saved)
    damaged = make(Path(folder) / "damaged", rank)
    policy.save(damaged)
    if rank == 0:
        (damaged / "__0_0.distcp").unlink()
    dist.barrier()
    return {
        "full": message(lambda: policy.save(saved)),
        "absent": failure(lambda: policy.restore(Path(folder) / "absent")),
        "damaged": failure(lambda: policy.restore(damaged)),
        "other": failure(lambda: engine(layout, other).restore(saved)),
        "dtype": message(lambda: engine(layout, model, dtype="bfloat16").restore(saved)),
    }


def full_disk(layout: ParallelLayout, rank: int, model: str, folder: str) -> list[list[str]]:
    """What is said when files can't grow beyond some sizes, as when the disk is full: on all ranks, or on the last."""
    policy = engine(layout, model)
    said = []
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number, (size, everywhere) in enumerate([(100, True), (10_000, True), (10_000, False)]):
        checkpoint, exported = (make(Path(folder) / f"{kind}-{number}", rank) for kind in ("checkpoint", "export"))
        if everywhere or rank == layout.world_size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        said.append([message(lambda: policy.save(checkpoint)), message(lambda: policy.export(exported))])  # noqa: B023
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return said


def hiccup(layout: ParallelLayout, rank: int, model: str, folder: str) -> list[str]:
    """What is said when the last rank's storage fails once, and the disk is not full."""

    def stale(*_: Any, **__: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    policy = engine(layout, model)
    saved, exported = (make(Path(folder) / name, rank) for name in ("checkpoint", "policy"))
    with pytest.MonkeyPatch.context() as patch:
        if rank == layout.world_size - 1:
            patch.setattr(export, "save_file", stale)
            patch.setattr(checkpoint.FileSystemWriter, "write_data", stale)
        return [failure(lambda: policy.save(saved)), failure(lambda: policy.export(exported))]


def restoring_memory(layout: ParallelLayout, rank: int, model: str, folder: str) -> float:
    """Bytes of memory that restoring takes at most beside what was there before, for each of this rank's parameters."""
    policy = engine(layout, model, dtype="bfloat16", distributed_optimizer=True)
    policy.save(make(Path(folder) / "checkpoint", rank))
    status = Path("/proc/self/status")

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kilobytes("VmRSS")
    policy.restore(Path(folder) / "checkpoint")
    return (kilobytes("VmHWM") - before) * 1024 / sum(parameter.numel() for parameter in policy.module.parameters())


def devices(layout: ParallelLayout, rank: int, model: str) -> list[str]:
    """The devices of a model's parameters where the GPU is another device than the CPU: here one without memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_CPU", torch.device("meta"))
        shape = read_shape(Path(model))
        module = build_model(transformer_config(shape, layout, torch.bfloat16, "none"), shape, layout)
    return sorted({parameter.device.type for parameter in module.parameters()})


def train_run(layout: ParallelLayout, rank: int, root: str, attempt: str) -> str:
    """Train a run to its end; how it ended."""
    run = Run.open(Path(root), attempt)
    policy = PolicyEngine(layout, run.config.model.policy, EngineSettings(dtype="float32"))
    return Trainer(run, policy, Control(StopFlag()), None).train()


def lonely(layout: ParallelLayout, rank: int, store: str) -> str:
    """What is said when other ranks never come."""
    device.shutdown()
    return message(lambda: device.initialize(ParallelLayout(world_size=2), rank=0, meeting=store, timeout_seconds=1))


def behaviour(layout: ParallelLayout, rank: int, model: str, other: str, folder: str) -> dict[str, Any]:
    """The engine's promises beside the numbers."""
    policy = engine(layout, model, steps=4)
    own = policy.weights()
    pairs = make_pairs()
    sequences = [s for pair in pairs for s in pair.sequences if s is not None]
    lengths = [pair.prompt_length for pair in pairs for s in pair.sequences if s is not None]
    seen: dict[str, Any] = {}

    scores = policy.score(sequences, lengths)
    loaded = policy.load_weights(other)
    seen["load_weights leaves the model"] = same(own, policy.weights())
    with policy.swapped(loaded):
        swapped_scores = policy.score(sequences, lengths)
        seen["no step while swapped"] = False
        try:
            step(policy, NO_REFERENCE)
        except RuntimeError:
            seen["no step while swapped"] = True
    seen["swapped scores differ"] = bool((swapped_scores != scores).all())
    seen["swapped back"] = same(own, policy.weights()) and bool((policy.score(sequences, lengths) == scores).all())
    try:
        with policy.swapped(loaded):
            raise KeyError
    except KeyError:
        seen["swapped back after an exception"] = same(own, policy.weights())
    policy.load(other)
    seen["load"] = same(policy.weights(), loaded) and bool((policy.score(sequences, lengths) == swapped_scores).all())
    policy.load(model)

    seen["one"] = abs(float(policy.score(sequences[:1], lengths[:1])[0] - scores[0])) < 1e-4
    seen["none"] = policy.score([], []).shape == (0,)
    seen["float32"] = str(scores.dtype)

    def refuse(extras: dict[str, np.ndarray]) -> None:
        raise UserError("not now")

    seen["before_update"] = message(lambda: step(policy, NO_REFERENCE, before_update=refuse))
    seen["weights after it"] = same(own, policy.weights())
    empty = policy.train_step(PairBatch(pairs), lambda *_: None, 0)
    seen["empty"] = [empty.extras, empty.gradient_norm, empty.tokens, empty.stepped, same(own, policy.weights())]
    rates = [step(policy, NO_REFERENCE).learning_rate for _ in range(2)]
    moved = policy.weights()
    policy.load(model)
    policy.reset_optimizer()
    policy.restart_schedule(4)
    seen["rates"] = [empty.learning_rate, *rates, step(policy, NO_REFERENCE).learning_rate]
    step(policy, NO_REFERENCE)
    seen["reset is as new"] = same(moved, policy.weights())

    broken = PairBatch([MASKED] * 7 + [replace(pairs[0], sequences=(np.full(300, 1, np.int32), None, None, None))])
    seen["too long"] = message(lambda: policy.train_step(broken, lambda *_: None, 1))
    seen["other tokenizer"] = message(lambda: policy.score([np.array([1, 131], np.int32)], [1]))
    seen["no response"] = message(lambda: policy.score([np.array([1, 2], np.int32)], [2]))
    seen["batch"] = message(lambda: policy.train_step(PairBatch(pairs[:7]), lambda *_: None, 7))

    def infinite(logprobs: Tensor, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return logprobs[:, 0] * torch.inf, {}

    seen["infinite gradient"] = message(lambda: policy.train_step(PairBatch(pairs), infinite, 7))
    seen["weights after infinity"] = same(moved, policy.weights())
    spoilt = policy.weights()
    if rank == layout.world_size - 1:
        spoilt["decoder.final_layernorm.weight"][3] = torch.nan
    with policy.swapped(spoilt):
        seen["not finite"] = message(lambda: policy.export(folder))
    seen["not a model"] = message(lambda: policy.load_weights(folder))
    return seen
