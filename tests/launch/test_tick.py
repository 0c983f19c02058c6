"""What a tick leaves in the status."""

from __future__ import annotations

import pytest

from tests.launch.conftest import MemoryAdapter
from toolkit.errors import UserError
from toolkit.exchange import hints
from toolkit.exchange.run import Run
from toolkit.launch.adapter import JobSpec, Unavailable
from toolkit.launch.tick import Tick


@pytest.mark.parametrize("error", [Unavailable("squeue did not answer"), UserError("there is no squeue here")])
def test_a_scheduler_that_cannot_be_asked_shows_in_the_status(
    run: Run, scheduler: MemoryAdapter, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    tick = Tick(run, scheduler)
    tick.supervise()
    real = scheduler.look

    def look(attempts, since):
        raise error

    monkeypatch.setattr(scheduler, "look", look)
    with pytest.raises(type(error)):
        tick.supervise()
    tick.advance()
    shown = hints.status(run.root)
    assert shown["unanswered"] == str(error) and any(str(error) in warning for warning in shown["warnings"])
    monkeypatch.setattr(scheduler, "look", real)
    tick.supervise()
    tick.advance()
    assert hints.status(run.root)["unanswered"] is None


def test_a_run_that_cannot_go_on_was_answered(run: Run) -> None:
    class Refuses(MemoryAdapter):
        def submit(self, job: JobSpec) -> str:
            raise UserError("no such partition")

    tick = Tick(run, Refuses())
    with pytest.raises(UserError):
        tick.supervise()
    tick.advance()
    shown = hints.status(run.root)
    assert shown["unanswered"] is None and "no such partition" in shown["reason"]
