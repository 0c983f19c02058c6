"""Attempts: who may submit what, what started, how it ended, and who is alive.

An attempt's life is three single-winner records: ``intent`` (its publisher may submit, once), ``start`` (either the job or the
tick that gave it up, exactly one of them), ``end`` (the job's own word, or what the tick found of its death).
Heartbeats are hints: one file per slot, replaced in place, believed only while its counter moves on the observer's own clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.exchange import filesystem, layout, series
from toolkit.exchange.records import Manifest, Records, Ref


def newest_started(records: Records, slot: str) -> Manifest | None:
    """The intent of a slot's newest attempt that started."""
    for intent in series.valid(records.find, records.root, lambda number: layout.job(slot, number, "intent")):
        start = records.find(layout.job(slot, series.number(intent), "start"))
        if start is not None and start.attributes["kind"] == "started":
            return intent
    return None


def word_of_rank_0(records: Records, ref: Ref, patience: float, missing: str) -> Manifest:
    """A record that the first rank of an attempt publishes and the others wait for.

    Args:
        missing: what it had not done when the patience (seconds) was over.

    Raises:
        ConnectionError: it did not come; another attempt may do better, so it is no refusal.
    """
    deadline = time.monotonic() + patience
    while (found := records.find(ref)) is None:
        if time.monotonic() > deadline:
            raise ConnectionError(f"rank 0 of {missing}; see its log")
        time.sleep(0.2)
    return found


def process_start(pid: int) -> str | None:
    """What tells a process from a later one with the same pid: its start time in clock ticks since boot (Linux); None if gone.

    A zombie counts as gone.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def this_process() -> dict[str, Any]:
    """Host, pid, start time and boot id of this process, for a start record."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": process_start(os.getpid()),
        "boot_id": boot_id(),
    }


def is_this_host(start: dict[str, Any]) -> bool:
    return bool(start["host"] == socket.gethostname() and start["boot_id"] == boot_id())


def is_alive(start: dict[str, Any]) -> bool:
    """Whether the process of a start record, started on this host since its last boot, still runs."""
    return is_this_host(start) and process_start(start["pid"]) == start["process_start"] is not None


@dataclass
class Heartbeat:
    """This process's heartbeat: a counter, and what it is working on (its claims, which are advice)."""

    root: Path
    slot: str
    attempt: str
    working_on: list[str] = field(default_factory=list)
    counter: int = 0

    def start(self, every: float) -> None:
        """Beat every so many seconds, in a thread of its own, until this process ends."""

        def keep() -> None:
            while True:
                self.beat()
                time.sleep(every)

        threading.Thread(target=keep, daemon=True).start()

    def beat(self) -> None:
        """Count on. It is a hint: where it can't be written nothing is lost, and a full disk is met where something is published."""
        self.counter += 1
        path = self.root / "heartbeats" / f"{self.slot}.json"
        body = {"attempt": self.attempt, "counter": self.counter, "working_on": self.working_on}
        with contextlib.suppress(OSError, UserError):
            path.parent.mkdir(exist_ok=True)
            filesystem.replace(path, json.dumps(body).encode())


def claims(root: Path, slot: str, attempt: str) -> list[str]:
    """What an attempt last said it was working on."""
    beat = last_beat(root, slot)
    return list(beat[2]) if beat is not None and beat[0] == attempt else []


def last_beat(root: Path, slot: str) -> tuple[str, int, list[str]] | None:
    """Attempt, counter and claims of a slot's heartbeat; None if there is none that can be read."""
    try:
        body = json.loads((root / "heartbeats" / f"{slot}.json").read_bytes())
        return str(body["attempt"]), int(body["counter"]), list(body["working_on"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # there is none, it is being replaced, or it is not ours


@dataclass
class Observer:
    """Watches the heartbeats of others on this process's own monotonic clock."""

    root: Path
    patience: float  # seconds without a move of the counter after which a heartbeat is ignored
    seen: dict[str, tuple[tuple[str, int], float]] = field(default_factory=dict)

    def claimed(self, except_slot: str) -> set[str]:
        """What the slots that seem alive, this one excepted, say they are working on."""
        directory, found = self.root / "heartbeats", set()
        if not filesystem.refresh(directory):
            return set()
        for path in directory.glob("*.json"):
            if path.stem == except_slot:
                continue
            beat = last_beat(self.root, path.stem)
            if beat is None:
                continue
            mark, now = beat[:2], time.monotonic()
            if self.seen.get(path.stem, (None, 0.0))[0] != mark:
                self.seen[path.stem] = (mark, now)
            if now - self.seen[path.stem][1] < self.patience:
                found |= set(beat[2])
        return found
