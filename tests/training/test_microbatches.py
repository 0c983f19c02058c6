from __future__ import annotations

import numpy as np
import pytest
import torch

from toolkit.errors import UserError
from toolkit.training.microbatches import MASKED, Pair, PairBatch, check_items, collate, divide, micro_batches


def sequence(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def test_alignment_of_five_tokens() -> None:
    """Prompt 10 11, response 12 13 14: the positions of 11, 12 and 13 predict it."""
    micro = collate([Pair(2, (sequence(10, 11, 12, 13, 14),))], [0], multiple=8)
    assert micro.tokens.tolist() == [[10, 11, 12, 13, 0, 0, 0, 0]]
    assert micro.labels.tolist() == [[11, 12, 13, 14, 0, 0, 0, 0]]
    assert micro.response.tolist() == [[False, True, True, True, False, False, False, False]]


def test_padding_is_to_the_longest_rounded_up() -> None:
    pairs = [Pair(1, (np.arange(9, dtype=np.int32), np.arange(3, dtype=np.int32)))]
    assert collate(pairs, [0], 8).tokens.shape == (2, 8)
    assert collate(pairs, [0], 16).tokens.shape == (2, 16)


def test_absent_sequences_are_not_computed_and_get_zero_without_gradient() -> None:
    pairs = [Pair(1, (sequence(1, 2), sequence(1, 3), None, None)), MASKED, Pair(1, (sequence(1, 4),) * 4)]
    micro = collate(pairs, [5, 7, 2], 8)
    assert len(micro.tokens) == 6
    assert micro.items.tolist() == [5, 7, 2]
    logprobs = torch.arange(1.0, 7.0, requires_grad=True)
    table = micro.scatter(logprobs)
    assert table.tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [3, 4, 5, 6]]
    table.sum().backward()
    assert logprobs.grad.tolist() == [1] * 6


def test_an_empty_micro_batch_computes_a_filler_that_counts_nothing() -> None:
    micro = collate([MASKED, MASKED], [0, 1], 8)
    assert micro.tokens.shape == (1, 8)
    assert not micro.response.any()
    filler = torch.ones(1, requires_grad=True)
    micro.scatter(filler).sum().backward()
    assert filler.grad.tolist() == [0]


@pytest.mark.parametrize(("count", "copies", "size"), [(1, 1, 1), (12, 2, 3), (13, 2, 3), (1, 4, 2), (40, 3, 4)])
def test_divide_gives_every_item_once_and_every_copy_as_many_passes(count: int, copies: int, size: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 9, count).tolist()
    plan = divide(lengths, copies, size)
    assert sorted(p for copy in plan for micro in copy for p in micro) == list(range(count))
    assert len({len(copy) for copy in plan}) == 1
    assert all(len(micro) <= size for copy in plan for micro in copy)
    assert plan == divide(lengths, copies, size)


def test_divide_puts_the_longest_first_and_like_with_like() -> None:
    assert divide([3, 9, 3, 7, 8, 1], 1, 2) == [[[1, 4], [3, 0], [2, 5]]]
    assert divide([3, 9, 3, 7, 8, 1], 2, 1) == [[[1], [3], [2]], [[4], [0], [5]]]


def test_micro_batches_of_a_copy() -> None:
    pairs = [Pair(1, (np.arange(n, dtype=np.int32),)) for n in (3, 9, 4, 12)]
    found = list(micro_batches(pairs, copy=1, copies=2, size=1, multiple=8))
    assert [micro.items.tolist() for micro in found] == [[1], [0]]
    assert PairBatch(pairs).tokens == 28


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair(2, (sequence(1, 2),)), "one of prompt|one of response"),
        (Pair(0, (sequence(1, 2),)), "prompt length 0"),
        (Pair(1, (sequence(*range(9)),)), "9 tokens; the model takes 8"),
        (Pair(1, (sequence(1, 10),)), "vocabulary is 0 to 9"),
        (Pair(1, (sequence(1, -1),)), "vocabulary is 0 to 9"),
    ],
)
def test_sequences_that_the_model_cannot_take(pair: Pair, message: str) -> None:
    check_items([MASKED, Pair(1, (sequence(*range(8)),))], vocabulary=10, max_positions=8)
    with pytest.raises(UserError, match=message):
        check_items([pair], vocabulary=10, max_positions=8)
