"""The arithmetic of a run against a slow enumeration that walks through it pair by pair."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from toolkit.exchange.plan import Plan


class Walk:
    """What happens in a run, step by step, without any arithmetic."""

    def __init__(self, plan: Plan) -> None:
        self.batches: list[tuple[int, int, int, list[int]]] = []  # round, epoch, shard, positions in the round
        self.boundaries: list[tuple[int, int]] = []  # round, steps done
        self.passed: list[int] = []  # boundaries behind each step
        self.steps_before: list[int] = []
        self.versions_before: list[int] = []
        for index, count in enumerate(plan.pairs_per_round):
            self.steps_before.append(len(self.batches))
            self.versions_before.append(len(self.boundaries))
            counts = plan.learns and plan.gated[index]
            since = 0
            for epoch in range(plan.epochs):
                left, shard = list(range(count)), 0
                while left:
                    rows, left = left[: plan.shard_size], left[plan.shard_size :]
                    while rows:
                        batch, rows = rows[: plan.global_batch], rows[plan.global_batch :]
                        self.passed.append(len(self.boundaries))
                        self.batches.append((index, epoch, shard, batch))
                        since += 1
                        if counts and since == plan.meta_interval:
                            self.boundaries.append((index, len(self.batches)))
                            since = 0
                    shard += 1
            if counts and since and plan.meta_remainder:
                self.boundaries.append((index, len(self.batches)))
        self.steps_before.append(len(self.batches))


def shapes(**fixed: object) -> list[Plan]:
    """Many small plans; shards are multiples of the batch, rounds may be short, empty, or not gated."""
    rounds = [((0,), (True,)), ((1,), (True,)), ((7, 8), (False, True)), ((5, 0, 12), (True, True, True))]
    found = []
    for (pairs, gated), (batch, shard), epochs, interval, remainder in product(
        rounds, [(1, 1), (1, 3), (2, 2), (2, 4), (3, 6)], (1, 2), (1, 2, 3, 50), (True, False)
    ):
        found.append(Plan(pairs, gated, shard, batch, epochs, interval, remainder, bool(fixed.get("learns", True))))
    return found


@pytest.mark.parametrize("learns", [True, False])
def test_the_plan_is_what_a_walk_through_the_run_finds(learns: bool) -> None:
    for plan in shapes(learns=learns):
        walk = Walk(plan)
        found = [batch for index in range(plan.rounds) for batch in plan.batches(index)]
        positions = [
            (
                b.round,
                b.epoch,
                b.shard,
                list(range(b.shard * plan.shard_size + b.start, b.shard * plan.shard_size + b.stop)),
            )
            for b in found
        ]
        assert positions == walk.batches, plan
        assert [batch.step for batch in found] == list(range(plan.steps)), plan
        assert list(plan.first_step) == walk.steps_before, plan
        assert [(b.round, b.after_step) for b in plan.boundaries] == walk.boundaries, plan
        assert [b.version for b in plan.boundaries] == list(range(1, len(plan.boundaries) + 1)), plan
        assert [plan.version_before_round(index) for index in range(plan.rounds)] == walk.versions_before, plan
        for lag in (0, 1, 3):
            used = [plan.version_at_step(step, lag) for step in range(plan.steps)]
            assert used == [max(0, passed - lag) for passed in walk.passed], (plan, lag)


def test_each_pair_is_in_exactly_one_batch_of_each_epoch() -> None:
    for plan in shapes():
        for index, count in enumerate(plan.pairs_per_round):
            seen = Counter(
                (batch.epoch, batch.shard * plan.shard_size + row)
                for batch in plan.batches(index)
                for row in range(batch.start, batch.stop)
            )
            assert seen == Counter(product(range(plan.epochs), range(count))), plan
            assert sum(plan.shard_rows(index, shard) for shard in range(plan.shards(index))) == count, plan


def test_a_boundary_uses_up_its_rows_or_the_round_discards_them() -> None:
    plan = Plan((10, 10), (True, True), 10, 1, 1, 4, meta_remainder=True, learns=True)
    assert [b.after_step for b in plan.boundaries] == [4, 8, 10, 14, 18, 20]
    plan = Plan((10, 10), (True, True), 10, 1, 1, 4, meta_remainder=False, learns=True)
    assert [b.after_step for b in plan.boundaries] == [4, 8, 14, 18]
    assert plan.version_before_round(1) == 2
    assert [plan.version_at_step(step, 1) for step in (3, 4, 8, 9, 10, 14, 18)] == [0, 0, 1, 1, 1, 2, 3]
