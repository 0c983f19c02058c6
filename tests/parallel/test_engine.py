"""What the engine promises beside its numbers, in one process and across pipeline stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.pool import Pool
from tests.parallel.problems import LEARNING, make_model
from toolkit.training.layout import ParallelLayout

LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(world_size=2),
    ParallelLayout(tensor=2, pipeline=2, world_size=4, sequence_parallel=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["one", "dp2", "tp2-pp2"])
def test_behaviour(pool: Pool, tmp_path: Path, layout: ParallelLayout) -> None:
    model = make_model("llama", tmp_path / "model")
    other = make_model("llama", tmp_path / "other", seed=1)
    (tmp_path / "empty").mkdir()
    ranks = pool.run("tests.parallel.cases:behaviour", layout, model=model, other=other, folder=tmp_path / "empty")
    for rank in ranks:
        for promise in (
            "load_weights leaves the model",
            "no step while swapped",
            "swapped scores differ",
            "swapped back",
            "swapped back after an exception",
            "load",
            "one",
            "none",
            "weights after it",
            "reset is as new",
            "weights after infinity",
        ):
            assert rank[promise] is True, promise
        assert rank["float32"] == "float32"
        assert rank["before_update"] == "not now"
        assert rank["empty"] == [{}, 0.0, 0, False, True]
        assert rank["rates"] == [LEARNING["learning_rate"]] * 4
        assert "300 tokens; the model takes 128" in rank["too long"]
        assert "0 to 130" in rank["other tokenizer"]
        assert "at least one token of prompt and one of response" in rank["no response"]
        assert "global batch(7 pairs)" in rank["batch"]
        assert "the gradient's norm is nan" in rank["infinite gradient"]
        assert "decoder.final_layernorm.weight" in rank["not finite"]
        assert "config.json" in rank["not a model"]
    assert not any((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("name", ["llama-bias", "qwen3"])
def test_all_parameters_are_on_one_device(pool: Pool, tmp_path: Path, name: str) -> None:
    """Megatron makes its own on the GPU; the norms, which are torch's, must not stay on the CPU."""
    (found,) = pool.run("tests.parallel.cases:devices", ParallelLayout(), model=make_model(name, tmp_path / "model"))
    assert len(found) == 1 and found != ["cpu"]


def test_ranks_that_never_come(pool: Pool, tmp_path: Path) -> None:
    (said,) = pool.run("tests.parallel.cases:lonely", ParallelLayout(), store=f"file://{tmp_path / 'store'}")
    assert "rank 0 of 2 could not join the others" in said and "GLOO_SOCKET_IFNAME" in said
