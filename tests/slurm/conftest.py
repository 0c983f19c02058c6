"""Real development clusters for tests: one for the session, and private ones for tests that break things."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

SLURM = Path(__file__).parents[2] / "slurm"
PATIENCE = 300.0  # seconds that Slurm may take on a busy machine
sys.path.insert(0, str(SLURM))  # a folder of scripts, no package

from devcluster import DevCluster, DevClusterError, missing_programs  # noqa: E402

if TYPE_CHECKING:
    from tests.slurm.runs import PayloadRun


def new_root() -> Path:
    """A directory for a cluster, not there yet: pytest's own are too long for the names of sockets."""
    return Path(f"/tmp/slurm-{secrets.token_hex(4)}")


@pytest.fixture(scope="session")
def slurm_programs() -> None:
    """Skips without Slurm's programs; under CI=true that is a failure."""
    if missing := missing_programs():
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up(f"NOT TESTED on Slurm: {', '.join(missing)} not installed; bash slurm/install.sh")


@pytest.fixture(scope="session")
def cluster(slurm_programs: None) -> Iterator[DevCluster]:
    """The session's cluster: four nodes, with accounting. Leave it as it was found."""
    with DevCluster(new_root()) as running:
        yield running


@pytest.fixture
def new_cluster(slurm_programs: None) -> Iterator[Callable[..., DevCluster]]:
    """Starts a private cluster for each call, with DevCluster's arguments but for ``root``."""
    started: list[DevCluster] = []

    def start(**arguments: int | str) -> DevCluster:
        started.append(DevCluster(new_root(), **arguments))
        return started[-1].start()

    yield start
    for private in started:
        private.stop()


def submit(cluster: DevCluster, *arguments: str) -> str:
    """sbatch without an output file; returns the job's id."""
    return cluster.run("sbatch", "--parsable", "--output=/dev/null", *arguments).stdout.strip()


def state(cluster: DevCluster, job: str) -> str | None:
    """The job's state for the controller; None if it knows no such job."""
    return next((row["state"] for row in cluster.jobs() if row["id"] == job), None)


def wait_until(condition: Callable[[], object], timeout: float = PATIENCE) -> None:
    """Poll until ``condition``; fails after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not so after {timeout:.0f} s"
        time.sleep(0.1)


def wait_for(cluster: DevCluster, job: str, *states: str, timeout: float = PATIENCE) -> None:
    """Wait until the controller has the job in one of ``states``; the failure says in which it was last."""
    deadline = time.monotonic() + timeout
    while (now := state(cluster, job)) not in states:
        assert time.monotonic() < deadline, f"job {job} is {now} after {timeout:.0f} s, not {' or '.join(states)}"
        time.sleep(0.1)


# ---------------------------------------------------------------------------------------------- runs around a payload


@pytest.fixture(scope="session")
def undisturbed(cluster: DevCluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The final weights of a payload run that nothing happened to."""
    from tests.slurm.runs import PayloadRun

    made = PayloadRun(cluster, tmp_path_factory.mktemp("undisturbed") / "run")
    made.tick()
    made.assert_sound()
    return made.weights()


@pytest.fixture
def make(cluster: DevCluster, tmp_path: Path) -> Iterator[Callable[..., PayloadRun]]:
    """Makes payload runs, on the session's cluster if no other is given. What is left of them is cancelled, and waited for."""
    from tests.slurm.runs import PayloadRun

    made: list[PayloadRun] = []

    def start(on: DevCluster = cluster, **arguments: Any) -> PayloadRun:
        made.append(PayloadRun(on, tmp_path / f"run{len(made)}", **arguments))
        return made[-1]

    yield start
    for left in made:
        # a test that failed while its controller was away
        with contextlib.suppress(DevClusterError, subprocess.TimeoutExpired):
            wait_until(lambda left=left: not _cancel(left))


def _cancel(run: PayloadRun) -> list[str]:
    """Cancel what is left of a run in the queue; returns what that was. To be called again: its roles may have submitted more."""
    if queue := run.in_queue():
        run.cluster.run("scancel", *queue, check=False)
    return queue
