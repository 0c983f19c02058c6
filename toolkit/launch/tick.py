"""The tick: everything that keeps a run going, for whoever calls it: the sidecar's loop, a launcher in the foreground, a person, cron."""

from __future__ import annotations

from typing import Any

from toolkit.exchange import hints
from toolkit.exchange.reports import condemn_reported
from toolkit.exchange.retention import collect_garbage
from toolkit.exchange.run import Run
from toolkit.launch.adapter import Adapter
from toolkit.launch.supervise import describe, supervise
from toolkit.reporting import status


class Tick:
    """`advance` acts on records only and may be called every few seconds; `supervise` also asks the scheduler."""

    def __init__(self, run: Run, adapter: Adapter) -> None:
        run.require_owner()
        self.run, self.adapter = run, adapter
        self.jobs: list[dict[str, Any]] = []
        self._status: dict[str, Any] = {}

    def advance(self) -> None:
        """Condemn what is damaged, remove what nobody needs, close a run that is complete, write the status."""
        condemn_reported(self.run)
        collect_garbage(self.run)
        if self.run.closing() is None and self.run.is_complete():
            self.run.finish()
        self._status = status.collect(self.run, self.jobs, self._status)
        hints.set_status(self.run.root, self._status)

    def supervise(self) -> None:
        """Bury the dead, submit what is due. Raises UserError when the run cannot go on."""
        self.jobs = describe(supervise(self.run, self.adapter))
