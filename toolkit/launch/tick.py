"""The tick: everything that keeps a run going, for whoever calls it: the sidecar's loop, a launcher in the foreground, a person, cron."""

from __future__ import annotations

import time
from typing import Any

from toolkit.errors import UserError
from toolkit.exchange import hints
from toolkit.exchange.records import Corrupt
from toolkit.exchange.reports import condemn_reported, report
from toolkit.exchange.retention import Sweep, collect_garbage
from toolkit.exchange.run import Run
from toolkit.launch.adapter import Adapter, State, Unavailable
from toolkit.launch.attempts import Attempt, current, gpu_hours
from toolkit.launch.deaths import bad_nodes, by_kind
from toolkit.launch.drift import changed_packages
from toolkit.launch.supervise import Supervisor
from toolkit.reporting import status


class Tick:
    """`advance` acts on records only and may be called every few seconds; `supervise` also asks the scheduler."""

    def __init__(self, run: Run, adapter: Adapter) -> None:
        run.require_owner()
        self.run, self.supervisor = run, Supervisor(run.root, run.attempt, adapter)
        self.sweep = Sweep(run)
        self.control: dict[str, Any] = {}
        self._status: dict[str, Any] = {}

    def advance(self) -> None:
        """Condemn what is damaged, remove what nobody needs, close a run that is complete, write the status."""
        condemn_reported(self.run)
        collect_garbage(self.run)
        self.sweep.step()
        if self.run.closing() is None and self.run.is_complete():
            self.run.finish()
        self._status = status.collect(self.run, self.control, self._status or hints.status(self.run.root))
        hints.set_status(self.run.root, self._status)

    def supervise(self) -> None:
        """Bury the dead, submit what is due. Raises UserError when the run cannot go on, Unavailable when nobody answers."""
        unanswered = None
        try:
            self.supervisor.supervise()
        except Corrupt as error:
            report(self.run, error)  # the next `advance` condemns it
            raise
        except (Unavailable, UserError) as error:
            if self.run.closing() is None:  # else it is closed with that reason
                unanswered = str(error)
            raise
        finally:
            self.control = describe(self.supervisor) | {"unanswered": unanswered}


def describe(supervisor: Supervisor) -> dict[str, Any]:
    """What the control plane knows, as JSON values, for the status.

    Returns:
        ``jobs``: of each slot the attempt that stands for it; ``deaths`` by kind; ``gpu_hours``; ``avoided`` nodes;
        ``drift``: packages that changed meanwhile, a sentence each.
    """
    histories = [history for history in supervisor.histories.values() if history]
    newest = max((history[-1].incarnation for history in histories), default=0)
    return {
        "jobs": [_describe(current(history), supervisor) for history in histories],
        "deaths": by_kind(histories),
        "gpu_hours": round(gpu_hours(histories, time.time()), 3),
        "avoided": list(bad_nodes(histories, newest, time.time())),
        "drift": changed_packages(histories),
    }


def _describe(attempt: Attempt, supervisor: Supervisor) -> dict[str, Any]:
    job = supervisor.jobs.get(attempt.id)
    pending = job is not None and job.state is State.PENDING
    words = attempt.death or {}
    return {
        "slot": attempt.slot,
        "number": attempt.number,
        "attempt": attempt.id,
        "outcome": attempt.outcome,
        "kind": words.get("kind"),
        "message": words.get("message"),
        "job": job.id
        if job is not None
        else (attempt.start.attributes.get("job") if attempt.start is not None else None),
        "reason": job.reason if job is not None and pending else None,
    }
