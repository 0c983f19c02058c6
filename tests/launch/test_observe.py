"""Asking the scheduler without acting."""

from __future__ import annotations

import os

import pytest

from tests.launch.conftest import MemoryAdapter
from toolkit.exchange.run import Run
from toolkit.launch import observe as observing
from toolkit.launch.adapter import Job, State, Unavailable
from toolkit.launch.observe import observe
from toolkit.launch.supervise import Supervisor


@pytest.fixture
def submitted(run: Run, scheduler: MemoryAdapter, monkeypatch: pytest.MonkeyPatch) -> MemoryAdapter:
    """The scheduler of a run whose roles were submitted."""
    Supervisor(run.root, "test", scheduler).supervise()
    monkeypatch.setattr(observing, "adapter", lambda config: scheduler)
    return scheduler


def test_reasons_and_ids_of_what_is_pending(
    run: Run, submitted: MemoryAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending = Job(State.PENDING, "12", "Priority")
    monkeypatch.setattr(submitted, "look", lambda attempts, since: dict.fromkeys(attempts, pending))
    before = sorted(run.root.rglob("*"))
    jobs = {job["slot"]: job for job in observe(run)["jobs"]}
    assert set(jobs) == {"trainer", "sidecar", "worker-000"}
    assert (jobs["trainer"]["job"], jobs["trainer"]["reason"], jobs["trainer"]["outcome"]) == (
        "12",
        "Priority",
        "pending",
    )
    assert sorted(run.root.rglob("*")) == before and not submitted.killed


def test_what_the_records_alone_keep_alive(run: Run, submitted: MemoryAdapter) -> None:
    submitted.same_machine = False
    job = submitted.start(run, "trainer")
    assert observe(run)["gone"] == []
    submitted.jobs[job.attempt] = State.GONE
    found = observe(run)
    assert found["gone"] == ["trainer"]
    assert next(entry for entry in found["jobs"] if entry["slot"] == "trainer")["outcome"] == "running"
    submitted.same_machine = True  # its process is another machine's, which cannot be seen from here
    assert observe(run)["gone"] == []


def test_a_scheduler_that_does_not_answer_is_no_error(
    run: Run, submitted: MemoryAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(attempts: object, since: float) -> dict[str, Job]:
        raise Unavailable("squeue did not answer")

    monkeypatch.setattr(submitted, "look", look)
    found = observe(run)
    assert found["unanswered"] == "squeue did not answer" and len(found["jobs"]) == 3
    assert observe(run, ask=False)["unanswered"] is None
    monkeypatch.setattr(os, "getuid", lambda: os.stat(run.root).st_uid + 1)  # noqa: PTH116
    assert observe(run)["unanswered"] is None, "another user's jobs are not asked for"
