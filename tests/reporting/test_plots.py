from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from toolkit.reporting import plots


def texts(svg: str) -> list[str]:
    """The words of a drawing, which is well-formed and scales with the page."""
    root = ElementTree.fromstring(svg)
    assert "width" not in root.attrib and "viewBox" in root.attrib
    return ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]


ROUNDS = [
    {"round": 1, "pairs": 10, "sampled": 6, "outcomes": {"pair": 4, "tie": 2}},
    {"round": 2, "pairs": 10, "sampled": 5, "outcomes": {"pair": 1}},  # 4 are not annotated yet
]


@pytest.mark.parametrize(
    ("svg", "expected"),
    [
        (plots.by_policy({0: 0.5, 1: 0.7}, {0: None, 1: 0.1}, "win rate"), {"win rate", "policy", "0", "1"}),
        (plots.by_policy({3: 1.0}, {}, "reward"), {"reward", "3"}),
        (plots.outcomes_by_round(ROUNDS), {"round 1", "round 2", "pair", "tie", "open", "60%", "50%"}),
        (plots.rewards_by_round({1: {"best": 1.0, "all": 0.5, "worst": 0.0}}), {"best", "all", "worst"}),
        (plots.learner_curves(np.zeros(3), {0: np.zeros(3)}), {"version 0"}),
        (plots.histograms({1: np.zeros(5), 2: np.ones(1)}, "feature s"), {"round 1", "round 2", "feature s"}),
        (plots.gain_by_weight(np.array([0.0, 0.0, 1.0]), np.array([1.0, 2.0, -1.0])), {"2", "1"}),
        (plots.by_step({"a": [None, 1.0], "b": [None, None]}, [0, 1], [0], "loss"), {"loss", "a"}),
        (
            plots.time_bars({"trainer": {"train": 90.0, "idle": 45.0}}, ["train"]),
            {"trainer", "train", "idle", "minutes"},
        ),
    ],
    ids=["win rate", "one policy", "outcomes", "rewards", "curves", "histograms", "gain", "steps", "time"],
)
def test_what_a_drawing_says(svg: str, expected: set[str]) -> None:
    assert expected <= set(texts(svg))


def test_a_series_without_values_has_no_label() -> None:
    assert "b" not in texts(plots.by_step({"a": [1.0], "b": [None]}, [0], [0], "loss"))


def test_many_steps_are_smoothed() -> None:
    steps = list(range(400))
    few, many = (plots.by_step({"a": [float(n % 2) for n in s]}, s, [0], "loss") for s in (steps[:50], steps))
    assert "opacity: 0.2" not in few and "opacity: 0.2" in many


def test_of_very_many_steps_the_single_ones_are_paler_and_below_every_mean() -> None:
    steps = list(range(4000))
    series = {"a": [float(n % 2) for n in steps], "b": [float(n % 3) for n in steps]}
    svg = plots.by_step(series, steps, [0], "loss")
    curves = re.findall(r'style="(fill: none; stroke: var\(--c[12]\)[^"]*)"', svg)
    pale = ["opacity: 0.05" in style for style in curves]
    assert pale[:4] == [True, True, False, False]


def test_many_policies_and_rounds_have_few_numbers() -> None:
    values = dict.fromkeys(range(41), 0.5)
    rewards = {version: {"best": 1.0, "all": 0.5, "worst": 0.0} for version in range(41)}
    for svg in (plots.by_policy(values, {}, "reward"), plots.rewards_by_round(rewards)):
        numbers = [word for word in texts(svg) if word.isdigit()]
        assert 2 < len(numbers) < 12 and "0" in numbers


def test_names_are_no_formulas() -> None:
    assert "a$^{$" in texts(plots.by_policy({0: 0.5, 1: 0.7}, {}, "a$^{$"))
