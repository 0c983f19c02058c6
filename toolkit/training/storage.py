"""Why files could not be written: a full disk, which a person must clear, or else the storage, which may do better next time."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from pathlib import Path

from toolkit.errors import UserError
from toolkit.exchange import filesystem

FULL = (*filesystem.FULL, errno.EFBIG)
PROBE_BYTES = 2**20


def write_failure(what: str, directory: Path, error: BaseException) -> Exception:
    """What to raise when ``error`` met the writing of ``what`` in ``directory``: UserError for a full disk, else RuntimeError."""
    told = re.search(r"os error (\d+)", str(error))  # safetensors
    number = int(told[1]) if told else getattr(error, "errno", None) or _probe(directory)
    message = (
        f"could not write {what} in {directory}: {str(error) or type(error).__name__}. Nothing of it was published"
    )
    if number in FULL:
        return UserError(f"{message}. Check the space and quota there")
    return RuntimeError(message)


def _probe(directory: Path) -> int | None:
    """The errno that writing in ``directory`` meets now: torch tells none."""
    path = directory / f".probe-{secrets.token_hex(6)}"
    try:
        with path.open("xb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    return None
