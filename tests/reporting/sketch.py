"""A small run directory made of real records: a warm-start round of 1 shard and two gated rounds of 2 shards, 4 pairs a shard."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from toolkit import config as configuration
from toolkit.config import Config
from toolkit.exchange import layout, lineage, tables
from toolkit.exchange.lineage import Progress
from toolkit.exchange.records import File
from toolkit.exchange.run import Run

PAIRS_PER_ROUND = [4, 8, 8]
STEPS = [0, 2, 6, 10]  # optimizer steps done at each round's start, and in the end
SAMPLES = 2


def make_config(root: Path, **method: Any) -> Config:
    values = {
        "data": {"path": "pairs.parquet", "heldout_prompts": 4},
        "model": {"policy": "policy-folder"},
        "reward": {"model": "reward-folder"},
        "method": {
            "rounds": 2,
            "warm_start": "offline_round",
            "global_batch": 2,
            "shard_size": 4,
            "sampling": {"samples": SAMPLES},
            "meta": {"interval": 2, "feature": "log_sigmoid_beta"},
        }
        | method,
        "run": str(root),
    }
    return configuration.build(Config, values)


class Sketch:
    """Publishes a run's records one by one, as the roles would."""

    def __init__(self, root: Path, pairs_per_round: list[int] | None = None, **method: Any) -> None:
        self.run = Run.create(root, make_config(root, **method), "test")
        self.root = root
        self.pairs_per_round = pairs_per_round or PAIRS_PER_ROUND
        self.parent: Any = None

    def reopen(self) -> Run:
        """The run as another process sees it."""
        return Run.open(self.root)

    def ids(self, index: int, shard: int) -> list[str]:
        size = self.run.config.method.shard_size
        count = min(size, self.pairs_per_round[index] - shard * size)
        return [f"r{index}-{shard * size + row}" for row in range(count)]

    def pairs(self, prompt: str = "What is <b>two</b> & two?", heldout: int = 4) -> None:
        size = self.run.config.method.shard_size
        blobs = {}
        for index, count in enumerate(self.pairs_per_round):
            shards = range(-(-count // size))
            keys = [(shard, key) for shard in shards for key in self.ids(index, shard)]
            rows = [
                {
                    "pair_id": key,
                    "row": position,
                    "round": index,
                    "shard": shard,
                    "position": position,
                    "prompt": [{"role": "user", "content": f"{prompt} ({key})"}],
                    "chosen": "It is <i>four</i>.",
                    "rejected": "It is five.",
                    "prompt_ids": [1, 2],
                    "chosen_ids": [3, 9],
                    "rejected_ids": [4, 9],
                }
                for position, (shard, key) in enumerate(keys)
            ]
            sizes = [len(self.ids(index, shard)) for shard in shards]
            blobs[f".round-{index:03d}.parquet"] = tables.to_parquet(pa.Table.from_pylist(rows, tables.PAIRS), sizes)
        held = [
            {
                "prompt_id": f"h{i}",
                "row": 100 + i,
                "prompt": [{"role": "user", "content": f"Held <{i}>"}],
                "prompt_ids": [1],
                "chosen": "Yes.",
            }
            for i in range(heldout)
        ]
        blobs[".heldout.parquet"] = tables.to_parquet(pa.Table.from_pylist(held, tables.HELDOUT))
        blobs[".dropped.parquet"] = tables.to_parquet(tables.DROPPED.empty_table())
        attributes = {
            "pairs_per_round": self.pairs_per_round,
            "digests": {"template": "aa", "tokenizer": "bb"},
            "counts": {"rows": 30, "pairs": sum(self.pairs_per_round), "heldout": heldout, "dropped": {"too_long": 6}},
        }
        self.run.records.publish(layout.PAIRS, attributes, blobs=blobs)

    def policy(self, version: int) -> None:
        ref, data = layout.policy(version), b"{}"
        folder = self.run.records.stage(ref)
        (folder / "config.json").write_bytes(data)
        file = File(f"{folder.name}/config.json", len(data), hashlib.sha256(data).hexdigest())
        self.run.records.publish(ref, {"version": version}, staged=[file])

    def scores(self, index: int, shard: int) -> None:
        ids = self.ids(index, shard)
        columns = {"pair_id": ids, **dict.fromkeys(("chosen", "rejected"), [-1.0] * len(ids))}
        columns |= dict.fromkeys(("chosen_tokens", "rejected_tokens"), [2] * len(ids))
        table = tables.conform(pa.table(columns), tables.LOGPROBS)
        self.run.records.publish(layout.logprobs(layout.policy_name(index), "offline", index, shard), {}, table=table)

    def requests(
        self, index: int, shard: int, sampled: list[bool], s: list[float] | None = None, w: list[float] | None = None
    ) -> None:
        count = len(sampled)
        columns = {
            "pair_id": self.ids(index, shard),
            "s": s or list(np.linspace(-2, 0, count)),
            "u": [0.99 if asked else 0.01 for asked in sampled],
            "w_gate": w or list(np.linspace(0.2, 0.8, count)),
            "sampled": sampled,
        }
        table = tables.conform(pa.table(columns), tables.REQUESTS)
        attributes = {"round": index, "shard": shard, "phi": 0, "sampled": sum(sampled)}
        self.run.records.publish(layout.requests(index, shard), attributes, table=table)

    def responses(
        self, index: int, shard: int, asked: list[str], texts: tuple[str, ...] = ("good <ok>", "bad")
    ) -> None:
        rows = [
            {
                "pair_id": key,
                "sample": sample,
                "token_ids": [5, 9],
                "text": f"{text} {key}",
                "finish_reason": ("stop", "length")[sample % 2],
                "logprob": -3.0,
                "seed": sample,
            }
            for key in asked
            for sample, text in enumerate(texts)
        ]
        table = pa.Table.from_pylist(rows, tables.RESPONSES)
        self.run.records.publish(layout.responses(index, shard), {"round": index, "shard": shard}, table=table)

    def annotations(self, index: int, shard: int, outcomes: dict[str, str]) -> None:
        """``outcomes`` by pair id."""
        rows = []
        for key, outcome in outcomes.items():
            row: dict[str, Any] = {"pair_id": key, "outcome": outcome, "rewards": [1.5, 0.5]}
            if outcome == "pair":
                row |= {"chosen_sample": 0, "rejected_sample": 1, "chosen_ids": [5, 9], "rejected_ids": [6, 9]}
                row |= {"chosen_reward": 1.5, "rejected_reward": 0.5}
            rows.append(row)
        counts: dict[str, int] = {}
        for outcome in outcomes.values():
            counts[outcome] = counts.get(outcome, 0) + 1
        table = pa.Table.from_pylist(rows, tables.ANNOTATIONS)
        attributes = {"round": index, "shard": shard, "outcomes": counts}
        self.run.records.publish(layout.annotations(index, shard), attributes, table=table)

    def evaluation(
        self, version: int, rewards: list[float], gold: list[float], tokens: int = 2, finish: str = "stop"
    ) -> None:
        rows = [
            {
                "prompt_id": f"h{i}",
                "token_ids": [7] * tokens,
                "text": f"answer <{version}> to {i}",
                "finish_reason": finish,
                "reward": reward,
                "metrics": [{"name": "gold", "value": value}],
            }
            for i, (reward, value) in enumerate(zip(rewards, gold, strict=True))
        ]
        table = pa.Table.from_pylist(rows, tables.EVALUATION)
        self.run.records.publish(layout.evaluation(version), {"version": version}, table=table)

    def checkpoint(self, step: int, index: int) -> None:
        at = Progress(step, index, 0)
        self.parent = lineage.publish(self.run.records, self.parent, at, {}, 0, [], {})

    def meta_batch(self, boundary: int, rows: list[tuple[float, float, float, float]]) -> None:
        """``rows``: s, loss_offline, loss_online, w_gate."""
        names = ("s", "loss_offline", "loss_online", "w_gate")
        columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
        columns |= {"pair_id": [f"m{i}" for i in range(len(rows))], "step": [0] * len(rows)}
        table = tables.conform(pa.table(columns), tables.META_BATCH)
        self.run.records.publish(layout.meta_batch(boundary), {"boundary": boundary}, table=table)

    def attempt(
        self,
        slot: str,
        number: int,
        name: str,
        end: dict[str, Any] | None = None,
        started: bool = True,
        gpus: int = 0,
    ) -> None:
        publish = self.run.records.publish
        intent = {"attempt": name, "slot": slot, "number": number, "incarnation": 0, "progress": [], "code": "c"}
        intent |= {"gpus": gpus}
        publish(layout.job(slot, number, "intent"), intent)
        if started:
            publish(layout.job(slot, number, "start"), {"kind": "started", "job": "1", "host": "node-1"})
        if end is not None:
            publish(layout.job(slot, number, "end"), end)

    def log(self, slot: str, number: int, name: str, rank: int, text: str, job: str = "1") -> Path:
        """The log of an attempt's rank."""
        folder = self.root / "logs" / slot / f"{number:04d}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{job}_{rank}_log.out"
        path.write_text(text)
        return path

    def metrics(self, slot: str, attempt: str, lines: list[dict[str, Any]]) -> None:
        directory = self.root / "metrics"
        directory.mkdir(exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"{slot}.{attempt}.jsonl").write_text(text)

    # ------------------------------------------------------------------------------------ stages of a run's life

    def go_halfway(self) -> None:
        """Round 1 is trained, round 2 in progress: one shard decided, sampled and not yet annotated; policy 2 not evaluated."""
        self.pairs()
        for version in range(3):
            self.policy(version)
        for shard in range(2):
            self.scores(1, shard)
        self.requests(1, 0, [True, True, False, True])
        self.requests(1, 1, [False, False, False, False])
        asked = ["r1-0", "r1-1", "r1-3"]
        self.responses(1, 0, asked)
        self.annotations(1, 0, {"r1-0": "pair", "r1-1": "tie", "r1-3": "pair"})
        self.scores(2, 0)
        self.requests(2, 0, [True, False, False, False])
        self.responses(2, 0, ["r2-0"])
        self.evaluation(0, [0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 1.0])
        self.evaluation(1, [1.0, 1.0, 1.0, 5.0], [0.0, 0.0, 1.0, 1.0])
        self.checkpoint(2, 1)
        self.checkpoint(6, 2)

    def finish(self) -> None:
        """Both rounds are done, every policy evaluated, the run closed, with attempts, metrics and meta batches."""
        self.annotations(2, 0, {"r2-0": "pair"})
        self.scores(2, 1)
        self.requests(2, 1, [True, True, False, False])
        self.responses(2, 1, ["r2-4", "r2-5"])
        self.annotations(2, 1, {"r2-4": "pair", "r2-5": "prompt_rejected"})
        self.checkpoint(10, 3)
        self.policy(3)
        self.evaluation(2, [1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 1.0, 1.0])
        self.evaluation(3, [2.0, 2.0, 4.0, 4.0], [1.0, 1.0, 1.0, 1.0], tokens=3)
        self.meta_batch(1, [(-1.0, 0.9, 0.4, 0.15), (-0.5, 0.6, 0.5, 0.15)])
        self.meta_batch(2, [(-0.2, 0.3, 0.8, 0.85)])
        self.attempt(
            "trainer",
            0,
            "aaa",
            {"outcome": "died", "kind": "crash", "message": "gone <away>", "seconds": 1800.0},
            gpus=4,
        )
        self.attempt("trainer", 1, "bbb", {"outcome": "done"})
        self.attempt("worker-000", 0, "ccc", {"outcome": "done"})
        first = [{"time": 100.0, "kind": "start", "step": 0, "round": 0}]
        self.metrics("trainer", "aaa", first + [step_line(n, 101.0 + n, margin_offline=0.1 * n) for n in range(7)])
        second = [{"time": 200.0, "kind": "restore", "step": 6, "round": 2, "sequence": 1}]
        self.metrics("trainer", "bbb", second + [step_line(n, 196.0 + n, margin_offline=0.2 * n) for n in range(6, 10)])
        self.run.close("finished", "every round is trained and every policy evaluated")


def step_line(step: int, time: float, **values: Any) -> dict[str, Any]:
    line = {"time": time, "kind": "step", "step": step, "round": 0, "shard": 0, "loss": 0.7, "tokens": 100}
    return line | {"seconds": 0.5, "stepped": True} | values
