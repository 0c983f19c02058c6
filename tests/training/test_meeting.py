"""Where a trainer's ranks meet: fresh for each attempt, and nothing that two runs on one host could both want."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.exchange.conftest import make_config
from toolkit.exchange.records import Ref
from toolkit.exchange.run import Run
from toolkit.training import role


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path, make_config(tmp_path), "test")


def meet(run: Run, number: int) -> list:
    """The stores of two ranks of an attempt."""
    stores: list = [None, None]

    def join(rank: int) -> None:
        stores[rank] = role._meet(run, "trainer", number, rank)

    ranks = [threading.Thread(target=join, args=(rank,)) for rank in (1, 0)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(30)
    return stores


def test_each_attempt_meets_at_a_place_of_its_own(run: Run) -> None:
    """Scenario 26: the first attempt's store still listens when the second one starts on the same host."""
    first, second = meet(run, 0), meet(run, 1)
    ports = {run.records.require(Ref("jobs/trainer", f"{n:04d}.meeting")).attributes["port"] for n in (0, 1)}
    assert len(ports) == 2
    for number, (leader, follower) in enumerate((first, second)):
        leader.set("who", f"attempt {number}")
        assert follower.get("who") == f"attempt {number}".encode()


def test_a_rank_whose_leader_is_gone_fails_and_is_no_refusal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another attempt may do better, so it is no UserError."""
    monkeypatch.setattr(role, "MEETING_PATIENCE", 1.0)
    with pytest.raises(ConnectionError, match="did not say within 1 s where to meet"):
        role._meet(run, "trainer", 0, 1)
    run.records.publish(Ref("jobs/trainer", "0001.meeting"), {"host": "127.0.0.1", "port": 9})
    with pytest.raises(ConnectionError, match=r"cannot reach rank 0 at 127\.0\.0\.1:9"):
        role._meet(run, "trainer", 1, 1)
