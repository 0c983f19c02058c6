"""Whole runs of the trainer alone: rounds without a gate wait for nobody."""

from __future__ import annotations

from pathlib import Path

from tests.exchange.conftest import make_config, publish_pairs
from tests.parallel.pool import Pool
from tests.parallel.problems import make_model
from toolkit.exchange import layout
from toolkit.exchange.run import Run
from toolkit.training.layout import ParallelLayout


def weights(run: Run, version: int) -> str:
    return run.records.require(layout.policy(version)).attributes["weights_digest"]


def test_a_restarted_schedule_ends_and_resumes_bit_for_bit(pool: Pool, tmp_path: Path) -> None:
    """Killed after the last checkpoint and before the last policy; and at the start of a round."""
    offline = {"warm_start": "none", "gate": {"kind": "none"}, "weight": {"kind": "one"}}
    config = make_config(
        tmp_path / "run",
        method={**offline, "round_start": {"optimizer": "reset", "schedule": "restart"}},
        model={"policy": str(make_model("llama", tmp_path / "model"))},
        trainer={"checkpoint_steps": 100},
    )
    run = Run.create(tmp_path / "run", config, "test")
    publish_pairs(run, (4, 8))

    def train(attempt: str) -> list[str]:
        return pool.run("tests.parallel.cases:train_run", ParallelLayout(), root=run.root, attempt=attempt)

    assert train("first") == ["done"]
    policies = [weights(run, version) for version in range(3)]
    assert len(set(policies)) == 3
    for lost in ([layout.policy(2)], [layout.policy(2), layout.checkpoint(1)]):
        for ref in lost:
            run.records.require(ref).path.unlink()
        assert train(f"after-{len(lost)}") == ["done"]
        assert [weights(run, version) for version in range(3)] == policies
