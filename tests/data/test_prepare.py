from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import prompt_ids
from toolkit.data.formats import Dropped, Message, Pair
from toolkit.data.prepare import Prepared, PrepareSettings, pair_id, prepare_pairs, round_sizes, shard_sizes
from toolkit.data.template import ChatTokenizer
from toolkit.errors import UserError
from toolkit.exchange import tables

SETTINGS = PrepareSettings(
    seed=7, rounds=2, global_batch=4, shard_size=8, max_prompt_tokens=100, max_tokens=120, heldout_prompts=3
)


@pytest.fixture
def tokenizer(llama3: Path) -> ChatTokenizer:
    return ChatTokenizer(llama3)


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def pairs(count: int, prompts: int) -> list[Pair]:
    return [Pair(row, user(f"prompt {row % prompts}"), f"good {row}", f"bad {row}") for row in range(count)]


def prepare(rows: list[Pair | Dropped], tokenizer: ChatTokenizer, **changes: Any) -> Prepared:
    return prepare_pairs(rows, tokenizer, dataclasses.replace(SETTINGS, **changes), "source")


def test_ids_text_and_names_of_a_pair(tokenizer: ChatTokenizer) -> None:
    prepared = prepare(pairs(40, 40), tokenizer)
    assert prepared.pairs.schema == tables.PAIRS
    assert prepared.heldout.schema == tables.HELDOUT
    assert prepared.dropped.schema == tables.DROPPED
    for pair in prepared.pairs.to_pylist():
        row = pair["row"]
        assert pair["pair_id"] == pair_id("source", row)
        assert pair["prompt"] == user(f"prompt {row}")
        assert pair["prompt_ids"] == prompt_ids(tokenizer, pair["prompt"])
        assert (pair["chosen"], pair["chosen_ids"]) == (f"good {row}", [*f"good {row}".encode(), 260])
        assert (pair["rejected"], pair["rejected_ids"]) == (f"bad {row}", [*f"bad {row}".encode(), 260])
    assert pair_id("source", 1) != pair_id("source", 2) != pair_id("other", 2)


def test_what_is_left_out_is_listed_and_counted(tokenizer: ChatTokenizer) -> None:
    kept = pairs(20, 20)
    spoilt = [
        Pair(20, user("same"), "answer", "answer"),
        Pair(21, user("blank"), " \n", "answer"),
        Pair(22, user(" "), "good", ""),
        Pair(23, user("long" * 20), "good", "bad"),  # 80 + 23 prompt tokens
        Pair(24, user("p" * 70), "c" * 40, "r"),
        dataclasses.replace(kept[5], row=25),
        Pair(26, user(" prompt 6 "), "good 6", "bad 6"),  # the template trims it to row 6's
        Dropped(27, "different_prompts", "…"),
    ]
    prepared = prepare([*kept, *spoilt], tokenizer, heldout_prompts=0)
    assert [(row["row"], row["reason"]) for row in prepared.dropped.to_pylist()] == [
        (20, "identical"),
        (21, "empty"),
        (22, "empty"),
        (23, "too_long"),
        (24, "too_long"),
        (25, "duplicate"),
        (26, "duplicate"),
        (27, "different_prompts"),
    ]
    details = prepared.dropped["detail"].to_pylist()
    assert details[2] == "prompt and rejected blank"
    assert details[3] == "prompt of 103 tokens, limit 100"
    assert details[4] == "prompt and response of 134 tokens, limit 120"
    assert prepared.counts["dropped"] == {
        "different_prompts": 1, "duplicate": 2, "empty": 2, "identical": 1, "too_long": 2
    }  # fmt: skip
    assert sorted(prepared.pairs["row"].to_pylist()) == list(range(20))
    assert (prepared.counts["rows"], prepared.counts["pairs"], prepared.counts["heldout"]) == (28, 20, 0)


