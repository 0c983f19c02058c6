"""Jobs of attempts that were given up, which the scheduler accepted after all."""

from __future__ import annotations

import pytest

from tests.launch.conftest import MemoryAdapter
from toolkit.exchange.run import Run
from toolkit.launch.adapter import JobSpec, State
from toolkit.launch.attempts import attempts
from toolkit.launch.control import living
from toolkit.launch.supervise import Supervisor, void, withdraw


class Stalled(MemoryAdapter):
    """Says that it cannot tell whether it took a job; kills only what it showed last, as Slurm's adapter does."""

    def submit(self, job: JobSpec) -> str:
        super().submit(job)
        self.jobs[job.attempt] = State.GONE
        raise TimeoutError("no answer")

    def cancel(self, attempts, kill: bool = False) -> None:
        there = [name for name in attempts if self.jobs.get(name) in (State.PENDING, State.RUNNING)]
        super().cancel(there, kill)
        self.jobs |= dict.fromkeys(there if kill else [], State.GONE)


def given_up(run: Run, scheduler: Stalled, times: int) -> str:
    """A trainer is submitted and given up again and again. Returns the first one's id."""
    for number in range(times):
        Supervisor(run.root, "test", scheduler).supervise()
        void(run, attempts(run, "trainer")[number], "never started")
    return attempts(run, "trainer")[0].id


@pytest.fixture
def scheduler() -> Stalled:
    return Stalled()


def test_a_job_that_comes_late_leaves_the_queue(run: Run, scheduler: Stalled) -> None:
    late = given_up(run, scheduler, 4)
    scheduler.jobs[late] = State.PENDING
    Supervisor(run.root, "test", scheduler).supervise()
    assert scheduler.killed == [late] and scheduler.jobs[late] is State.GONE
    Supervisor(run.root, "test", scheduler).supervise()
    assert scheduler.killed == [late]


def test_a_late_job_is_not_overlooked_when_none_must_be_left(run: Run, scheduler: Stalled) -> None:
    late = given_up(run, scheduler, 4)
    assert living(run, scheduler) == []
    scheduler.jobs[late] = State.PENDING
    assert living(run, scheduler) == [late]


def test_a_run_that_ends_takes_late_jobs_along(run: Run, scheduler: Stalled) -> None:
    late = given_up(run, scheduler, 2)
    scheduler.jobs[late] = State.PENDING
    run.close("finished", "")
    withdraw(run, scheduler)
    assert late in scheduler.killed
