"""A run whose trainer is the test: it publishes policies, scores and meta batches by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.exchange.conftest import make_config, publish_pairs
from toolkit.exchange import layout, tables
from toolkit.exchange.run import Run

SHARDS = (0, 1)  # of each gated round
METHODS: dict[str, dict[str, Any]] = {
    "recommended": {
        "meta": {
            "interval": 2,
            "feature": "standardised",
            "init": "random",
            "clamp": 0.02,
            "minibatch": 3,
            "exploration": 0.1,
        }
    },
    "paper": {
        "meta": {
            "interval": 2,
            "feature": "log_sigmoid_beta",
            "init": "constant",
            "clamp": 0.0,
            "minibatch": None,
            "learning_rate": 5e-3,
            "exploration": 0.0,
        }
    },
    "random": {"gate": {"kind": "random", "parameters": {"probability": 0.5}}, "weight": {"kind": "zero"}},
    "threshold": {
        "gate": {"kind": "threshold", "parameters": {"threshold": -0.7}},
        "weight": {"kind": "zero"},
        "meta": {"feature": "log_sigmoid_beta"},
    },
    "simpo": {
        "objective": {"name": "simpo"},
        "gate": {"kind": "fixed"},
        "weight": {"kind": "fixed"},
        "meta": {"feature": "log_sigmoid"},
    },
}


def logprob_columns(weights: str, round_index: int, count: int) -> dict[str, np.ndarray]:
    """Made-up log-probs of a round's pairs under the weights of that name: float32 values, and token counts."""
    rng = np.random.default_rng([round_index, *weights.encode()])
    names = ("chosen", "rejected")
    found = {name: rng.normal(-30, 8, count).astype(np.float32) for name in names}
    tokens = np.random.default_rng(round_index)  # of the pairs, whatever the weights
    return found | {f"{name}_tokens": tokens.integers(3, 40, count).astype(np.int32) for name in names}


class Trainer:
    """Publishes what the sidecar waits for."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def policy(self, *versions: int) -> None:
        for version in versions:
            self.run.records.publish(layout.policy(version), {"version": version})

    def ids(self, round_index: int, shard: int) -> list[str]:
        return self.run.pairs(round_index, shard)["pair_id"].to_pylist()

    def score(self, round_index: int, *shards: int, weights: tuple[str, ...] | None = None) -> None:
        """Scores of shards under the round's policy and the first one, or under the ``weights`` named."""
        size = self.run.plan.shard_size
        for name in weights or (layout.policy_name(round_index), layout.policy_name(0)):
            columns = logprob_columns(name, round_index, self.run.plan.pairs_per_round[round_index])
            for shard in shards:
                part = {key: value[shard * size : (shard + 1) * size] for key, value in columns.items()}
                table = tables.conform(pa.table({"pair_id": self.ids(round_index, shard), **part}), tables.LOGPROBS)
                self.run.records.publish(layout.logprobs(name, "offline", round_index, shard), {}, table=table)

    def meta_batch(self, boundary: int, rows: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(boundary)
        columns = {name: rng.normal(0.5, 0.3, rows).astype(np.float32) for name in ("s", "loss_offline", "loss_online")}
        extra = {"pair_id": [f"m{row}" for row in range(rows)], "step": [0] * rows, "w_gate": [0.5] * rows}
        table = tables.conform(pa.table(columns | extra), tables.META_BATCH)
        self.run.records.publish(layout.meta_batch(boundary), {"boundary": boundary}, table=table)
        return columns


def make_run(root: Path, method: str = "recommended") -> Trainer:
    run = Run.create(root, make_config(root, seed=11, method=METHODS[method]), "trainer")
    publish_pairs(run)
    return Trainer(run)


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return make_run(tmp_path / "run")
