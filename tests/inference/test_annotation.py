"""Every outcome of a pair's annotation, with the real reward engine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from tests.inference.conftest import CONTEXT, Model
from toolkit.errors import UserError
from toolkit.exchange.tables import ANNOTATIONS, PAIRS, RESPONSES
from toolkit.inference.annotation import annotate_shard
from toolkit.inference.engine import RewardEngine

Responses = list[tuple[str, str]]  # (text, finish reason)


def ids(text: str) -> list[int]:
    return [ord(letter) - ord("a") + 5 for letter in text]


def render(messages: Sequence[dict[str, str]], text: str) -> list[int]:
    if "?" in text:
        raise UserError("the template does not know ?")
    return [token for message in messages for token in ids(message["content"])] + [3] + ids(text)


def annotate(reward: RewardEngine, allow_truncated: bool = False, **responses: Responses) -> list[dict]:
    """The annotations of pairs, whose prompt is their own name."""
    pairs = [{"pair_id": key, "prompt": [{"role": "user", "content": key}]} for key in sorted(responses)]
    rows = [
        {"pair_id": key, "sample": number, "token_ids": [*ids(text), 2], "text": text, "finish_reason": reason}
        for key, texts in responses.items()
        for number, (text, reason) in enumerate(texts)
    ]
    table = annotate_shard(
        pa.Table.from_pylist(rows, schema=RESPONSES),
        pa.Table.from_pylist(pairs, schema=PAIRS),
        reward,
        render,
        allow_truncated,
    )
    assert table.schema == ANNOTATIONS
    return table.to_pylist()


def test_best_against_worst(reward: RewardEngine, judge_model: Model) -> None:
    texts = ["a", "bb", "cde", "xyz", "zzz"]
    second, first = annotate(reward, b=[(text, "stop") for text in texts], a=[("u", "stop"), ("v", "stop")])
    assert (second["pair_id"], first["pair_id"]) == ("b", "a")  # the order of the responses
    expected = [judge_model.reward(render([{"role": "user", "content": "b"}], text)) for text in texts]
    assert second["rewards"] == pytest.approx(expected, abs=1e-4)
    best, worst = int(np.argmax(expected)), int(np.argmin(expected))
    assert second["outcome"] == "pair"
    assert (second["chosen_sample"], second["rejected_sample"]) == (best, worst)
    assert (second["chosen_ids"], second["rejected_ids"]) == ([*ids(texts[best]), 2], [*ids(texts[worst]), 2])
    assert second["chosen_reward"] == second["rewards"][best]
    assert second["rejected_reward"] == second["rewards"][worst]


def test_a_truncated_response_enters_a_pair_only_where_allowed(reward: RewardEngine) -> None:
    responses = [("a", "length"), ("bb", "stop"), ("cde", "stop"), ("xyz", "length")]
    [without] = annotate(reward, a=responses)
    assert {without["chosen_sample"], without["rejected_sample"]} == {1, 2}
    [cut] = annotate(reward, a=[("a", "length"), ("bb", "length"), ("cde", "stop")])
    assert cut["outcome"] == "all_truncated"
    [allowed] = annotate(reward, allow_truncated=True, a=[("a", "length"), ("bb", "length")])
    assert allowed["outcome"] == "pair"


def test_equal_responses_tie(reward: RewardEngine) -> None:
    [row] = annotate(reward, a=[("bb", "stop")] * 3)
    assert row["outcome"] == "tie"
    assert len(set(row["rewards"])) == 1
    assert all(row[key] is None for key in row if key.startswith(("chosen", "rejected")))


@pytest.mark.parametrize("beyond", ["b" * CONTEXT, "what?"])
def test_what_the_reward_model_cannot_take_has_no_reward(reward: RewardEngine, beyond: str) -> None:
    [failed] = annotate(reward, a=[("a", "stop"), (beyond, "stop")])
    assert failed["outcome"] == "reward_failed"
    assert [math.isnan(value) for value in failed["rewards"]] == [False, True]
    [enough] = annotate(reward, a=[(beyond, "stop"), ("a", "stop"), ("bb", "stop")])
    assert enough["outcome"] == "pair"
    assert {enough["chosen_sample"], enough["rejected_sample"]} == {1, 2}


def test_a_rejected_prompt_stays_one_row(reward: RewardEngine) -> None:
    rows = annotate(reward, a=[("too long", "rejected")], b=[("u", "stop"), ("v", "stop")])
    assert [(row["pair_id"], row["outcome"]) for row in rows] == [("a", "prompt_rejected"), ("b", "pair")]
    assert rows[0]["rewards"] == []


def test_no_responses_make_an_empty_table(reward: RewardEngine) -> None:
    assert annotate(reward) == []
