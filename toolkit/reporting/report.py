"""``report.html``: one file that shows what a run did, whether it helped, and real text of it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import __version__
from toolkit import config as configuration
from toolkit.config import Config
from toolkit.exchange import filesystem, layout
from toolkit.exchange.run import Run, flatten
from toolkit.reporting import gather, metrics, page, plots
from toolkit.reporting.page import Html, tag
from toolkit.reporting.progress import Reader
from toolkit.reporting.summary import policies_table, rounds_table, with_sign
from toolkit.reporting.terminal import SHOWN_HOURS, deaths, duration, metric_names
from toolkit.reporting.timing import ACTIVITIES, IDLE, STARTING

PAIRS_SHOWN = 3  # a round
ROUNDS_DRAWN = 20  # whose outcomes are drawn
PROMPTS_SHOWN = 6  # held-out prompts
ATTEMPTS_SHOWN = 60
BARS_SHOWN = 10  # slots with a bar of their own in the picture of where the time went


def write_report(run: Run, summary: dict[str, Any]) -> Path:
    """Write ``report.html`` in the run directory; of an unfinished run it shows what is there.

    Args:
        summary: from `toolkit.reporting.summary.summarise_run`.

    Raises:
        ImportError: matplotlib is not installed here.
    """
    path = run.root / "report.html"
    filesystem.replace(path, html(run, summary).encode())
    return path


def html(run: Run, summary: dict[str, Any]) -> str:
    """The report as one self-contained HTML document."""
    reader = Reader(run)
    sections = [_cards(summary), _rounds(summary), _quality(summary)]
    if summary["pairs"]:
        sections += [_gate(reader, summary), _training(run), _time(summary), *_texts(reader, summary), _data(run)]
    sections += [_attempts(summary), _configuration(run)]
    unread = [f"Cannot read {name}: {detail}" for name, detail in sorted(reader.damage.items())]
    warnings = [*summary["warnings"], *(text for text in unread if text not in summary["warnings"])]
    return page.page(f"{run.root.name} – MetaAPO run", _head(run, summary), _warnings(warnings), *sections, _footer())


# ------------------------------------------------------------------------------------------------- the top


def _head(run: Run, summary: dict[str, Any]) -> Html:
    outcome = summary["outcome"] or "not finished"
    made = datetime.fromtimestamp(run.records.require(layout.IDENTITY).written, UTC)
    config = run.config
    facts = [
        f"{summary['method']} ({config.method.objective.name}, gate {config.method.gate.kind})",
        f"policy {Path(config.model.policy).name or config.model.policy}",
        f"data {Path(config.data.path).name or config.data.path}",
        f"seed {config.seed}",
        f"made {made:%Y-%m-%d %H:%M} UTC",
    ]
    if run.config.replay_from is not None:
        facts.append(f"replay of {Path(run.config.replay_from).name}")
    badge = tag("span", outcome, kind=f"badge {summary['outcome'] or ''}")
    return tag("header", tag("h1", run.root.name, badge), tag("p", " · ".join(facts), kind="lead"))


def _warnings(warnings: list[str]) -> Html:
    return tag("ul", *(tag("li", warning) for warning in warnings), kind="warnings") if warnings else Html("")


def _cards(summary: dict[str, Any]) -> Html:
    entries = []
    for name in (*_metric_keys(summary), "reward"):
        entries.append((_label(name), *_change(summary[name], summary["change"].get(name))))
    win_rate = summary["win_rate"]["final"]
    entries.append(("win rate", "–" if win_rate is None else f"{win_rate:.1%}", "last policy against the start"))
    made, of, saved = (summary["annotations"][key] for key in ("made", "of", "saved_fraction"))
    if saved is not None:
        entries.append(("annotations saved", f"{saved:.1%}", f"{made:,} responses judged, {of:,} if all were sampled"))
    steps = summary["steps"]
    entries.append(("pairs", f"{summary['pairs']:,}", f"{steps['done']:,} of {steps['of'] or 0:,} optimizer steps"))
    attempts, died = len(summary["attempts"]), sum(summary["deaths"].values())
    spent = f"{summary['gpu_hours']:,.1f} GPU-hours, " if summary["gpu_hours"] >= SHOWN_HOURS else ""
    tried = f"{spent}{attempts:,} attempts" + (f", {died:,} died" if died else "")
    entries.append(("wall time", duration(summary["wall_seconds"]), tried))
    return page.cards(entries)


def _metric_keys(summary: dict[str, Any]) -> list[str]:
    return [f"{name}_reward" for name in metric_names(summary["policies"])]


def _label(name: str) -> str:
    return "reward" if name == "reward" else f"{name.removesuffix('_reward')} reward"


def _change(ends: dict[str, float | None], change: dict[str, float | None] | None) -> tuple[str, str]:
    """The number and the remark of a headline card."""
    initial, final = ends["initial"], ends["final"]
    if final is None:
        return "–", "not evaluated" if initial is None else f"{initial:.3f} at the start; last policy not evaluated"
    return f"{final:.3f}", "" if initial is None else f"{with_sign(change)} from {initial:.3f} at the start"


def _rounds(summary: dict[str, Any]) -> Html:
    note = (
        "What each round asked for, and what became of it. Ties, prompts of which every response was cut at the limit, and failures "
        "give no online pair."
    )
    return page.section("Rounds", page.table(*rounds_table(summary)), note=note)


# ------------------------------------------------------------------------------------------------- the plots


def _quality(summary: dict[str, Any]) -> Html:
    policies = summary["policies"]
    wanted = [
        (
            f"{name} reward",
            lambda of, name=name: of["metrics"].get(name),
            f"Mean of the metric {name!r} over the held-out prompts.",
        )
        for name in metric_names(policies)
    ]
    wanted += [
        (
            "reward",
            lambda of: of["reward"],
            "Mean reward of the policies' responses to the held-out prompts; policy 0 is the initial one.",
        ),
        (
            "win rate",
            lambda of: of["win_rate"],
            "Share of held-out prompts on which a policy's response has more reward than the initial policy's; ties count one half.",
        ),
        (
            "tokens per response",
            lambda of: of["tokens"],
            "Mean length of a response. A reward that rises with the length alone is no progress.",
        ),
    ]
    figures = []
    for colour, (label, value, caption) in enumerate(wanted):
        known = {policy["version"]: value(policy) for policy in policies if value(policy) is not None}
        errors = {policy["version"]: value(policy["error"]) for policy in policies}
        if known:
            figures.append(page.figure(plots.by_policy(known, errors, label, colour), caption))
    note = (
        "Judged on the held-out prompts: mean ± standard error of the mean. Policy 0 is the initial one, policy v + 1 is made by "
        "round v. Win rate: by reward, against the initial policy on the same prompt; a tie counts one half. The changes above are "
        "means of differences on the same prompts, which are known better than the difference of two means."
    )
    return page.section("Policies", page.table(*policies_table(summary)), page.grid(*figures), note=note)


def _gate(reader: Reader, summary: dict[str, Any]) -> Html:
    rounds = [entry for entry in summary["rounds"] if entry["sampled_fraction"] is not None]
    if not rounds:
        return Html("")
    drawn = [rounds[index] for index in gather.spread(len(rounds), ROUNDS_DRAWN)]
    caption = (
        "What became of each round's pairs: sampled with a usable online pair, or sampled without one; the rest was trained on "
        "its dataset pair alone."
    )
    if len(drawn) < len(rounds):
        caption += f" Of {len(rounds)} rounds {len(drawn)} are drawn, evenly spread."
    figures = [page.figure(plots.outcomes_by_round(drawn), caption)]
    rewards = gather.sampled_rewards(reader, rounds)
    if rewards:
        caption = (
            "Rewards of the responses sampled in each round: of each prompt's best, of all, of each prompt's worst."
        )
        figures.append(page.figure(plots.rewards_by_round(rewards), caption))
    values = gather.gate_values(reader, rounds)
    note = ""
    if values["s"]:
        figures.append(page.figure(plots.histograms(values["s"], "feature s"), "Feature s of the pairs, as scored."))
        caption = "Weight w that the gate gave each pair; it is sampled with probability 1 − w."
        figures.append(page.figure(plots.histograms(values["w_gate"], "w at the gate", (0, 1)), caption))
        if reader.run.config.learns:
            curves, note = _learner(reader, np.concatenate(list(values["s"].values())))
            figures.append(curves)
    rows = gather.meta_rows(reader)
    if len(rows["gain"]):
        caption = (
            "How much better the online pair scores than the dataset pair (ℓ is minus the loss), by the gate's weight. "
            "A useful meta-learner gives low weights where this is positive. Numbers are rows of meta batches."
        )
        figures.append(page.figure(plots.gain_by_weight(rows["w_gate"], rows["gain"]), caption))
    return page.section("Gate and meta-learner", page.grid(*figures), note=note)


def _learner(reader: Reader, features: np.ndarray) -> tuple[Html, str]:
    """The figure of the meta-learner's versions, or why there is none."""
    low, high = np.quantile(features, [0.005, 0.995])
    points = np.linspace(low - 0.2, high + 0.2, 200)
    try:
        curves = gather.learner_curves(reader, points)
    except ImportError as error:
        return Html(
            ""
        ), f"The meta-learner's curves are not drawn: {error.name} is not installed where this was written."
    if not curves:
        return Html(""), ""
    caption = f"The meta-learner h: s → w, {len(curves)} of its versions; later ones are darker."
    return page.figure(plots.learner_curves(points, curves), caption), ""


