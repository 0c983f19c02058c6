"""What the control plane needs of a scheduler. One small adapter a kind; `submitit` stays behind it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from toolkit.cluster import JobRequest
from toolkit.config import Config
from toolkit.errors import unknown


class State(Enum):
    """What a scheduler says of an attempt. UNKNOWN is not GONE: it does not remember, which happens to living jobs too."""

    PENDING = "pending"
    RUNNING = "running"
    GONE = "gone"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Job:
    """What a scheduler says of an attempt's job."""

    state: State
    id: str | None = None
    reason: str = ""  # why it is pending, in the scheduler's words
    nodes: str = ""  # in the scheduler's notation
    kind: str = "crash"  # of the death, if it is gone and left no word: a key of `toolkit.cluster.Budgets`
    message: str = "its process is gone and left no word"
    seconds: float | None = None  # that it ran


@dataclass(frozen=True)
class JobSpec:
    """One attempt to submit. ``attempt`` is in the job's name and in its environment, by which it is found again."""

    root: Path
    slot: str
    number: int
    attempt: str
    code: Path  # what PYTHONPATH is set to
    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    request: JobRequest
    margin: float = 300.0  # seconds before the end of the wall time at which it saves
    after: str | None = None  # id of a job whose end this one waits for
    exclude: tuple[str, ...] = field(default=())  # nodes

    @property
    def tasks(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def logs(self) -> Path:
        return self.root / "logs" / self.slot / f"{self.number:04d}-{self.attempt}"


class Unavailable(Exception):
    """The scheduler does not answer. Nothing is known, nothing was changed; ask again later."""


class Busy(Exception):
    """The scheduler takes no more jobs of this user now. The job was not accepted."""


class Adapter(Protocol):
    """A scheduler."""

    same_machine: bool  # whether an attempt's pid can be looked up here

    def submit(self, job: JobSpec) -> str:
        """Submit once; returns the scheduler's id.

        Raises:
            UserError: refused, and would be again.
            Busy: not accepted now.
            Exception: anything else is unclear: the job may have been accepted; it is looked up by its attempt.
        """

    def look(self, attempts: Collection[str], since: float) -> dict[str, Job]:
        """The job of each attempt, in at most two queries.

        Args:
            since: when the oldest of them was intended, seconds since the epoch.

        Raises:
            Unavailable: no answer.
        """

    def room(self) -> int | None:
        """How many more jobs may be submitted, as of the last `look`; None: there is no limit."""

    def cancel(self, jobs: Collection[str], kill: bool = False) -> None:
        """Ask the jobs of these attempts to save and stop (pending ones are removed), or end them at once."""


def adapter(config: Config) -> Adapter:
    """The adapter of a cluster profile."""
    if config.cluster.kind == "local":
        from toolkit.launch.local import LocalAdapter

        return LocalAdapter()
    if config.cluster.kind == "slurm":
        from toolkit.launch.slurm import SlurmAdapter

        return SlurmAdapter(config.cluster)
    raise unknown("cluster.kind", config.cluster.kind, ("local", "slurm"))
