from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conversion.test_weights import SHAPE
from toolkit.conversion.reading import INDEX_FILE, SINGLE_FILE, read_shards
from toolkit.conversion.weights import to_shard, weight_map
from toolkit.errors import UserError

WEIGHTS = weight_map(SHAPE)


def tensors() -> dict[str, torch.Tensor]:
    return {
        source: torch.randn(sizes)
        for weight in WEIGHTS.values()
        for source, sizes in zip(weight.sources, weight.shapes, strict=True)
    }


def write_sharded(folder: Path, content: dict[str, torch.Tensor]) -> None:
    names = list(content)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: content[name] for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in parts.items() for name in members}}
    (folder / INDEX_FILE).write_text(json.dumps(index))


def read(folder: Path, tied: bool = False) -> dict[str, torch.Tensor]:
    return dict(read_shards(folder, replace(SHAPE, tied=tied), WEIGHTS, 1, 2))


@pytest.mark.parametrize("sharded", [False, True])
def test_reads_what_a_rank_holds(tmp_path: Path, sharded: bool) -> None:
    content = tensors()
    if sharded:
        write_sharded(tmp_path, content)
    else:
        save_file(content, tmp_path / SINGLE_FILE)
    found = read(tmp_path)
    assert list(found) == list(WEIGHTS)
    for name, weight in WEIGHTS.items():
        assert torch.equal(found[name], to_shard(weight, [content[source] for source in weight.sources], SHAPE, 1, 2))


def test_tied_models_may_hold_the_output_layer_too(tmp_path: Path) -> None:
    content = tensors()
    save_file(content, tmp_path / SINGLE_FILE)
    assert torch.equal(read(tmp_path, tied=True)["output_layer.weight"][:6], content["model.embed_tokens.weight"][7:])


def spoil_missing_file(folder: Path) -> None:
    (folder / "model-2.safetensors").unlink()


def spoil_damaged_file(folder: Path) -> None:
    (folder / "model-2.safetensors").write_bytes((folder / "model-2.safetensors").read_bytes()[:-8])


def spoil_index(folder: Path) -> None:
    (folder / INDEX_FILE).write_text("[]")


def spoil_path(folder: Path) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))


def spoil_pickle(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def spoil_empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def spoil_missing_tensor(folder: Path) -> None:
    content = tensors()
    del content["model.layers.3.mlp.up_proj.weight"]
    write_sharded(folder, content)


def spoil_unexpected_tensor(folder: Path) -> None:
    write_sharded(folder, {**tensors(), "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1)})


def spoil_shape(folder: Path) -> None:
    write_sharded(folder, {**tensors(), "model.norm.weight": torch.ones(9)})


def spoil_dtype(folder: Path) -> None:
    write_sharded(folder, {**tensors(), "model.norm.weight": torch.ones(8, dtype=torch.int8)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing_file, r"model-2\.safetensors is missing"),
        (spoil_damaged_file, r"model-2\.safetensors is damaged"),
        (spoil_index, "no valid weight_map"),
        (spoil_path, "outside the model folder"),
        (spoil_pickle, r"\.bin format only"),
        (spoil_empty, r"expected model\.safetensors"),
        (spoil_missing_tensor, r"model\.layers\.3\.mlp\.up_proj\.weight missing"),
        (spoil_unexpected_tensor, "lora_A"),
        (spoil_shape, r"model\.norm\.weight has shape \[9\].*\[8\]"),
        (spoil_dtype, r"model\.norm\.weight is stored as I8.*unquantised"),
    ],
)
def test_bad_folders_are_refused(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    write_sharded(tmp_path, tensors())
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        read(tmp_path)