def test_limits_are_inclusive(tokenizer: ChatTokenizer) -> None:
    rows = pairs(20, 20)
    longest = max(len(prompt_ids(tokenizer, pair.prompt)) for pair in rows)
    whole = longest + len("good 19") + 1
    limits = {"heldout_prompts": 0, "max_prompt_tokens": longest}
    assert prepare(rows, tokenizer, max_tokens=whole, **limits).counts["pairs"] == 20
    assert prepare(rows, tokenizer, max_tokens=whole - 1, **limits).counts["dropped"] == {"too_long": 10}


def test_a_conversation_the_template_refuses_is_dropped(tokenizer: ChatTokenizer) -> None:
    tokenizer.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + tokenizer.template
    )
    rows = [*pairs(20, 20), Pair(20, [{"role": "system", "content": "s"}, *user("p")], "c", "r")]
    dropped = prepare(rows, tokenizer).dropped.to_pylist()
    assert [(row["row"], row["reason"]) for row in dropped] == [(20, "template")]
    assert "no system role" in dropped[0]["detail"]


def test_a_prompt_is_held_out_with_all_its_pairs(tokenizer: ChatTokenizer) -> None:
    prepared = prepare(pairs(60, 20), tokenizer)
    held = [message[0]["content"] for message in prepared.heldout["prompt"].to_pylist()]
    assert len(set(held)) == len(held) == 3
    trained = {message[0]["content"] for message in prepared.pairs["prompt"].to_pylist()}
    assert trained.isdisjoint(held)
    assert len(trained) == 17
    assert prepared.counts == prepared.counts | {"rows": 60, "pairs": 51, "heldout": 3, "dropped": {"heldout": 6}}
    for row in prepared.heldout.to_pylist():
        assert row["row"] < 20  # the first pair of its prompt
        assert row["chosen"] == f"good {row['row']}"
        assert row["prompt_ids"] == prompt_ids(tokenizer, row["prompt"])

    more = prepare(pairs(60, 20), tokenizer, heldout_prompts=5)
    # a larger split contains the smaller one, and who is held out does not depend on other prompts
    assert set(held) <= {message[0]["content"] for message in more.heldout["prompt"].to_pylist()}


def test_order_is_seeded_and_independent_of_what_else_is_there(tokenizer: ChatTokenizer) -> None:
    rows = pairs(60, 60)
    first, again = prepare(rows, tokenizer), prepare(rows, tokenizer)
    assert all(
        tables.to_parquet(getattr(first, name)) == tables.to_parquet(getattr(again, name))
        for name in ("pairs", "heldout", "dropped")
    )
    order = first.pairs["row"].to_pylist()
    assert order != sorted(order)
    other = prepare(rows, tokenizer, seed=8, heldout_prompts=0).pairs["row"].to_pylist()
    assert other != prepare(rows, tokenizer, heldout_prompts=0).pairs["row"].to_pylist()
    assert prepare(rows, tokenizer, seed=8).heldout["row"].to_pylist() != first.heldout["row"].to_pylist()
    bounded = prepare(rows, tokenizer, max_pairs=16)
    assert bounded.pairs["row"].to_pylist() == order[:16]
    assert bounded.counts["dropped"] == {"max_pairs": 57 - 16}
    without = prepare([row for row in rows if row.row not in order[:4]], tokenizer, heldout_prompts=0)
    assert [row for row in without.pairs["row"].to_pylist() if row in order] == order[4:]


def test_the_batches_of_tokenization_leave_no_trace(tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Pair | Dropped] = [*pairs(50, 20), Dropped(50, "different_prompts", "…")]
    steps: list[int] = []
    whole = prepare_pairs(iter(rows), tokenizer, SETTINGS, "source", steps.append)
    assert steps == [51]
    monkeypatch.setattr("toolkit.data.prepare.BATCH", 7)
    parts = prepare_pairs(iter(rows), tokenizer, SETTINGS, "source", steps.append)
    assert steps == [51, *range(7, 50, 7), 51]
    assert parts.pairs.equals(whole.pairs)
    assert parts.counts == whole.counts


