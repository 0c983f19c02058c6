"""The report's plots, as inline SVG that follows the page's colours, light or dark. Pure: numbers in, text out."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Colours that stand for the page's: matplotlib must be given some, and the SVG's are then replaced by CSS variables.
INK, MUTED, GRID, PAPER = "#0a0001", "#0a0002", "#0a0003", "#0a0004"
SERIES = tuple(f"#0a001{index}" for index in range(8))
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", PAPER: "--card"}
VARIABLES |= {colour: f"--c{index}" for index, colour in enumerate(SERIES, 1)}

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "metaapo",  # the same numbers give the same text
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # names may hold a dollar sign
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.prop_cycle": matplotlib.cycler(color=SERIES),
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.left": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "figure.facecolor": "none",
}
COMPACT, SMALL, WIDTH = (3.0, 2.2), (3.8, 2.5), 9.0  # inches; the page scales them

OUTCOMES = ("pair", "tie", "all_truncated", "prompt_rejected", "reward_failed")
PASSIVE = {"start": 0.8, "wait": 0.55, "idle": 0.3}  # grey, by opacity


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for pattern, replacement in (
        (r'(<svg [^>]*?) width="[^"]*"', r"\1"),  # the page says how large it is
        (r'(<svg [^>]*?) height="[^"]*"', r"\1"),
        (r"<metadata>.*?</metadata>\s*", ""),
        (r'<g id="[^"]*"', "<g"),  # the same in every drawing
    ):
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text


def by_policy(values: Mapping[int, float], errors: Mapping[int, float | None], name: str, colour: int = 0) -> str:
    """A value of each policy with its standard error; a win rate has its line at one half."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(COMPACT)
        versions = sorted(values)
        axes.errorbar(
            versions,
            [values[version] for version in versions],
            yerr=[errors.get(version) or 0.0 for version in versions],
            color=SERIES[colour % len(SERIES)],
            marker="o",
            markersize=5,
            capsize=3,
            elinewidth=1,
        )
        if name == "win rate":
            axes.axhline(0.5, color=MUTED, linewidth=0.8, linestyle="--")
        _numbered(axes, versions)
        axes.margins(y=0.15)
        axes.set_xlabel("policy")
        axes.set_ylabel(name)
        return _svg(figure)


def _numbered(axes: Axes, numbers: Sequence[int]) -> None:
    """Whole numbers along x, a few of them however many there are."""
    axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def outcomes_by_round(rounds: Sequence[Mapping[str, object]]) -> str:
    """What became of the pairs of each gated round: not sampled, and the annotations' outcomes; fractions of the round."""
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, axes = _figure((SMALL[0], max(1.0 + 0.2 * len(rounds), SMALL[1])))
        present = [name for name in OUTCOMES if any(entry["outcomes"].get(name) for entry in rounds)]
        labels = [f"round {entry['round']}" for entry in rounds]
        left = np.zeros(len(rounds))
        for name in present:
            widths = np.array([entry["outcomes"].get(name, 0) / entry["pairs"] for entry in rounds])
            axes.barh(labels, widths, left=left, height=0.62, color=SERIES[OUTCOMES.index(name)], label=name)
            left += widths
        asked = np.array([entry["sampled"] / entry["pairs"] for entry in rounds])
        if (asked - left > 1e-9).any():
            axes.barh(labels, np.maximum(asked - left, 0), left=left, height=0.62, color=MUTED, alpha=0.3, label="open")
        for index, fraction in enumerate(asked):
            axes.text(max(fraction, left[index]) + 0.015, index, f"{fraction:.0%}", va="center", fontsize=8.5)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.invert_yaxis()
        axes.set_xlabel("of the round's pairs")
        _legend_above(axes)
        return _svg(figure)


def rewards_by_round(rewards: Mapping[int, Mapping[str, float]]) -> str:
    """Mean rewards of the sampled responses by round: of the best, of all, of the worst of a prompt."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(SMALL)
        rounds = sorted(rewards)
        for index, name in enumerate(("best", "all", "worst")):
            axes.plot(
                rounds, [rewards[r][name] for r in rounds], color=SERIES[index], marker="o", markersize=5, label=name
            )
        _numbered(axes, rounds)
        axes.margins(y=0.15)
        axes.set_xlabel("round")
        axes.set_ylabel("reward")
        _legend_above(axes)
        return _svg(figure)


def learner_curves(s: np.ndarray, weights: Mapping[int, np.ndarray]) -> str:
    """w = h(s) of some versions of the meta-learner; later versions are darker, the first is dashed."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(SMALL)
        versions = sorted(weights)
        for rank, version in enumerate(versions):
            first, last = rank == 0, rank == len(versions) - 1
            axes.plot(
                s,
                weights[version],
                color=MUTED if first and not last else SERIES[0],
                linestyle="--" if first and not last else "-",
                alpha=1.0 if first or last else 0.2 + 0.6 * rank / len(versions),
                linewidth=2.2 if last else 1.2,
                label=f"version {version}" if first or last else None,
            )
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("feature s")
        axes.set_ylabel("weight w of the offline half")
        axes.legend(loc="best")
        return _svg(figure)


