"""What `toolkit.reporting.explain` finds: the words that its parts share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Line:
    """A line of a log. ``file`` is relative to the run; ``line`` counts from 1, None where it is not known."""

    file: str
    line: int | None
    text: str


@dataclass
class Finding:
    """Something that keeps, or kept, a run from going on.

    ``attempts``: of whom it is true, the newest first: slot, number, job, nodes, ended (seconds since the epoch).
    ``since``: what became of the slot.
    """

    kind: str
    meaning: str
    advice: str = ""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    since: str = ""
