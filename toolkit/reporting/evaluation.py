"""What an evaluation comes to, and against the initial policy's: prompt by prompt, as prompts differ far more than policies do."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pyarrow as pa


def summarise(evaluation: pa.Table, initial: pa.Table) -> dict[str, Any]:
    """What an evaluation comes to, as JSON values.

    Args:
        evaluation: `toolkit.exchange.tables.EVALUATION` of a policy.
        initial: that of the initial policy on the same prompts; without rows while there is none.

    Returns:
        ``prompts``, and of them ``answered`` (not rejected), ``judged`` (with a reward), ``compared`` (with a reward from
        both policies); the means ``reward``, ``win_rate`` (of the policy's reward against the initial policy's on the
        same prompt, a tie counts 0.5), ``tokens`` (of a response), ``truncated`` (fraction of the answered) and
        ``metrics`` by name (of their finite values); and each one's standard error under ``error``. ``change``: of ``reward``
        and each ``<metric>_reward`` the ``mean`` difference from the initial policy over the prompts on which both have a
        finite value, and its standard ``error``. None where there is nothing to average, or, for an error, fewer than two
        values.
    """
    rows = evaluation.to_pylist()
    answered = [row for row in rows if row["finish_reason"] != "rejected"]
    after, before = _judgements(evaluation), _judgements(initial)
    shared = {
        name: [(value, before[name][prompt]) for prompt, value in of.items() if prompt in before[name]]
        for name, of in after.items()
        if name in before
    }
    series: dict[str, list[float]] = {
        "reward": list(after["reward"].values()),
        "win_rate": [1.0 if new > old else 0.5 if new == old else 0.0 for new, old in shared["reward"]],
        "tokens": [float(len(row["token_ids"])) for row in answered],
        "truncated": [float(row["finish_reason"] == "length") for row in answered],
    }
    metrics = {name.removesuffix("_reward"): list(of.values()) for name, of in after.items() if name != "reward"}
    differences = {name: [new - old for new, old in pairs] for name, pairs in shared.items() if pairs}
    return {
        "prompts": len(rows),
        "answered": len(answered),
        "judged": len(series["reward"]),
        "compared": len(series["win_rate"]),
        **{name: _mean(of) for name, of in series.items()},
        "metrics": {name: _mean(of) for name, of in metrics.items()},
        "error": {
            **{name: _standard_error(of) for name, of in series.items()},
            "metrics": {name: _standard_error(of) for name, of in metrics.items()},
        },
        "change": {name: {"mean": _mean(of), "error": _standard_error(of)} for name, of in differences.items()},
    }


def _judgements(evaluation: pa.Table) -> dict[str, dict[str, float]]:
    """The finite values of ``reward`` and of each ``<metric>_reward`` by prompt."""
    found: dict[str, dict[str, float]] = {"reward": {}}
    for row in evaluation.select(["prompt_id", "reward", "metrics"]).to_pylist():
        judged = [("reward", row["reward"])] + [(f"{of['name']}_reward", of["value"]) for of in row["metrics"]]
        for name, value in judged:
            if math.isfinite(value):
                found.setdefault(name, {})[row["prompt_id"]] = value
    return found


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _standard_error(values: list[float]) -> float | None:
    """Of the mean of independent values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
