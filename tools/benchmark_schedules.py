"""Three schedules of the same work: streamed, phase by phase on the same split of cores, phase by phase with all cores in turn.

    python tools/benchmark_schedules.py [--rounds 2] [--pairs 1920] [--times 1] [--toy DIR]

The work is a MetaAPO run on a toy world with the real parts: a short warm start, then rounds of so many pairs. Nothing is
added to the toolkit for this; each schedule is a configuration of it:

streamed
    As shipped: shards of 64 pairs; the trainer has one core, the worker the other.
phases, same split
    A round is one shard, so that the worker can begin when all of the round is scored, and the trainer when all of it is
    annotated. Cores as above. (The worker so has all prompts of a round in one batch, which suits its engine.)
phases, all in turn
    A round is two shards, one for each of two workers; the trainer has two data-parallel ranks. A role that has nothing to do
    leaves at once (idle_exit) and is submitted again when there is work for it, so trainer and workers alternate on both
    cores. It starts anew each time: its reload is a process's start with its imports, a checkpoint or policy read, and a
    look of the supervisor.

Policies are not evaluated. Wall time is from the first policy's publication to the last one's. Cores held: from each attempt's
start to its end, as a cluster would bill them. CPU: what its processes computed, sampled from /proc. Idle: the part of the time held
in which a role waited for others; starting: from its start to its first activity, and loading policies. In a small world starting
weighs more than on a cluster, where rounds take hours; the columns tell it apart.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from benchmark_tools import print_table

from toolkit.cluster import role_of
from toolkit.exchange import layout
from toolkit.exchange.run import Run
from toolkit.launch.attempts import Attempt, attempts, known_slots
from toolkit.launch.job import ATTEMPT
from toolkit.reporting.timing import IDLE, STARTING, where_time_went

ROOT = Path(__file__).parents[1]
WARM_START = 64  # pairs
SAMPLE = 0.2  # seconds between two looks at /proc
TICKS = os.sysconf("SC_CLK_TCK")
ROLES = ("trainer", "worker")


def schedules(pairs: int, pinned: dict[str, Path]) -> dict[str, list[str]]:
    """Keys of the configuration for each schedule.

    Args:
        pinned: for each role, an interpreter that computes on that role's core alone.
    """
    split = [f"cluster.{role}.python={path}" for role, path in pinned.items()]
    return {
        "streamed": ["method.shard_size=64", *split],
        "phases, same split": [f"method.shard_size={pairs}", *split],
        "phases, all in turn": [
            f"method.shard_size={pairs // 2}",
            "trainer.data=2",
            "inference.workers=2",
            "trainer.idle_exit=2",
            "inference.idle_exit=1",
            "cluster.supervise=1",
        ],
    }


@contextlib.contextmanager
def cpu_seconds(found: dict[str, float]) -> Iterator[None]:
    """Add up the CPU seconds of every process of an attempt that lives meanwhile, by attempt."""
    seen: dict[tuple[str, str], tuple[str, float]] = {}  # by pid and process start: attempt, seconds
    over = threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE):
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError, StopIteration):
                    fields = (process / "stat").read_text().rpartition(")")[2].split()
                    environment = (process / "environ").read_bytes().split(b"\0")
                    entry = next(value for value in environment if value.startswith(f"{ATTEMPT}=".encode()))
                    attempt = entry.decode().partition("=")[2]
                    key = (process.name, fields[19])
                    seen[key] = (attempt, (int(fields[11]) + int(fields[12])) / TICKS)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for attempt, seconds in seen.values():
            found[attempt] = found.get(attempt, 0.0) + seconds


def perform(root: Path, toy: Path, overrides: list[str]) -> dict[str, float]:
    """Perform a run to its end; returns the CPU seconds of each attempt."""
    command = [sys.executable, "-m", "toolkit.cli", "launch", "experiment=quickstart", "cluster=local"]
    common = [f"toy={toy}", f"run={root}", "inference.does=[sample,annotate]", "data.heldout_prompts=8"]
    cpu: dict[str, float] = {}
    with cpu_seconds(cpu):
        done = subprocess.run([*command, *common, *overrides], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return cpu


def measured(name: str, run: Run, cpu: dict[str, float]) -> tuple[float, list[list[object]]]:
    """Wall seconds, and a row of the table for each role."""
    own = {slot: attempts(run, slot) for slot in known_slots(run)}
    where = where_time_went(run, [attempt for history in own.values() for attempt in history])
    first, last = (run.records.require(layout.policy(version)).written for version in (0, run.plan.rounds))
    wall, rows = last - first, []
    for role in ROLES:
        slots = [slot for slot in own if role_of(slot) == role]
        cores = run.config.trainer.data if role == "trainer" else 1
        held = sum(seconds_held(attempt) for slot in slots for attempt in own[slot])
        spent = {
            key: sum(where[slot].get(key, 0.0) for slot in slots) for key in ("wait", IDLE, STARTING, "load models")
        }
        used = sum(cpu.get(attempt.id, 0.0) for slot in slots for attempt in own[slot])
        rows.append(
            [
                name,
                f"{wall:.0f}",
                role,
                sum(len(own[slot]) for slot in slots),
                f"{cores * held / 3600:.3f}",
                f"{used / 3600:.3f}",
                f"{(spent['wait'] + spent[IDLE]) / held:.0%}",
                f"{(spent[STARTING] + spent['load policy']) / held:.0%}",
            ]
        )
    return wall, rows


def seconds_held(attempt: Attempt) -> float:
    if attempt.start is None or attempt.end is None or attempt.outcome == "voided":
        return 0.0
    return attempt.end.written - attempt.start.written


def interpreter(path: Path, core: int) -> Path:
    """A program that is this Python on one core."""
    path.write_text(f'#!/bin/sh\nexec taskset -c {core} "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="gated rounds")
    parser.add_argument("--pairs", type=int, default=1920, help="of a gated round, a multiple of 64")
    parser.add_argument("--times", type=int, default=1, help="how often all three are done, one after the other")
    parser.add_argument("--toy", type=Path, default=ROOT / "toy-world-large", help="a toy world of 4,096 pairs")
    options = parser.parse_args()
    if options.pairs % 64 or options.pairs * options.rounds + WARM_START > 4000:
        parser.error("--pairs must be a multiple of 64, and all rounds together at most 3,900 pairs")
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        parser.error("two cores are needed")
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    toy = options.toy.resolve()
    make = [sys.executable, "tools/toy_world.py", "--output", str(toy), "--pairs", "4096"]
    subprocess.run(make, cwd=ROOT, check=True, capture_output=True)
    parent = Path(tempfile.mkdtemp(prefix="benchmark-schedules-"))
    size = [
        f"method.rounds={options.rounds}",
        f"method.warm_start_pairs={WARM_START}",
        f"data.max_pairs={options.rounds * options.pairs + WARM_START}",
    ]
    header = ["schedule", "wall s", "role", "attempts", "core-hours held", "CPU-hours", "idle", "starting"]
    try:
        pinned = {role: interpreter(parent / role, core) for role, core in zip(ROLES, cores, strict=True)}
        for time in range(options.times):
            walls, rows = {}, []
            for name, overrides in schedules(options.pairs, pinned).items():
                root = parent / f"run-{time}-{len(walls)}"
                cpu = perform(root, toy, [*size, *overrides])
                walls[name], own = measured(name, Run.open(root), cpu)
                rows += own
                print(f"{name}: {walls[name]:.0f} s, load of the machine {os.getloadavg()[0]:.1f}", flush=True)
            print_table(header, rows)
            for name in list(walls)[1:]:
                print(f"{name} / streamed: {walls[name] / walls['streamed']:.2f} of the wall time")
    finally:
        shutil.rmtree(parent)


if __name__ == "__main__":
    main()
