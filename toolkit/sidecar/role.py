"""The sidecar: one small process that derives, ticks, and can be killed at any moment."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from toolkit.exchange.jobs import Heartbeat
from toolkit.exchange.records import Corrupt, Superseded
from toolkit.exchange.reports import report
from toolkit.exchange.run import Run
from toolkit.launch.adapter import adapter
from toolkit.launch.tick import Tick
from toolkit.reporting.metrics import MetricsWriter
from toolkit.signals import StopFlag


def main(run: Run, slot: str, number: int, rank: int, size: int, stop: StopFlag) -> str:
    """Run the sidecar until the run is closed.

    Returns:
        ``done`` or ``saved``.
    """
    from toolkit.sidecar.pending import Pending  # brings torch, which nothing else of the sidecar needs

    metrics = MetricsWriter(run.root, slot, run.attempt)
    return keep(run, slot, stop, Pending(run, metrics.write).turn)


def keep(run: Run, slot: str, stop: StopFlag, turn: Callable[[], bool]) -> str:
    """Tick, call ``turn``, beat, and again, until the run is closed; at once if the turn got something done.

    A damaged record that is met on the way is reported, condemned by the next tick, and made again.

    Returns:
        ``done`` or ``saved``.
    """
    tick = Tick(Run.open(run.root, run.attempt), adapter(run.config))
    heartbeat = Heartbeat(run.root, slot, run.attempt)
    config = run.config.sidecar
    if run.config.cluster.control == "job":  # else nothing can be submitted from here
        threading.Thread(target=_supervise, args=(tick, run.config.cluster.supervise, stop), daemon=True).start()
    while not stop.is_set():
        moved = False
        try:
            tick.advance()  # condemns what was met before
            if run.closing(run.incarnation) is not None:
                return "done"
            with contextlib.suppress(Superseded):  # the run was closed under this turn; the next look shows it
                moved = turn()
        except Corrupt as error:
            report(run, error)
        heartbeat.beat()
        if not moved:
            stop.sleep(config.poll)
    return "saved"


def _supervise(tick: Tick, every: float, stop: StopFlag) -> None:
    """Ask the scheduler at a polite pace, in a thread of its own: it may hang."""
    while not stop.is_set():
        started = time.monotonic()
        try:
            tick.supervise()
        except Exception as error:  # a scheduler that does not answer is asked again; a run that cannot go on is closed
            print(f"supervise: {type(error).__name__}: {error}")
        pause = every * random.uniform(1.0, 1.1)  # so that the runs of a site do not ask all at once
        stop.sleep(max(0.0, pause - (time.monotonic() - started)))


def hosted(root: Path, attempt: str, incarnation: int, number: int) -> None:
    """The sidecar as a child of the trainer's first rank (`toolkit.launch.handover`)."""
    run = Run.open(root, attempt, incarnation)
    os.umask(int(run.config.cluster.umask, 8))
    main(run, "sidecar", number, 0, 1, StopFlag.install())


if __name__ == "__main__":
    hosted(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
