"""Weights of a Hugging Face model folder, read tensor by tensor: never more than a parameter at a time in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from toolkit.conversion.shape import ModelShape
from toolkit.conversion.weights import to_shard, weight_map
from toolkit.errors import UserError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_MANY = 5  # names listed in an error


def read_shards(
    folder: Path, shape: ModelShape, names: Iterable[str], tensor_rank: int, tensor_size: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, shard) of the Megatron parameters ``names`` as tensor-parallel rank ``tensor_rank`` holds them.

    Shards are on the CPU, in the folder's dtype. The whole folder is checked against ``shape`` before the first one.

    Raises:
        UserError: no safetensors files, a damaged or missing one, missing, unexpected or misshapen tensors (named).
    """
    weights = weight_map(shape)
    expected = {
        source: sizes
        for weight in weights.values()
        for source, sizes in zip(weight.sources, weight.shapes, strict=True)
    }
    with ExitStack() as stack:
        tensors = _open(folder, stack)
        _check(folder, tensors, expected, shape.tied)
        for name in names:
            weight = weights[name]
            yield (
                name,
                to_shard(weight, [tensors[source] for source in weight.sources], shape, tensor_rank, tensor_size),
            )


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Lazy slices of all tensors in the folder, by name; the files stay open for as long as ``stack``."""
    tensors = {}
    for file in _files(folder):
        try:
            handle = stack.enter_context(safe_open(file, framework="pt"))
            tensors.update((name, handle.get_slice(name)) for name in handle.keys())  # noqa: SIM118 (not a dict)
        except FileNotFoundError:
            raise UserError(f"incomplete model folder: {file} is missing; copy or download it again") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged ({error}); copy or download it again") from None
    return tensors


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, from its index or the single one."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index} has no valid weight_map; copy or download the model again") from None
        if any(Path(name).name != name for name in names):
            raise UserError(f"{index} names files outside the model folder; download the model from a trusted source")
        return [folder / name for name in names]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if any(folder.glob("*.bin")):
        raise UserError(
            f"{folder} holds weights in PyTorch's .bin format only, which can run code when it is opened; "
            "convert them to safetensors (load with transformers, then save_pretrained)"
        )
    raise UserError(
        f"incomplete model folder {folder}: expected {SINGLE_FILE} or {INDEX_FILE}; download the model again"
    )


def _check(folder: Path, tensors: dict[str, Any], expected: dict[str, tuple[int, ...]], tied: bool) -> None:
    """Raise UserError unless the folder holds exactly the expected tensors, in their shapes and as floats."""
    harmless = {name for name in tensors if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")}
    if missing := expected.keys() - tensors.keys():
        raise UserError(f"incomplete model folder {folder}: {_list(missing)} missing; copy or download it again")
    if unexpected := tensors.keys() - expected.keys() - harmless:
        raise UserError(
            f"{folder} holds tensors that its config.json doesn't account for: {_list(unexpected)}; "
            "expected a model of a supported architecture, merged with its adapters if it has any"
        )
    for name, sizes in expected.items():
        if tuple(tensors[name].get_shape()) != sizes:
            raise UserError(
                f"{folder}: {name} has shape {tensors[name].get_shape()}; config.json makes it {list(sizes)}"
            )
        if tensors[name].get_dtype() not in _FLOATS:
            raise UserError(
                f"{folder}: {name} is stored as {tensors[name].get_dtype()}; expected one of {', '.join(sorted(_FLOATS))}. "
                "Use the unquantised model."
            )


def _list(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:_MANY]) + (f" and {len(names) - _MANY} more" if len(names) > _MANY else "")
