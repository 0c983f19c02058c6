"""TensorBoard event files of a run, from its metrics and evaluations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tensorboard.summary import Writer

from toolkit.exchange import layout
from toolkit.exchange.run import Run
from toolkit.reporting import metrics

NOT_DRAWN = {"step", "round", "shard", "time", "kind", "slot", "attempt", "stepped"}


def write_events(run: Run, summary: dict[str, Any]) -> Path:
    """Write ``tensorboard/`` anew: ``train/*`` by optimizer step, ``gate/*`` by the round's first step, ``evaluation/*`` by the
    steps that the policy was trained for.

    Args:
        summary: from `toolkit.reporting.summary.summarise_run`.

    Returns:
        The directory, for ``tensorboard --logdir``.

    Raises:
        ImportError: tensorboard is not installed here.
    """
    directory = run.root / "tensorboard"
    directory.mkdir(exist_ok=True)
    for old in directory.glob("events.out.tfevents.*"):
        old.unlink()
    writer = Writer(str(directory))
    try:
        for line in metrics.steps(run.root):
            for name, value in line.items():
                if name not in NOT_DRAWN:
                    _add(writer, f"train/{name}", value, line["step"], line["time"])
        _add_rounds(writer, run, summary)
    finally:
        writer.close()
    return directory


def _add_rounds(writer: Writer, run: Run, summary: dict[str, Any]) -> None:
    for entry in summary["rounds"]:  # a warm start has no gate
        if entry["sampled_fraction"] is not None:
            step = run.plan.first_step[entry["round"]]
            _add(writer, "gate/sampled_fraction", entry["sampled_fraction"], step)
            for outcome, number in entry["outcomes"].items():
                _add(writer, f"gate/{outcome}", number, step)
    for policy in summary["policies"]:
        step = run.plan.first_step[policy["version"]]
        manifest = run.records.find(layout.evaluation(policy["version"]))
        when = None if manifest is None else manifest.written
        for name in ("reward", "win_rate", "tokens", "truncated"):
            _add(writer, f"evaluation/{name}", policy[name], step, when)
        for name, value in policy["metrics"].items():
            _add(writer, f"evaluation/{name}", value, step, when)


def _add(writer: Writer, tag: str, value: object, step: int, when: float | None = None) -> None:
    if isinstance(value, int | float) and math.isfinite(value):
        writer.add_scalar(tag, value, step, wall_time=when)
