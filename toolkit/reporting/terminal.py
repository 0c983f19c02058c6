"""A status as people see it in a terminal. Needs rich and nothing else: `metaapo status` has to start in a blink."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

STAGES = ("scored", "requested", "sampled", "annotated", "trained")
SHOWN_ROUNDS = 8  # and as many policies: a terminal's height
COUNTED_SHARDS = 100  # shards of a round from which a stage is shown in percent
SHOWN_WORKERS = 4
SHOWN_MESSAGES = 4  # of failures, and of reasons for which jobs are pending
SHOWN_NODES = 6
SHOWN_HOURS = 0.05  # GPU-hours that are worth a word
STALE = 30.0  # seconds after which a status says its age in red
QUIET = 600.0  # seconds without a tick after which nobody seems to keep an open run going
STYLES = {"finished": "bold green", "failed": "bold red", "cancelled": "bold yellow"}


def duration(seconds: float) -> str:
    """``seconds`` in the two largest units: ``3 d 4 h``, ``2 h 5 m``, ``3 m 20 s``, ``12 s``."""
    whole = max(0, round(seconds))
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {smaller_unit}"
    return f"{whole} s"


def metric_names(evaluations: Iterable[dict[str, Any]]) -> list[str]:
    """Names of the further metrics in evaluations, sorted."""
    return sorted({name for entry in evaluations for name in entry["metrics"]})


def flat_warning(rounds: list[str]) -> str:
    """What it means that a gate has no variance."""
    return (
        f"the gate of round {', '.join(rounds)} has no variance: it gives every pair the same weight, so what is sampled is "
        "chance. A policy that equals its gate reference scores all pairs alike; method.warm_start=offline_round helps."
    )


def line(status: dict[str, Any]) -> str:
    """A status in one line that changes only when something got done: for logs."""
    if status.get("outcome"):
        return f"{status['outcome']}: {status['reason']}"
    if not status.get("rounds"):
        return "preparing" if status.get("started") else "no status yet"
    current = min(status["policy"] or 0, len(status["rounds"]) - 1)
    entry = status["rounds"][current]
    names = STAGES if entry["gated"] else ("trained",)
    stages = " ".join(f"{name} {entry[name]}/{entry['shards']}" for name in names)
    parts = [f"round {current} of 0-{len(status['rounds']) - 1}", stages]
    if status["evaluations"]:
        newest = status["evaluations"][-1]
        values = [f"{name} {value:.3f}" for name, value in _values(newest) if value is not None]
        parts.append(f"policy {newest['version']}: {' '.join(values)}")
    return " | ".join(parts)


def _values(evaluation: dict[str, Any]) -> list[tuple[str, float | None]]:
    metrics = sorted(evaluation["metrics"].items())
    return [("reward", evaluation["reward"]), ("win rate", evaluation["win_rate"]), *metrics]


def render(status: dict[str, Any], age_seconds: float | None = None) -> RenderableType:
    """The table for a terminal of 80 columns or more.

    Args:
        status: from `collect`.
        age_seconds: how old it is; None: not known.
    """
    if not status.get("run"):
        return Text("no status yet: the run's first tick writes it", style="dim")
    parts: list[RenderableType] = [_headline(status, age_seconds)]
    if status["steps"] is None:
        parts.append(Text("the pairs are not prepared yet", style="dim"))
    else:
        parts += [_bar(status), _rounds_table(status)]
        if status["evaluations"]:
            parts.append(_policies_table(status["evaluations"]))
        saved = _saved(status["annotations"])
        parts += [part for part in (saved, _waiting(status)) if part is not None]
    if status["jobs"]:
        parts.append(_jobs(status["jobs"]))
    parts += [part for part in (_spent(status), _untended(status, age_seconds)) if part is not None]
    parts += [Text(f"! {warning}", style="yellow") for warning in status["warnings"]]
    if status["outcome"] == "finished":
        parts.append(Text(f"what it came to: metaapo report {status['run']}", style="dim"))
    return Group(*parts)


def _headline(status: dict[str, Any], age: float | None) -> RenderableType:
    grid = Table.grid(expand=True)
    grid.add_column(overflow="fold")
    grid.add_column(justify="right")
    outcome = status["outcome"]
    left = Text.assemble((status["run"], "bold"), "  ", (outcome or "running", STYLES.get(outcome or "", "bold cyan")))
    right = Text(style="dim")
    if status["started"] is not None:
        until = status["ended"] or status.get("written") or time.time()
        right.append(f"{duration(until - status['started'])}")
    if age is not None and not outcome:
        right.append(f" · status {duration(age)} old", style="red" if age > STALE else "dim")
    grid.add_row(left, right)
    if outcome and outcome != "finished" and status["reason"]:
        return Group(grid, Text(status["reason"], style=STYLES.get(outcome, "")))
    return grid


def _bar(status: dict[str, Any]) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    steps = status["steps"]
    facts = [f"step {steps['done']:,} of {steps['of']:,}"]
    if status["tokens_per_second"] is not None:
        facts.append(f"{status['tokens_per_second']:,.0f} tokens/s")
    if status["seconds_left"] is not None:
        facts.append(f"about {duration(status['seconds_left'])} left")
    grid.add_row(ProgressBar(total=max(steps["of"], 1), completed=steps["done"], width=30), " · ".join(facts))
    return grid


def _rounds_table(status: dict[str, Any]) -> Table:
    """Shards by stage."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    for heading in ("round", "pairs", "scored", "gated", "sampled", "judged", "trained", "asked"):
        table.add_column(heading, justify="right", no_wrap=True)
    rounds = status["rounds"]
    current = min(status["policy"] or 0, len(rounds) - 1)
    first = max(0, min(current - SHOWN_ROUNDS + 2, len(rounds) - SHOWN_ROUNDS))
    for entry in rounds[first : first + SHOWN_ROUNDS]:
        stages = [_stage(entry, name) for name in STAGES]
        asked = f"{entry['asked'] / entry['decided']:.0%}" if entry["decided"] else ""
        label = Text(str(entry["round"]), style="bold" if entry["round"] == current and not status["outcome"] else "")
        table.add_row(label, f"{entry['pairs']:,}", *stages, asked)
    return table


