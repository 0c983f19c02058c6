"""Where a policy is loaded from: in place, or from a copy on a disk of the node's own. Every byte is verified, once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from toolkit.exchange import filesystem
from toolkit.exchange.records import Manifest, Records, check

STAGING = "METAAPO_STAGING"  # a profile's cluster.staging


def policy_folder(records: Records, manifest: Manifest, slot: str) -> Path:
    """The folder of a policy's verified files.

    With a staging directory they are read from the shared filesystem once, by copying; the copy is what is verified and loaded, and
    takes the place of the policy before.

    Raises:
        Corrupt: a file of the policy is damaged.
        RuntimeError: the staging directory does not hold what was copied there. No UserError, which would end the run:
            another node's disk may do.
    """
    staging = os.environ.get(STAGING)
    if not staging:
        paths = [records.verified(manifest, entry) for entry in manifest.files]
        return paths[0].parent
    folder = Path(staging) / (_prefix(records, slot) + records.attempt)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True, mode=0o700)
        for entry in manifest.files:
            source = manifest.directory / entry.path
            copy = folder / source.name
            if not source.exists():
                check(manifest, entry)  # says what is missing
            shutil.copyfile(source, copy)
            if filesystem.digest(copy) != entry.digest:
                check(manifest, entry)  # the policy's fault, or
                raise RuntimeError(
                    f"{copy} is not what was copied there from {source}: is the disk of this node broken?"
                )
    except OSError as error:
        raise RuntimeError(
            f"cannot stage {manifest.ref} in {folder}: {error}. cluster.staging names a directory of the node's own with room for "
            f"{sum(entry.bytes for entry in manifest.files) / 2**30:.1f} GiB; null loads policies in place"
        ) from error
    return folder


@contextlib.contextmanager
def tidied(records: Records, slot: str) -> Iterator[None]:
    """Leave no copy behind: those of the slot's attempts that were killed on this node go at the start, this one's own at the end.

    At the start only: an attempt that was given up and lives on must not take away its successor's.
    """
    staging = os.environ.get(STAGING)
    if not staging:
        yield
        return
    for left in Path(staging).glob(f"{_prefix(records, slot)}*"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(Path(staging) / (_prefix(records, slot) + records.attempt), ignore_errors=True)


def _prefix(records: Records, slot: str) -> str:
    return f"metaapo-{hashlib.blake2b(str(records.root).encode(), digest_size=6).hexdigest()}-{slot}-"
