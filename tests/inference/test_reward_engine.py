"""The real reward engine, compared with transformers."""

from __future__ import annotations

import math

import pytest

from tests.inference.conftest import CONTEXT, VOCABULARY, Model
from toolkit.inference.engine import RewardEngine

CONVERSATIONS = [[3, 4, 5], [7] * 150 + [8], [7] * 150 + [9], list(range(2, 90)), [5] * CONTEXT]


def test_rewards_are_the_raw_logits_of_transformers(reward: RewardEngine, judge_model: Model) -> None:
    expected = [judge_model.reward(ids) for ids in CONVERSATIONS]
    assert reward.score(CONVERSATIONS) == pytest.approx(expected, abs=1e-4)
    assert min(expected) < 0 or max(expected) > 1  # no sigmoid could give these


def test_equal_conversations_have_equal_rewards(reward: RewardEngine) -> None:
    rewards = reward.score([*CONVERSATIONS, *CONVERSATIONS[::-1]])
    assert rewards[:5] == rewards[:4:-1]


def test_what_the_model_cannot_take_has_no_reward(reward: RewardEngine, judge_model: Model) -> None:
    rewards = reward.score([[3, 4], [], [5] * (CONTEXT + 1), [3, VOCABULARY], [6]])
    assert [math.isnan(value) for value in rewards] == [False, True, True, True, False]
    assert rewards[0] == pytest.approx(judge_model.reward([3, 4]), abs=1e-4)
    assert reward.score([]) == []