def _policies_table(evaluations: list[dict[str, Any]]) -> Table:
    """How the policies are judged: the first, and the newest."""
    metrics = metric_names(evaluations)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("policy", justify="right", no_wrap=True)
    for heading in ("reward", "win rate", *metrics):
        table.add_column(heading, justify="right", style="cyan", overflow="fold")
    for entry in [*evaluations[:1], *evaluations[1:][1 - SHOWN_ROUNDS :]]:
        table.add_row(str(entry["version"]), *_judged(entry, metrics))
    return table


def _stage(entry: dict[str, Any], name: str) -> Text:
    done, total = entry[name], entry["shards"]
    if not entry["gated"] and name != "trained":
        return Text("–", style="dim")
    shown = f"{done}/{total}" if total < COUNTED_SHARDS else f"{100 * done // total}%"
    return Text(shown, style="green" if done == total else "yellow" if done else "dim")


def _judged(evaluation: dict[str, Any], metrics: list[str]) -> list[str]:
    win_rate = "" if evaluation["win_rate"] is None else f"{evaluation['win_rate']:.0%}"
    values = [evaluation["reward"], *(evaluation["metrics"].get(name) for name in metrics)]
    reward, *others = ["" if value is None else f"{value:.3f}" for value in values]
    return [reward, win_rate, *others]


def _saved(annotations: dict[str, Any]) -> Text | None:
    if annotations["saved_fraction"] is None:
        return None
    return Text.assemble(
        ("annotations ", "dim"),
        f"{annotations['made']:,}",
        (" of ", "dim"),
        f"{annotations['of']:,}",
        (" if all were sampled: ", "dim"),
        (f"{annotations['saved_fraction']:.0%} saved", "bold"),
    )


