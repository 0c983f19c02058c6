"""control=chain: how many links are queued, at launch and by later resumes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace

import pytest

from tests.launch.conftest import MemoryAdapter
from toolkit.exchange import layout
from toolkit.exchange.run import Run
from toolkit.launch import control
from toolkit.launch.adapter import Job, JobSpec

LINKS = 3


class Chained(MemoryAdapter):
    """A queue of ``free`` places."""

    free = 100
    looks = 0

    def submit(self, job: JobSpec) -> str:
        return f"job-{job.slot}-{job.number}" if super().submit(job) else ""

    def look(self, attempts: Collection[str], since: float = 0.0) -> dict[str, Job]:
        self.looks += 1
        ids = {job.attempt: f"job-{job.slot}-{job.number}" for job in self.submitted}
        return {name: replace(job, id=ids.get(name)) for name, job in super().look(attempts, since).items()}

    def room(self) -> int:
        return self.free - len(self.submitted)


@pytest.fixture
def scheduler(run: Run, monkeypatch: pytest.MonkeyPatch) -> Chained:
    found = Chained(same_machine=False)
    monkeypatch.setattr(control, "adapter", lambda config: found)
    cluster = replace(run.config.cluster, kind="slurm", control="chain", links=LINKS)
    run.set_operations(replace(run.config, cluster=cluster))
    return found


def test_each_link_waits_for_the_one_before(run: Run, scheduler: Chained) -> None:
    assert control.start(run) == []
    assert scheduler.looks == 1, "one for all slots"
    links = [(job.number, job.after) for job in scheduler.submitted if job.slot == "trainer"]
    assert links == [(0, None), (1, "job-trainer-0"), (2, "job-trainer-1")]


def test_a_resume_fills_up_what_is_there(run: Run, scheduler: Chained) -> None:
    control.start(run)
    control.start(Run.open(run.root))
    assert Counter(job.slot for job in scheduler.submitted) == {"trainer": 3, "sidecar": 3, "worker-000": 3}
    first = next(job for job in scheduler.submitted if job.slot == "trainer")
    Run.open(run.root, first.attempt).records.publish(layout.job("trainer", 0, "end"), {"outcome": "saved"})
    control.start(Run.open(run.root))
    [link] = [job for job in scheduler.submitted if job.slot == "trainer"][LINKS:]
    assert (link.number, link.after) == (3, "job-trainer-2")


def test_links_are_counted_from_the_first_that_lives(run: Run, scheduler: Chained) -> None:
    control.start(run)
    run.close("cancelled", "by hand")
    control.tick(run)  # withdraws them
    run.reopen()
    scheduler.free = len(scheduler.submitted) + 4
    notes = control.start(Run.open(run.root))
    assert [note.partition(";")[0] for note in notes] == [
        "trainer: 2 of 3 links are queued",
        "sidecar: 1 of 3 links are queued",
        "worker-000: 1 of 3 links are queued",
    ]
    assert all(note.endswith(f"metaapo resume {run.root}") for note in notes)


def test_a_slot_without_work_gets_no_links(run: Run, scheduler: Chained) -> None:
    for version in range(4):
        run.records.publish(layout.policy(version), {})
    assert control.start(run) == []
    assert {job.slot for job in scheduler.submitted} == {"sidecar", "worker-000"}, "training is over"
