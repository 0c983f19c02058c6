"""Deletion: only by the tick, and never of anything a valid record names.

What a record named is removed after a deletion record and a grace period. What no record can name any more, because another
writer has taken the name, is removed after the grace period without one: it was never part of the run.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from toolkit.errors import UserError
from toolkit.exchange import jobs, layout, series
from toolkit.exchange.records import Ref, decode
from toolkit.exchange.run import Run

# What one process writes for a publication: `Records.publish`, and the private names of `filesystem`.
DATA = re.compile(r"(?P<record>.+\.g\d+)\.(?P<writer>[^.]+\.[0-9a-f]{6})(\..+)?")
PRIVATE = re.compile(r"\..+\.[0-9a-f]{12}")
SWEPT = 8  # directories looked at in one go
NOT_OURS = {"code", "logs", "metrics", "tensorboard"}  # nothing is published there


def collect_garbage(run: Run) -> list[str]:
    """Announce what is not needed any more, and remove what was announced longer than the grace period ago.

    Checkpoints beyond the newest N, and policies beyond the newest N, the first and those a reference or evaluation still needs;
    their manifests stay: the lineage can be verified for ever. And what attempts left that died while they wrote a checkpoint or
    policy, or lost it to another. One that only seemed dead and wakes up loses what it writes, and at worst is condemned.

    Returns:
        The names of the records whose files were removed now, and of the directories that were no record's.
    """
    removed = []
    for name, directory in [*_checkpoints(run), *_policies(run)]:
        record, _ = run.records.publish(layout.deletion(name), {"record": name, "directory": directory.name})
        if time.time() - record.written >= run.config.retention.grace and _remove(run.root, directory):
            removed.append(name)
    return removed


def is_deleted(run: Run, ref: Ref) -> bool:
    """Whether the deletion of a record's files was announced."""
    return run.records.find(layout.deletion(str(ref))) is not None


def _checkpoints(run: Run) -> Iterator[tuple[str, Path]]:
    """Names and directories of checkpoints that nobody goes back to, and of what never became one, or was condemned."""
    keep = run.config.retention.checkpoints
    kept = list(islice(series.valid(run.records.find, run.root, layout.checkpoint), keep))
    oldest = series.number(kept[-1]) if len(kept) == keep else 0
    for number, directory in _staged(run.root, layout.checkpoint):
        ref = layout.checkpoint(number)
        winner = _directory(run, ref)
        if winner == directory and number < oldest:
            yield str(ref), directory
        elif winner != directory and (winner is not None or number < oldest or _is_left(run, ref, directory)):
            yield f"{ref.directory}/{directory.name}", directory


def _policies(run: Run) -> Iterator[tuple[str, Path]]:
    """Names and directories of policies that nobody loads any more, and of what never became one."""
    newest = run.newest_policy()
    for number, directory in _staged(run.root, layout.policy):
        ref = layout.policy(number)
        winner = _directory(run, ref)
        if winner == directory and _is_expendable(run, number, newest):
            yield str(ref), directory
        elif winner != directory and (winner is not None or _is_left(run, ref, directory)):
            yield f"{ref.directory}/{directory.name}", directory


def _is_left(run: Run, ref: Ref, directory: Path) -> bool:
    """Whether no trainer is there any more that could publish what it staged here."""
    newest = jobs.newest_started(run.records, "trainer")
    if newest is None or run.records.find(ref) is not None:
        return False
    is_newest = directory.name.split(".")[1] == newest.attributes["attempt"]
    end = layout.job("trainer", series.number(newest), "end")
    return not is_newest or run.records.find(end) is not None


def _is_expendable(run: Run, version: int, newest: int | None) -> bool:
    """Whether a policy is none of the newest, not the first, which is a reference, and was evaluated."""
    if newest is None or version == 0 or version > newest - max(run.config.retention.policies, 2):
        return False
    return not run.config.evaluates or run.records.find(layout.evaluation(version)) is not None


def _staged(root: Path, of: series.Series) -> list[tuple[int, Path]]:
    """The directories that were staged for records of a series, with their numbers, oldest first."""
    name = re.compile(r"(\d+)\.[^.]+\.[0-9a-f]{6}")
    entries = (root / of(0).directory).glob("*")
    return sorted((int(match[1]), path) for path in entries if (match := name.fullmatch(path.name)) and path.is_dir())


def _directory(run: Run, ref: Ref) -> Path | None:
    """The directory that a record's files lie in (`Records.stage`), there or not; None without record or files."""
    manifest = run.records.find(ref)
    return (
        None if manifest is None or not manifest.files else manifest.directory / Path(manifest.files[0].path).parts[0]
    )


def _remove(root: Path, directory: Path) -> bool:
    """Remove what can be removed now; True if all of it is gone. A file that is still open may stay on NFS for a while."""
    if not directory.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{directory} is not inside the run {root}")
    shutil.rmtree(directory, ignore_errors=True)
    return not directory.exists()


class Sweep:
    """Removes the small files that killed and beaten writers left beside records, a few directories at a time.

    Held by whoever ticks. Each process goes through the directories in an order of its own, so that those that tick only once
    see all of them too. A file goes when no record can name it any more: its record, of the same generation, was published
    by another writer; or when it is the private copy that every publication makes and unlinks.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._listings = _listings(run.root)

    def step(self) -> list[Path]:
        """Look at the next few directories. Returns what was removed."""
        removed = []
        listings = list(islice(self._listings, SWEPT))
        if len(listings) < SWEPT:
            self._listings = _listings(self.run.root)  # from the start, next time
        for directory, names in listings:
            for path in _garbage(directory, names):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime >= self.run.config.retention.grace:
                        path.unlink()
                        removed.append(path)
        return removed


def _listings(directory: Path) -> Iterator[tuple[Path, list[str]]]:
    """The names in a directory and in all below it that records lie in, those side by side in random order."""
    try:
        with os.scandir(directory) as found:
            entries = list(found)
    except FileNotFoundError:
        return
    yield directory, [entry.name for entry in entries]
    random.shuffle(entries)
    for entry in entries:
        if "." not in entry.name and entry.name not in NOT_OURS and entry.is_dir(follow_symlinks=False):
            yield from _listings(directory / entry.name)


def _garbage(directory: Path, names: Sequence[str]) -> Iterator[Path]:
    """What no record will name among the files of a directory."""
    written: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # by record and writer
    for name in names:
        if PRIVATE.fullmatch(name):
            yield directory / name
        elif match := DATA.fullmatch(name):
            written[match["record"]][match["writer"]].append(name)
    for record, writers in written.items():
        if len(writers) > 1:  # of one alone there is nothing to collect: it published, or may still do so
            path = directory / f"{record}.json"
            with contextlib.suppress(FileNotFoundError, UserError):
                named = {entry.path for entry in decode(path, path.read_bytes()).files}
                yield from (directory / name for own in writers.values() for name in own if name not in named)
