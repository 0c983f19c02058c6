"""A shard's requests, answered by the real engine."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from tests.inference.conftest import CONTEXT, Model
from toolkit.algorithms.draws import sample_seed
from toolkit.exchange.tables import PAIRS, REQUESTS, RESPONSES
from toolkit.inference.engine import PolicyEngine
from toolkit.inference.sampling import sample_shard
from toolkit.inference.settings import SamplingSettings

SETTINGS = SamplingSettings(samples=3, max_new_tokens=12)
STOP = list(range(40, 50))
PROMPTS = {"a": [3, 4, 5], "b": [6, 7], "c": [5] * CONTEXT, "d": [8, 9, 10]}


def spell(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def pairs_of(prompts: dict[str, list[int]]) -> pa.Table:
    return pa.Table.from_pylist([{"pair_id": key, "prompt_ids": ids} for key, ids in prompts.items()], schema=PAIRS)


def requests(**sampled: bool) -> pa.Table:
    return pa.Table.from_pylist([{"pair_id": key, "sampled": value} for key, value in sampled.items()], schema=REQUESTS)


def test_requested_prompts_are_answered_in_order(policy: PolicyEngine, first: Model) -> None:
    asked = requests(d=True, b=False, a=True)
    table = sample_shard(asked, pairs_of(PROMPTS), policy, SETTINGS, 17, 2, STOP, spell)
    assert table.schema == RESPONSES
    rows = table.to_pylist()
    assert [(row["pair_id"], row["sample"]) for row in rows] == [(key, k) for key in "da" for k in range(3)]
    for row in rows:
        assert row["seed"] == sample_seed(17, 2, row["pair_id"], row["sample"])
        assert row["text"] == spell(row["token_ids"])
        assert abs(row["logprob"] - first.logprob(PROMPTS[row["pair_id"]], row["token_ids"])) < 1e-4
        ended = row["token_ids"][-1] in STOP
        assert row["finish_reason"] == ("stop" if ended else "length")
        assert ended or len(row["token_ids"]) == SETTINGS.max_new_tokens


def test_a_pairs_responses_do_not_depend_on_its_shard(policy: PolicyEngine) -> None:
    alone = sample_shard(requests(a=True), pairs_of(PROMPTS), policy, SETTINGS, 17, 2, STOP, spell)
    among = sample_shard(requests(b=True, a=True, d=True), pairs_of(PROMPTS), policy, SETTINGS, 17, 2, STOP, spell)
    assert among.slice(3, 3).equals(alone)
    other_round = sample_shard(requests(a=True), pairs_of(PROMPTS), policy, SETTINGS, 17, 3, STOP, spell)
    assert other_round["token_ids"] != alone["token_ids"]


def test_a_prompt_that_the_engine_cannot_take_is_one_row(policy: PolicyEngine) -> None:
    table = sample_shard(requests(c=True, a=True), pairs_of(PROMPTS), policy, SETTINGS, 17, 2, STOP, spell)
    rejected, *rows = table.to_pylist()
    assert rejected["text"].startswith(f"{CONTEXT} tokens")
    assert {key: rejected[key] for key in ("pair_id", "sample", "token_ids", "finish_reason", "logprob", "seed")} == {
        "pair_id": "c",
        "sample": 0,
        "token_ids": [],
        "finish_reason": "rejected",
        "logprob": None,
        "seed": None,
    }
    assert [row["pair_id"] for row in rows] == ["a"] * 3


def test_no_requests_make_an_empty_table(policy: PolicyEngine) -> None:
    table = sample_shard(requests(a=False), pairs_of(PROMPTS), policy, SETTINGS, 17, 2, STOP, spell)
    assert table.num_rows == 0 and table.schema == RESPONSES
