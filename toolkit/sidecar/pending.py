"""What the sidecar derives, in the order of the run: feature statistics, gate decisions, meta-learner versions.

Only the window in flight is looked at: one round, its undecided shards, the next meta boundary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from toolkit.exchange import derive, hints, layout, series
from toolkit.exchange.records import Ref
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
        index, window = self.round, self.undecided[:WINDOW]
        scores = {s: layout.logprobs(layout.policy_name(index), "offline", index, s) for s in window}
        requests = {s: layout.requests(index, s) for s in window}
        there = series.present(self.run.root, [*scores.values(), *requests.values()])
        for shard in window:
            known = scores[shard] in there or requests[shard] in there
            if known and derive.publish_requests(self.run, self.round, shard):
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
        index = self.round
        sampled = self._made(layout.responses, self.unsampled[:WINDOW])
        self.unsampled = [shard for shard in self.unsampled if shard not in sampled]
        self.unannotated += sorted(sampled)
        annotated = self._made(layout.annotations, self.unannotated[:WINDOW])
        self.unannotated = [shard for shard in self.unannotated if shard not in annotated]
        self.done += len(annotated)
        frontier: dict[str, Any] = {
            "round": index,
            "sample": self.unsampled[:WINDOW],
            "annotate": self.unannotated[:WINDOW],
        }
        hints.set_frontier(self.run.root, frontier | {"done": self.done})

    def _made(self, kind: Callable[[int, int], Ref], shards: list[int]) -> set[int]:
        """Those of the round's shards that have a record of this kind."""
        refs = {shard: kind(self.round, shard) for shard in shards}
        there = series.present(self.run.root, refs.values())
        return {shard for shard, ref in refs.items() if ref in there and self.run.records.find(ref) is not None}