def _training(run: Run) -> Html:
    lines = metrics.steps(run.root)
    if not lines:
        return Html("")
    steps = [entry["step"] for entry in lines]
    starts = [run.plan.first_step[index] for index in range(run.plan.rounds)]
    wanted = (
        (
            "loss",
            {"loss": "loss", "dataset pairs": "loss_offline", "online pairs": "loss_online"},
            "Loss of a step's pairs.",
        ),
        (
            "margin",
            {"dataset pairs": "margin_offline", "online pairs": "margin_online"},
            "Implicit reward margin β·Δ of chosen over rejected, under the loss reference.",
        ),
        (
            "implicit reward",
            {"chosen": "reward_chosen", "rejected": "reward_rejected"},
            "β·(log π − log π_ref) of the dataset pairs' sides. Both falling is usual; chosen far below 0 is a warning.",
        ),
        ("weight w", {"weight w": "w"}, "Mean weight of the offline half among pairs with an online half."),
        ("gradient norm", {"gradient norm": "gradient_norm"}, "Before clipping."),
        ("learning rate", {"learning rate": "learning_rate"}, "As scheduled."),
    )
    figures = []
    for name, columns, caption in wanted:
        series = {label: [entry.get(column) for entry in lines] for label, column in columns.items()}
        if any(value is not None for values in series.values() for value in values):
            figures.append(page.figure(plots.by_step(series, steps, starts, name), caption))
    note = (
        "Dotted lines are the starts of rounds. From 100 steps on, a line is the mean of the last 1/50 of the steps, which lags behind "
        "them and smooths the learning rate too; the steps themselves are pale."
    )
    return page.section("Training", page.grid(*figures), note=note)


