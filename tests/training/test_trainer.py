"""What the trainer asks of its records while it waits, and its check at a round's start. Whole rounds: tests/parallel."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
import torch.distributed as dist

from tests.exchange.conftest import PAIRS_PER_ROUND, make_config, publish_pairs
from toolkit.exchange import derive, layout
from toolkit.exchange.run import Run
from toolkit.signals import StopFlag
from toolkit.training.control import Control, Starved
from toolkit.training.trainer import Trainer, is_zero_margin_loss

LN2 = 0.6931472


@pytest.fixture
def trainer(tmp_path) -> Iterator[Trainer]:
    """One that needs no model: it waits for a shard of a gated round, and nobody else is there."""
    settings = {"meta_wait": 0.0, "poll": 0.01, "idle_exit": 0.1}
    run = Run.create(tmp_path / "run", make_config(tmp_path, trainer=settings), "test")
    publish_pairs(run, PAIRS_PER_ROUND)
    run.records.publish(layout.policy(1), {})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Trainer(run, None, Control(StopFlag()), None)
    dist.destroy_process_group()


@pytest.mark.parametrize(("decided", "gates"), [(False, True), (True, False)])
def test_only_a_shard_that_nobody_gates_is_gated_here(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, decided: bool, gates: bool
) -> None:
    """While annotations are awaited, no record of another shard is looked up."""
    if decided:
        trainer.run.records.publish(layout.requests(1, 0), {"sampled": 1})
    gated: list[int] = []
    monkeypatch.setattr(trainer, "_gate", gated.append)
    with pytest.raises(Starved):
        trainer._wait_for_shard(1, 0)
    assert bool(gated) == gates


def test_a_rounds_statistics_are_read_once(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def statistics(run: Run, index: int) -> derive.FeatureStatistics:
        read.append(index)
        return derive.FeatureStatistics(mean=float(index), std=1.0, count=2, variance=1.0)

    monkeypatch.setattr(derive, "needs_statistics", lambda method: True)
    monkeypatch.setattr(derive, "statistics", statistics)
    assert [trainer._statistics(index).mean for index in (1, 1, 2, 2)] == [1.0, 1.0, 2.0, 2.0]
    assert read == [1, 2]
    assert trainer._statistics(0) is None


def test_what_rank_0_reads_reaches_every_rank_or_fails_on_every_rank(trainer: Trainer) -> None:
    table = pa.table({"a": [1, 2]})
    assert trainer.control.lead_table(lambda: table) == table
    with pytest.raises(ZeroDivisionError):
        trainer.control.lead_table(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("dtype", "losses", "accepted"),
    [
        ("float32", [LN2, LN2 + 1e-4], True),
        ("float32", [LN2, LN2 + 1e-2], False),
        ("bfloat16", [LN2 - 0.3, LN2 + 0.4, LN2], True),
        ("bfloat16", [LN2 + 0.2] * 4, False),
        ("bfloat16", [0.3] * 4, False),
        ("bfloat16", [LN2, np.nan], False),
    ],
)
def test_each_loss_of_a_policy_that_is_its_own_reference(dtype: str, losses: list[float], accepted: bool) -> None:
    assert is_zero_margin_loss(np.array(losses, np.float32), LN2, dtype) is accepted
