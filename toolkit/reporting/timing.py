"""Where the time of each role went, from its metrics and its attempts' records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from toolkit.exchange.run import Run
from toolkit.launch.supervise import Attempt
from toolkit.reporting import metrics

# Activities by the kind of their metrics line, which is written when they end, with the seconds that they took.
TRAINER = {"score": "score", "step": "train", "wait": "wait", "checkpoint": "checkpoint", "policy": "publish policy"}
WORKER = {"sample": "sample", "annotate": "annotate", "evaluate": "evaluate", "load": "load policy"}
ACTIVITIES = TRAINER | WORKER
STARTING, IDLE = "start", "idle"


def where_time_went(run: Run, attempts: Iterable[Attempt]) -> dict[str, dict[str, float]]:
    """Seconds of each slot by activity, over all its attempts.

    ``start`` is from an attempt's start to its first activity, ``idle`` what no activity accounts for: waiting for work, loading
    a reward model. A slot without timed activities (the sidecar) is left out.
    """
    known = {attempt.id: attempt for attempt in attempts}
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in metrics.read(run.root):
        lines.setdefault((entry["slot"], entry["attempt"]), []).append(entry)
    slots: dict[str, dict[str, float]] = {}
    for (slot, name), own in sorted(lines.items()):
        if not any(entry["kind"] in ACTIVITIES for entry in own):
            continue
        seconds = slots.setdefault(slot, {})
        for activity, value in _attempt(own, known.get(name)).items():
            seconds[activity] = seconds.get(activity, 0.0) + value
    return slots


def _attempt(lines: list[dict[str, Any]], attempt: Attempt | None) -> dict[str, float]:
    """Seconds of one attempt by activity."""
    found: dict[str, float] = {}
    for entry in lines:
        if entry["kind"] in ACTIVITIES:
            activity = ACTIVITIES[entry["kind"]]
            found[activity] = found.get(activity, 0.0) + (entry.get("seconds") or 0.0)
    began = lines[0]["time"] - (lines[0].get("seconds") or 0.0)
    started = began if attempt is None or attempt.start is None else attempt.start.written
    ended = lines[-1]["time"] if attempt is None or attempt.end is None else attempt.end.written
    found[STARTING] = max(0.0, began - started)
    found[IDLE] = max(0.0, ended - started - sum(found.values()))
    return found
