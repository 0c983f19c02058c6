"""The formats in which people keep preference pairs, and how a row of each becomes a ``Pair``.

=========== ====================================================================================================
strings     columns ``prompt``, ``chosen``, ``rejected``: strings
messages    ``chosen``, ``rejected``: lists of {role, content} that end with an assistant turn, with or without a
            ``prompt`` (a string or such a list); where the lists hold whole conversations, they are the truth
hh_rlhf     ``chosen``, ``rejected``: transcripts ``\\n\\nHuman: … \\n\\nAssistant: …``; ``prompt``, if there is one,
            is the part of the transcript before both
=========== ====================================================================================================

A row that is not what its format says stops everything, with file, row and column. A row that can be read but is no
pair is left out, with the reason ``different_prompts`` (its two conversations part before the last turn) or
``no_answer`` (a transcript ends with the human's turn).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.errors import UserError, unknown

if TYPE_CHECKING:  # the roles read conversations, not files: they need not have `datasets`
    from toolkit.data.sources import Source

Message = dict[str, str]  # {"role", "content"}
Row = Mapping[str, Any]
Parsed = tuple[list[Message], str, str]  # prompt, chosen, rejected

COLUMNS = ("prompt", "chosen", "rejected")
PEEK = 100  # rows looked at to tell the format
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class Pair:
    """A preference pair: the conversation up to the answer, and two answers to it."""

    row: int
    prompt: list[Message]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Dropped:
    """A row that was left out, and why."""

    row: int
    reason: str
    detail: str


class _Unreadable(Exception):
    """(column, what was found and what expected)"""


class _NoPair(Exception):
    """(reason, detail)"""


def prompt_id(prompt: list[Message]) -> str:
    """16 hex digits that name a prompt: its roles and contents, surrounding whitespace apart (templates trim it)."""
    turns = [[message["role"], message["content"].strip()] for message in prompt]
    return hashlib.blake2b(json.dumps(turns).encode(), digest_size=8).hexdigest()


def read_pairs(source: Source, format: str = "auto") -> Iterator[Pair | Dropped]:
    """Every row of ``source``, in order, as a pair or as dropped with a reason.

    Args:
        format: a name in ``FORMATS``, or ``auto`` to detect it.

    Raises:
        UserError: an unknown format, one whose columns are missing, or a row that cannot be read.
    """
    if format == "auto":
        format = detect(source)
    if format not in FORMATS:
        raise unknown("data format", format, ("auto", *FORMATS))
    read, needed, _ = FORMATS[format]
    if missing := [name for name in needed if name not in source.columns]:
        raise UserError(f"{source.name}: format {format} lacks column(s) {', '.join(missing)}. {_describe(source)}")
    for number, row in source.rows(COLUMNS):
        try:
            prompt, chosen, rejected = read(row)
        except _Unreadable as error:
            column, found = error.args
            raise UserError(f"{source.name} row {number} (counted from 0), column {column}: {found}") from None
        except _NoPair as error:
            yield Dropped(number, *error.args)
        else:
            yield Pair(number, prompt, chosen, rejected)


def detect(source: Source) -> str:
    """The format of ``source`` by its columns and first rows.

    Raises:
        UserError: none fits, or more than one; it lists the columns and what each format needs.
    """
    fits: set[str] = set()
    for _, row in itertools.islice(source.rows(COLUMNS), PEEK):
        prompt, chosen, rejected = (row.get(name) for name in COLUMNS)
        if isinstance(chosen, list) and isinstance(rejected, list):
            fits.add("messages")
        elif isinstance(chosen, str) and isinstance(rejected, str):
            start = chosen if prompt is None else prompt
            if isinstance(start, str) and SPEAKER.match(start):
                fits.add("hh_rlhf")
            elif isinstance(prompt, str):
                fits.add("strings")
    if len(fits) == 1:
        return fits.pop()
    found = f"its first rows look like {' and '.join(sorted(fits))}" if fits else "its first rows fit no format"
    raise UserError(f"{source.name}: cannot tell the data format: {found}. {_describe(source)}")


def _describe(source: Source) -> str:
    needs = "; ".join(f"{name} needs {text}" for name, (_, _, text) in FORMATS.items())
    return f"Columns found: {', '.join(source.columns)}. Formats: {needs}. Name one, or rename the columns"


def _strings(row: Row) -> Parsed:
    prompt, chosen, rejected = (_text(row.get(name), name) for name in COLUMNS)
    return [{"role": "user", "content": prompt}], chosen, rejected


def _messages(row: Row) -> Parsed:
    prompt = row.get("prompt")
    before = _turns(prompt, "prompt") if isinstance(prompt, list) else []

    def conversation(column: str) -> list[Message]:
        turns = _turns(row.get(column), column)
        if before:
            return turns if turns[: len(before)] == before and len(turns) > len(before) else before + turns
        if any(turn["role"] == "user" for turn in turns[:-1]):
            return turns
        return [*turns[:-1], {"role": "user", "content": _text(prompt, "prompt")}, turns[-1]]

    return _split(conversation("chosen"), conversation("rejected"))


def _hh_rlhf(row: Row) -> Parsed:
    before = "" if row.get("prompt") is None else _text(row["prompt"], "prompt")

    def conversation(column: str) -> list[Message]:
        text = _text(row.get(column), column)
        if text.lstrip().startswith(before.strip()):
            turns = _transcript(text, column)
        else:  # the answer alone: what stands in it, even a speaker's name, is the answer's
            turns = _transcript(before, "prompt")
            opened = turns.pop()["content"] if turns[-1]["role"] == "assistant" else ""
            turns.append({"role": "assistant", "content": (opened + text).strip()})
        if turns[-1]["role"] == "user":
            raise _NoPair("no_answer", f"{column} ends with the human's turn")
        return turns

    return _split(conversation("chosen"), conversation("rejected"))


def _transcript(text: str, column: str) -> list[Message]:
    start, *parts = SPEAKER.split(text)
    if start.strip() or not parts:
        raise _Unreadable(column, f"starts with {_shown(text)}; expected a transcript '\\n\\nHuman: …'")
    return [
        {"role": SPEAKERS[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _split(chosen: list[Message], rejected: list[Message]) -> Parsed:
    """What stands before the last turns, and the last turns."""
    for column, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1]["role"] != "assistant":
            raise _Unreadable(column, f"the last turn is of role {turns[-1]['role']!r}; expected 'assistant'")
    if chosen[:-1] != rejected[:-1]:
        raise _NoPair("different_prompts", "chosen and rejected part before their last turn")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def _turns(value: object, column: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise _Unreadable(column, f"found {_shown(value)}; expected a list of messages {{role, content}}")
    for position, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise _Unreadable(column, f"message {position} is {_shown(turn)}; expected {{role, content}}")
    return [
        {key: _text(turn.get(key), f"{column}, message {position}, {key}") for key in ("role", "content")}
        for position, turn in enumerate(value)
    ]


def _text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise _Unreadable(column, f"found {_shown(value)}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Unreadable(column, f"holds half a character at position {error.start} (a lone surrogate)") from None
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'…' if len(text) > 60 else ''}" if value is not None else "nothing"


# name: (reader of a row, columns it must have, the same for people)
FORMATS: dict[str, tuple[Callable[[Row], Parsed], tuple[str, ...], str]] = {
    "strings": (_strings, COLUMNS, "prompt, chosen, rejected as strings"),
    "messages": (_messages, COLUMNS[1:], "chosen, rejected as lists of {role, content} (prompt: string, list or none)"),
    "hh_rlhf": (_hh_rlhf, COLUMNS[1:], r"chosen, rejected as transcripts '\n\nHuman: … \n\nAssistant: …'"),
}
