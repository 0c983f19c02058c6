"""The files of an exported Hugging Face model folder."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from toolkit.conversion.reading import INDEX_FILE
from toolkit.conversion.shape import CONFIG_FILE, read_config
from toolkit.conversion.weights import Weight

# Everything beside the weights that transformers and vLLM read.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def plan_files(
    stages: Sequence[Sequence[Weight]], element_bytes: int, file_bytes: int
) -> list[dict[str, list[Weight]]]:
    """For each pipeline stage, its safetensors files with the parameters that go into each.

    Parameters stay in order and whole; a file is closed before it would exceed ``file_bytes``. Every process can compute
    the plan by itself.
    """
    groups: list[tuple[int, list[Weight]]] = []
    for stage, weights in enumerate(stages):
        used = math.inf
        for weight in weights:
            size = element_bytes * sum(math.prod(shape) for shape in weight.shapes)
            if used + size > file_bytes:
                groups.append((stage, []))
                used = 0
            groups[-1][1].append(weight)
            used += size
    plan: list[dict[str, list[Weight]]] = [{} for _ in stages]
    for number, (stage, weights) in enumerate(groups, start=1):
        plan[stage][f"model-{number:05d}-of-{len(groups):05d}.safetensors"] = weights
    return plan


def write_index(directory: Path, plan: Sequence[Mapping[str, Sequence[Weight]]], element_bytes: int) -> str:
    """Write the index of all tensors of all stages; returns its file name."""
    files = {name: weights for stage in plan for name, weights in stage.items()}
    sizes = [math.prod(shape) for weights in files.values() for weight in weights for shape in weight.shapes]
    index = {
        "metadata": {"total_size": element_bytes * sum(sizes)},
        "weight_map": {source: name for name, weights in files.items() for w in weights for source in w.sources},
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return INDEX_FILE


def write_companions(model_folder: Path, directory: Path, dtype: str) -> list[str]:
    """Write ``config.json`` with the weights' dtype and copy tokenizer, template and generation settings.

    Returns the names of the files written.
    """
    config = {name: value for name, value in read_config(model_folder).items() if name != "torch_dtype"}
    config["dtype"] = dtype
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    present = [name for name in COMPANIONS if (model_folder / name).is_file()]
    for name in present:
        shutil.copyfile(model_folder / name, directory / name)
    return [CONFIG_FILE, *present]
