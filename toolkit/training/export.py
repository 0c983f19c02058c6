"""A trained policy as a Hugging Face model folder, written by all pipeline stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from toolkit.conversion.shape import ModelShape
from toolkit.conversion.weights import Weight, from_shards, stage_weights
from toolkit.conversion.writing import plan_files, write_companions, write_index
from toolkit.errors import UserError
from toolkit.training.collective import raise_together
from toolkit.training.storage import write_failure

FILE_BYTES = 2 * 2**30


def export(
    directory: Path, weights: Mapping[str, Tensor], shape: ModelShape, model_folder: Path, file_bytes: int = FILE_BYTES
) -> list[str]:
    """Write the model into an existing empty directory; returns the files that this rank wrote, without path.

    A collective call. Of each pipeline stage the first rank writes, one parameter gathered at a time, so that it holds
    one file (``file_bytes``, or a single larger tensor) in memory. Rank 0 writes the index, ``config.json`` and copies
    of the tokenizer's files.

    Args:
        weights: this rank's shards by their name in the whole model (``weights.global_name``).
        model_folder: where config, tokenizer and template come from.

    Raises:
        UserError: on every rank, if a weight isn't finite (it is named, and nothing is written) or the disk is full.
        RuntimeError: on every rank, if writing fails otherwise.
    """
    broken = next((name for name, weight in weights.items() if not torch.isfinite(weight).all()), None)
    raise_together(
        UserError(f"cannot export the policy: {broken} has weights that are not finite (nan or inf)")
        if broken
        else None
    )
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    dtype = next(iter(weights.values())).dtype
    plan = plan_files([stage_weights(shape, stage, stages) for stage in range(stages)], dtype.itemsize, file_bytes)
    files = plan[parallel_state.get_pipeline_model_parallel_rank()]
    written: list[str] = []
    problem: Exception | None = None
    if parallel_state.get_data_parallel_rank() == 0:
        for file, members in files.items():
            tensors = {
                source: tensor
                for weight in members
                for source, tensor in gather_weight(weight, weights[weight.name], shape).items()
            }
            if tensors and problem is None:  # after a failure go on gathering: the other ranks wait for it
                try:
                    save_file(tensors, directory / file, metadata={"format": "pt"})
                except (OSError, SafetensorError) as error:
                    problem = write_failure("the policy", directory, error)
                written.append(file)
    if dist.get_rank() == 0 and problem is None:
        try:
            written.append(write_index(directory, plan, dtype.itemsize))
            written += write_companions(model_folder, directory, str(dtype).removeprefix("torch."))
        except OSError as error:
            problem = write_failure("the policy", directory, error)
    raise_together(problem)
    return written


def gather_weight(weight: Weight, shard: Tensor, shape: ModelShape) -> dict[str, Tensor]:
    """The Hugging Face tensors of one parameter, on the CPU of the first tensor-parallel rank; elsewhere none.

    A collective call of the tensor-parallel group.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    shards = [shard.detach()]
    if group.size() > 1 and weight.kind != "replicated":
        shards = [torch.empty_like(shard) for _ in range(group.size())] if group.rank() == 0 else []
        dist.gather(shard.detach(), shards or None, dst=dist.get_global_rank(group, 0), group=group)
    if group.rank() > 0:
        return {}
    tensors = from_shards(weight, shards, shape)
    return {source: tensor.cpu().contiguous() for source, tensor in zip(weight.sources, tensors, strict=True)}
