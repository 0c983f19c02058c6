"""What the job that keeps a run going does beside its role: it has its successor queued, and it may host the sidecar.

The keeper is the sidecar's job, or the trainer's where the sidecar has none of its own. Its successor waits in the queue for its end
(afterany), whatever that end is: so wall time, preemption and crashes of the keeper need nobody on a login node.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator

from toolkit.config import Config
from toolkit.exchange.run import Run
from toolkit.launch.adapter import adapter

RESTART = 5.0  # seconds after which a hosted sidecar that ended is started again


def keeper(config: Config) -> str:
    """The slot whose job keeps the run going."""
    return "trainer" if config.cluster.sidecar_in == "trainer" else "sidecar"


@contextlib.contextmanager
def sitting(run: Run, slot: str, number: int, job_id: str) -> Iterator[None]:
    """Around a role's main, on the first rank of its attempt ``number``."""
    cluster = run.config.cluster
    if slot != keeper(run.config):
        yield
        return
    queues = cluster.kind != "local" and cluster.control == "job"
    with _hosted_sidecar(run, number) if slot == "trainer" else contextlib.nullcontext():
        if queues:  # beside the role: a scheduler that hangs must not hold it up
            threading.Thread(target=_queue_successor, args=(run, slot, number + 1, job_id), daemon=True).start()
        yield
    if queues and run.closing(run.incarnation) is not None:
        from toolkit.launch.supervise import withdraw

        try:
            withdraw(Run.open(run.root, run.attempt), adapter(run.config))
        except Exception as error:  # what stays in the queue finds the run closed and ends at once
            print(f"handover: {type(error).__name__}: {error}")


def _queue_successor(run: Run, slot: str, number: int, job_id: str) -> None:
    from toolkit.launch.supervise import submit

    try:
        fresh = Run.open(run.root, run.attempt)
        submit(fresh, adapter(run.config), slot, number, int(run.incarnation or 0), after=job_id)
    except Exception as error:  # the tick finds the slot empty when this job has ended
        print(f"handover: {type(error).__name__}: {error}")


@contextlib.contextmanager
def _hosted_sidecar(run: Run, number: int) -> Iterator[None]:
    """A sidecar as a child of this process, started again when it ends, stopped with this block."""
    command = [
        sys.executable,
        "-m",
        "toolkit.sidecar.role",
        str(run.root),
        run.attempt,
        str(run.incarnation),
        str(number),
    ]
    over, child = threading.Event(), [subprocess.Popen(command)]

    def keep() -> None:
        while not over.is_set():
            child[0].wait()
            if over.wait(RESTART):
                return
            child[0] = subprocess.Popen(command)

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        child[0].terminate()
        thread.join(60)
        child[0].kill()