def _time(summary: dict[str, Any]) -> Html:
    slots = summary["seconds"]
    if not slots:
        return Html("")
    workers = [name for name in slots if name.startswith("worker-")]
    if len(workers) > BARS_SHOWN:
        mean = {
            activity: sum(slots[name].get(activity, 0.0) for name in workers) / len(workers)
            for activity in (*ACTIVITIES.values(), STARTING, IDLE)
        }
        slots = {name: found for name, found in slots.items() if name not in workers}
        slots[f"{len(workers)} workers, mean"] = mean
    colours = [activity for activity in ACTIVITIES.values() if activity not in plots.PASSIVE]
    caption = (
        "Seconds of each role by activity, all attempts together. Grey is time without work; start: until its first activity, for "
        "a worker the wait for its first work too; wait: for annotations; idle: waiting for work. Load models: starting vLLM included."
    )
    return page.section(
        "Where the time went", page.grid(page.figure(plots.time_bars(slots, colours), caption, wide=True))
    )


# ------------------------------------------------------------------------------------------------- the texts


def _texts(reader: Reader, summary: dict[str, Any]) -> list[Html]:
    last = max((policy["version"] for policy in summary["policies"]), default=0)
    compared = gather.before_and_after(reader, last, PROMPTS_SHOWN) if last else []
    blocks = [tag("div", _messages(row["prompt"]), _compared(row, last), kind="pair") for row in compared]
    held_out = page.section(
        "Before and after",
        *blocks,
        note=f"Held-out prompts, evenly spread, with the responses of the initial policy and of policy {last}.",
    )
    rounds = []
    for entry in summary["rounds"]:
        shown = gather.sampled_pairs(reader, entry["round"], PAIRS_SHOWN) if entry["online"] else []
        rounds.append(page.details(f"Round {entry['round']}", *(_pair(row) for row in shown), opened=True))
    sampled = page.section(
        "Sampled pairs",
        *rounds,
        note="The first pairs of each round with an online half: what the dataset says, and the best and worst of the policy's own "
        "responses by reward.",
    )
    return [held_out, sampled]


def _messages(messages: list[dict[str, str]]) -> Html:
    return Html("".join(page.quote(message["content"], message["role"]) for message in messages))


