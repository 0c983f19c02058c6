"""What a run came to: ``summary.json``, and the tables of its rounds and policies."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from toolkit.exchange import filesystem, layout, lineage
from toolkit.exchange.run import Run
from toolkit.launch.attempts import Attempt, attempts, every_slot, gpu_hours
from toolkit.launch.deaths import by_kind
from toolkit.launch.drift import changed_packages
from toolkit.reporting import progress
from toolkit.reporting.progress import Reader
from toolkit.reporting.terminal import SHOWN_HOURS, deaths, duration, flat_warning, metric_names
from toolkit.reporting.timing import lasted, where_time_went

LONGER = 1.2  # growth of the mean response length from which a rising reward is doubted
CUT = 0.1  # fraction of truncated responses from which the report warns


def write_summary(run: Run) -> dict[str, Any]:
    """Write ``summary.json`` in the run directory. Returns what `summarise_run` returns."""
    found = summarise_run(run)
    filesystem.replace(run.root / "summary.json", json.dumps(found, indent=1).encode() + b"\n")
    return found


def summarise_run(run: Run) -> dict[str, Any]:
    """What a run came to so far, as JSON values; of an unfinished run what is there, the rest None.

    Returns:
        ``pairs`` (trained on, all rounds) and ``heldout`` prompts; ``rounds`` after the warm start, in order, and ``warm_start``
        likewise (None without one): ``round``, ``pairs``, ``sampled`` (prompts asked) and ``sampled_fraction``, ``online``
        (pairs with an online half), ``outcomes``, ``flat``, and of the policy after the round ``reward``, ``win_rate``,
        ``tokens``, ``truncated`` and ``<metric>_reward``; ``reward``, ``win_rate``, ``tokens`` and each ``<metric>_reward`` as
        {initial, final} (final: of the last policy), and the ``change`` between them on the same prompts with its standard error; ``policies``: every evaluation with its standard errors; ``annotations``
        {made, of, saved_fraction}: responses; ``outcomes`` of all annotations; ``steps`` {done, of}; ``wall_seconds`` from the
        run's making to its closing or last record; ``seconds`` of each role by activity; ``attempts`` and how they ended, ``deaths`` among them by kind, and the ``gpu_hours`` that all have held;
        ``outcome`` and ``reason`` of the run; ``warnings``; ``verified`` (None: `metaapo verify` tells).
    """
    reader = Reader(run)
    histories = [attempts(run, slot) for slot in every_slot(run)]
    tried = [attempt for history in histories for attempt in history]
    closing = run.closing()
    wall_seconds, made = _wall_seconds(reader, tried), run.records.require(layout.IDENTITY).written
    found: dict[str, Any] = {
        "run": str(run.root),
        "method": run.config.method.name,
        "outcome": None if closing is None else closing.attributes["outcome"],
        "reason": None if closing is None else closing.attributes["reason"],
        "pairs": 0,
        "heldout": 0,
        "rounds": [],
        "warm_start": None,
        "policies": [],
        "change": {},
        "reward": _ends([], None, "reward"),
        "win_rate": _ends([], None, "win_rate"),
        "tokens": _ends([], None, "tokens"),
        "annotations": progress.annotations(run.config.method.sampling.samples, []),
        "outcomes": {},
        "steps": {"done": 0, "of": None},
        "wall_seconds": wall_seconds,
        "seconds": where_time_went(run, tried),
        "attempts": [_attempt(attempt) for attempt in tried],
        "deaths": by_kind(histories),
        "gpu_hours": round(gpu_hours(histories, made + wall_seconds), 3),
        "verified": None,
    }
    if reader.find(layout.PAIRS) is not None:
        found |= _progress(reader)
    found["warnings"] = _warnings(reader, found) + [
        f"{sentence[0].upper()}{sentence[1:]}." for sentence in changed_packages(histories)
    ]
    return found


def _progress(reader: Reader) -> dict[str, Any]:
    run, plan = reader.run, reader.run.plan
    newest, checkpoint = progress.newest_policy(reader), progress.newest_checkpoint(reader)
    done = 0 if checkpoint is None else lineage.progress(checkpoint).step
    seen = progress.rounds(reader, [], newest, done)
    policies = progress.evaluations(reader, [], newest)
    rounds = [_round(entry, policies) for entry in seen]
    warm = run.config.method.warm_start == "offline_round"
    outcomes: dict[str, int] = {}
    for entry in seen:
        for outcome, number in entry["outcomes"].items():
            outcomes[outcome] = outcomes.get(outcome, 0) + number
    return {
        "pairs": sum(plan.pairs_per_round),
        "heldout": run.pairs_manifest.attributes.get("counts", {}).get("heldout", 0),
        "rounds": rounds[warm:],
        "warm_start": rounds[0] if warm else None,
        "policies": policies,
        "change": next((policy["change"] for policy in policies if policy["version"] == plan.rounds), {}),
        **{name: _ends(policies, plan.rounds, name) for name in ("reward", "win_rate", "tokens")},
        **{f"{name}_reward": _ends(policies, plan.rounds, name, True) for name in metric_names(policies)},
        "annotations": progress.annotations(
            run.config.method.sampling.samples, [entry for entry in seen if entry["gated"]]
        ),
        "outcomes": outcomes,
        "steps": {"done": done, "of": plan.steps},
    }


def _round(entry: dict[str, Any], policies: list[dict[str, Any]]) -> dict[str, Any]:
    after = next((policy for policy in policies if policy["version"] == entry["round"] + 1), None)
    of_policy = ("reward", "win_rate", "tokens", "truncated")
    return {
        "round": entry["round"],
        "gated": entry["gated"],
        "pairs": entry["pairs"],
        "sampled": entry["asked"],
        "sampled_fraction": entry["asked"] / entry["decided"] if entry["decided"] else None,
        "online": entry["outcomes"].get("pair", 0),
        "outcomes": entry["outcomes"],
        "flat": entry["flat"],
        **{name: None if after is None else after[name] for name in of_policy},
        **{f"{name}_reward": None if after is None else after["metrics"].get(name) for name in metric_names(policies)},
    }


def _ends(policies: list[dict[str, Any]], last: int | None, name: str, metric: bool = False) -> dict[str, float | None]:
    """A value of the initial and of the last policy."""
    values = {entry["version"]: (entry["metrics"] if metric else entry).get(name) for entry in policies}
    return {"initial": values.get(0), "final": None if last is None else values.get(last)}


def _attempt(attempt: Attempt) -> dict[str, Any]:
    end = attempt.death or ({} if attempt.end is None else attempt.end.attributes)
    seconds = lasted(attempt)
    return {
        "slot": attempt.slot,
        "number": attempt.number,
        "incarnation": attempt.incarnation,
        "outcome": attempt.outcome,
        "kind": end.get("kind"),
        "message": end.get("message"),
        "host": None if attempt.start is None else attempt.start.attributes.get("host"),
        "seconds": None if seconds is None else round(seconds, 1),
    }


def _wall_seconds(reader: Reader, tried: list[Attempt]) -> float:
    """From the identity record to the closing, or to the last record of an open run."""
    run, identity = reader.run, reader.run.records.require(layout.IDENTITY)
    closing = run.closing()
    if closing is not None:
        return round(closing.written - identity.written, 1)
    newest = progress.newest_policy(reader)
    records = [reader.find(layout.PAIRS), progress.newest_checkpoint(reader)]
    for version in range(newest + 1 if newest is not None else 0):
        records += [reader.find(layout.policy(version)), reader.find(layout.evaluation(version))]
    for attempt in tried:
        records += [attempt.start, attempt.end]
    return round(max([identity.written, *(r.written for r in records if r is not None)]) - identity.written, 1)


# ------------------------------------------------------------------------------------------------- warnings


def _warnings(reader: Reader, found: dict[str, Any]) -> list[str]:
    """What a reader of the numbers should know before believing them."""
    warnings = []
    if found["outcome"] != "finished":
        state = found["outcome"] or "not finished"
        warnings.append(
            f"The run is {state}{': ' + found['reason'] if found['reason'] else ''}. The numbers are partial."
        )
    flat = [str(entry["round"]) for entry in [found["warm_start"], *found["rounds"]] if entry and entry["flat"]]
    if flat:
        sentence = flat_warning(flat)
        warnings.append(sentence[0].upper() + sentence[1:])
    config = reader.run.config
    if config.reward.model is not None and config.evaluation_reward == config.reward.model and found["policies"]:
        warnings.append(
            "The evaluation's reward and win rate come from the reward model that chose the training pairs: part of a rise may "
            "be over-optimisation of that model. Set evaluation.reward to another model, or judge by a metric."
        )
    warnings += _about_length(found)
    unjudged = sum(policy["answered"] - policy["judged"] for policy in found["policies"])
    if unjudged:
        warnings.append(
            f"{unjudged} evaluated responses have no reward (the reward model failed); means leave them out."
        )
    return warnings + [f"Cannot read {name}: {detail}" for name, detail in sorted(reader.damage.items())]


def _about_length(found: dict[str, Any]) -> list[str]:
    if not found["policies"]:
        return []
    first, last = found["policies"][0], found["policies"][-1]
    warnings = []
    if first["tokens"] and last["tokens"] and first["reward"] is not None and last["reward"] is not None:
        growth = last["tokens"] / first["tokens"]
        if growth > LONGER and last["reward"] > first["reward"]:
            warnings.append(
                f"Responses grew longer together with the reward: {first['tokens']:.0f} to {last['tokens']:.0f} tokens "
                f"(x{growth:.2f}) from policy {first['version']} to {last['version']}. The reward model may like length."
            )
    if last["truncated"] is not None and last["truncated"] > CUT:
        warnings.append(
            f"{last['truncated']:.0%} of policy {last['version']}'s responses were cut at method.sampling.max_new_tokens; a cut "
            "response is judged as it stands."
        )
    return warnings


# ------------------------------------------------------------------------------------------------- for people


def rounds_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What each round asked for and got: headings, and a row of cells a round."""
    headings = ["round", "pairs", "sampled", "online pairs", "ties", "all cut", "failed"]
    rows = []
    for entry in [summary["warm_start"], *summary["rounds"]]:
        if entry is None:
            continue
        label = str(entry["round"]) + (" (warm)" if entry is summary["warm_start"] else "")
        cells = ["–"] * 5
        if entry["sampled_fraction"] is not None:
            outcomes = Counter(entry["outcomes"])
            failed = outcomes["prompt_rejected"] + outcomes["reward_failed"]
            counts = (entry["online"], outcomes["tie"], outcomes["all_truncated"], failed)
            cells = [f"{entry['sampled']:,} ({entry['sampled_fraction']:.0%})", *(f"{count:,}" for count in counts)]
        rows.append([label, f"{entry['pairs']:,}", *cells])
    return headings, rows


