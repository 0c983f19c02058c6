"""What attempts died of, and what follows: submit again, avoid a node, or stop the run and say why."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from toolkit.cluster import Budgets
from toolkit.exchange.run import Run
from toolkit.launch.attempts import Attempt, progress

KIND = {"corrupt": "crash", "cancelled": "unknown"}  # kinds that share another's budget
BLAMED = ("crash", "resource", "corrupt")  # deaths that the work may be to blame for
POISON = 3  # deaths at the same piece of work that stop the run
AT_ONCE = 120.0  # seconds: a death this early after the start may be the node's fault
STRIKES = 2  # such deaths, or failures, of a node after which it is avoided
MEMORY_OF_STRIKES = 3600.0  # seconds
CORNERED = "no node is left for it besides those that it was to avoid"


def verdict(run: Run, slot: str, history: Sequence[Attempt], histories: Iterable[Sequence[Attempt]]) -> str | None:
    """Why a slot must not be submitted again, or None.

    A refusal (the input or the configuration is wrong) stops at once; each kind of death has its budget of deaths without progress
    in between; three deaths at the same shard name it.

    Args:
        history: the slot's attempts of this incarnation, oldest first.
        histories: the attempts of every slot.
    """
    last = history[-1].death if history else None
    if last is None:
        return None
    if last["kind"] == "refused":
        return f"{slot} stopped: {last['message']}"
    poison = _poison(run, history[-1].incarnation, last, histories)
    if poison is not None:
        return poison
    mark = progress(run)
    deaths = [a.death for a in history if a.death is not None and a.intent.attributes["progress"] == mark]
    counts = Counter(_budgeted(death) for death in deaths)
    kind = _budgeted(last)
    if counts[kind] < getattr(run.config.cluster.budgets, kind):
        return None
    words = ": ".join(str(last[key]) for key in ("error", "message") if key in last)
    return (
        f"{slot} died {len(deaths)} times without a record published in between "
        f"({', '.join(f'{count} x {name}' for name, count in counts.items())}); the last: {words}. "
        f"What it means: metaapo explain {run.root}   Then: metaapo resume {run.root}"
    )


def _budgeted(death: dict[str, Any]) -> str:
    kind = KIND.get(death["kind"], death["kind"])
    return kind if kind in Budgets.__dataclass_fields__ else "unknown"


def _poison(run: Run, incarnation: int, last: dict[str, Any], histories: Iterable[Sequence[Attempt]]) -> str | None:
    """A sentence if attempts of any slot died at the same piece of work again and again."""
    if last["kind"] not in BLAMED or not last.get("working_on"):
        return None
    work = last["working_on"][0]
    deaths = [
        attempt
        for every in histories
        for attempt in every
        if attempt.incarnation == incarnation
        and attempt.death is not None
        and attempt.death["kind"] in BLAMED
        and work in attempt.death.get("working_on", [])
    ]
    if len(deaths) < POISON:
        return None
    who = ", ".join(f"{attempt.slot} attempt {attempt.number}" for attempt in deaths)
    return (
        f"{len(deaths)} attempts died while they worked on {work} ({who}); {_pairs(run, work)}the last: {last['message']}. "
        f"What it means: metaapo explain {run.root}   Then: metaapo resume {run.root}"
    )


def _pairs(run: Run, work: str) -> str:
    """The pairs of a shard's record name, in words."""
    parts = work.split("/")
    if parts[0] != "rounds" or not parts[-1].isdigit():
        return ""
    ids = run.pairs(int(parts[1]), int(parts[-1]))["pair_id"].to_pylist()
    more = f" and {len(ids) - 4} more" if len(ids) > 4 else ""
    return f"its pairs: {', '.join(ids[:4])}{more}; "


def bad_nodes(histories: Iterable[Sequence[Attempt]], incarnation: int, now: float) -> tuple[str, ...]:
    """Nodes to avoid: those that failed, or killed jobs at once, more than once within the hour, while others did well. Sorted.

    Only jobs on a single node tell which node it was. None if as many seem bad as good: then it is not the nodes, or there would be
    none left to run on.

    Args:
        now: seconds since the epoch.
    """
    strikes: Counter[str] = Counter()
    well: set[str] = set()
    for attempt in (attempt for history in histories for attempt in history):
        if attempt.start is None or attempt.incarnation != incarnation:
            continue
        death, started = attempt.death or {}, attempt.start.attributes
        node = str(death.get("nodes") or started.get("nodes") or "")
        if not node or "[" in node or "," in node:
            continue
        early = float(death.get("seconds", AT_ONCE)) < AT_ONCE and death.get("kind") in ("crash", "unknown")
        if death.get("kind") == "node" or early:
            strikes[node] += attempt.end is not None and now - attempt.end.written < MEMORY_OF_STRIKES
        elif attempt.outcome != "voided":
            well.add(node)
    found = {node for node, count in strikes.items() if count >= STRIKES}
    return tuple(sorted(found)) if len(found) <= len(well - found) else ()


def is_cornered(history: Iterable[Attempt], now: float) -> bool:
    """Whether a slot found no node besides the bad ones within the hour: then it avoids none.

    Args:
        now: seconds since the epoch.
    """
    starts = (attempt.start for attempt in history if attempt.outcome == "voided" and attempt.start is not None)
    return any(s.attributes["reason"] == CORNERED and now - s.written < MEMORY_OF_STRIKES for s in starts)


MEMORY = re.compile(rb"[^\n]*(?:[Ee]xceeded (?:job |step )?memory limit|oom[-_]kill|Out of memory|OutOfMemory)[^\n]*")
TAIL = 16384  # bytes of a log's end that are looked at


def memory_words(root: Path, attempt: Attempt) -> str:
    """The line of an attempt's logs that says it died for lack of memory; Slurm's state does not always tell. Empty if none does."""
    for path in sorted((root / "logs" / attempt.slot).glob(f"{attempt.number:04d}-{attempt.id}/*_log.out")):
        with contextlib.suppress(OSError), path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            found = MEMORY.search(file.read())
            if found:
                return found.group().decode(errors="replace").strip()
    return ""


def by_kind(histories: Iterable[Sequence[Attempt]]) -> dict[str, int]:
    """How many attempts died of what."""
    deaths = (attempt.death for history in histories for attempt in history)
    return dict(Counter(str(death["kind"]) for death in deaths if death is not None).most_common())
