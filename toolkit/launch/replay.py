"""Replay: a run that takes another run's requests, annotations and meta-learner versions as they are, and only trains again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from toolkit.errors import UserError
from toolkit.exchange import layout
from toolkit.exchange.records import Manifest, Ref
from toolkit.exchange.run import Run


def replayed_refs(source: Run) -> Iterator[Ref]:
    """Names of the records that a replay takes over: prepared pairs, statistics, requests, annotations, meta-learner versions."""
    yield layout.PAIRS
    plan = source.plan
    for index in range(plan.rounds):
        if plan.gated[index]:
            yield layout.statistics(index)
            for shard in range(plan.shards(index)):
                yield layout.requests(index, shard)
                yield layout.annotations(index, shard)
    for version in range(len(plan.boundaries) + 1):
        yield layout.phi(version)


def finished_run(root: Path) -> Run:
    """The run to be replayed.

    Raises:
        UserError: there is none, or it is still training.
    """
    source = Run.open(root)
    if not source.finished():
        raise UserError(f"replay_from: {root} has not trained its last round yet; a replay needs all its records")
    return source


def import_records(source: Run, run: Run) -> int:
    """Publish in ``run`` what a replay of ``source`` takes over, byte for byte, each record naming the one it came from.

    Returns:
        How many records are there.

    Raises:
        UserError: a record of the source is damaged.
    """
    count = 0
    for ref in replayed_refs(source):
        manifest = source.records.find(ref)
        if manifest is None:
            continue  # a shard of which nothing was asked has no annotations; a method without meta-learner no versions
        run.records.publish(ref, _attributes(manifest), blobs=_contents(source, manifest))
        count += 1
    return count


def _attributes(manifest: Manifest) -> dict:
    return manifest.attributes | {"replayed_from": manifest.digest}


def _contents(source: Run, manifest: Manifest) -> dict[str, bytes]:
    """The record's files by suffix (what follows generation, attempt and token in their names)."""
    contents = {}
    for entry in manifest.files:
        suffix = "." + entry.path.removeprefix(manifest.ref.name).split(".", 4)[-1]
        contents[suffix] = source.records.verified(manifest, entry).read_bytes()
    return contents