def test_rounds_and_shards(tokenizer: ChatTokenizer) -> None:
    prepared = prepare(pairs(43, 43), tokenizer, warm_start=True, heldout_prompts=2)
    assert prepared.metadata["pairs_per_round"] == [16, 16, 9]
    table = prepared.pairs.to_pylist()
    assert [(row["round"], row["position"]) for row in table] == [
        (index, position) for index, size in enumerate((16, 16, 9)) for position in range(size)
    ]
    assert all(row["shard"] == row["position"] // 8 for row in table)
    cut = list(prepared.rounds())
    assert [sizes for _, sizes in cut] == [[8, 8], [8, 8], [8, 1]]
    assert [set(part["round"].to_pylist()) for part, _ in cut] == [{0}, {1}, {2}]


@pytest.mark.parametrize(
    ("count", "changes", "sizes"),
    [
        (32, {}, [16, 16]),
        (33, {}, [20, 13]),  # nine batches, the last one of a single pair
        (5, {}, [4, 1]),
        (40, {"rounds": 3}, [16, 12, 12]),
        (40, {"rounds": 3, "warm_start": True}, [12, 12, 8, 8]),
        (40, {"rounds": 3, "warm_start": True, "warm_start_pairs": 8}, [8, 12, 12, 8]),
        (7, {"rounds": 1}, [7]),
    ],
)
def test_round_sizes(count: int, changes: dict[str, Any], sizes: list[int]) -> None:
    assert round_sizes(count, dataclasses.replace(SETTINGS, **changes)) == sizes
    assert sum(sizes) == count


def test_round_sizes_lose_nothing_and_leave_one_short_batch() -> None:
    for rounds in (1, 2, 3, 7):
        settings = dataclasses.replace(SETTINGS, rounds=rounds)
        for count in range(4 * rounds, 120):
            sizes = round_sizes(count, settings)
            assert sum(sizes) == count
            assert all(size % 4 == 0 for size in sizes[:-1])
            batches = [-(-size // 4) for size in sizes]
            assert max(batches) - min(batches) <= 1
    assert shard_sizes(20, 8) == [8, 8, 4]
    assert shard_sizes(16, 8) == [8, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard_size": 10}, "shard_size 10 is not a multiple of global_batch 4; take 8 or 12"),
        ({"shard_size": 2}, "shard_size 2 is not a multiple of global_batch 4; take 4"),
        ({"rounds": 0}, "rounds is 0; expected at least 1"),
        ({"max_pairs": 0}, "max_pairs is 0"),
        ({"heldout_prompts": -1}, "heldout_prompts is -1"),
        ({"warm_start_pairs": 8}, "no warm-start round"),
        ({"warm_start": True, "warm_start_pairs": 6}, "warm_start_pairs 6 is not a multiple of global_batch 4"),
    ],
)
def test_settings_that_fit_no_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SETTINGS, **changes)


def test_too_little_data(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(UserError, match="heldout_prompts asks for 3 of 3 different prompts"):
        prepare(pairs(9, 3), tokenizer)
    with pytest.raises(
        UserError, match=r"too few pairs: 4 pairs; 2 rounds need .* Of 7 rows: 3 held out, dropped \{\}"
    ):
        prepare(pairs(7, 7), tokenizer)
    blank: Iterator[Pair] = (Pair(row, user("p"), "", "") for row in range(3))
    with pytest.raises(UserError, match=r"too few pairs: 0 pairs.*dropped \{'empty': 3\}"):
        prepare(list(blank), tokenizer, heldout_prompts=0)
    with pytest.raises(UserError, match="after 8 pairs for the warm start"):
        prepare(pairs(12, 12), tokenizer, warm_start=True, warm_start_pairs=8)


def test_metadata_says_what_the_ids_were_made_with(tokenizer: ChatTokenizer) -> None:
    metadata = prepare(pairs(20, 20), tokenizer).metadata
    assert metadata["digests"] == tokenizer.digests
    assert (metadata["end_of_turn"], metadata["stop_ids"], metadata["notes"]) == (260, [257, 260], [])
    assert metadata["source_digest"] == "source"