def _waiting(status: dict[str, Any]) -> Text | None:
    """The data that waits for the next stage."""
    waiting = status.get("waiting", {})  # statuses of older versions have none
    found = [f"{number:,} to {name}" for name, number in waiting.items() if number and name != "evaluate"]
    if found:
        first, _, rest = found[0].partition(" ")
        found[0] = f"{first} {'shard' if first == '1' else 'shards'} {rest}"
    policies = waiting.get("evaluate", 0)
    if policies:
        found.append(f"{policies:,} {'policy' if policies == 1 else 'policies'} to evaluate")
    return Text.assemble(("waiting ", "dim"), ", ".join(found)) if found and not status["outcome"] else None


def _spent(status: dict[str, Any]) -> Text | None:
    """What the run has cost: deaths by kind, GPU-hours, nodes that it keeps away from."""
    parts = []
    if status.get("deaths"):
        parts.append((deaths(status["deaths"]), "deaths"))
    if (status.get("gpu_hours") or 0.0) >= SHOWN_HOURS:
        parts.append((f"{status['gpu_hours']:,.1f}", "GPU-hours"))
    if status.get("avoided"):
        nodes = status["avoided"]
        more = f" and {len(nodes) - SHOWN_NODES} more" if len(nodes) > SHOWN_NODES else ""
        parts.append((f"{', '.join(nodes[:SHOWN_NODES])}{more}", "nodes avoided"))
    text = Text("")
    for value, name in parts:
        text.append("  " if text else "").append(f"{name} ", style="dim").append(value)
    return text if parts else None


def deaths(by_kind: dict[str, int]) -> str:
    """``3 preempted, 1 node``."""
    return ", ".join(f"{number:,} {kind}" for kind, number in by_kind.items())


def _untended(status: dict[str, Any], age: float | None) -> Text | None:
    if status["outcome"] or age is None or age < QUIET:
        return None
    advice = f"! nobody has ticked this run for {duration(age)}. To do it once: metaapo tick {status['run']}"
    return Text(advice, style="bold red")


def _jobs(jobs: list[dict[str, Any]]) -> Text:
    """The newest attempt of each role; beyond a few, the workers are counted."""
    workers = [job for job in jobs if job["slot"].startswith("worker-")]
    shown = [job for job in jobs if job not in workers or len(workers) <= SHOWN_WORKERS]
    text = Text("")
    for job in shown:
        attempt = f" (attempt {job['number']})" if job["number"] else ""
        text.append("  " if text else "").append(job["slot"], style="bold").append(f"{attempt} ")
        text.append(job["outcome"], style=_job_style(job["outcome"]))
    if len(workers) > SHOWN_WORKERS:
        text.append("  ").append(f"{len(workers):,} workers", style="bold").append(f" {_count(workers)}")
    for line in _together([job for job in jobs if job.get("waits_for")], "waits_for"):
        text.append(f"\n{line}", style="yellow")
    for line in _together([job for job in jobs if job["outcome"] in ("failed", "died") and job["message"]], "message"):
        text.append(f"\n{line}", style="red")
    return text


def _together(jobs: list[dict[str, Any]], key: str) -> list[str]:
    """A line for each message that jobs have, with who has it."""
    slots: dict[str, list[str]] = {}
    for job in jobs:
        slots.setdefault(job[key].splitlines()[0], []).append(job["slot"])
    lines = []
    for message, who in list(slots.items())[:SHOWN_MESSAGES]:
        more = f" and {len(who) - SHOWN_WORKERS:,} more" if len(who) > SHOWN_WORKERS else ""
        lines.append(f"{', '.join(who[:SHOWN_WORKERS])}{more}: {message}")
    hidden = len(slots) - SHOWN_MESSAGES
    return [*lines, f"and {hidden:,} more"] if hidden > 0 else lines


def _count(workers: Iterable[dict[str, Any]]) -> str:
    return ", ".join(f"{count:,} {outcome}" for outcome, count in Counter(w["outcome"] for w in workers).most_common())


def _job_style(outcome: str) -> str:
    return {"running": "green", "done": "green", "failed": "red", "died": "red"}.get(outcome, "yellow")
