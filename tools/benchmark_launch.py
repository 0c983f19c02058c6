"""From launch to the first optimizer step, and from a trainer's death to its next one, on the quickstart's toy world.

    python tools/benchmark_launch.py [--times 3] [--toy DIR] [--slurm] [key=value ...]

Launches the quickstart's run with the real trainer, worker and sidecar, waits until its first gated round trains, kills the
trainer with kill -9, waits for the next optimizer step, and cancels the run. The moments come from the run's records and
metrics; each row is the time since the one before, and the last row of each half is the sum. On this machine (cluster=local), or
with ``--slurm`` as jobs of a development cluster (slurm/devcluster.py), whose own latencies then count: Slurm
starts jobs every few seconds and reports their end late.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmark_tools import print_table

from toolkit.errors import UserError
from toolkit.exchange import layout
from toolkit.exchange.records import Manifest, Ref
from toolkit.exchange.run import Run
from toolkit.reporting import metrics

ROOT = Path(__file__).parents[1]
PATIENCE = 600.0  # seconds


def wait_for(found: Callable[[], Any], what: str) -> Any:
    """What ``found`` returns once it is not None."""
    deadline = time.monotonic() + PATIENCE
    while (value := found()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE:.0f} s in vain for {what}")
        time.sleep(0.05)
    return value


class Launched:
    """A run that was launched, and what its trainer's attempts did when."""

    def __init__(self, root: Path, arguments: list[str], environment: Mapping[str, str]) -> None:
        self.root, self.environment = root, environment
        self.time = time.time()
        self.log = (root.parent / f"{root.name}.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "toolkit.cli", "launch", *arguments, f"run={root}"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def find(self, ref: Ref, what: str) -> Manifest:
        """A record, once it is there."""

        def look() -> Manifest | None:
            if self.process.poll() not in (None, 0):
                raise RuntimeError(f"the launch failed: {Path(self.log.name).read_text()[-3000:]}")
            with contextlib.suppress(UserError):  # no run yet
                return Run.open(self.root).records.find(ref)
            return None

        return wait_for(look, what)

    def record(self, number: int, event: str) -> Manifest:
        """A record of the trainer's attempt, once it is there."""
        return self.find(layout.job("trainer", number, event), f"trainer attempt {number}: {event}")

    def line(self, number: int, matches: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """The first line of metrics of the trainer's attempt that matches, once it is there."""
        attempt = self.record(number, "intent").attributes["attempt"]

        def look() -> dict[str, Any] | None:
            lines = metrics.read(self.root)
            return next((line for line in lines if line["attempt"] == attempt and matches(line)), None)

        return wait_for(look, what)

    def kill_trainer(self) -> float:
        """kill -9; returns when."""
        os.kill(self.record(0, "start").attributes["pid"], signal.SIGKILL)
        return time.time()

    def cancel(self) -> None:
        command = [sys.executable, "-m", "toolkit.cli", "cancel", str(self.root)]
        subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, check=True, timeout=400)
        self.process.wait(120)
        self.log.close()


def is_step(line: dict[str, Any]) -> bool:
    return line["kind"] == "step"


def measure(run: Launched) -> dict[str, float]:
    """Moments in seconds since the epoch, in their order."""
    found = {"launch": run.time, "pairs prepared": run.find(layout.PAIRS, "the pairs").written}
    found["trainer's intent"] = run.record(0, "intent").written
    found["trainer started"] = run.record(0, "start").written
    found["model loaded"] = run.line(0, lambda line: line["kind"] == "start", "the model")["time"]
    found["first step"] = run.line(0, is_step, "the first step")["time"]
    run.line(0, lambda line: is_step(line) and line["round"] == 1, "a step of round 1")
    found["death"] = run.kill_trainer()
    found["death recorded"] = run.record(0, "end").written
    found["next intent"] = run.record(1, "intent").written
    found["next attempt started"] = run.record(1, "start").written
    found["checkpoint loaded"] = run.line(1, lambda line: line["kind"] == "restore", "the checkpoint")["time"]
    found["next step"] = run.line(1, is_step, "the next step")["time"]
    return found


def durations(moments: dict[str, float]) -> dict[str, float]:
    """Seconds of each phase, and of both halves as wholes."""
    names, found = list(moments), {}
    for before, after in pairwise(names):
        if after == "death":
            found["launch to first step"] = moments["first step"] - moments["launch"]
        else:
            found[f"… to {after}" if before not in ("launch", "death") else f"{before} to {after}"] = (
                moments[after] - moments[before]
            )
    found["death to next step"] = moments["next step"] - moments["death"]
    return found


@contextlib.contextmanager
def cluster(slurm: bool, parent: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The name of the cluster's profile, and the environment for its commands."""
    if not slurm:
        yield "local", dict(os.environ)
        return
    sys.path.append(str(ROOT / "slurm"))
    from devcluster import DevCluster

    with DevCluster(parent / "cluster") as dev:
        yield "devcluster", dev.env


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--toy", type=Path, default=ROOT / "toy-world", help="made if it is not there")
    parser.add_argument("--slurm", action="store_true", help="as Slurm jobs on a development cluster")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run's configuration")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    toy = options.toy.resolve()
    subprocess.run([sys.executable, "tools/toy_world.py", "--output", str(toy)], cwd=ROOT, check=True)
    parent = Path(tempfile.mkdtemp(prefix="bench-"))
    found: list[dict[str, float]] = []
    try:
        with cluster(options.slurm, parent) as (profile, environment):
            for number in range(options.times):
                arguments = ["experiment=quickstart", f"cluster={profile}", f"toy={toy}", *options.overrides]
                run = Launched(parent / f"run-{number}", arguments, environment)
                try:
                    found.append(durations(measure(run)))
                finally:
                    run.cancel()
                print(f"{number + 1} of {options.times}: {json.dumps(found[-1])}", flush=True)
    finally:
        shutil.rmtree(parent)
    rows = [
        [name, f"{median(run[name] for run in found):.1f}", *(f"{run[name]:.1f}" for run in found)] for name in found[0]
    ]
    print_table([f"seconds, cluster={profile}", "median", *(f"run {n + 1}" for n in range(len(found)))], rows)


if __name__ == "__main__":
    main()
