"""The one chain of checkpoints of a run.

A checkpoint is a single-winner record with a sequence number and its parent's digest. A trainer publishes only its parent's number
plus one; one that loses is fenced. Data progress and weights roll back together, because the record says which batches
and which records went into it.

The newest checkpoint is the one with the highest number, and the chain is what it was trained from, by the parents' digests. So a
checkpoint that is condemned hides no later one and stays in the chain of those that were trained from it while it was whole;
if it was the newest, training goes back to the one before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from toolkit.exchange import layout, series
from toolkit.exchange.records import Corrupt, File, Manifest, Records, Ref, Superseded, decode


@dataclass(frozen=True)
class Progress:
    """Where training stands: ``step`` optimizer steps are done; the next batch is the plan's batch number ``step``."""

    step: int
    round: int
    boundary: int  # meta boundaries passed


def newest(records: Records) -> Manifest | None:
    """The checkpoint with the highest sequence number."""
    return series.newest(records, layout.checkpoint)


def chain(records: Records) -> list[Manifest]:
    """The newest checkpoint and those it was trained from, oldest first.

    One that was condemned is there too, as long as its manifest can be read. Else it is left out, and so the chain below it
    cannot be proven: its successor's ``parent`` is not the digest of the one before.
    """
    found: list[Manifest] = []
    manifest = newest(records)
    while manifest is not None:
        found.append(manifest)
        manifest = _parent(records, manifest)
    return found[::-1]


def _parent(records: Records, child: Manifest) -> Manifest | None:
    """The checkpoint that ``child`` was trained from, or the nearest readable one below it."""
    for number in range(sequence(child) - 1, -1, -1):
        readable = list(_readable(records, layout.checkpoint(number)))
        if readable:
            return next((m for m in readable if m.digest == child.attributes["parent"]), readable[-1])
    return None


def _readable(records: Records, ref: Ref) -> Iterator[Manifest]:
    """All generations of a record that can be read, the condemned ones first."""
    for generation in count():
        path = records.root / ref.directory / f"{ref.name}.g{generation}.json"
        try:
            yield decode(path, path.read_bytes())
        except Corrupt:
            continue
        except FileNotFoundError:
            if not path.with_name(f"{ref.name}.g{generation}.tombstone.json").exists():
                return


def sequence(manifest: Manifest) -> int:
    return int(manifest.attributes["sequence"])


def progress(manifest: Manifest) -> Progress:
    attributes = manifest.attributes
    return Progress(int(attributes["step"]), int(attributes["round"]), int(attributes["boundary"]))


def publish(
    records: Records,
    parent: Manifest | None,
    at: Progress,
    consumed: Mapping[str, str],
    first_step: int,
    staged: Sequence[File],
    extra: Mapping[str, Any],
) -> Manifest:
    """Publish the checkpoint after ``parent``.

    Args:
        consumed: name and digest of every record that training read since the parent.
        first_step: steps done at the parent; this checkpoint covers the batches ``first_step .. at.step - 1``.

    Raises:
        Superseded: another trainer has published this sequence number or a later one, or trained the parent again after it was
            condemned; this one must stop.
    """
    number, digest = (0, None) if parent is None else (sequence(parent) + 1, parent.digest)
    ahead = newest(records)
    if ahead is not None and sequence(ahead) >= number - 1 and ahead.digest != digest:
        raise _superseded(records, ahead)
    attributes = {
        "sequence": number,
        "parent": digest,
        "step": at.step,
        "round": at.round,
        "boundary": at.boundary,
        "first_step": first_step,
        "consumed": dict(sorted(consumed.items())),
        **extra,
    }
    manifest, won = records.publish(layout.checkpoint(number), attributes, staged=staged, farewell=True)
    if not won:
        raise _superseded(records, manifest)
    return manifest


def _superseded(records: Records, winner: Manifest) -> Superseded:
    return Superseded(
        f"checkpoint {sequence(winner)} of this run was published by attempt {winner.attempt}; this attempt ({records.attempt}) is "
        "superseded and stops. Nothing it did after its last checkpoint counts."
    )
