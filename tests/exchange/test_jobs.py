"""Who is alive: processes of this host, heartbeats on the observer's own clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from toolkit.errors import UserError
from toolkit.exchange import filesystem, hints, jobs, layout
from toolkit.exchange.jobs import Heartbeat, Observer
from toolkit.exchange.run import Run


def test_a_process_is_told_from_a_later_one_with_its_pid() -> None:
    mine = jobs.this_process()
    assert jobs.is_this_host(mine) and jobs.is_alive(mine)
    assert not jobs.is_alive(mine | {"process_start": str(int(mine["process_start"]) - 1)})
    assert not jobs.is_alive(mine | {"boot_id": "another boot"})
    assert not jobs.is_alive(mine | {"host": "another host"})
    json.dumps(mine)


def test_a_zombie_and_a_dead_process_are_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    facts = jobs.this_process() | {"pid": child.pid, "process_start": jobs.process_start(child.pid)}
    assert jobs.is_alive(facts)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet buried
    assert Path(f"/proc/{child.pid}").exists()
    assert jobs.process_start(child.pid) is None and not jobs.is_alive(facts)
    child.communicate()
    assert jobs.process_start(child.pid) is None and not jobs.is_alive(facts)


def test_a_process_name_with_blanks_and_brackets_is_no_trouble(tmp_path: Path) -> None:
    name = tmp_path / "a ) S 1 (b"
    name.symlink_to("/bin/sleep")
    children = [subprocess.Popen([command, "60"]) for command in (str(name), "sleep")]
    try:
        while not Path(f"/proc/{children[0].pid}/comm").read_text().startswith("a )"):
            time.sleep(0.01)
        odd, plain = (int(jobs.process_start(child.pid) or 0) for child in children)
        assert abs(odd - plain) < 60 * os.sysconf("SC_CLK_TCK")
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_a_heart_beats_on_once_the_disk_has_room_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    full, real = [True], filesystem.write

    def write(path: Path, data: bytes) -> None:
        if full[0]:
            raise UserError("cannot write: No space left on device")
        real(path, data)

    monkeypatch.setattr(filesystem, "write", write)
    Heartbeat(run.root, "trainer", "a").start(0.01)
    time.sleep(0.1)
    full[0] = False
    deadline = time.monotonic() + 20
    while (beat := jobs.last_beat(run.root, "trainer")) is None:
        assert time.monotonic() < deadline, "its thread is dead"
        time.sleep(0.01)
    assert beat[1] > 1


def test_the_newest_attempt_that_started(run: Run) -> None:
    assert jobs.newest_started(run.records, "trainer") is None
    for number, word in enumerate(["started", "voided", "started", None]):
        run.records.publish(layout.job("trainer", number, "intent"), {"attempt": f"a{number}"})
        if word is not None:
            run.records.publish(layout.job("trainer", number, "start"), {"kind": word})
    assert jobs.newest_started(run.records, "trainer").attributes["attempt"] == "a2"


# ---------------------------------------------------------------------------------------------- heartbeats


class Clock:
    """The observer's own clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(jobs.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(jobs.time, "time", lambda: pytest.fail("two hosts' clocks must not be compared"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_claim_is_believed_while_its_counter_moves(tmp_path: Path, clock: Clock) -> None:
    observer, worker = Observer(tmp_path, patience=60), Heartbeat(tmp_path, "worker-001", "abc")
    assert observer.claimed("worker-000") == set()
    worker.working_on = ["shard 3"]
    worker.beat()
    assert observer.claimed("worker-000") == {"shard 3"}
    clock.now += 59
    assert observer.claimed("worker-000") == {"shard 3"}
    clock.now += 2
    assert observer.claimed("worker-000") == set(), "it stood still for 61 s"
    worker.working_on = ["shard 4"]
    worker.beat()
    assert observer.claimed("worker-000") == {"shard 4"}, "it was only slow"
    worker.working_on = []
    worker.beat()
    assert observer.claimed("worker-000") == set()


def test_the_time_of_the_file_means_nothing(tmp_path: Path, clock: Clock) -> None:
    observer = Observer(tmp_path, patience=60)
    Heartbeat(tmp_path, "worker-001", "abc", ["shard 3"]).beat()
    path = tmp_path / "heartbeats/worker-001.json"
    for mtime in (0, 4e9):
        os.utime(path, (mtime, mtime))
        assert observer.claimed("worker-000") == {"shard 3"}
    clock.now += 61
    path.touch()
    assert observer.claimed("worker-000") == set()


def test_a_new_attempt_of_a_slot_starts_over(tmp_path: Path, clock: Clock) -> None:
    observer = Observer(tmp_path, patience=60)
    Heartbeat(tmp_path, "worker-001", "dead", ["shard 3"]).beat()
    observer.claimed("worker-000")
    clock.now += 61
    Heartbeat(tmp_path, "worker-001", "heir", ["shard 5"]).beat()
    assert observer.claimed("worker-000") == {"shard 5"}, "the counter is again 1, but of another attempt"


def test_ones_own_claims_and_foreign_files_do_not_count(tmp_path: Path, clock: Clock) -> None:
    observer = Observer(tmp_path, patience=60)
    Heartbeat(tmp_path, "worker-000", "me", ["mine"]).beat()
    Heartbeat(tmp_path, "worker-001", "you", ["yours"]).beat()
    for name, content in ((".nfs01.json", "{}"), ("x.json", "{"), ("y.json", "[]"), ("z.json.swp", "{}")):
        (tmp_path / "heartbeats" / name).write_text(content)
    assert observer.claimed("worker-000") == {"yours"}
    assert observer.claimed("worker-001") == {"mine"}


def test_hints_are_empty_where_there_are_none(tmp_path: Path) -> None:
    assert hints.frontier(tmp_path) == hints.status(tmp_path) == {}
    (tmp_path / "frontier.json").write_text("[1")
    (tmp_path / "status.json").write_text("[1]")
    assert hints.frontier(tmp_path) == hints.status(tmp_path) == {}
    hints.set_frontier(tmp_path, {"round": 1})
    hints.set_status(tmp_path, {"policy": 2})
    assert hints.frontier(tmp_path) == {"round": 1}
    assert hints.status(tmp_path)["policy"] == 2 and hints.status(tmp_path)["written"] > 0
