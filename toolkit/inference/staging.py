"""Where a policy is loaded from: in place, or from a copy on a disk of the node's own. Every byte is verified, once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from toolkit.errors import UserError
from toolkit.exchange import filesystem
from toolkit.exchange.records import Manifest, Records, check

STAGING = "METAAPO_STAGING"  # a profile's cluster.staging


def policy_folder(records: Records, manifest: Manifest) -> Path:
    """The folder of a policy's verified files.

    With a staging directory they are read from the shared filesystem once, by copying; the copy is what is verified and loaded, and
    takes the place of the policy before.

    Raises:
        Corrupt: a file of the policy is damaged.
        UserError: the staging directory does not hold what was copied there.
    """
    staging = os.environ.get(STAGING)
    if not staging:
        paths = [records.verified(manifest, entry) for entry in manifest.files]
        return paths[0].parent
    folder = Path(staging) / f"metaapo-{records.attempt}"
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
                raise UserError(f"{copy} is not what was copied there from {source}: is the disk of this node broken?")
    except OSError as error:
        raise UserError(
            f"cannot stage {manifest.ref} in {folder}: {error}. cluster.staging names a directory of the node's own with room for "
            f"{sum(entry.bytes for entry in manifest.files) / 2**30:.1f} GiB; null loads policies in place"
        ) from error
    return folder
