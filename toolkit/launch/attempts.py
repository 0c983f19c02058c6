"""The attempts of a run's slots, read from their records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from toolkit.config import Config
from toolkit.exchange import hints, layout, lineage, series
from toolkit.exchange.records import Manifest
from toolkit.exchange.run import Run


@dataclass(frozen=True)
class Attempt:
    """A slot's attempt and what is recorded of it."""

    slot: str
    number: int
    intent: Manifest
    start: Manifest | None
    end: Manifest | None

    @property
    def id(self) -> str:
        return str(self.intent.attributes["attempt"])

    @property
    def incarnation(self) -> int:
        return int(self.intent.attributes["incarnation"])

    @property
    def over(self) -> bool:
        return self.end is not None or (self.start is not None and self.start.attributes["kind"] == "voided")

    @property
    def turned_away(self) -> bool:
        """Whether the scheduler had no room for it."""
        return self.outcome == "voided" and self.start is not None and self.start.attributes["death"] == "busy"

    @property
    def outcome(self) -> str:
        """``pending``, ``running``, ``voided``, or what its end says."""
        if self.end is not None:
            return str(self.end.attributes["outcome"])
        if self.start is None:
            return "pending"
        return "running" if self.start.attributes["kind"] == "started" else "voided"

    @property
    def death(self) -> dict[str, Any] | None:
        """``kind``, ``message`` and where there was one ``error`` (its class) of an attempt that did not end well, else None."""
        if self.outcome == "voided" and self.start is not None:
            word = self.start.attributes
            if word["death"] in ("busy", "withdrawn"):
                return None
            return {"kind": word["death"], "message": f"it did not start: {word['reason']}; its log may say more"}
        return self.end.attributes if self.end is not None and self.outcome in ("failed", "died") else None


def slots(config: Config) -> list[str]:
    """The roles that a run's configuration asks for, one slot a job, the most important first."""
    found = ["trainer"]
    if config.replay_from is None and config.needs_workers:
        found += ["sidecar"] * (config.cluster.sidecar_in == "own")
        found += [f"worker-{index:03d}" for index in range(config.inference.workers)]
    return found


def known_slots(run: Run) -> list[str]:
    """The slots that ever had an attempt."""
    return sorted(path.name for path in (run.root / "jobs").glob("*") if path.is_dir())


def every_slot(run: Run) -> list[str]:
    """The slots that the configuration asks for, and those that ever had an attempt."""
    return list(dict.fromkeys([*slots(run.config), *known_slots(run)]))


def attempts(run: Run, slot: str, known: Sequence[Attempt] = ()) -> list[Attempt]:
    """All attempts of a slot, oldest first.

    Args:
        known: its first attempts as they were seen before: after one listing, only what is new is read.
    """
    there = series.names(run.root, layout.job(slot, 0, "intent").directory)

    def read(number: int, event: str) -> Manifest | None:
        ref = layout.job(slot, number, event)
        return run.records.find(ref) if ref.name in there else None

    found = [attempt if attempt.over else _again(attempt, read) for attempt in known]
    while (intent := read(len(found), "intent")) is not None:
        found.append(_again(Attempt(slot, len(found), intent, None, None), read))
    return found


def _again(attempt: Attempt, read: Callable[[int, str], Manifest | None]) -> Attempt:
    """An attempt with what is recorded of it by now."""
    return replace(attempt, start=attempt.start or read(attempt.number, "start"), end=read(attempt.number, "end"))


def current(history: Sequence[Attempt]) -> Attempt:
    """The attempt that stands for a slot: one that runs, before one that waits behind it or was given up; else the newest."""
    running = [attempt for attempt in history if attempt.outcome == "running"]
    begun = [attempt for attempt in history if attempt.outcome != "voided"]
    return [*history, *begun[-1:], *running][-1]


def progress(run: Run) -> list[int]:
    """A mark that moves whenever the run gets on: newest checkpoint, newest policy, shards done by the workers (a hint)."""
    newest = lineage.newest(run.records)
    policy = run.newest_policy()
    return [
        -1 if newest is None else lineage.sequence(newest),
        -1 if policy is None else policy,
        int(hints.frontier(run.root).get("done", 0)),
    ]


def gpu_hours(histories: Sequence[Sequence[Attempt]], now: float) -> float:
    """GPU-hours that attempts have held, the living ones until ``now`` (seconds since the epoch)."""
    total = 0.0
    for attempt in (attempt for history in histories for attempt in history):
        if attempt.start is not None and attempt.outcome != "voided":
            end = attempt.end
            seconds = now - attempt.start.written if end is None else float(end.attributes.get("seconds", 0.0))
            total += seconds * int(attempt.intent.attributes.get("gpus", 0)) / 3600
    return total
