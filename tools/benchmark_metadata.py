"""How many metadata operations the exchange costs: of each kind of record, and per shard of a whole run.

    python tools/benchmark_metadata.py [--shards 100 1000] [--directory DIR]

strace counts the operations that a shared filesystem's metadata server has to answer. First for one publication and one
read of each kind of record. Then for one turn of a worker beside others. Then for whole runs that differ only in their number
of shards: the trainer, two workers, the sidecar and its tick in one process that takes turns, so that nobody polls in vain
and the count is the same every time. Their loops and the exchange are the real ones; in the place of the models stand a few
lines of arithmetic, because only files are counted. What a shard costs must not depend on how many shards there are.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_advance import MemoryScheduler
from benchmark_records import SAMPLES, Maker, unsynced
from benchmark_tools import NO_STRACE, OPERATIONS, can_count, count_operations, print_table, section

from toolkit.exchange import layout, lineage
from toolkit.exchange.records import Ref, check
from toolkit.exchange.run import Run
from toolkit.launch.tick import Tick

WARM_START = 2  # shards of the first round
WORKERS = 2
FLEETS = (2, 50, 1000)  # workers


# ------------------------------------------------------------------------------------------- one record of each kind


def each_kind(root: Path) -> None:
    """What strace watches: publish and read a record of each kind."""
    maker = Maker.create(root, [1, 2])
    run, newest = maker.run, lineage.newest
    policy = layout.policy_name(1)
    publications: dict[str, tuple[Ref, Callable[[], object]]] = {
        "policy (1 file)": (layout.policy(0), lambda: maker.policy(0)),
        "checkpoint (2 files)": (layout.checkpoint(1), lambda: maker.checkpoint(newest(run.records), 2, 0, {})),
        "log-probs": (layout.logprobs(policy, "offline", 1, 1), lambda: maker.logprobs(policy, "offline", 1, 1)),
        "requests": (layout.requests(1, 1), lambda: maker.requests(1, 1)),
        "responses": (layout.responses(1, 1), lambda: maker.responses(1, 1)),
        "annotations": (layout.annotations(1, 1), lambda: maker.annotations(1, 1)),
        "meta batch": (layout.meta_batch(2), lambda: maker.meta_batch(2)),
        "intent (no file)": (layout.job("trainer", 1, "intent"), lambda: publish_intent(run)),
    }
    # The directories are there already, as for all shards of a bucket but the first.
    maker.checkpoint(None, 1, 0, {})
    maker.logprobs(policy, "offline", 1, 0)
    maker.requests(1, 0)
    maker.responses(1, 0)
    maker.annotations(1, 0)
    maker.meta_batch(1)
    maker.attempt("trainer", 0, "first")
    (root / "policies").mkdir(exist_ok=True)
    for name, (ref, publish) in publications.items():
        section(f"{name}: publish")
        publish()
        reader = Run.open(root)
        section(f"{name}: read")
        manifest = reader.records.require(ref)
        for entry in manifest.files:
            check(manifest, entry)
            (manifest.directory / entry.path).read_bytes()
        section("")


def publish_intent(run: Run) -> None:
    run.records.publish(layout.job("trainer", 1, "intent"), {"attempt": "second"})


# ------------------------------------------------------------------------------------------- a whole run


class Arithmetic:
    """The trainer's engine without a model: log-probs are sums of token ids, and stay what they are."""

    class layout:
        @staticmethod
        def describe() -> str:
            return "none"

    def load(self, folder: str) -> None: ...

    def load_weights(self, folder: Path) -> dict[str, Any]:
        return {}

    @contextmanager
    def swapped(self, weights: Mapping[str, Any]) -> Iterator[None]:
        yield

    def restart_schedule(self, steps: int) -> None: ...

    def reset_optimizer(self) -> None: ...

    def score(self, sequences: Sequence[np.ndarray], prompt_lengths: Sequence[int]) -> np.ndarray:
        pairs = zip(sequences, prompt_lengths, strict=True)
        return np.array([-float(ids[length:].sum()) for ids, length in pairs], np.float32)

    def train_step(self, batch: Any, loss: Any, denominator: int, before_update: Callable[..., None]) -> Any:
        import torch

        from toolkit.training.engine import StepResult

        def logprob(pair: Any, side: int) -> float:
            ids = pair.sequences[side] if side < len(pair.sequences) else None
            return 0.0 if ids is None else -float(ids[pair.prompt_length :].sum())

        logprobs = torch.tensor([[logprob(pair, side) for side in range(4)] for pair in batch.pairs])
        _, extras = loss(logprobs, torch.arange(len(batch.pairs)))
        kept = {name: value.numpy() for name, value in extras.items()} | {"logprobs": logprobs.numpy()}
        before_update(kept)
        return StepResult(kept, 1.0, 1e-3, batch.tokens, stepped=True)

    def save(self, directory: Path, average: object) -> None:
        for name in ("__0_0.distcp", "common.pt", "metadata.json", ".metadata"):
            (directory / name).write_bytes(b"weights")

    def export(self, directory: Path) -> None:
        for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
            (directory / name).write_bytes(b"weights")


