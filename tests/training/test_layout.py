from __future__ import annotations

from dataclasses import replace

import pytest

from tests.conversion.test_weights import SHAPE
from toolkit.errors import UserError
from toolkit.training.layout import ParallelLayout


def test_data_follows_from_the_rest() -> None:
    layout = ParallelLayout(tensor=2, pipeline=3, world_size=24)
    assert layout.data == 4
    assert layout.describe() == "tensor(2) * pipeline(3) * data(4)"


def test_world_that_the_layout_cannot_fill() -> None:
    with pytest.raises(UserError, match=r"tensor\(2\) \* pipeline\(2\) \* data\(\?\) != world_size\(6\)"):
        ParallelLayout(tensor=2, pipeline=2, world_size=6)


@pytest.mark.parametrize("sizes", [{"tensor": 0}, {"pipeline": -1}, {"world_size": 1.5}, {"sequence_parallel": True}])
def test_nonsense(sizes: dict) -> None:
    with pytest.raises(UserError, match="layout"):
        ParallelLayout(**sizes)


def test_padding() -> None:
    assert ParallelLayout(tensor=4, world_size=4).padded_vocabulary(131) == 132
    assert ParallelLayout(tensor=4, world_size=4).padded_vocabulary(132) == 132
    assert ParallelLayout(tensor=4, world_size=4).sequence_multiple == 8
    assert ParallelLayout(tensor=4, world_size=4, sequence_parallel=True).sequence_multiple == 32


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        (ParallelLayout(tensor=3, world_size=3), {}, r"attention heads\(8\) % tensor\(3\) = 2"),
        (ParallelLayout(tensor=8, world_size=8), {}, r"key/value heads\(4\) % tensor\(8\) = 4"),
        (ParallelLayout(tensor=2, world_size=2), {"feed_forward": 13}, r"feed-forward units\(13\) % tensor\(2\)"),
        (ParallelLayout(pipeline=3, world_size=3), {}, r"layers\(4\) % pipeline\(3\) = 1"),
    ],
)
def test_models_that_do_not_divide(layout: ParallelLayout, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        layout.check_model(replace(SHAPE, **change))


def test_models_that_do() -> None:
    ParallelLayout(tensor=4, pipeline=2, world_size=8).check_model(SHAPE)


def test_batches() -> None:
    layout = ParallelLayout(tensor=2, world_size=8)
    layout.check_batch(24, 3)
    with pytest.raises(UserError, match=r"global batch\(20 pairs\).*data\(4\).*micro batch\(3 pairs\).*multiple of 12"):
        layout.check_batch(20, 3)
