"""What the job that keeps a run going does beside its role: it hosts the sidecar, and clears the queue when the run is over.

The keeper is the sidecar's job, or the trainer's where the sidecar has none of its own. Its successor waits in the queue for its end
(afterany), whatever that end is (`Supervisor`): so wall time, preemption and crashes of the keeper need nobody on a login node.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from toolkit.config import Config
from toolkit.exchange import hints
from toolkit.exchange.run import Run
from toolkit.launch.adapter import adapter
from toolkit.launch.attempts import slots

RESTART = 5.0  # seconds after which a hosted sidecar that ended is started again
UNTENDED = 20  # looks at the scheduler missed after which the other jobs do the keeper's work


def keeper(config: Config) -> str:
    """The slot whose job keeps the run going: where there is no sidecar to do it, as in offline training, the trainer's."""
    alone = config.cluster.kind != "local" and "sidecar" not in slots(config)
    return "trainer" if alone or config.cluster.sidecar_in == "trainer" else "sidecar"


@contextlib.contextmanager
def sitting(run: Run, slot: str, number: int) -> Iterator[None]:
    """Around a role's main, on the first rank of its attempt ``number``."""
    if slot != keeper(run.config):
        threading.Thread(target=_watch, args=(run,), daemon=True).start()
        yield
        return
    with _hosted_sidecar(run, number) if slot == "trainer" else contextlib.nullcontext():
        yield
        if slot == "trainer":
            _wait_for_the_end(run)
    cluster = run.config.cluster
    if cluster.kind != "local" and cluster.control == "job" and run.closing(run.incarnation) is not None:
        from toolkit.launch.supervise import withdraw

        try:
            withdraw(Run.open(run.root, run.attempt), adapter(run.config))
        except Exception as error:  # what stays in the queue finds the run closed and ends at once
            print(f"handover: {type(error).__name__}: {error}")


def _wait_for_the_end(run: Run) -> None:
    """A trainer that is done stays until its sidecar has seen the last evaluation in and closed the run, for a bounded time."""
    deadline = time.monotonic() + run.config.trainer.idle_exit
    while run.finished() and run.closing(run.incarnation) is None and time.monotonic() < deadline:
        time.sleep(min(1.0, run.config.sidecar.poll))


def _watch(run: Run) -> None:
    """Tick if nobody else does: a crashed controller may have lost both the keeper's job and its successor's."""
    cluster, pace = run.config.cluster, run.config.cluster.supervise
    if cluster.kind == "local" or cluster.control != "job":
        return
    seen, since = 0.0, time.monotonic()
    while run.closing(run.incarnation) is None:
        time.sleep(pace * random.uniform(1.0, 2.0))
        written = hints.status(run.root).get("written", 0.0)
        if written != seen:
            seen, since = written, time.monotonic()
        elif time.monotonic() - since > UNTENDED * pace:
            from toolkit.launch.tick import Tick

            print("nobody keeps this run going: doing it from here")
            with contextlib.suppress(Exception):  # tried again at the next turn
                tick = Tick(Run.open(run.root, run.attempt), adapter(run.config))
                tick.advance()
                tick.supervise()


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
