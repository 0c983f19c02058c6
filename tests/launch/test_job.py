"""What a job does around its role: claim its start, say how it ended. And the signals it dies well by."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.exchange.conftest import answer, script
from toolkit.errors import UserError
from toolkit.exchange import jobs, layout
from toolkit.exchange.records import Corrupt, Superseded
from toolkit.exchange.run import Run
from toolkit.launch import job, snapshot
from toolkit.signals import StopFlag

CODE = snapshot.package_digest(snapshot.PACKAGE)


class Job:
    """Attempt 0 of the trainer, whose role is the test's."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.monkeypatch = run, monkeypatch
        intent = {"attempt": "abc", "slot": "trainer", "number": 0, "incarnation": 0, "code": CODE, "progress": []}
        run.records.publish(layout.job("trainer", 0, "intent"), intent)
        monkeypatch.setenv(job.ATTEMPT, "of-the-test")  # what the job sets is put back
        monkeypatch.setattr(StopFlag, "install", StopFlag)

    def play(self, role: Callable[..., Any], job_id: str = "1", rank: int = 0, size: int = 1) -> str:
        self.monkeypatch.setattr(job, "_role", lambda slot: role)
        return job.play(self.run.root, "trainer", 0, job_id, rank, size)

    def record(self, event: str) -> dict[str, Any] | None:
        found = self.run.records.find(layout.job("trainer", 0, event))
        return None if found is None else found.attributes


@pytest.fixture
def trainer(run: Run, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(run, monkeypatch)


def raises(error: BaseException) -> Callable[..., str]:
    def role(*_: Any) -> str:
        raise error

    return role


def test_a_job_claims_its_start_plays_and_says_how_it_ended(trainer: Job) -> None:
    def role(run: Run, slot: str, number: int, rank: int, size: int, stop: StopFlag) -> str:
        assert (run.attempt, run.incarnation, slot, number, rank, size) == ("abc", 0, "trainer", 0, 0, 2)
        assert os.environ[job.ATTEMPT] == "abc" and not stop.is_set()
        start = trainer.record("start")
        assert start["kind"] == "started" and start["job"] == "77" and jobs.is_alive(start)
        assert start["packages"]["numpy"] == importlib.metadata.version("numpy")
        run.records.publish(layout.phi(0), {})
        return "saved"

    assert trainer.play(role, job_id="77", size=2) == "saved"
    end = trainer.record("end")
    assert (end["outcome"], end["rank"]) == ("saved", 0) and end["seconds"] >= 0
    assert trainer.run.records.require(layout.phi(0)).attempt == "abc"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("no reward folder"), "refused"),
        (RuntimeError("boom"), "crash"),
        (MemoryError("too much"), "resource"),
        (SystemExit(3), "crash"),
        (KeyboardInterrupt(), "crash"),
    ],
)
def test_a_failure_is_recorded_and_raised(trainer: Job, error: BaseException, kind: str) -> None:
    with pytest.raises(type(error)):
        trainer.play(raises(error))
    end = trainer.record("end")
    assert (end["outcome"], end["kind"], end["error"]) == ("failed", kind, type(error).__name__)
    assert end["message"] == str(error)
    assert ("traceback" in end) == (kind != "refused")


def test_a_superseded_job_ends_without_fuss(trainer: Job) -> None:
    assert trainer.play(raises(Superseded("another is ahead"))) == "superseded"
    assert trainer.record("end")["outcome"] == "superseded"


def test_a_damaged_record_is_reported(trainer: Job) -> None:
    path = trainer.run.pairs_manifest.path
    with pytest.raises(Corrupt):
        trainer.play(raises(Corrupt(path, "a bit flipped")))
    assert trainer.record("end")["kind"] == "corrupt"
    assert [note.name for note in (trainer.run.root / "reports").iterdir()] == ["data~pairs.g0.json"]


def test_a_job_says_how_it_ended_though_its_incarnation_is_over(trainer: Job) -> None:
    def role(run: Run, *_: Any) -> str:
        run.close("cancelled", "by hand")
        run.records.publish(layout.phi(0), {})
        return "done"

    assert trainer.play(role) == "superseded"
    assert trainer.record("end")["outcome"] == "superseded"


# ---------------------------------------------------------------------------------------------- who may start


def test_a_job_that_was_given_up_does_nothing(trainer: Job) -> None:
    trainer.run.records.publish(layout.job("trainer", 0, "start"), {"kind": "voided", "reason": "never started"})
    assert trainer.play(raises(AssertionError("it plays"))) == "voided"
    assert trainer.record("end") is None


def test_a_job_that_is_run_twice_plays_once(trainer: Job) -> None:
    """A restarted controller replays a job, or two ids carry one attempt."""
    assert trainer.play(lambda *_: "saved", job_id="1") == "saved"
    assert trainer.play(raises(AssertionError("it plays")), job_id="2") == "voided"
    assert trainer.record("end")["outcome"] == "saved"


