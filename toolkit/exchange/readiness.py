"""What each role waits for, as questions about records."""

from __future__ import annotations

from toolkit.exchange import layout, lineage
from toolkit.exchange.run import Run


def shard_is_ready(run: Run, round_index: int, shard: int) -> bool:
    """Whether all that training this shard needs from others is published."""
    if not run.plan.gated[round_index]:
        return True
    requests = run.records.find(layout.requests(round_index, shard))
    if requests is None:
        return False
    nothing_asked = requests.attributes["sampled"] == 0
    return nothing_asked or run.records.find(layout.annotations(round_index, shard)) is not None


def trainer_has_work(run: Run) -> bool:
    """Whether a trainer that starts now would not have to wait for its first batch."""
    if run.finished():
        return False
    newest = lineage.newest(run.records)
    if newest is None or run.records.find(layout.PAIRS) is None:
        return True  # pairs that were condemned are to be prepared again
    at = lineage.progress(newest)
    if run.records.find(layout.policy(at.round)) is None:
        return True  # a policy to publish, the last one among them
    batch = next(batch for batch in run.plan.batches(at.round) if batch.step == at.step)
    if run.plan.gated[at.round] and run.records.find(layout.requests(at.round, batch.shard)) is None:
        return True  # scores or decisions are missing, which a trainer makes both
    return shard_is_ready(run, at.round, batch.shard)


def workers_have_work(run: Run) -> bool:
    """Whether anything is asked of the workers: an open shard of the newest policy's round, or a policy to evaluate."""
    version = run.newest_policy()
    if version is None or run.records.find(layout.PAIRS) is None:
        return False
    if run.unevaluated():
        return True
    return version < run.plan.rounds and any(
        run.records.find(layout.requests(version, shard)) is not None and not shard_is_ready(run, version, shard)
        for shard in range(run.plan.shards(version))
    )
