"""Where a trainer's ranks meet: fresh for each attempt, and nothing that two runs on one host could both want."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.exchange.conftest import make_config, publish_pairs
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
        stores[rank] = role._meet(run, "trainer", number, rank, 2)

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


@pytest.mark.parametrize("kind", ["local", "slurm"])
def test_ranks_of_one_node_meet_where_no_other_node_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("SLURM_NNODES", "1")
    run = Run.create(tmp_path, make_config(tmp_path, cluster={"kind": kind}), "test")
    stores = meet(run, 0)
    place = run.records.require(Ref("jobs/trainer", "0000.meeting")).attributes
    assert place["host"] == "127.0.0.1" and stores[1].port == place["port"]
    sockets = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    listening = [fields[1] for fields in sockets if fields[3] == "0A" and fields[1].endswith(f":{place['port']:04X}")]
    assert listening == [f"0100007F:{place['port']:04X}"]


def test_a_rank_alone_opens_no_port(run: Run) -> None:
    store = role._meet(run, "trainer", 0, 0, 1)
    assert isinstance(store, dist.HashStore)
    assert run.records.find(Ref("jobs/trainer", "0000.meeting")) is None


def test_a_rank_whose_leader_is_gone_fails_and_is_no_refusal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another attempt may do better, so it is no UserError."""
    monkeypatch.setattr(role, "MEETING_PATIENCE", 1.0)
    with pytest.raises(ConnectionError, match="did not say within 1 s where to meet"):
        role._meet(run, "trainer", 0, 1, 2)
    run.records.publish(Ref("jobs/trainer", "0001.meeting"), {"host": "127.0.0.1", "port": 9})
    with pytest.raises(ConnectionError, match=r"cannot reach rank 0 at 127\.0\.0\.1:9"):
        role._meet(run, "trainer", 1, 1, 2)


def test_the_data_may_take_longer_than_a_meeting(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the launcher could not prepare the data, rank 0 does, which may take an hour."""
    monkeypatch.setattr(role, "MEETING_PATIENCE", 0.1)
    timer = threading.Timer(1.0, publish_pairs, (run,))
    timer.start()
    role._prepare(run, "trainer", 0, 1)
    timer.join()
    assert run.records.find(role.PAIRS) is not None


def test_data_that_are_never_prepared_are_no_refusal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(role, "PREPARING_PATIENCE", 0.1)
    with pytest.raises(ConnectionError, match="rank 0 of trainer attempt 0 did not prepare the data"):
        role._prepare(run, "trainer", 0, 1)
