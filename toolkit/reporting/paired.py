"""How much a policy changed against the initial one, prompt by prompt: prompts differ far more than policies do."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pyarrow as pa


def changes(evaluation: pa.Table, initial: pa.Table) -> dict[str, dict[str, float | None]]:
    """Mean change of the reward and of each metric over the prompts on which both policies have a finite value.

    Args:
        evaluation, initial: `toolkit.exchange.tables.EVALUATION` of a policy and of the initial one.

    Returns:
        ``reward`` and ``<metric>_reward``: ``mean`` and its standard ``error`` (None with fewer than two prompts).
    """
    after, before = _values(evaluation), _values(initial)
    found: dict[str, dict[str, float | None]] = {}
    for name in sorted(after.keys() & before.keys()):
        shared = sorted(after[name].keys() & before[name].keys())
        differences = [after[name][prompt] - before[name][prompt] for prompt in shared]
        if differences:
            spread = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
            found[name] = {"mean": statistics.fmean(differences), "error": spread}
    return found


def _values(table: pa.Table) -> dict[str, dict[str, float]]:
    """The finite values of each judgement by prompt."""
    found: dict[str, dict[str, float]] = {}
    for row in table.to_pylist():
        judged: list[tuple[str, Any]] = [("reward", row["reward"])]
        judged += [(f"{metric['name']}_reward", metric["value"]) for metric in row["metrics"] or []]
        for name, value in judged:
            if value is not None and math.isfinite(value):
                found.setdefault(name, {})[row["prompt_id"]] = value
    return found
