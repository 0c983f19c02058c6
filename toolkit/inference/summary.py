"""What an evaluation comes to. Needs neither vLLM nor torch."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pyarrow as pa


def summarise(evaluation: pa.Table, initial: pa.Table) -> dict[str, Any]:
    """What an evaluation comes to, as JSON values.

    Args:
        evaluation: ``EVALUATION`` of a policy.
        initial: ``EVALUATION`` of the initial policy on the same prompts.

    Returns:
        ``prompts``, and of them ``answered`` (not rejected), ``judged`` (with a reward), ``compared`` (with a reward from
        both policies); the means ``reward``, ``win_rate`` (of the policy's reward against the initial policy's on the
        same prompt, a tie counts 0.5), ``tokens`` (of a response), ``truncated`` (fraction of the answered) and
        ``metrics`` by name (of their finite values); and each one's standard error under ``error``. None where there is nothing to average,
        or, for an error, fewer than two values.
    """
    rows = evaluation.to_pylist()
    answered = [row for row in rows if row["finish_reason"] != "rejected"]
    rewards, before = _rewards(evaluation), _rewards(initial)
    compared = [(rewards[key], before[key]) for key in rewards if key in before]
    values: dict[str, list[float]] = {}
    for row in answered:
        for metric in row["metrics"]:
            if math.isfinite(metric["value"]):
                values.setdefault(metric["name"], []).append(metric["value"])
    series: dict[str, list[float]] = {
        "reward": list(rewards.values()),
        "win_rate": [1.0 if new > old else 0.5 if new == old else 0.0 for new, old in compared],
        "tokens": [float(len(row["token_ids"])) for row in answered],
        "truncated": [float(row["finish_reason"] == "length") for row in answered],
    }
    return {
        "prompts": len(rows),
        "answered": len(answered),
        "judged": len(rewards),
        "compared": len(compared),
        **{name: _mean(of) for name, of in series.items()},
        "metrics": {name: _mean(of) for name, of in values.items()},
        "error": {
            **{name: _standard_error(of) for name, of in series.items()},
            "metrics": {name: _standard_error(of) for name, of in values.items()},
        },
    }


def _rewards(evaluation: pa.Table) -> dict[str, float]:
    """The finite rewards by prompt."""
    pairs = zip(evaluation["prompt_id"].to_pylist(), evaluation["reward"].to_pylist(), strict=True)
    return {key: reward for key, reward in pairs if math.isfinite(reward)}


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _standard_error(values: list[float]) -> float | None:
    """Of the mean of independent values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
