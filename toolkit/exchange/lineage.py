"""The one chain of checkpoints of a run.

A checkpoint is a single-winner record with a sequence number and its parent's digest. A trainer publishes only its parent's number
plus one; one that loses is fenced. Data progress and weights roll back together, because the record says which batches
and which records went into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.exchange import layout
from toolkit.exchange.records import File, Manifest, Records, Superseded


@dataclass(frozen=True)
class Progress:
    """Where training stands: ``step`` optimizer steps are done; the next batch is the plan's batch number ``step``."""

    step: int
    round: int
    boundary: int  # meta boundaries passed


def newest(records: Records, start: int = 0) -> Manifest | None:
    """The checkpoint with the highest sequence number, looking upwards from ``start``."""
    found = records.find(layout.checkpoint(start))
    if found is None:
        return None
    while (following := records.find(layout.checkpoint(start + 1))) is not None:
        found, start = following, start + 1
    return found


def chain(records: Records) -> list[Manifest]:
    """All checkpoints, oldest first."""
    found: list[Manifest] = []
    while (following := records.find(layout.checkpoint(len(found)))) is not None:
        found.append(following)
    return found


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
        Superseded: another trainer has published this sequence number; this one must stop.
    """
    number = 0 if parent is None else sequence(parent) + 1
    attributes = {
        "sequence": number,
        "parent": parent.digest if parent is not None else None,
        "step": at.step,
        "round": at.round,
        "boundary": at.boundary,
        "first_step": first_step,
        "consumed": dict(sorted(consumed.items())),
        **extra,
    }
    manifest, won = records.publish(layout.checkpoint(number), attributes, staged=staged, farewell=True)
    if not won:
        raise Superseded(
            f"checkpoint {number} of this run was published by attempt {manifest.attempt}; this attempt ({records.attempt}) is "
            "superseded and stops. Nothing it did after its last checkpoint counts."
        )
    return manifest
