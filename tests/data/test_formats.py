from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from toolkit.data import formats, sources
from toolkit.data.formats import Dropped, Pair
from toolkit.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
WHO = {"role": "user", "content": "Who?"}
GOOD = {"role": "assistant", "content": "A name."}
BAD = {"role": "assistant", "content": "No."}


def source(folder: Path, rows: list[dict[str, Any]]) -> sources.Source:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sources.load(path)


def read(folder: Path, *rows: dict[str, Any], format: str = "auto") -> list[Pair | Dropped]:
    return list(formats.read_pairs(source(folder, list(rows)), format))


def test_strings(tmp_path: Path) -> None:
    rows = read(tmp_path, {"prompt": "Hi", "chosen": " Hello\n", "rejected": "", "score": 1})
    assert rows == [Pair(0, [HI], " Hello\n", "")]  # as it stands; judging it is not the reader's work


def test_messages_without_prompt_keep_system_and_all_turns(tmp_path: Path) -> None:
    before = [SYSTEM, HI, HELLO, WHO]
    assert read(tmp_path, {"chosen": [*before, GOOD], "rejected": [*before, BAD]}) == [
        Pair(0, before, "A name.", "No.")
    ]


@pytest.mark.parametrize(
    ("prompt", "opening", "expected"),
    [
        ("Who?", [SYSTEM, WHO], [SYSTEM, WHO]),  # UltraFeedback-binarized: prompt repeats the user's turn
        ([SYSTEM, WHO], [SYSTEM, WHO], [SYSTEM, WHO]),  # the lists repeat the prompt
        ([SYSTEM, WHO], [], [SYSTEM, WHO]),  # the lists hold the answers only
        ("Who?", [], [WHO]),
        ("Who?", [SYSTEM], [SYSTEM, WHO]),
    ],
)
def test_messages_with_prompt(tmp_path: Path, prompt: Any, opening: list[dict], expected: list[dict]) -> None:
    row = {"prompt": prompt, "chosen": [*opening, GOOD], "rejected": [*opening, BAD]}
    assert read(tmp_path, row) == [Pair(0, expected, "A name.", "No.")]


def test_messages_from_parquet_ignore_other_fields(tmp_path: Path) -> None:
    turns = [HI | {"weight": 1.0}, HELLO | {"weight": 2.0}]
    table = pa.Table.from_pylist([{"chosen": turns, "rejected": [turns[0], BAD | {"weight": 0.0}], "id": 3}])
    pq.write_table(table, tmp_path / "a.parquet")
    loaded = sources.load(tmp_path / "a.parquet", cache_dir=tmp_path / "cache")
    assert list(formats.read_pairs(loaded)) == [Pair(0, [HI], "Hello", "No.")]


