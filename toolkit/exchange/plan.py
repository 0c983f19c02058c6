"""The arithmetic of a run: rounds, shards, batches, optimizer steps, meta boundaries. Known before the run starts.

Batch membership never depends on the gate, so every position in the run is a function of these few numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Batch:
    """One optimizer step: rows ``start:stop`` of a shard. ``step`` counts over the whole run, from 0."""

    step: int
    round: int
    epoch: int
    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class Boundary:
    """Where meta-learner version ``version`` is learned: after optimizer step ``after_step`` (that many steps are done)."""

    version: int
    round: int
    after_step: int


@dataclass(frozen=True)
class Plan:
    """The run's shape.

    Args:
        pairs_per_round: pairs of each round.
        gated: for each round, whether its gate may ask for online samples (a warm-start round does not).
        shard_size: pairs of a shard; a round's last shard may be shorter.
        global_batch: pairs of an optimizer step; a shard's last batch may be shorter.
        epochs: passes over a round's pairs.
        meta_interval: optimizer steps between meta boundaries, counted from each round's start (T_meta).
        meta_remainder: whether the steps after a round's last full interval are a boundary of their own.
        learns: whether the method has a meta-learner at all.
    """

    pairs_per_round: tuple[int, ...]
    gated: tuple[bool, ...]
    shard_size: int
    global_batch: int
    epochs: int
    meta_interval: int
    meta_remainder: bool
    learns: bool

    @property
    def rounds(self) -> int:
        return len(self.pairs_per_round)

    def shards(self, round_index: int) -> int:
        return -(-self.pairs_per_round[round_index] // self.shard_size)

    def shard_rows(self, round_index: int, shard: int) -> int:
        return min(self.shard_size, self.pairs_per_round[round_index] - shard * self.shard_size)

    def steps_in_round(self, round_index: int) -> int:
        return self.epochs * sum(
            -(-self.shard_rows(round_index, shard) // self.global_batch) for shard in range(self.shards(round_index))
        )

    @cached_property
    def first_step(self) -> tuple[int, ...]:
        """Steps done before each round, and in the end: ``rounds + 1`` values."""
        firsts = [0]
        for index in range(self.rounds):
            firsts.append(firsts[-1] + self.steps_in_round(index))
        return tuple(firsts)

    @property
    def steps(self) -> int:
        return self.first_step[-1]

    def batches(self, round_index: int) -> Iterator[Batch]:
        """The round's optimizer steps in their fixed order."""
        step = self.first_step[round_index]
        for epoch in range(self.epochs):
            for shard in range(self.shards(round_index)):
                rows = self.shard_rows(round_index, shard)
                for start in range(0, rows, self.global_batch):
                    yield Batch(step, round_index, epoch, shard, start, min(start + self.global_batch, rows))
                    step += 1

    @cached_property
    def boundaries(self) -> tuple[Boundary, ...]:
        """All meta boundaries, versions 1, 2, ... in order."""
        found: list[Boundary] = []
        if not self.learns:
            return ()
        for index in range(self.rounds):
            if not self.gated[index]:
                continue
            first, last = self.first_step[index], self.first_step[index + 1]
            ends = list(range(first + self.meta_interval, last + 1, self.meta_interval))
            if self.meta_remainder and (not ends or ends[-1] != last) and last > first:
                ends.append(last)
            found += [Boundary(len(found) + 1 + offset, index, end) for offset, end in enumerate(ends)]
        return tuple(found)

    def version_before_round(self, round_index: int) -> int:
        """The meta-learner version at the last boundary of the rounds before: the one this round's gate uses."""
        return sum(boundary.round < round_index for boundary in self.boundaries)

    def version_at_step(self, step: int, lag: int) -> int:
        """The version whose weights the loss of optimizer step ``step`` uses: ``lag`` behind the last boundary passed."""
        passed = sum(boundary.after_step <= step for boundary in self.boundaries)
        return max(0, passed - lag)
