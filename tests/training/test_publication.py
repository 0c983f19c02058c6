"""What a policy is published with."""

from __future__ import annotations

from toolkit.training.publication import PROBES, middling


def row(length: int) -> list[list[int]]:
    return [[1] * 3, [2] * (length - 3)]


def lengths(rows: list[list[list[int]]]) -> list[int]:
    return [len(prompt) + len(response) for prompt, response in rows]


def test_probes_are_of_median_length_among_what_the_engine_takes() -> None:
    rows = [row(length) for length in (90, 10, 50, 20, 80, 30, 70, 40, 60, 100)]
    assert lengths(middling(rows, 1000)) == [40, 50, 60, 70]
    assert lengths(middling(rows, 60)) == [10, 20, 30, 40][-PROBES:]
    assert middling(rows[::-1], 1000) == middling(rows, 1000)


def test_few_or_long_responses_still_give_probes() -> None:
    assert lengths(middling([row(10), row(20)], 1000)) == [10, 20]
    assert lengths(middling([row(30), row(40)], 10)) == [30, 40]
