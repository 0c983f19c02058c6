"""What the sidecar derives, in the order of the run: feature statistics, gate decisions, meta-learner versions.

Only the window in flight is looked at: one round, its undecided shards, the next meta boundary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from toolkit.exchange import derive, hints, layout
from toolkit.exchange.reports import Condemnations
from toolkit.exchange.run import Run

WINDOW = 256  # shards looked at in one turn


class Pending:
    """Keeps the derived records of a run up to date. Calling `turn` again and again is all there is to it.

    Args:
        note: told of what was published: kind and values, for the metrics.
    """

    def __init__(self, run: Run, note: Callable[..., None] = lambda kind, **values: None) -> None:
        self.run, self.note = run, note
        self.condemnations = Condemnations(run)
        self._start_over()

    def _start_over(self) -> None:
        self.round = 0
        self.version = 0  # the next meta-learner version to make
        self.undecided: list[int] | None = None  # of the round
        self.unsampled: list[int] = []
        self.unannotated: list[int] = []
        self.done = 0  # shards of the round that are annotated

    def turn(self) -> bool:
        """Publish what can be published now. True if there was anything."""
        if self.run.records.find(layout.PAIRS) is None:
            return False
        if self.condemnations.news():
            self._start_over()
        moved = self._learn()
        moved |= self._decide()
        self._follow()
        return moved

    def _learn(self) -> bool:
        if not self.run.config.learns:
            return False
        moved = False
        while self.version <= len(self.run.plan.boundaries) and derive.publish_phi(self.run, self.version):
            self.note("phi", version=self.version)
            self.version += 1
            moved = True
        return moved

    def _decide(self) -> bool:
        """Gate decisions of the round that the newest policy starts."""
        plan = self.run.plan
        newest = self.run.newest_policy()
        if newest is None or newest >= plan.rounds:
            return False
        if self.undecided is None or newest > self.round:
            self.round = newest
            self.undecided = list(range(plan.shards(newest))) if plan.gated[newest] else []
            self.unsampled, self.unannotated, self.done = [], [], 0
        if not self.undecided:
            return False
        if derive.needs_statistics(self.run.config.method) and not derive.publish_statistics(self.run, self.round):
            return False
        moved = False
        for shard in self.undecided[:WINDOW]:
            if derive.publish_requests(self.run, self.round, shard):
                self.undecided.remove(shard)
                manifest = self.run.records.require(layout.requests(self.round, shard))
                asked, pairs = manifest.attributes["sampled"], plan.shard_rows(self.round, shard)
                self.note("requests", round=self.round, shard=shard, asked=asked, pairs=pairs)
                if asked:
                    self.unsampled.append(shard)
                moved = True
        return moved

    def _follow(self) -> None:
        """Where each shard stands, for the frontier hint."""
        find, index = self.run.records.find, self.round
        sampled = [s for s in self.unsampled[:WINDOW] if find(layout.responses(index, s)) is not None]
        self.unsampled = [s for s in self.unsampled if s not in set(sampled)]
        self.unannotated += sampled
        annotated = [s for s in self.unannotated[:WINDOW] if find(layout.annotations(index, s)) is not None]
        self.unannotated = [s for s in self.unannotated if s not in set(annotated)]
        self.done += len(annotated)
        frontier: dict[str, Any] = {
            "round": index,
            "sample": self.unsampled[:WINDOW],
            "annotate": self.unannotated[:WINDOW],
        }
        hints.set_frontier(self.run.root, frontier | {"done": self.done})
