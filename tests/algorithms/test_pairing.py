from __future__ import annotations

import math

import pytest

from toolkit.algorithms.pairing import Outcome, best_worst

NO, YES = [False] * 4, [True] * 4
IDS = [[1], [2], [3], [4]]


@pytest.mark.parametrize(
    ("rewards", "truncated", "outcome"),
    [
        ([0.1, 0.9, -0.5, 0.3], NO, Outcome("pair", 1, 2)),
        ([0.9, 0.9, -0.5, -0.5], NO, Outcome("pair", 0, 2)),  # the first of equals
        ([0.1, 0.9, -0.5, 0.3], [False, True, True, False], Outcome("pair", 3, 0)),  # truncated ones are no candidates
        ([0.1, math.nan, -0.5, math.inf], NO, Outcome("pair", 0, 2)),  # nor those without a reward
        ([0.5, 0.5, 0.5, 0.5], NO, Outcome("tie")),
        ([0.5, 0.9, 0.5, 0.1], [False, True, False, True], Outcome("tie")),
        ([0.1, 0.9, 0.2, 0.3], YES, Outcome("all_truncated")),
        ([0.1, 0.9, 0.2, 0.3], [True, True, True, False], Outcome("all_truncated")),
        ([math.nan] * 4, NO, Outcome("reward_failed")),
        ([math.nan, -math.inf, math.inf, 1.0], NO, Outcome("reward_failed")),
        ([1.0, math.nan, 2.0, 3.0], [False, False, True, True], Outcome("reward_failed")),
        ([math.nan] * 4, YES, Outcome("all_truncated")),
    ],
)
def test_outcomes(rewards, truncated, outcome) -> None:
    assert best_worst(rewards, truncated, IDS) == outcome


def test_the_same_text_twice_is_a_tie_whatever_its_rewards() -> None:
    assert best_worst([0.50001, 0.5], [False, False], [[7, 8], [7, 8]]) == Outcome("tie")
    assert best_worst([0.50001, 0.5, 0.1], [False] * 3, [[7, 8], [7, 8], [9]]) == Outcome("pair", 0, 2)


def test_truncated_responses_may_be_allowed() -> None:
    assert best_worst([0.1, 0.9, -0.5, 0.3], YES, IDS, allow_truncated=True) == Outcome("pair", 1, 2)


@pytest.mark.parametrize(
    "arguments", [([1.0], [False], [[1]]), ([1.0, 2.0], [False], IDS[:2]), ([1.0, 2.0], NO[:2], IDS)]
)
def test_lengths_are_checked(arguments) -> None:
    with pytest.raises(ValueError, match="one length >= 2"):
        best_worst(*arguments)
