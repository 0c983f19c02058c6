"""Export: the bytes that were loaded, in files that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.parallel.pool import Pool
from tests.parallel.problems import make_model, make_pairs
from toolkit.training.layout import ParallelLayout

ONE = ParallelLayout()
TP2 = ParallelLayout(tensor=2, world_size=2)
PP2 = ParallelLayout(pipeline=2, world_size=2)
DP2 = ParallelLayout(world_size=2)


@pytest.mark.parametrize("layout", [ONE, TP2, PP2, DP2], ids=["one", "tp2", "pp2", "dp2"])
@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen2", "qwen3"])
def test_round_trip_is_bitwise(pool: Pool, tmp_path: Path, name: str, layout: ParallelLayout) -> None:
    source = make_model(name, tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    folder = tmp_path / "exported"
    folder.mkdir()
    case = "tests.parallel.cases:round_trip"
    written = pool.run(case, layout, model=source, folder=folder, dtype="float32")[0]
    expected = load_file(source / "model.safetensors")
    found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sorted(file for rank in written for file in rank) == sorted(path.name for path in folder.iterdir())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for tensor, file in index["weight_map"].items():
        with safe_open(folder / file, framework="pt") as handle:
            assert tensor in handle.keys()  # noqa: SIM118 (not a dict)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    stages = {rank for rank, files in enumerate(written) if any(file.endswith(".safetensors") for file in files)}
    assert stages == ({0, 1} if layout == PP2 else {0}), "each pipeline stage writes its own files"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_gives_the_engine_s_logprobs(pool: Pool, tmp_path: Path, dtype: str) -> None:
    transformers = pytest.importorskip("transformers")
    source = make_model("qwen3", tmp_path / "source")
    np.save(tmp_path / "reference.npy", np.zeros((8, 4)))
    folder = tmp_path / "exported"
    folder.mkdir()
    result = pool.run("tests.parallel.cases:train", PP2, model=source, folder=folder, dtype=dtype)[0]
    for file in folder.glob("gradients-*"):
        file.unlink()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert str(model.dtype) == f"torch.{dtype}"
    expected = []
    for pair in make_pairs():
        for sequence in (s for s in pair.sequences if s is not None):
            tokens = torch.from_numpy(sequence.astype(np.int64))
            with torch.no_grad():
                table = model(tokens[None]).logits[0].float().log_softmax(-1)
            picked = table[:-1].gather(1, tokens[1:, None])[pair.prompt_length - 1 :]
            expected.append(float(picked.sum()))
    np.testing.assert_allclose(result["after"], expected, atol=1e-4 if dtype == "float32" else 1.0)
