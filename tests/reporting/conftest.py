"""Runs at three stages of their life, of real records."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reporting.sketch import Sketch, step_line


@pytest.fixture
def sketch(tmp_path: Path) -> Sketch:
    """A run that has just been made."""
    return Sketch(tmp_path / "run")


@pytest.fixture
def halfway(sketch: Sketch) -> Sketch:
    """Round 1 is trained, round 2 in progress: one shard decided, sampled and not yet annotated; policy 2 not evaluated."""
    sketch.pairs()
    for version in range(3):
        sketch.policy(version)
    for shard in range(2):
        sketch.scores(1, shard)
    sketch.requests(1, 0, [True, True, False, True])
    sketch.requests(1, 1, [False, False, False, False])
    asked = ["r1-0", "r1-1", "r1-3"]
    sketch.responses(1, 0, asked)
    sketch.annotations(1, 0, {"r1-0": "pair", "r1-1": "tie", "r1-3": "pair"})
    sketch.scores(2, 0)
    sketch.requests(2, 0, [True, False, False, False])
    sketch.responses(2, 0, ["r2-0"])
    sketch.evaluation(0, [0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 1.0])
    sketch.evaluation(1, [1.0, 1.0, 1.0, 5.0], [0.0, 0.0, 1.0, 1.0])
    sketch.checkpoint(2, 1)
    sketch.checkpoint(6, 2)
    return sketch


@pytest.fixture
def finished(halfway: Sketch) -> Sketch:
    """Both rounds are done, every policy evaluated, the run closed, with attempts, metrics and meta batches."""
    s = halfway
    s.annotations(2, 0, {"r2-0": "pair"})
    s.scores(2, 1)
    s.requests(2, 1, [True, True, False, False])
    s.responses(2, 1, ["r2-4", "r2-5"])
    s.annotations(2, 1, {"r2-4": "pair", "r2-5": "prompt_rejected"})
    s.checkpoint(10, 3)
    s.policy(3)
    s.evaluation(2, [1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 1.0, 1.0])
    s.evaluation(3, [2.0, 2.0, 4.0, 4.0], [1.0, 1.0, 1.0, 1.0], tokens=3)
    s.meta_batch(1, [(-1.0, 0.9, 0.4, 0.15), (-0.5, 0.6, 0.5, 0.15)])
    s.meta_batch(2, [(-0.2, 0.3, 0.8, 0.85)])
    s.attempt("trainer", 0, "aaa", {"outcome": "died", "kind": "crash", "message": "gone <away>"})
    s.attempt("trainer", 1, "bbb", {"outcome": "done"})
    s.attempt("worker-000", 0, "ccc", {"outcome": "done"})
    first = [{"time": 100.0, "kind": "start", "step": 0, "round": 0}]
    s.metrics("trainer", "aaa", first + [step_line(n, 101.0 + n, margin_offline=0.1 * n) for n in range(7)])
    second = [{"time": 200.0, "kind": "restore", "step": 6, "round": 2, "sequence": 1}]
    s.metrics("trainer", "bbb", second + [step_line(n, 196.0 + n, margin_offline=0.2 * n) for n in range(6, 10)])
    s.run.close("finished", "every round is trained and every policy evaluated")
    return s