def make_worker(maker: Maker, run: Run, slot: str) -> Any:
    """A worker whose responses and annotations are made up."""
    from toolkit.inference.worker import Worker
    from toolkit.signals import StopFlag

    class Writer(Worker):
        def _sample(self, index: int, shard: int) -> None:
            requests = self.run.records.table(self.run.records.require(layout.requests(index, shard)))
            maker.responses(index, shard, requests.filter(requests["sampled"])["pair_id"].to_pylist())

        def _annotate(self, index: int, shard: int) -> None:
            responses = self.run.records.table(self.run.records.require(layout.responses(index, shard)))
            maker.annotations(index, shard, responses["pair_id"].to_pylist()[::SAMPLES])

        def _evaluate(self, version: int) -> None:
            maker.evaluation(version)

    return Writer(run, slot, StopFlag())


def beside_others(root: Path) -> None:
    """What strace watches: turns of a worker beside more and more others, each of which samples a shard of its own."""
    maker = Maker.create(root, [1, max(FLEETS) + 100])
    for version in (0, 1):
        maker.policy(version)
    with unsynced():
        for shard in range(max(FLEETS) + 100):
            maker.requests(1, shard)
    worker, others = make_worker(maker, Run.open(root, "worker-0", 0), "worker-000"), 0
    for fleet in FLEETS:
        for number in range(others + 1, fleet):
            maker.heartbeat(f"worker-{number:03d}", f"a{number}", 1, [str(layout.responses(1, number))])
        others = fleet - 1
        section(f"a worker of {fleet:,}: sample or annotate a shard")
        worker._turn()
        section("")


def whole_run(root: Path, shards: int) -> None:
    """What strace watches: a run of one gated round of so many shards, after a short warm start."""
    import torch.distributed as dist

    from toolkit.sidecar.pending import Pending
    from toolkit.signals import StopFlag
    from toolkit.training.control import Control
    from toolkit.training.trainer import Trainer

    maker = Maker.create(root, [WARM_START, shards], retention={"grace": 0.0}, cluster={"control": "login"})

    def opened(attempt: str) -> Run:
        return Run.open(root, attempt, 0)

    workers = [make_worker(maker, opened(f"worker-{n}"), f"worker-{n:03d}") for n in range(WORKERS)]
    sidecar, tick = Pending(opened("sidecar")), Tick(opened("sidecar"), MemoryScheduler())
    for slot in ("trainer", "sidecar", *(worker.slot for worker in workers)):
        maker.attempt(slot, 0, slot)

    def others() -> None:
        section("workers")
        for worker in workers:
            worker._turn()
        section("sidecar")
        sidecar.turn()
        section("tick")
        tick.advance()
        section("trainer")

    class TakingTurns(Control):
        def wait(self, look: Callable[[], bool], *patience: object) -> None:
            while not look():
                others()

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    section("trainer")
    outcome = Trainer(opened("trainer"), Arithmetic(), TakingTurns(StopFlag()), None).train()
    while tick.run.closing() is None:
        others()
    section("")
    assert outcome == "done", outcome


def per_shard(counted: Mapping[str, Mapping[str, int]], shards: int) -> Iterator[list[object]]:
    for role in ("trainer", "workers", "sidecar", "tick"):
        values = [counted[role][kind] / (shards + WARM_START) for kind in OPERATIONS]
        yield [role, f"{shards:,}", *(f"{value:.1f}" for value in [*values, sum(values)])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[100, 1000], help="of each run's gated round")
    parser.add_argument("--directory", type=Path, help="where the runs are made (default: a temporary directory)")
    parser.add_argument("--watched", nargs=2, metavar=("WHAT", "ROOT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.watched:
        what, root = options.watched[0], Path(options.watched[1])
        {"each-kind": each_kind, "beside-others": beside_others}.get(what, lambda r: whole_run(r, int(what)))(root)
        return
    if not can_count():
        parser.error(NO_STRACE)
    parent = Path(tempfile.mkdtemp(prefix="benchmark-metadata-", dir=options.directory))

    def watch(what: str) -> dict[str, Any]:
        root = parent / what
        return count_operations([sys.executable, __file__, "--watched", what, str(root)], root)

    try:
        for what in ("each-kind", "beside-others"):
            found = {name: counts for name, counts in watch(what).items() if name}
            rows = [
                [name, *(counts[kind] for kind in OPERATIONS), sum(counts.values())] for name, counts in found.items()
            ]
            print_table([what.replace("-", " "), *OPERATIONS, "all"], rows)
            print()
        rows = [row for shards in options.shards for row in per_shard(watch(str(shards)), shards)]
        print_table(["operations per shard of", "a run of", *OPERATIONS, "all"], sorted(rows, key=lambda row: row[0]))
    finally:
        shutil.rmtree(parent)


if __name__ == "__main__":
    main()
