"""Deletion: only by the tick, after a deletion record and a grace period, and never of anything a winner names."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

from toolkit.exchange import layout, lineage
from toolkit.exchange.records import Manifest, Ref
from toolkit.exchange.run import Run


def collect_garbage(run: Run) -> list[str]:
    """Announce what is not needed any more, and remove what was announced longer than the grace period ago.

    Checkpoints beyond the newest N, and policies beyond the newest N, the first and those a reference or evaluation still needs.
    Their manifests stay: the lineage can be verified for ever.

    Returns:
        The names of the records whose files were removed now.
    """
    removed = []
    for ref, manifest in reversed(_expendable(run)):  # the oldest first, so that an interruption leaves none behind
        announced = Ref("deletions", str(ref).replace("/", "~"))
        record, _ = run.records.publish(announced, {"record": str(ref), "digest": manifest.digest})
        if time.time() - record.written >= run.config.retention.grace:
            for directory in {(manifest.directory / entry.path).parent for entry in manifest.files}:
                if directory != manifest.directory and directory.is_dir():
                    _remove(run.root, directory)
                    removed.append(str(ref))
    return removed


def is_deleted(run: Run, ref: Ref) -> bool:
    """Whether the deletion of a record's files was announced."""
    return run.records.find(Ref("deletions", str(ref).replace("/", "~"))) is not None


def _expendable(run: Run) -> list[tuple[Ref, Manifest]]:
    if run.records.find(layout.PAIRS) is None:
        return []
    keep = run.config.retention
    found: list[tuple[Ref, Manifest]] = []
    newest = lineage.newest(run.records)
    if newest is not None:
        for number in range(lineage.sequence(newest) - keep.checkpoints, -1, -1):
            ref = layout.checkpoint(number)
            manifest = run.records.find(ref)
            if manifest is None or not _has_files(manifest):
                break  # older ones are gone already
            found.append((ref, manifest))
    version = run.newest_policy()
    if version is not None:
        for number in range(version - keep.policies, 0, -1):
            ref = layout.policy(number)
            manifest = run.records.find(ref)
            if manifest is None or not _has_files(manifest) or number >= version - 1:
                continue
            if not run.config.evaluates or run.records.find(layout.evaluation(number)) is not None:
                found.append((ref, manifest))
    return found


def _has_files(manifest: Manifest) -> bool:
    """Whether a record's directory is there: it is the last that goes, should its removal be interrupted."""
    return bool(manifest.files) and (manifest.directory / manifest.files[0].path).parent.is_dir()


def _remove(root: Path, directory: Path) -> None:
    if not directory.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{directory} is not inside the run {root}")
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)
