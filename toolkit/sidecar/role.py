"""The sidecar: one small process that derives, ticks, and can be killed at any moment."""

from __future__ import annotations

import contextlib
import threading
import time

from toolkit.exchange.jobs import Heartbeat
from toolkit.exchange.records import Superseded
from toolkit.exchange.run import Run
from toolkit.launch.adapter import adapter
from toolkit.launch.tick import Tick
from toolkit.reporting.metrics import MetricsWriter
from toolkit.sidecar.pending import Pending
from toolkit.signals import StopFlag


def main(run: Run, slot: str, number: int, rank: int, size: int, stop: StopFlag) -> str:
    """Run the sidecar until the run is closed.

    Returns:
        ``done`` or ``saved``.
    """
    metrics = MetricsWriter(run.root, slot, run.attempt)
    pending = Pending(run, metrics.write)
    tick = Tick(Run.open(run.root, run.attempt), adapter(run.config))
    heartbeat = Heartbeat(run.root, slot, run.attempt)
    config = run.config.sidecar
    supervisor = threading.Thread(target=_supervise, args=(tick, config.supervise, stop), daemon=True)
    supervisor.start()
    while not stop.is_set():
        with contextlib.suppress(Superseded):  # the run was closed under this turn; that is met below
            while pending.turn():
                pass
        tick.advance()
        heartbeat.beat([])
        if run.closing(run.incarnation) is not None:
            return "done"
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
        stop.sleep(max(0.0, every - (time.monotonic() - started)))