def test_a_job_of_a_closed_incarnation_does_nothing(trainer: Job) -> None:
    trainer.run.close("cancelled", "by hand")
    assert trainer.play(raises(AssertionError("it plays"))) == "voided"
    trainer.run.reopen()
    assert trainer.play(raises(AssertionError("it plays"))) == "voided"
    start = trainer.record("start")
    assert (start["kind"], start["death"]) == ("voided", "withdrawn") and trainer.record("end") is None


def test_the_other_ranks_of_a_closed_incarnation_do_not_wait(trainer: Job) -> None:
    trainer.run.close("cancelled", "by hand")
    for rank in (0, 1):
        assert trainer.play(raises(AssertionError("it plays")), rank=rank, size=2) == "voided"


def test_a_job_without_intent_or_with_other_code_refuses(trainer: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"jobs/trainer/0007\.intent is not published"):
        job.play(trainer.run.root, "trainer", 7, "1", 0, 1)
    monkeypatch.setattr(snapshot, "package_digest", lambda package: "0" * 64)
    with pytest.raises(UserError, match="submitted with code"):
        trainer.play(raises(AssertionError("it plays")))
    assert trainer.record("start") is None


# ---------------------------------------------------------------------------------------------- ranks


def test_the_other_ranks_wait_for_the_start(trainer: Job) -> None:
    facts = {"kind": "started", "job": "1"}
    timer = threading.Timer(0.3, trainer.run.records.publish, (layout.job("trainer", 0, "start"), facts))
    timer.start()
    assert trainer.play(lambda *_: "done", rank=1, size=2) == "done"
    timer.join()
    assert trainer.record("end") is None, "rank 0 speaks for the attempt"


def test_the_other_ranks_do_not_wait_for_ever(trainer: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "START_WAIT", 0.1)
    with pytest.raises(ConnectionError, match="rank 0 of trainer attempt 0 did not start"):
        trainer.play(raises(AssertionError("it plays")), rank=1, size=2)


class LeaderFailed(Exception):
    """Named as the trainer's: rank 0 failed, and this rank only heard of it."""


@pytest.mark.parametrize(("error", "speaks"), [(RuntimeError("mine"), True), (LeaderFailed("rank 0's"), False)])
def test_another_rank_speaks_only_of_its_own_failure(trainer: Job, error: Exception, speaks: bool) -> None:
    trainer.run.records.publish(layout.job("trainer", 0, "start"), {"kind": "started", "job": "1"})
    with pytest.raises(type(error)):
        trainer.play(raises(error), rank=1, size=2)
    assert (trainer.record("end") is not None) == speaks
    if speaks:
        assert trainer.record("end")["rank"] == 1


def test_the_first_word_stands(trainer: Job) -> None:
    def role(run: Run, *_: Any) -> str:
        Run.open(run.root, "tick").records.publish(layout.job("trainer", 0, "end"), {"outcome": "died"})
        return "saved"

    assert trainer.play(role) == "saved"
    assert trainer.record("end") == {"outcome": "died"}


# ---------------------------------------------------------------------------------------------- signals

SLEEPER = """
import sys, time
from toolkit.signals import StopFlag

flag = StopFlag.install()
print("ready", flush=True)
started = time.monotonic()
stopped = flag.sleep(60)
print("stopped" if stopped and flag.is_set() and time.monotonic() - started < 30 else "slept on", flush=True)
time.sleep(1)  # saving, while more signals come
print("saved", flush=True)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGINT"])
def test_a_signal_only_sets_the_flag(name: str) -> None:
    sleeper = script(SLEEPER)
    assert sleeper.stdout.readline() == "ready\n"
    sleeper.send_signal(getattr(signal, name))
    assert sleeper.stdout.readline() == "stopped\n"
    for again in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT, signal.SIGINT):
        sleeper.send_signal(again)
    assert answer(sleeper) == "saved"


def test_a_deadline_sets_the_flag() -> None:
    flag = StopFlag(time.time() + 0.2)
    assert not flag.is_set()
    started = time.monotonic()
    assert flag.sleep(60) and flag.is_set()
    assert time.monotonic() - started < 30
    assert StopFlag(time.time() - 1).sleep(60)
    assert not StopFlag().sleep(0.01)


def test_the_deadline_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAAPO_DEADLINE", str(time.time() + 1.5))
    assert answer(script(SLEEPER)).splitlines() == ["ready", "stopped", "saved"]


STORM = """
import os, signal, threading, time
from toolkit.signals import StopFlag

flag, end = StopFlag.install(), time.monotonic() + 1

def storm():
    while time.monotonic() < end:
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.0005)

threading.Thread(target=storm, daemon=True).start()
while time.monotonic() < end:
    flag.sleep(0)
    flag._stopped = False  # so that it would sleep again
print("alive")
"""


def test_a_signal_at_any_moment_of_a_sleep_does_no_harm() -> None:
    storm = script(STORM)
    try:
        assert storm.communicate(timeout=20)[0] == "alive\n"
    finally:
        storm.kill()
