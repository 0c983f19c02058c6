"""Pairs of a global batch, divided into padded micro-batches.

Alignment: a sequence of n tokens gives n - 1 positions; position t sees ``sequence[t]`` and predicts
``sequence[t + 1]``. With prompt length p the response's tokens are the labels of positions p - 1 to n - 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolkit.errors import UserError

SIDES = ("off_chosen", "off_rejected", "on_chosen", "on_rejected")


@dataclass(frozen=True)
class Pair:
    """A prompt with up to four responses.

    Attributes:
        prompt_length: tokens of the prompt that all four begin with.
        sequences: prompt and response, int32 (length,), in the order of ``SIDES``; None where there is none.
    """

    prompt_length: int
    sequences: tuple[NDArray[np.int32] | None, ...]


MASKED = Pair(0, (None,) * len(SIDES))
"""Fills a short batch up; contributes nothing."""


@dataclass(frozen=True)
class PairBatch:
    """A global batch: the same pairs in the same order on every rank."""

    pairs: Sequence[Pair]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, prompts included, padding not."""
        return sum(len(sequence) for pair in self.pairs for sequence in pair.sequences if sequence is not None)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass computes.

    Attributes:
        tokens, labels: (m, s) int64. response: (m, s) bool, true where the label belongs to a response.
        items: (n,) int64, positions in the global batch of the items that the sequences belong to.
        slots: (m',) int64, where the first m' sequences go in the flattened (n, k) array of the items' log-probs;
            sequences beyond them are fillers of an empty micro-batch.
        width: k, sequences per item, absent ones counted.
    """

    tokens: Tensor
    labels: Tensor
    response: Tensor
    items: Tensor
    slots: Tensor
    width: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same on ``device``, but for ``items``, which stay on the CPU."""
        moved = (part.to(device) for part in (self.tokens, self.labels, self.response))
        return MicroBatch(*moved, self.items, self.slots.to(device), self.width)

    def scatter(self, logprobs: Tensor) -> Tensor:
        """(m,) log-prob sums of the sequences as (n, k), differentiable; 0 without gradient where one is absent."""
        flat = logprobs.new_zeros(len(self.items) * self.width)
        return flat.index_copy(0, self.slots, logprobs[: len(self.slots)]).unflatten(0, (len(self.items), self.width))


def divide(lengths: Sequence[int], copies: int, size: int) -> list[list[list[int]]]:
    """Which items each copy of the model takes in each micro-batch: ``result[copy][micro_batch]`` lists positions.

    Longest first (what doesn't fit in memory shows at once), neighbours in length together, at most ``size`` at a time;
    all copies get equally many micro-batches, the last ones perhaps empty. A pure function of its arguments.
    """
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    starts = range(0, len(order), copies * size)
    return [[order[start + c * size : start + (c + 1) * size] for start in starts] for c in range(copies)]


def micro_batches(items: Sequence[Pair], copy: int, copies: int, size: int, multiple: int) -> Iterator[MicroBatch]:
    """The micro-batches of data-parallel copy ``copy`` of ``copies``, ``size`` items each, padded to ``multiple``."""
    lengths = [max((len(s) for s in item.sequences if s is not None), default=0) for item in items]
    for positions in divide(lengths, copies, size)[copy]:
        yield collate([items[position] for position in positions], positions, multiple)


def collate(items: Sequence[Pair], positions: Sequence[int], multiple: int) -> MicroBatch:
    """One micro-batch, padded on the right to its longest sequence, rounded up to a multiple of ``multiple``."""
    width = len(items[0].sequences) if items else len(SIDES)
    present = [
        (row * width + column, sequence, item.prompt_length)
        for row, item in enumerate(items)
        for column, sequence in enumerate(item.sequences)
        if sequence is not None
    ]
    slots = [slot for slot, _, _ in present]
    # Every copy has to take part in each pass through the pipeline: an empty micro-batch computes one filler.
    sequences = [(sequence, prompt) for _, sequence, prompt in present] or [(np.zeros(2, np.int32), 2)]
    longest = max(len(sequence) for sequence, _ in sequences) - 1
    padded = -(-longest // multiple) * multiple
    tokens, labels = np.zeros((2, len(sequences), padded), np.int64)
    response = np.zeros((len(sequences), padded), bool)
    for row, (sequence, prompt) in enumerate(sequences):
        size = len(sequence) - 1
        tokens[row, :size], labels[row, :size] = sequence[:-1], sequence[1:]
        response[row, prompt - 1 : size] = True
    return MicroBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        torch.from_numpy(response),
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor(slots, dtype=torch.int64),
        width,
    )


def check_items(items: Sequence[Pair], vocabulary: int, max_positions: int) -> None:
    """Raise UserError for a sequence that the model can't take: too long, a token it doesn't know, or no response."""
    for position, item in enumerate(items):
        for sequence in item.sequences:
            if sequence is None:
                continue
            if not 1 <= item.prompt_length < len(sequence):
                raise UserError(
                    f"sequence {position} of the batch has {len(sequence)} tokens and prompt length {item.prompt_length}; "
                    "expected at least one token of prompt and one of response"
                )
            if len(sequence) > max_positions:
                raise UserError(
                    f"sequence {position} of the batch has {len(sequence)} tokens; the model takes {max_positions}. "
                    "Prepare the data with a smaller length limit."
                )
            if int(sequence.max()) >= vocabulary or int(sequence.min()) < 0:
                raise UserError(
                    f"sequence {position} of the batch has token ids from {sequence.min()} to {sequence.max()}; the "
                    f"model's vocabulary is 0 to {vocabulary - 1}. The data were prepared with another tokenizer."
                )
