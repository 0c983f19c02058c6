"""What the control plane needs of a scheduler. One small adapter a kind; `submitit` stays behind it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from toolkit.config import Config
from toolkit.errors import unknown


class State(Enum):
    """What a scheduler says of an attempt. UNKNOWN is not GONE: the scheduler did not answer, or does not remember."""

    PENDING = "pending"
    RUNNING = "running"
    GONE = "gone"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class JobSpec:
    """One attempt to submit. ``attempt`` is in the job's name and in its environment, by which it is found again."""

    root: Path
    slot: str
    number: int
    attempt: str
    code: Path  # what PYTHONPATH is set to
    tasks: int
    python: str
    time_minutes: int
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def logs(self) -> Path:
        return self.root / "logs" / self.slot / f"{self.number:04d}-{self.attempt}"


class Adapter(Protocol):
    """A scheduler."""

    def submit(self, job: JobSpec) -> str:
        """Submit once; returns the scheduler's id.

        Raises:
            UserError: refused, and would be again.
            Exception: anything else is unclear: the job may have been accepted; it is looked up by its attempt.
        """

    def states(self, attempts: Collection[str]) -> dict[str, State]:
        """The state of each attempt, in one query."""

    def cancel(self, attempts: Collection[str], kill: bool = False) -> None:
        """Ask the jobs of these attempts to stop (TERM), or end them at once."""


def adapter(config: Config) -> Adapter:
    """The adapter of a cluster profile."""
    if config.cluster.kind == "local":
        from toolkit.launch.local import LocalAdapter

        return LocalAdapter()
    raise unknown("cluster.kind", config.cluster.kind, ("local",))
