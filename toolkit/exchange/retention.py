"""Deletion: only by the tick, after a deletion record and a grace period, and never of anything a winner names."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

from toolkit.exchange import layout, lineage
from toolkit.exchange.records import Ref
from toolkit.exchange.run import Run


def collect_garbage(run: Run) -> list[str]:
    """Announce what is not needed any more, and remove what was announced longer than the grace period ago.

    Checkpoints beyond the newest N, and policies beyond the newest N, the first and those a reference or evaluation still needs;
    their manifests stay: the lineage can be verified for ever. And what attempts left that died while they wrote a checkpoint or
    policy, or lost it to another.

    Returns:
        The names of the records whose files were removed now, and of the directories that were no record's.
    """
    removed = []
    # The oldest first, so that an interruption leaves none behind.
    for name, directory in [*reversed(_expendable(run)), *_abandoned(run)]:
        record, _ = run.records.publish(_announcement(name), {"record": name, "directory": directory.name})
        if time.time() - record.written >= run.config.retention.grace:
            _remove(run.root, directory)
            removed.append(name)
    return removed


def is_deleted(run: Run, ref: Ref) -> bool:
    """Whether the deletion of a record's files was announced."""
    return run.records.find(_announcement(str(ref))) is not None


def _announcement(name: str) -> Ref:
    return Ref("deletions", name.replace("/", "~"))


def _expendable(run: Run) -> list[tuple[str, Path]]:
    """Names and directories of old checkpoints and policies, each kind from new to old."""
    if run.records.find(layout.PAIRS) is None:
        return []
    keep = run.config.retention
    found: list[tuple[str, Path]] = []
    newest = lineage.newest(run.records)
    if newest is not None:
        for number in range(lineage.sequence(newest) - keep.checkpoints, -1, -1):
            directory = _directory(run, layout.checkpoint(number))
            if directory is None or not directory.is_dir():
                break  # older ones are gone already
            found.append((str(layout.checkpoint(number)), directory))
    version = run.newest_policy()
    if version is not None:
        for number in range(version - keep.policies, 0, -1):
            directory = _directory(run, layout.policy(number))
            if directory is None or not directory.is_dir() or number >= version - 1:
                continue
            if not run.config.evaluates or run.records.find(layout.evaluation(number)) is not None:
                found.append((str(layout.policy(number)), directory))
    return found


def _abandoned(run: Run) -> list[tuple[str, Path]]:
    """Staged directories whose record was published by another attempt: no record will ever name them."""
    found = []
    for kind in (layout.checkpoint(0).directory, layout.policy(0).directory):
        for directory in sorted(path for path in (run.root / kind).glob("*") if path.is_dir()):
            winner = _directory(run, Ref(kind, directory.name.partition(".")[0]))
            if winner not in (None, directory):
                found.append((f"{kind}/{directory.name}", directory))
    return found


def _directory(run: Run, ref: Ref) -> Path | None:
    """The directory that a record's files lie in (`Records.stage`), there or not; None without record or files."""
    manifest = run.records.find(ref)
    return (
        None if manifest is None or not manifest.files else manifest.directory / Path(manifest.files[0].path).parts[0]
    )


def _remove(root: Path, directory: Path) -> None:
    if not directory.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{directory} is not inside the run {root}")
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)