def _compared(row: dict[str, Any], last: int) -> Html:
    sides = []
    for key, heading in (("initial", "initial policy"), ("final", f"policy {last}")):
        said = row[key]
        judged = [("reward", said["reward"]), *((metric["name"], metric["value"]) for metric in said["metrics"])]
        remark = _remark(judged, said["finish_reason"])
        sides.append(page.quote(said["text"], heading, remark, "chosen" if key == "final" else ""))
    return tag("div", *sides, kind="sides")


def _pair(row: dict[str, Any]) -> Html:
    blocks = []
    for half, source in (("offline", "dataset"), ("online", "sampled")):
        sides = [
            page.quote(
                row[half][side]["text"],
                f"{source}, {side}",
                _remark([("reward", row[half][side]["reward"])], row[half][side]["finish_reason"]),
                side,
            )
            for side in ("chosen", "rejected")
        ]
        blocks.append(tag("div", *sides, kind="sides"))
    rewards = ", ".join("failed" if value is None else f"{value:.2f}" for value in row["online"]["rewards"])
    facts = f"pair {row['pair_id']} · s {row['s']:.3f} · w at the gate {row['w_gate']:.3f} · rewards of all responses: {rewards}"
    return tag("div", _messages(row["prompt"]), *blocks, tag("p", facts, kind="note"), kind="pair")


def _remark(judged: list[tuple[str, float | None]], finish_reason: str | None) -> str:
    values = [f"{name} {value:.3f}" for name, value in judged if gather.finite(value) is not None]
    ended = {"stop": "ended", "length": "cut at the limit", "rejected": "prompt rejected"}
    return " · ".join([*values, *([ended.get(finish_reason, finish_reason)] if finish_reason else [])])


# ------------------------------------------------------------------------------------------------- the rest


def _data(run: Run) -> Html:
    counts = run.pairs_manifest.attributes.get("counts", {})
    rows = [["source", run.config.data.path]]
    rows += [[name, f"{counts[name]:,}"] for name in ("rows", "pairs", "heldout") if name in counts]
    rows += [[f"dropped: {reason}", f"{number:,}"] for reason, number in counts.get("dropped", {}).items()]
    rows += [[f"{name} digest", digest] for name, digest in run.pairs_manifest.attributes.get("digests", {}).items()]
    return page.section("Data", page.table([], rows, "words"))


def _attempts(summary: dict[str, Any]) -> Html:
    attempts = summary["attempts"]
    # all that went wrong before the rest, the newest first
    order = sorted(attempts, key=lambda a: (a["outcome"] not in ("failed", "died"), -a["number"], a["slot"]))
    rows = [
        [
            f"{attempt['slot']} {attempt['number']}",
            attempt["outcome"],
            "" if attempt["seconds"] is None else duration(attempt["seconds"]),
            attempt["host"],
            ": ".join(filter(None, (attempt["kind"], attempt["message"]))),
        ]
        for attempt in order[:ATTEMPTS_SHOWN]
    ]
    notes = [f"{len(attempts)} attempts; {ATTEMPTS_SHOWN} are shown."] if len(attempts) > ATTEMPTS_SHOWN else []
    notes += [f"Deaths by kind: {deaths(summary['deaths'])}."] if summary["deaths"] else []
    return page.section(
        "Attempts", page.table(["attempt", "ended", "lasted", "host", "message"], rows, "words"), note=" ".join(notes)
    )


def _configuration(run: Run) -> Html:
    defaults = dict(flatten(configuration.identity(Config()) | configuration.operations(Config())))
    halves = (("Identity", configuration.identity(run.config)), ("Operations", configuration.operations(run.config)))
    parts = []
    for title, values in halves:
        rows = [
            [
                tag("b", key) if value != defaults.get(key) else key,
                "(set)" if "environment" in key.split(".")[:-1] else str(value),  # it may hold a secret
                "" if value == defaults.get(key) else _default(defaults, key),
            ]
            for key, value in flatten(values)
        ]
        parts.append(page.details(title, page.table(["key", "value", "default"], rows, "words settings")))
    return page.section("Configuration", *parts, note="Keys in bold differ from their defaults.")


def _default(defaults: dict[str, Any], key: str) -> str:
    return str(defaults[key]) if key in defaults else "(none)"


def _footer() -> Html:
    return tag(
        "footer", f"Written by metaapo {__version__}. Numbers: summary.json; rows: the Parquet files of the run."
    )