def histograms(values: Mapping[int, np.ndarray], name: str, bounds: tuple[float, float] | None = None) -> str:
    """Densities of a value by round; later rounds are darker."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(SMALL)
        low, high = bounds or _bounds(np.concatenate(list(values.values())))
        bins = int(np.clip(np.sqrt(max(map(len, values.values()))), 10, 40))
        edges = np.linspace(low, high, bins + 1)
        for rank, (index, found) in enumerate(sorted(values.items())):
            counts, _ = np.histogram(np.clip(found, low, high), edges)
            last = rank == len(values) - 1
            density = counts / max(counts.sum(), 1)
            alpha = 0.3 + 0.7 * (rank + 1) / len(values)
            axes.stairs(density, edges, color=SERIES[0], alpha=alpha, linewidth=1.4, label=f"round {index}")
            if last:
                axes.stairs(density, edges, color=SERIES[0], alpha=0.15, fill=True)
        axes.set_xlabel(name)
        axes.set_ylabel("share of pairs")
        if len(values) <= 6:
            axes.legend(loc="best")
        return _svg(figure)


def _bounds(values: np.ndarray) -> tuple[float, float]:
    """The range without the outermost half percents; never empty."""
    low, high = np.quantile(values, [0.005, 0.995])
    return (low - 0.5, high + 0.5) if high - low < 1e-6 else (low, high)


def gain_by_weight(weights: np.ndarray, gain: np.ndarray) -> str:
    """Mean of ℓ(online) − ℓ(dataset) (scores, higher is better) of meta-batch rows by their gate weight, with standard errors."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(SMALL)
        edges = np.linspace(0, 1, 11)
        bucket = np.clip(np.digitize(weights, edges) - 1, 0, 9)
        for index in np.unique(bucket):
            rows = gain[bucket == index]
            error = rows.std(ddof=1) / np.sqrt(len(rows)) if len(rows) > 1 else 0.0
            centre, mean = edges[index] + 0.05, rows.mean()
            axes.bar(centre, mean, width=0.085, color=SERIES[0], alpha=0.75)
            axes.errorbar(centre, mean, yerr=error, color=INK, elinewidth=1, capsize=2)
            offset = (0, 4 if mean >= 0 else -4)
            axes.annotate(
                f"{len(rows):,}",
                (centre, mean + (error if mean >= 0 else -error)),
                offset,
                textcoords="offset points",
                ha="center",
                va="bottom" if mean >= 0 else "top",
                fontsize=7,
                color=MUTED,
            )
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set_xlim(0, 1)
        axes.margins(y=0.15)
        axes.set_xlabel("weight w at the gate")
        axes.set_ylabel("ℓ(online) − ℓ(dataset)")
        return _svg(figure)


def by_step(
    series: Mapping[str, Sequence[float | None]], steps: Sequence[int], starts: Sequence[int], name: str
) -> str:
    """Values by optimizer step, with a line where each round starts; long runs are smoothed over the raw values.

    Args:
        series: values by label, one a step of ``steps``; None where there is none.
        starts: first step of each round.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(SMALL)
        for start in starts:
            axes.axvline(start, color=MUTED, linewidth=0.8, linestyle=":")
        for index, (label, values) in enumerate(series.items()):
            known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
            if not known:
                continue
            x, y = np.array([step for step, _ in known]), np.array([value for _, value in known])
            window = len(y) // 50
            if window > 1:
                # under all means, and paler the more lie on each other
                axes.plot(x, y, color=SERIES[index], alpha=min(0.2, 200 / len(y)), linewidth=0.8, zorder=1)
                y = np.convolve(y, np.full(window, 1 / window), "valid")
                x = x[window - 1 :]
            axes.plot(x, y, color=SERIES[index], label=label)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(name)
        if len(series) > 1:
            _legend_above(axes)
        return _svg(figure)


def time_bars(slots: Mapping[str, Mapping[str, float]], colours: Sequence[str]) -> str:
    """Where each role's time went: a bar a role, seconds by activity.

    Args:
        colours: the activities that have a colour of their own, in order; others (`PASSIVE`) are grey.
    """
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, axes = _figure((WIDTH, 1.0 + 0.3 * len(slots)))
        longest = max((sum(found.values()) for found in slots.values()), default=0.0)
        unit, size = ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 120 else ("seconds", 1.0)
        names = list(slots)
        left = np.zeros(len(names))
        first, *last = PASSIVE
        for activity in (first, *colours, *last):
            widths = np.array([slots[name].get(activity, 0.0) / size for name in names])
            if not widths.any():
                continue
            passive = activity in PASSIVE
            colour = MUTED if passive else SERIES[colours.index(activity) % len(SERIES)]
            alpha = PASSIVE.get(activity, 1.0)
            axes.barh(names, widths, left=left, height=0.62, color=colour, alpha=alpha, label=activity)
            left += widths
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        _legend_above(axes, 6)
        return _svg(figure)


def _legend_above(axes: Axes, columns: int = 3) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handlelength=1.2)
