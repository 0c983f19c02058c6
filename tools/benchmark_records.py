"""Runs of real records without a model, as large as wanted: what the benchmarks of the control plane look at."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from toolkit import config as configuration
from toolkit.config import Config
from toolkit.exchange import filesystem, layout, lineage, tables
from toolkit.exchange.lineage import Progress
from toolkit.exchange.records import File, Manifest, Ref
from toolkit.exchange.run import Run

SHARD, BATCH = 8, 2  # pairs of a shard, of an optimizer step
SAMPLES = 2


def make_config(root: Path, rounds: int, **groups: Any) -> Config:
    """A MetaAPO configuration: a warm start and ``rounds`` gated rounds. ``groups`` change keys of a group."""
    values: dict[str, Any] = {
        "data": {"path": "pairs.jsonl"},
        "model": {"policy": "policy-folder"},
        "reward": {"model": "reward-folder"},
        "method": {
            "rounds": rounds,
            "warm_start": "offline_round",
            "shard_size": SHARD,
            "global_batch": BATCH,
            "sampling": {"samples": SAMPLES},
            "meta": {"feature": "log_sigmoid_beta"},
        },
        "run": str(root),
    }
    for group, keys in groups.items():
        values[group] = values.get(group, {}) | keys
    return configuration.build(Config, values)


@contextlib.contextmanager
def unsynced() -> Iterator[None]:
    """Without fsync, for what is made only to be looked at."""
    real, os.fsync = os.fsync, lambda descriptor: None
    try:
        yield
    finally:
        os.fsync = real


class Maker:
    """Publishes a run's records as the roles would; every pair is asked for and gets an online half.

    Args:
        run: an existing run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    @classmethod
    def create(cls, root: Path, shards: list[int], **groups: Any) -> Maker:
        """A new run with prepared pairs: ``shards`` of each round, the warm start first."""
        made = cls(Run.create(root, make_config(root, len(shards) - 1, **groups), "benchmark"))
        blobs = {}
        for index, count in enumerate(shards):
            positions = np.arange(count * SHARD)
            size = len(positions)
            columns = {
                "pair_id": [f"r{index}-{position}" for position in positions],
                "row": positions,
                "round": np.full(size, index, np.int32),
                "shard": (positions // SHARD).astype(np.int32),
                "position": positions.astype(np.int32),
                "prompt": [[{"role": "user", "content": "?"}]] * size,
                "chosen": ["yes"] * size,
                "rejected": ["no"] * size,
                "prompt_ids": [[1]] * size,
                "chosen_ids": [[2, 9]] * size,
                "rejected_ids": [[3, 9]] * size,
            }
            table = tables.conform(pa.table(columns, schema=tables.PAIRS), tables.PAIRS)
            blobs[f".round-{index:03d}.parquet"] = tables.to_parquet(table, [SHARD] * count)
        blobs[".heldout.parquet"] = tables.to_parquet(tables.HELDOUT.empty_table())
        attributes = {
            "pairs_per_round": [count * SHARD for count in shards],
            "digests": {"tokenizer": "t", "template": "t"},
            "counts": {},
        }
        made.run.records.publish(layout.PAIRS, attributes, blobs=blobs)
        return made

    def _publish(self, ref: Ref, table: pa.Table | None = None, **attributes: Any) -> Manifest:
        return self.run.records.publish(ref, attributes | self.run.provenance, table=table)[0]

    def _ids(self, shard: int, index: int) -> list[str]:
        return [f"r{index}-{position}" for position in range(shard * SHARD, (shard + 1) * SHARD)]

    def policy(self, version: int) -> None:
        """A policy of one small file; its source is the newest checkpoint."""
        ref, newest = layout.policy(version), lineage.newest(self.run.records)
        source = {"model": "policy-folder"} if version == 0 or newest is None else {"checkpoint": newest.digest}
        self.run.records.publish(ref, {"version": version, "source": source}, blobs={".safetensors": b"weights"})

    def logprobs(self, weights: str, half: str, index: int, shard: int) -> None:
        ids = self._ids(shard, index)
        values = np.linspace(-9, -1, SHARD, dtype=np.float32) + 0.1 * index
        counts = np.full(SHARD, 2, np.int32)
        columns = {"pair_id": ids, "chosen": values, "rejected": values[::-1]}
        columns |= {"chosen_tokens": counts, "rejected_tokens": counts}
        table = tables.conform(pa.table(columns), tables.LOGPROBS)
        self._publish(layout.logprobs(weights, half, index, shard), table, round=index, shard=shard)

    def requests(self, index: int, shard: int) -> None:
        w_gate = np.linspace(0.1, 0.8, SHARD, dtype=np.float32)
        columns = {
            "pair_id": self._ids(shard, index),
            "s": np.log(w_gate),
            "u": np.full(SHARD, 0.9),
            "w_gate": w_gate,
            "sampled": np.full(SHARD, True),
        }
        table = tables.conform(pa.table(columns), tables.REQUESTS)
        self._publish(layout.requests(index, shard), table, round=index, shard=shard, phi=0, sampled=SHARD)

    def responses(self, index: int, shard: int, asked: list[str] | None = None) -> None:
        """Responses to a shard's pairs, or to those ``asked`` for."""
        rows = [
            {
                "pair_id": key,
                "sample": sample,
                "token_ids": [5 + sample, 9],
                "text": "yes",
                "finish_reason": "stop",
                "logprob": -3.0,
                "seed": sample,
            }
            for key in (self._ids(shard, index) if asked is None else asked)
            for sample in range(SAMPLES)
        ]
        table = pa.Table.from_pylist(rows, tables.RESPONSES)
        self._publish(layout.responses(index, shard), table, round=index, shard=shard)

    def annotations(self, index: int, shard: int, asked: list[str] | None = None) -> None:
        ids = self._ids(shard, index) if asked is None else asked
        row = {"outcome": "pair", "rewards": [1.5, 0.5], "chosen_sample": 0, "rejected_sample": 1}
        row |= {"chosen_ids": [5, 9], "rejected_ids": [6, 9], "chosen_reward": 1.5, "rejected_reward": 0.5}
        table = pa.Table.from_pylist([{"pair_id": key, **row} for key in ids], tables.ANNOTATIONS)
        self._publish(layout.annotations(index, shard), table, round=index, shard=shard, outcomes={"pair": len(ids)})

    def evaluation(self, version: int) -> None:
        self._publish(layout.evaluation(version), tables.EVALUATION.empty_table(), version=version)

    def meta_batch(self, boundary: int) -> None:
        columns = {"pair_id": [f"m{row}" for row in range(BATCH)], "step": [0] * BATCH}
        columns |= {name: [0.5] * BATCH for name in ("s", "loss_offline", "loss_online", "w_gate")}
        table = tables.conform(pa.table(columns), tables.META_BATCH)
        self._publish(layout.meta_batch(boundary), table, boundary=boundary)

    def checkpoint(self, parent: Manifest | None, step: int, index: int, consumed: dict[str, str]) -> Manifest:
        """A checkpoint with a directory of two small files."""
        number = 0 if parent is None else lineage.sequence(parent) + 1
        first = 0 if parent is None else int(parent.attributes["step"])
        stage = self.run.records.stage(layout.checkpoint(number), private=True)
        files = []
        for name in ("__0_0.distcp", "common.pt"):
            (stage / name).write_bytes(b"weights")
            files.append(file_entry(stage / name))
        at = Progress(step, index, 0)
        return lineage.publish(self.run.records, parent, at, consumed, first, files, {"layout": "tp1"})

    def attempt(self, slot: str, number: int, name: str, end: dict[str, Any] | None = None) -> None:
        """An attempt that started, and its end if it has one."""
        publish = self.run.records.publish
        intent = {"attempt": name, "slot": slot, "number": number, "incarnation": 0, "progress": [], "code": "c"}
        publish(layout.job(slot, number, "intent"), intent | {"operations": 0, "gpus": int(slot != "sidecar")})
        start = {"kind": "started", "job": f"{number}", "host": "n1", "nodes": "n1"}
        publish(layout.job(slot, number, "start"), start | {"boot_id": "b", "pid": 1, "process_start": "1"})
        if end is not None:
            publish(layout.job(slot, number, "end"), end)

    def heartbeat(self, slot: str, attempt: str, counter: int, working_on: list[str]) -> None:
        path = self.run.root / "heartbeats" / f"{slot}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"attempt": attempt, "counter": counter, "working_on": working_on}))


def file_entry(path: Path) -> File:
    """The entry of a staged file, its path relative to the record's directory."""
    return File(f"{path.parent.name}/{path.name}", path.stat().st_size, filesystem.digest(path))