def policies_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """How each policy is judged on the held-out prompts: headings, and a row of cells a policy."""
    names = metric_names(summary["policies"])
    headings = ["policy", "reward", "win rate", *(f"{name} reward" for name in names), "tokens per response", "cut"]
    rows = []
    for policy in summary["policies"]:
        error = policy["error"]
        rows.append(
            [
                str(policy["version"]),
                with_error(policy["reward"], error["reward"]),
                "" if policy["win_rate"] is None else f"{policy['win_rate']:.1%}",
                *(with_error(policy["metrics"].get(name), error["metrics"].get(name)) for name in names),
                "" if policy["tokens"] is None else f"{policy['tokens']:.1f}",
                "" if policy["truncated"] is None else f"{policy['truncated']:.0%}",
            ]
        )
    return headings, rows


def render(summary: dict[str, Any]) -> RenderableType:
    """A summary for a terminal of 80 columns or more: both tables, and what they come to."""
    tables = [_table(*found) for found in (rounds_table(summary), policies_table(summary)) if found[1]]
    lines = [Text("\n".join(_sentences(summary)))]
    lines += [Text(f"! {warning}", style="yellow") for warning in summary["warnings"]]
    return Group(Text(f"{summary['method']}  {summary['run']}", style="bold"), *tables, *lines)


