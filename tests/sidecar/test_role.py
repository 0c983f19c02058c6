"""The sidecar's loop: it derives and ticks until the run is closed, whatever its scheduler does."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.launch.conftest import MemoryAdapter
from tests.sidecar.conftest import SHARDS, Trainer
from toolkit.cluster import ClusterConfig
from toolkit.errors import UserError
from toolkit.exchange import hints, jobs, layout
from toolkit.exchange.run import Run
from toolkit.sidecar import role
from toolkit.signals import StopFlag


class Sidecar:
    """The role in a thread of its own, with a scheduler in memory."""

    def __init__(self, trainer: Trainer, scheduler: MemoryAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(role, "adapter", lambda config: scheduler)
        run, self.stop, self.outcome = trainer.run, StopFlag(), ""
        run.set_operations(
            replace(run.config, sidecar=replace(run.config.sidecar, poll=0.01), cluster=ClusterConfig(supervise=0.02))
        )
        self.thread = threading.Thread(target=self._play, args=(Run.open(run.root, "sidecar", 0),), daemon=True)
        self.thread.start()

    def _play(self, run: Run) -> None:
        self.outcome = role.main(run, "sidecar", 0, 0, 1, self.stop)

    def until(self, true) -> None:
        deadline = time.monotonic() + 60
        while not true():
            assert self.thread.is_alive() and time.monotonic() < deadline, "waited in vain"
            time.sleep(0.01)

    def end(self) -> str:
        self.thread.join(300)
        self.stop.set()  # for its supervision, which else goes on in a thread of its own
        return self.outcome


@pytest.fixture
def scheduler() -> MemoryAdapter:
    return MemoryAdapter()


def test_it_derives_ticks_and_stops_with_the_run(
    trainer: Trainer, scheduler: MemoryAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer.run
    sidecar = Sidecar(trainer, scheduler, monkeypatch)
    sidecar.until(lambda: len(scheduler.submitted) == 3)
    trainer.policy(0, 1)
    trainer.score(1, *SHARDS)
    sidecar.until(lambda: run.records.find(layout.requests(1, SHARDS[-1])) is not None)
    sidecar.until(lambda: hints.status(run.root).get("policy") == 1)
    assert (run.root / "heartbeats/sidecar.json").exists() and list((run.root / "metrics").glob("sidecar.*.jsonl"))
    run.close("cancelled", "by hand")
    assert sidecar.end() == "done"
    assert len(scheduler.submitted) == 3


def test_it_leaves_when_told_to(trainer: Trainer, scheduler: MemoryAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    sidecar = Sidecar(trainer, scheduler, monkeypatch)
    sidecar.stop.set()
    assert sidecar.end() == "saved"


def test_it_closes_a_run_that_is_complete(
    trainer: Trainer, scheduler: MemoryAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer.run
    trainer.policy(0, 1, 2, 3)
    for version in range(4):
        run.records.publish(layout.evaluation(version), {"policy": ""})
    for version in range(1, len(run.plan.boundaries) + 1):
        trainer.meta_batch(version, rows=2)
    trainer.score(1, *SHARDS)
    sidecar = Sidecar(trainer, scheduler, monkeypatch)
    sidecar.until(lambda: run.records.find(layout.phi(2)) is not None)
    trainer.score(2, *SHARDS)
    assert sidecar.end() == "done"
    assert run.closing().attributes["outcome"] == "finished"


@pytest.mark.parametrize("damaged", ["a-score", "its-manifest", "the-newest-policy"])
def test_it_heals_the_damage_that_it_meets(
    trainer: Trainer, scheduler: MemoryAdapter, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    """It is the only reader of scores: were it to die of a damaged one, so would its successors."""
    run = trainer.run
    trainer.policy(0, 1)
    trainer.score(1, *SHARDS)
    ref = layout.policy(1) if damaged == "the-newest-policy" else layout.logprobs("policy-0001", "offline", 1, 1)
    manifest = run.records.require(ref)
    path = manifest.directory / manifest.files[0].path if damaged == "a-score" else manifest.path
    path.write_bytes(b"X" + path.read_bytes()[1:])
    sidecar = Sidecar(trainer, scheduler, monkeypatch)
    sidecar.until(lambda: path.with_name(f"{ref.name}.g0.tombstone.json").exists())
    trainer.policy(1)
    trainer.score(1, *SHARDS)
    sidecar.until(lambda: run.records.find(layout.requests(1, 1)) is not None)
    assert run.records.require(ref).generation == 1
    run.close("cancelled", "by hand")
    assert sidecar.end() == "done"


def test_a_sidecar_with_much_to_do_still_beats_and_leaves(
    trainer: Trainer, scheduler: MemoryAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(role, "adapter", lambda config: scheduler)
    stop, turns = StopFlag(), [0]

    def turn() -> bool:
        turns[0] += 1
        if turns[0] == 3:
            stop.set()
        return True

    assert role.keep(Run.open(trainer.run.root, "sidecar", 0), "sidecar", stop, turn) == "saved"
    assert turns == [3] and jobs.last_beat(trainer.run.root, "sidecar") == ("sidecar", 3, [])


@pytest.mark.parametrize("error", [RuntimeError("slurmctld is away"), UserError("half a record")])
def test_a_scheduler_that_fails_is_asked_again(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class Flaky(MemoryAdapter):
        asked = 0

        def look(self, attempts, since):
            self.asked += 1
            if self.asked in (1, 2, 3):
                raise error
            return super().look(attempts, since)

    scheduler = Flaky()
    sidecar = Sidecar(trainer, scheduler, monkeypatch)
    sidecar.until(lambda: scheduler.asked > 3)
    assert len(scheduler.submitted) == 3
    sidecar.stop.set()
    assert sidecar.end() == "saved"


def test_a_scheduler_that_hangs_holds_nothing_up(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Hangs(MemoryAdapter):
        def look(self, attempts, since):
            threading.Event().wait()

    sidecar = Sidecar(trainer, Hangs(), monkeypatch)
    trainer.policy(0, 1)
    trainer.score(1, *SHARDS)
    sidecar.until(lambda: trainer.run.records.find(layout.requests(1, 0)) is not None)
    trainer.run.close("cancelled", "by hand")
    assert sidecar.end() == "done"
