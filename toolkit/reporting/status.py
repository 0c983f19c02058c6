"""The status of a run, collected from its records by whoever ticks. `toolkit.reporting.terminal` shows it."""

from __future__ import annotations

from typing import Any

from toolkit.exchange import layout, lineage
from toolkit.exchange.run import Run
from toolkit.reporting import progress
from toolkit.reporting.pace import pace
from toolkit.reporting.progress import Reader
from toolkit.reporting.reasons import in_words
from toolkit.reporting.terminal import flat_warning

WAITING = ("gate", "sample", "judge", "train", "evaluate")


def collect(run: Run, control: dict[str, Any], previous: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a run is doing, as JSON values.

    Args:
        control: what the control plane knows (`toolkit.launch.tick.describe`, `toolkit.launch.observe.observe`); empty: what
            ``previous`` says of it.
        previous: an earlier status of this run: shards and evaluations that it shows as done are not looked at again.

    Returns:
        ``rounds`` and ``evaluations`` (see `toolkit.reporting.progress`); ``steps`` {done, of}; ``annotations`` {made, of,
        saved_fraction}; ``tokens_per_second`` of the last steps and ``seconds_left`` (None: not known); ``outcome`` and
        ``reason`` (None while the run goes on); ``started`` and ``ended``, seconds since the epoch; ``waiting``: shards that
        wait to be gated, sampled, judged and trained, and policies that wait to be evaluated; what ``control`` holds, its jobs
        with ``waits_for``, the reason in words; ``warnings``.
    """
    previous = previous or {}
    reader = Reader(run)
    identity = reader.find(layout.IDENTITY)
    incarnation = run.current_incarnation()
    closing = None if incarnation is None else reader.find(layout.closed(incarnation))
    found: dict[str, Any] = {
        "run": str(run.root),
        "method": run.config.method.name,
        "started": None if identity is None else identity.written,
        "ended": None if closing is None else closing.written,
        "incarnation": incarnation,
        "outcome": None if closing is None else closing.attributes["outcome"],
        "reason": None if closing is None else closing.attributes["reason"],
        "jobs": [],
        "deaths": {},
        "gpu_hours": None,
        "avoided": [],
        "gone": [],
        "drift": [],
        "unanswered": None,
        "policy": None,
        "checkpoint": 0,
        "steps": None,
        "rounds": [],
        "evaluations": [],
        "annotations": None,
        "waiting": dict.fromkeys(WAITING, 0),
        "tokens_per_second": None,
        "seconds_left": None,
    }
    found |= control or {
        key: previous[key] for key in ("jobs", "deaths", "gpu_hours", "avoided", "drift") if key in previous
    }
    found["jobs"] = [
        job | {"waits_for": in_words(job["reason"]) if job.get("reason") else None} for job in found["jobs"]
    ]
    if reader.find(layout.PAIRS) is not None:
        found |= _progress(reader, found, previous)
    found["warnings"] = _warnings(found, reader)
    return found


def _progress(reader: Reader, found: dict[str, Any], previous: dict[str, Any]) -> dict[str, Any]:
    run, total = reader.run, reader.run.plan.steps
    newest = progress.newest_policy(reader)
    checkpoint = progress.newest_checkpoint(reader)
    speed = pace(run)
    step = speed["step"]
    if step is None:
        step = 0 if checkpoint is None else lineage.progress(checkpoint).step
    rounds = progress.rounds(reader, previous.get("rounds", []), newest, step)
    evaluations = progress.evaluations(reader, previous.get("evaluations", []), newest)
    unjudged = 0 if newest is None or not run.config.evaluates else newest + 1 - len(evaluations)
    running = found["outcome"] is None
    left = speed["seconds_per_step"] * (total - step) if running and speed["seconds_per_step"] is not None else None
    return {
        "policy": newest,
        "checkpoint": 0 if checkpoint is None else lineage.sequence(checkpoint),
        "steps": {"done": step, "of": total},
        "rounds": rounds,
        "evaluations": evaluations,
        "annotations": progress.annotations(
            run.config.method.sampling.samples, [entry for entry in rounds if entry["gated"]]
        ),
        "waiting": _waiting(rounds) | {"evaluate": unjudged},
        "tokens_per_second": speed["tokens_per_second"] if running and step < total else None,
        "seconds_left": left,
    }


def _waiting(rounds: list[dict[str, Any]]) -> dict[str, int]:
    """Shards of the gated rounds that one stage is done with and the next is not."""
    gated = [entry for entry in rounds if entry["gated"]]
    stages = ("scored", "requested", "sampled", "annotated", "trained")
    return {
        name: sum(max(0, entry[done] - entry[following]) for entry in gated)
        for name, done, following in zip(WAITING, stages, stages[1:], strict=False)
    }


def _warnings(found: dict[str, Any], reader: Reader) -> list[str]:
    flat = [str(entry["round"]) for entry in found["rounds"] if entry["flat"]]
    warnings = [flat_warning(flat)] if flat else []
    if found["unanswered"] is not None:
        warnings.append(
            f"the scheduler does not answer ({found['unanswered']}): the jobs' states are those of the records"
        )
    if found["gone"]:
        warnings.append(
            f"the scheduler has no job any more of: {', '.join(found['gone'])}; the next tick submits them again"
        )
    warnings += found["drift"]
    return warnings + [f"cannot read {name}: {detail}" for name, detail in sorted(reader.damage.items())]
