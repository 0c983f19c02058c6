"""A small run directory of real records, and scripts that play other processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from toolkit import config as configuration
from toolkit.config import Config
from toolkit.exchange import layout, tables
from toolkit.exchange.records import Manifest
from toolkit.exchange.run import Run

ROOT = Path(__file__).parents[2]
PAIRS_PER_ROUND = (4, 7, 8)  # a warm-start round of one shard and two gated rounds of two, one of them short


def make_config(root: Path, **groups: Any) -> Config:
    """A configuration; ``method=dict(lag=0)`` and the like change some keys of a group."""
    values: dict[str, Any] = {
        "data": {"path": "pairs.jsonl"},
        "model": {"policy": "policy-folder"},
        "reward": {"model": "reward-folder"},
        "method": {"rounds": 2, "warm_start": "offline_round", "global_batch": 2, "shard_size": 4},
        "run": str(root),
    }
    for group, keys in groups.items():
        values[group] = values.get(group, {}) | keys if isinstance(keys, dict) else keys
    return configuration.build(Config, values)


def publish_pairs(run: Run, pairs_per_round: tuple[int, ...] = PAIRS_PER_ROUND) -> Manifest:
    """Prepared pairs ``r<round>-<position>``, as `toolkit.data.publish` would leave them."""
    size = run.config.method.shard_size
    blobs = {}
    for index, count in enumerate(pairs_per_round):
        rows = [
            {
                "pair_id": f"r{index}-{position}",
                "row": position,
                "round": index,
                "shard": position // size,
                "position": position,
                "prompt": [{"role": "user", "content": "?"}],
                "chosen": "yes",
                "rejected": "no",
                "prompt_ids": [1],
                "chosen_ids": [2, 9],
                "rejected_ids": [3, 9],
            }
            for position in range(count)
        ]
        sizes = [min(size, count - start) for start in range(0, count, size)]
        blobs[f".round-{index:03d}.parquet"] = tables.to_parquet(pa.Table.from_pylist(rows, tables.PAIRS), sizes)
    blobs[".heldout.parquet"] = tables.to_parquet(tables.HELDOUT.empty_table())
    attributes = {"pairs_per_round": list(pairs_per_round), "digests": {"tokenizer": "t"}, "counts": {}}
    return run.records.publish(layout.PAIRS, attributes, blobs=blobs)[0]


def script(source: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Another process that runs ``source`` with this checkout's package."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", source, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str], timeout: float = 300) -> str:
    """What a script printed; it must have ended well."""
    return answers([process], timeout)[0]


def answers(processes: Sequence[subprocess.Popen[str]], timeout: float = 300) -> list[str]:
    """What scripts that run side by side printed; they must have ended well. If one has not, none is left."""
    found = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=timeout)
            assert process.returncode == 0, errors
            found.append(output.strip())
    finally:
        for process in processes:
            process.kill()
    return found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose pairs are prepared."""
    root = tmp_path / "run"
    made = Run.create(root, make_config(root), "test")
    publish_pairs(made)
    return made
