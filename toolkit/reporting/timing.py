"""Where the time of each role went, from its metrics and its attempts' records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from toolkit.exchange.run import Run
from toolkit.launch.supervise import Attempt
from toolkit.reporting import metrics

# Activities by the kind of their metrics line, which is written when they end, with the seconds that they took.
TRAINER = {"score": "score", "step": "train", "wait": "wait", "checkpoint": "checkpoint", "policy": "publish policy"}
WORKER = {"sample": "sample", "annotate": "annotate", "evaluate": "evaluate", "load": "load models"}
ACTIVITIES = TRAINER | WORKER
STARTING, IDLE = "start", "idle"


def where_time_went(run: Run, attempts: Iterable[Attempt]) -> dict[str, dict[str, float]]:
    """Seconds of each slot by activity, over all its attempts.

    ``start`` is from an attempt's start to its first activity, for a worker the wait for its first work too; ``load models``
    includes starting vLLM; ``idle`` is what no activity accounts for: waiting for work. A slot without timed activities (the sidecar) is left out.
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
    seconds = None if attempt is None else lasted(attempt)
    ended = lines[-1]["time"] if seconds is None else started + seconds
    found[STARTING] = max(0.0, began - started)
    found[IDLE] = max(0.0, ended - started - sum(found.values()))
    return found


def lasted(attempt: Attempt) -> float | None:
    """Seconds that an attempt lasted; None if it did not start or is not over.

    Its end may have been written long after it, by the tick that noticed its death: what the record says of its length counts.
    """
    if attempt.start is None or attempt.end is None:
        return None
    return float(attempt.end.attributes.get("seconds", attempt.end.written - attempt.start.written))