def _table(headings: list[str], rows: list[list[str]]) -> Table:
    """A table of which nothing is cut: a heading's words and, where it must, a value's error take lines of their own."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        judged = heading.endswith("reward")
        look: dict[str, Any] = {"no_wrap": not judged, "overflow": "fold", "style": "cyan" if judged else ""}
        table.add_column(heading.replace(" ", "\n"), justify="right", vertical="bottom", **look)
    for row in rows:
        table.add_row(*row)
    return table


def with_error(value: float | None, error: float | None) -> str:
    """A value with its standard error."""
    if value is None:
        return ""
    return f"{value:.3f}" + ("" if error is None else f" ±{error:.3f}")


def with_sign(change: dict[str, float | None] | None) -> str:
    """A change with its sign and standard error."""
    if change is None:
        return "no prompt in common"
    return f"{change['mean']:+.3f}" + ("" if change["error"] is None else f" ±{change['error']:.3f}")


def _sentences(summary: dict[str, Any]) -> list[str]:
    found = []
    for name in (*(f"{name}_reward" for name in metric_names(summary["policies"])), "reward"):
        ends = summary[name]
        if ends["initial"] is not None and ends["final"] is not None:
            change = with_sign(summary["change"].get(name))
            found.append(
                f"{name.replace('_', ' ')} {ends['initial']:.3f} -> {ends['final']:.3f} ({change} on the same prompts)."
            )
    annotations = summary["annotations"]
    if annotations["saved_fraction"] is not None:
        found.append(
            f"{annotations['made']:,} of {annotations['of']:,} responses judged, {annotations['saved_fraction']:.0%} saved."
        )
    cost = f"Wall time {duration(summary['wall_seconds'])}"
    if summary["gpu_hours"] >= SHOWN_HOURS:
        cost += f", {summary['gpu_hours']:,.1f} GPU-hours"
    if summary["deaths"]:
        cost += f"; deaths: {deaths(summary['deaths'])}"
    return [*found, f"{cost}."]