def test_hh_rlhf(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Who?\n\nand why?\n\nAssistant:"
    rows = read(tmp_path, {"chosen": f"{start} A name.", "rejected": f"{start} No.\n\nReally."})
    prompt = [HI, HELLO, {"role": "user", "content": "Who?\n\nand why?"}]
    assert rows == [Pair(0, prompt, "A name.", "No.\n\nReally.")]
    # the same with the shared part in a column of its own
    assert read(tmp_path, {"prompt": start, "chosen": " A name.", "rejected": " No.\n\nReally."}) == rows


@pytest.mark.parametrize("before", ["\n\nHuman: Hi\n\nAssistant:", "Human: Hi\n\nAssistant:", "\n\nHuman: Hi"])
def test_an_hh_answer_may_go_on_with_another_turn(tmp_path: Path, before: str) -> None:
    """Models do that; the prompt, stripped or without its last line, still says what is one."""
    row = {"prompt": before, "chosen": " Hello\n\nHuman: Thanks.", "rejected": "No."}
    assert read(tmp_path, row) == [Pair(0, [HI], "Hello\n\nHuman: Thanks.", "No.")]
    whole = {"prompt": before, "chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "Human: Hi\n\nAssistant: No."}
    assert read(tmp_path, whole) == [Pair(0, [HI], "Hello", "No.")]


def test_an_hh_transcript_without_an_answer_is_dropped(tmp_path: Path) -> None:
    answered = {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}
    rows = read(tmp_path, answered, answered | {"rejected": "\n\nHuman: Hi"})
    assert rows[1] == Dropped(1, "no_answer", "rejected ends with the human's turn")


def test_rows_with_different_prompts_are_dropped_with_a_reason(tmp_path: Path) -> None:
    rows = read(
        tmp_path,
        {"chosen": [HI, GOOD], "rejected": [HI, BAD]},
        {"chosen": [HI, GOOD], "rejected": [WHO, BAD]},
        {"chosen": [HI, HELLO, WHO, GOOD], "rejected": [HI, BAD]},
    )
    assert [(row.row, getattr(row, "reason", None)) for row in rows] == [
        (0, None),
        (1, "different_prompts"),
        (2, "different_prompts"),
    ]


OK_STRINGS = {"prompt": "p", "chosen": "c", "rejected": "r"}
OK_MESSAGES = {"chosen": [HI, GOOD], "rejected": [HI, BAD]}
OK_HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}


@pytest.mark.parametrize(
    ("good", "change", "column", "found"),
    [
        (OK_STRINGS, {"chosen": None}, "chosen", "found nothing; expected a string"),
        (OK_STRINGS, {"rejected": 5}, "rejected", "found int 5; expected a string"),
        (OK_STRINGS, {"prompt": [HI]}, "prompt", "found list"),
        (OK_STRINGS, {"prompt": "half \ud83d"}, "prompt", "half a character at position 5"),
        (OK_MESSAGES, {"chosen": []}, "chosen", r"found list \[\]; expected a list of messages"),
        (OK_MESSAGES, {"chosen": "text"}, "chosen", "found str 'text'; expected a list of messages"),
        (OK_MESSAGES, {"chosen": [HI, "x"]}, "chosen", "message 1 is str 'x'"),
        (OK_MESSAGES, {"rejected": [HI, {"role": "assistant"}]}, "rejected, message 1, content", "found nothing"),
        (OK_MESSAGES, {"rejected": [HI, HELLO, WHO]}, "rejected", "last turn is of role 'user'; expected 'assistant'"),
        (OK_MESSAGES, {"rejected": [BAD]}, "prompt", "found nothing; expected a string"),
        (OK_HH, {"chosen": "Hi there"}, "chosen", "expected a transcript"),
        (OK_HH, {"prompt": "Hi"}, "prompt", "expected a transcript"),
    ],
)
def test_an_unreadable_row_names_file_row_and_column(
    tmp_path: Path, good: dict, change: dict, column: str, found: str
) -> None:
    where = rf"pairs\.jsonl row 101 \(counted from 0\), column {column}: .*{found}"
    with pytest.raises(UserError, match=where):
        read(tmp_path, *[good] * 101, good | change)


@pytest.mark.parametrize(
    "rows",
    [
        [{"question": "p", "chosen": "c", "rejected": "r"}],
        [{"prompt": "p", "chosen": "c"}],
        [OK_STRINGS, OK_HH],
        [{"prompt": "p", "chosen": [HI, GOOD], "rejected": "r"}],
    ],
)
def test_an_unknown_or_ambiguous_format_lists_columns_and_needs(tmp_path: Path, rows: list[dict]) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, *rows)
    for part in ("Columns found: ", *rows[0], *formats.FORMATS):
        assert part in str(error.value)


def test_a_named_format_is_held_to(tmp_path: Path) -> None:
    assert read(tmp_path, OK_STRINGS, OK_STRINGS | {"prompt": "\n\nHuman: x"}, format="strings")[1] == Pair(
        1, [{"role": "user", "content": "\n\nHuman: x"}], "c", "r"
    )
    with pytest.raises(UserError, match="format strings lacks column\\(s\\) prompt"):
        read(tmp_path, OK_HH, format="strings")
    with pytest.raises(UserError, match="unknown data format 'sharegpt'; expected one of: auto, hh_rlhf, messages"):
        read(tmp_path, OK_STRINGS, format="sharegpt")


def test_prompt_id_sees_roles_and_turns_but_not_outer_whitespace() -> None:
    assert formats.prompt_id([HI]) == formats.prompt_id([{"role": "user", "content": " Hi\n"}])
    others = [[HI], [WHO], [SYSTEM, HI], [{"role": "system", "content": "Hi"}], [HI, HELLO, HI]]
    assert len({formats.prompt_id(prompt) for prompt in others}) == len(others)
