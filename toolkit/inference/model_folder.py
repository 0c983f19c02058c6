"""What a Hugging Face model folder holds, seen without loading it.

vLLM takes a folder that lacks a tensor without a word and goes on with what was in memory; so folders are compared first.
What is wrong with a folder is a UserError; an OSError of reading it (stale handle, input/output error) is its node's fault and passes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from toolkit.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor in the folder's safetensors files; a tied `lm_head.weight` is left out.

    Raises:
        UserError: a file is missing, cut short or no safetensors file, or the index promises a tensor that no file has.
    """
    config = _json(folder / "config.json")
    promised = _json(folder / INDEX)["weight_map"] if (folder / INDEX).exists() else {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(set(promised.values())) or [SINGLE]:
        try:
            with safe_open(folder / name, framework="numpy") as tensors:
                shapes.update({key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()})  # noqa: SIM118
        except (FileNotFoundError, SafetensorError) as error:
            raise UserError(f"cannot read the weights {folder / name}: {error}") from error
    if missing := sorted(set(promised) - set(shapes)):
        raise UserError(f"{folder / INDEX} promises {len(missing)} tensor(s) that no file has: {_some(missing)}")
    if config.get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    return shapes


def check_same_tensors(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a folder whose tensors (``shapes``) are not those of the model in the engine (``expected``).

    Raises:
        UserError: names the tensors that are missing, unknown or of another shape.
    """
    faults = []
    if missing := sorted(expected.keys() - shapes.keys()):
        faults.append(f"{len(missing)} missing: {_some(missing)}")
    if extra := sorted(shapes.keys() - expected.keys()):
        faults.append(f"{len(extra)} unknown: {_some(extra)}")
    other = [
        f"{name} {shapes[name]}, expected {expected[name]}"
        for name in sorted(shapes.keys() & expected.keys())
        if shapes[name] != expected[name]
    ]
    if other:
        faults.append(f"{len(other)} of another shape: {_some(other)}")
    if faults:
        raise UserError(
            f"the tensors in {folder} are not those of the model in the engine ({len(expected)}): {'; '.join(faults)}"
        )


def check_reward_model(folder: Path) -> None:
    """Refuse a folder that holds no sequence classifier with one label.

    Raises:
        UserError: says what it holds instead.
    """
    config = _json(folder / "config.json")
    architectures = config.get("architectures") or ["no architecture"]
    labels = len(config.get("id2label", "12"))  # transformers writes the labels unless there are two
    if not architectures[0].endswith("ForSequenceClassification") or labels != 1:
        raise UserError(
            f"{folder} ({architectures[0]}, {labels} label(s)) is no reward model; expected a sequence classifier with one "
            "label, LlamaForSequenceClassification for one: set reward.model (evaluation.reward) to such a folder"
        )


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"cannot read {path}: {error}. Expected a Hugging Face model folder at {path.parent}"
        ) from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
