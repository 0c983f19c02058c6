"""The inference worker as a job."""

from __future__ import annotations

from toolkit.exchange.run import Run
from toolkit.inference import environment
from toolkit.signals import StopFlag


def main(run: Run, slot: str, number: int, rank: int, size: int, stop: StopFlag) -> str:
    """Sample, annotate and evaluate until the run is closed.

    Returns:
        ``done``, ``saved`` (told to stop) or ``starved`` (nothing to do for too long).
    """
    environment.prepare()  # before anything imports torch or vllm
    from toolkit.inference import staging
    from toolkit.inference.worker import Worker

    with staging.tidied(run.records, slot):
        return Worker(run, slot, stop).work()
