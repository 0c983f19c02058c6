"""How long the control plane's looks take on a large run, and how many files they touch.

    python tools/benchmark_advance.py [--shards 10000] [--workers 1000] [--times 20] [--directory DIR]

Makes a run directory of real records (without fsync; that is not what is measured): a warm start and four gated rounds,
the third round half done, with its checkpoints, meta batches and meta-learner versions; a trainer with a dozen attempts;
workers of which a tenth died once. Finished rounds have scores, requests, responses and annotations of every shard; log-probs
under references, which nothing here looks at, are left out. Then the run goes on, a few shards between any two looks, and it
measures ``Tick.advance`` (records only, every few seconds) and ``Supervisor.supervise`` (with a scheduler in memory, once a
minute). File operations are counted by strace, on the same run standing still. ``--directory`` puts the run on another
filesystem.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from benchmark_records import BATCH, SHARD, Maker, unsynced
from benchmark_tools import NO_STRACE, OPERATIONS, can_count, count_operations, print_table, section

from toolkit.config import RetentionConfig
from toolkit.exchange import layout
from toolkit.exchange.retention import collect_garbage
from toolkit.exchange.run import Run
from toolkit.launch.adapter import Job, JobSpec, State
from toolkit.launch.tick import Tick

ROUNDS = 5
CURRENT = 2  # the round in flight
STEPS = SHARD // BATCH  # a shard
CHECKPOINT_STEPS = 50
META_STEPS = 8
TRAINER_ATTEMPTS = 12
MOVES = 16  # shards that go on between two looks


class MemoryScheduler:
    """Every job runs."""

    same_machine = False

    def submit(self, job: JobSpec) -> str:
        raise AssertionError(f"{job.slot} was submitted although it runs")

    def look(self, attempts: Collection[str], since: float = 0.0) -> dict[str, Job]:
        return {attempt: Job(State.RUNNING) for attempt in attempts}

    def room(self) -> int | None:
        return None

    def cancel(self, jobs: Collection[str], kill: bool = False) -> None:
        raise AssertionError("a job that runs was cancelled")


def make(root: Path, shards: int, workers: int) -> Iterator[None]:
    """Make the run. Then each ``next`` lets it go on: a few shards are sampled, annotated and trained."""
    per_round = max(1, shards // ROUNDS)
    maker = Maker.create(
        root,
        [per_round] * ROUNDS,
        inference={"workers": workers},
        trainer={"checkpoint_steps": CHECKPOINT_STEPS},
        retention={"grace": 0.0},
        cluster={"control": "login"},  # nothing is submitted behind what runs
    )
    newest = None

    def train(first: int, last: int, index: int) -> None:
        """Checkpoints and meta boundaries of steps ``first .. last - 1``."""
        nonlocal newest
        for step in range(first + 1, last + 1):
            ends_round = step % (per_round * STEPS) == 0
            if step % CHECKPOINT_STEPS == 0 or ends_round:
                newest = maker.checkpoint(newest, step, index + ends_round, {})
                if ends_round:
                    maker.policy(index + 1)
            if index and step % META_STEPS == 0:
                boundary = (step - per_round * STEPS) // META_STEPS
                maker.meta_batch(boundary)
                maker.run.records.publish(layout.phi(boundary), {"version": boundary}, blobs={".safetensors": b"phi"})

    maker.policy(0)
    train(0, per_round * STEPS, 0)
    for index in range(1, CURRENT):
        for shard in range(per_round):
            maker.logprobs(layout.policy_name(index), "offline", index, shard)
            maker.requests(index, shard)
            maker.responses(index, shard)
            maker.annotations(index, shard)
        train(index * per_round * STEPS, (index + 1) * per_round * STEPS, index)
    for version in range(CURRENT):
        maker.evaluation(version)
    for shard in range(per_round):
        maker.logprobs(layout.policy_name(CURRENT), "offline", CURRENT, shard)
        maker.requests(CURRENT, shard)
    sampled, annotated, trained = per_round * 6 // 10, per_round * 55 // 100, per_round // 2
    for shard in range(sampled):
        maker.responses(CURRENT, shard)
    for shard in [*range(annotated), *range(annotated + 3, sampled, 7)]:  # some workers are ahead of others
        maker.annotations(CURRENT, shard)
    start = CURRENT * per_round * STEPS
    train(start, start + trained * STEPS, CURRENT)
    for number in range(TRAINER_ATTEMPTS):
        last = number == TRAINER_ATTEMPTS - 1
        death = {"outcome": "died", "kind": "preempted", "message": "preempted", "seconds": 3600.0}
        maker.attempt("trainer", number, f"trainer-{number}", None if last else death)
    maker.attempt("sidecar", 0, "sidecar-0")
    for number in range(workers):
        slot, died = f"worker-{number:03d}", number % 10 == 0
        if died:
            death = {"outcome": "died", "kind": "preempted", "message": "preempted", "seconds": 600.0}
            maker.attempt(slot, 0, f"{slot}-first", death)
        maker.attempt(slot, int(died), slot)
        maker.heartbeat(slot, slot, 1, [str(layout.responses(CURRENT, number % per_round))])
    metrics(root, start + trained * STEPS)
    collect_garbage(maker.run)  # as the ticks would have done all along
    config = maker.run.config
    maker.run.set_operations(dataclasses.replace(config, retention=RetentionConfig()))
    yield
    while True:
        for _ in range(MOVES):
            if sampled < per_round:
                maker.responses(CURRENT, sampled)
                sampled += 1
            if annotated < sampled:
                maker.annotations(CURRENT, annotated)
                annotated += 1
            if trained < annotated:
                train(start + trained * STEPS, start + (trained + 1) * STEPS, CURRENT)
                trained += 1
        yield


def metrics(root: Path, step: int) -> None:
    """The metrics of the trainer's newest attempt."""
    directory = root / "metrics"
    directory.mkdir(exist_ok=True)
    first = max(0, step - 5000)
    lines = [{"time": 0.0, "kind": "restore", "step": first, "round": CURRENT}]
    for number in range(first, step):
        lines.append({"time": number / 2, "kind": "step", "step": number, "tokens": 1000, "seconds": 0.4, "loss": 0.7})
    name = f"trainer.trainer-{TRAINER_ATTEMPTS - 1}.jsonl"
    (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(root: Path, going_on: Iterator[None], times: int) -> dict[str, list[float]]:
    """Seconds of each look, by what it is."""
    found: dict[str, list[float]] = {}
    tick = new_tick(root)
    found["advance, the first ever"] = [seconds(tick.advance)]
    found["supervise, the first of a process"] = [seconds(tick.supervise)]
    again = found["advance, again and again"] = []
    fresh = found["advance, by a fresh process"] = []
    supervise = found["supervise, again and again"] = []
    for number in range(times):
        with unsynced():
            next(going_on)
        again.append(seconds(tick.advance))
        if number % 4 == 0:
            fresh.append(seconds(lambda: new_tick(root).advance()))
            supervise.append(seconds(tick.supervise))
    return found


def new_tick(root: Path) -> Tick:
    return Tick(Run.open(root, "benchmark"), MemoryScheduler())


def look(root: Path) -> None:
    """What strace watches: one look of each kind, on a run that stands still."""
    section("advance, by a fresh process")
    tick = new_tick(root)
    tick.advance()
    section("advance, again and again")
    tick.advance()
    section("supervise, the first of a process")
    tick.supervise()
    section("supervise, again and again")
    tick.supervise()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=1_000)
    parser.add_argument("--times", type=int, default=20, help="looks of each kind")
    parser.add_argument("--directory", type=Path, help="where the run is made (default: a temporary directory)")
    parser.add_argument("--look", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.look is not None:
        look(options.look)
        return
    root = Path(tempfile.mkdtemp(prefix="benchmark-advance-", dir=options.directory)) / "run"
    try:
        with unsynced():
            going_on = make(root, options.shards, options.workers)
            made = seconds(lambda: next(going_on))
        print(f"{options.shards:,} shards and {options.workers:,} workers made in {made:.0f} s", flush=True)
        times = measure(root, going_on, options.times)
        watched = [sys.executable, __file__, "--look", str(root)]
        counted = count_operations(watched, root) if can_count() else {}
        rows = []
        for name, values in times.items():
            own = counted.get(name)
            counts = [own[kind] for kind in OPERATIONS] if own is not None else [""] * len(OPERATIONS)
            rows.append([name, len(values), f"{statistics.median(values):.3f}", f"{max(values):.3f}", *counts])
        print_table(["look", "times", "median s", "worst s", *OPERATIONS], rows)
        if not counted:
            print(NO_STRACE)
    finally:
        shutil.rmtree(root.parent)


if __name__ == "__main__":
    main()
