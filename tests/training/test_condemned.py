"""What a trainer does about records that it waited for, or made, and that were condemned since."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.exchange.conftest import make_config, publish_pairs
from toolkit.errors import UserError
from toolkit.exchange import layout, tables
from toolkit.exchange.records import Ref
from toolkit.exchange.run import Run
from toolkit.signals import StopFlag
from toolkit.training import publication, shard
from toolkit.training.control import Control
from toolkit.training.trainer import Trainer


@pytest.fixture
def control() -> Iterator[Control]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Control(StopFlag())
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run.create(tmp_path, make_config(tmp_path, method={"meta": {"interval": 2}}), "test")
    publish_pairs(made)
    return made


def trainer(run: Run, control: Control, saved: int) -> Trainer:
    """One whose checkpoint is at that step; it computes nothing here."""
    engine: Any = None
    made = Trainer(run, engine, control, None)
    made.saved_step = made.step = saved
    return made


def condemn(run: Run, ref: Ref) -> None:
    manifest = run.records.require(ref)
    run.records.condemn(manifest.path, ref, "damaged", "?", None)


@pytest.mark.parametrize(("ahead", "error"), [(0, RuntimeError), (1, UserError)])
def test_a_shard_whose_policy_was_condemned_is_not_waited_for(
    run: Run, control: Control, ahead: int, error: type[Exception]
) -> None:
    run.records.publish(layout.policy(1), {})
    condemn(run, layout.policy(1))
    waiting = trainer(run, control, run.plan.first_step[1] + ahead)
    with pytest.raises(error, match="policies/0001 was damaged") as caught:
        waiting._wait_for_shard(1, 0)
    assert type(caught.value) is error, "a refusal closes the run; else the next attempt publishes the policy again"
    run.records.publish(layout.requests(1, 0), {"sampled": 0})
    waiting._wait_for_shard(1, 0)  # who needs nothing more of that policy goes on


@pytest.mark.parametrize(("ahead", "error"), [(-1, RuntimeError), (0, UserError)])
def test_a_meta_batch_that_was_condemned_before_anyone_learned_of_it(
    run: Run, control: Control, ahead: int, error: type[Exception]
) -> None:
    boundary = run.plan.boundaries[1]
    waiting = trainer(run, control, boundary.after_step + ahead)
    run.records.publish(layout.phi(1), {})
    with pytest.raises(error, match="meta/000/000002 was damaged") as caught:
        waiting._publish_phis(2)
    assert type(caught.value) is error
    waiting._publish_phis(1)


def publish_decisions(run: Run, sampled: int) -> None:
    run.records.publish(layout.requests(1, 0), {"sampled": sampled}, table=tables.REQUESTS.empty_table())


def test_an_online_half_that_was_asked_for_is_never_left_out(run: Run) -> None:
    with pytest.raises(RuntimeError, match="rounds/001/requests/000/000000 was condemned"):
        shard.online_rows(run, 1, 0)
    publish_decisions(run, sampled=2)
    with pytest.raises(RuntimeError, match="rounds/001/annotations/000/000000 was condemned"):
        shard.online_rows(run, 1, 0)
    run.records.publish(layout.annotations(1, 0), {}, table=tables.ANNOTATIONS.empty_table())
    assert shard.online_rows(run, 1, 0).num_rows == 0


def test_a_shard_of_which_nothing_was_asked_has_no_online_half(run: Run) -> None:
    publish_decisions(run, sampled=0)
    assert shard.online_rows(run, 1, 0).num_rows == 0


def test_a_save_that_fails_leaves_nothing(run: Run, control: Control) -> None:
    """Else the disk that was too full for it stays full."""
    with (
        pytest.raises(UserError, match="no space"),
        publication.staged(run, control, layout.checkpoint(0), private=True) as directory,
    ):
        (directory / "half").write_bytes(b"0")
        raise UserError("no space")
    assert not directory.exists()
    with publication.staged(run, control, layout.checkpoint(0), private=True) as directory:
        pass
    assert directory.is_dir()
