"""Megatron distributed checkpoints (format ``torch_dist``) of weights, optimizer and schedule, for any layout.

Own content, Megatron's mechanism: for each parameter its weight, Adam's moments and (in bf16) the fp32 master copy, all
of the whole parameter's shape. So a checkpoint can be read with other tensor, pipeline and data sizes, and with or
without the distributed optimizer; ``DistributedOptimizer.sharded_state_dict`` of megatron-core 0.16.1 could not
(it fails with torch's Adam, or quietly shares one step counter among all parameters).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, save_state_dict
from torch.distributed.checkpoint.api import CheckpointException

from toolkit.errors import UserError
from toolkit.training.collective import raise_together
from toolkit.training.optimizer import MOMENTS, PolicyOptimizer
from toolkit.training.storage import write_failure

FORMAT = 1


def save(
    directory: Path,
    model: GPTModel,
    optimizer: PolicyOptimizer,
    common: Mapping[str, Any],
    extra: Mapping[str, Tensor] | None,
) -> list[str]:
    """Write a checkpoint into an existing empty directory; returns the files that this rank wrote, without path.

    A collective call. ``common`` holds plain values that are the same on all ranks; ``extra`` tensors for each of this
    rank's parameters, by name, kept beside the weights.

    Raises:
        UserError: on every rank, if the directory isn't empty or the disk is full.
        RuntimeError: on every rank, if writing fails otherwise.
    """
    first = dist.get_rank() == 0
    if first and (not directory.is_dir() or any(directory.iterdir())):
        raise_together(UserError(f"cannot save a checkpoint in {directory}: expected an existing empty directory"))
    raise_together(None)
    content = _content(model, optimizer, extra)
    for name, parameter in model.named_parameters():
        for kind, whole in _whole_state(optimizer, parameter).items():
            if kind in content:
                content[kind][name] = _like(content["model"][name], kind, whole)
    content["common"] = {
        **common,
        "format": FORMAT,
        "dtype": _name(model.config.params_dtype),
        "steps": optimizer.steps,
        "extra_dtype": _name(next(iter(extra.values())).dtype) if extra else "",
    }
    # The steps of dist_checkpointing.save, but all ranks agree after each, and the data are written in this process:
    # Megatron's own way forks writers and spawns a manager even for a synchronous save, and waits for ever if one dies.
    tensors, rest = save_preprocess(content)
    _attempt(directory, lambda: TorchCommonSaveStrategy("torch", 1).save_common(rest, directory))
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
    writer = FileSystemWriter(directory, single_file_per_rank=True, sync_files=True, thread_count=1)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    _attempt(directory, lambda: save_state_dict(mcore_to_pyt_state_dict(flat, False), writer, planner=planner))
    _attempt(directory, lambda: first and save_config(CheckpointingConfig("torch_dist", 1), str(directory)))
    mine = (f"__{dist.get_rank()}_", *(("common.pt", "metadata.json", ".metadata") if first else ()))
    return sorted(path.name for path in directory.iterdir() if path.name.startswith(mine))


def _attempt(directory: Path, action: Callable[[], object]) -> None:
    """Write something on all ranks, or raise on all."""
    problem = None
    try:
        action()
    except (OSError, RuntimeError, CheckpointException) as error:
        problem = write_failure("the checkpoint", directory, _cause(error))
    raise_together(problem)


def restore(
    directory: Path, model: GPTModel, optimizer: PolicyOptimizer
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """Set weights and optimizer from a checkpoint; returns (common values, extra tensors or None).

    A collective call. The layout may differ from the one that saved.

    Raises:
        UserError: on every rank, if the checkpoint is of another dtype or of a newer format.
        RuntimeError: on every rank, if it can't be read into this model.
    """
    problem, common, extra = None, {}, None
    try:
        common = dist_checkpointing.load_common_state_dict(str(directory))["common"]
        if common["format"] > FORMAT:
            problem = UserError(
                f"checkpoint {directory} has format {common['format']}, newer than {FORMAT}; update the toolkit"
            )
        elif common["dtype"] != _name(model.config.params_dtype):
            problem = UserError(
                f"checkpoint {directory} was trained in {common['dtype']}; expected {_name(model.config.params_dtype)}"
            )
    except (OSError, CheckpointingException, KeyError, RuntimeError) as error:
        problem = RuntimeError(f"{directory} holds no readable checkpoint: {error}")
    raise_together(problem)
    parameters = dict(model.named_parameters())
    if common["extra_dtype"]:
        dtype = getattr(torch, common["extra_dtype"])
        extra = {name: torch.zeros_like(parameter, dtype=dtype, device="cpu") for name, parameter in parameters.items()}
    content = _content(model, optimizer, extra)
    kinds = sorted(content.keys() - {"model", "extra"})
    loaded = _load(directory, {kind: content[kind] for kind in content.keys() - set(kinds)})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(loaded["model"][name])
        for kind in kinds:  # one after the other, and on the CPU: all at once may not fit
            whole = {
                name: _like(content["model"][name], kind, torch.zeros(parameter.shape, dtype=torch.float32))
                for name, parameter in parameters.items()
            }
            whole = _load(directory, {kind: whole})[kind]
            for name, parameter in parameters.items():
                part, state = optimizer.state(parameter)
                if state:
                    state[kind].copy_(whole[name].flatten()[part])
            del whole
    optimizer.steps = common["steps"]
    return common, loaded["extra"] if extra else None


def _load(directory: Path, content: dict[str, Any]) -> dict[str, Any]:
    """What ``content`` describes from a checkpoint, on all ranks, or RuntimeError on all."""
    problem, loaded = None, {}
    try:
        loaded = dist_checkpointing.load(content, str(directory))
    except (OSError, CheckpointException, CheckpointingException, KeyError, RuntimeError) as error:
        problem = RuntimeError(f"could not read the checkpoint {directory} into this model: {_cause(error)}")
    raise_together(problem)
    return loaded


def _content(
    model: GPTModel, optimizer: PolicyOptimizer, extra: Mapping[str, Tensor] | None
) -> dict[str, dict[str, Any]]:
    """The sharded state dict, with the weights and the extra tensors filled in. In fp32 the weights are the master copy."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sharded = model.sharded_state_dict(metadata={"dp_cp_group": group})
    content: dict[str, dict[str, Any]] = {"model": {name: sharded[name] for name, _ in model.named_parameters()}}
    content.update({kind: {} for kind in MOMENTS})
    if model.config.params_dtype != torch.float32:
        content["main"] = {}
    if extra is not None:
        content["extra"] = {name: _like(content["model"][name], "extra", tensor) for name, tensor in extra.items()}
    return content


def _like(weight: Any, kind: str, tensor: Tensor) -> Any:
    """``tensor`` sharded as ``weight`` is, under a key of its own."""
    changes = {"key": f"{kind}.{weight.key}", "data": tensor}
    if not isinstance(weight, ShardedTensorFactory):
        changes["dtype"] = tensor.dtype
    return replace(weight, **changes)


def _whole_state(optimizer: PolicyOptimizer, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    """The parameter's optimizer state in its own shape.

    With the distributed optimizer it is put together from the slices, on the CPU of the first copy of the model, which
    writes it; the other copies have the shapes only.
    """
    part, state = optimizer.state(parameter)
    if not optimizer.distributed:
        return {kind: tensor.view(parameter.shape) for kind, tensor in state.items()}
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    whole = {}
    for kind in ("main", *MOMENTS):
        flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if state:
            flat[part] = state[kind]
        # Each element comes from one copy only: the sum is exact.
        dist.reduce(flat, dst=dist.get_global_rank(group, 0), group=group)
        whole[kind] = flat.view(parameter.shape).to("cpu" if group.rank() == 0 else "meta")
    return whole


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cause(error: BaseException) -> BaseException:
    """The first failure: torch wraps those of all ranks into one exception."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
