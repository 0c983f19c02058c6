"""Durable writes and create-once names on a filesystem that many hosts share.

The rules (NFS, Lustre, GPFS): write under a name of one's own, fsync the file, give it its final name by ``link`` (which never
overwrites, unlike ``rename``), fsync the directory. Locks, mtimes and clocks are never trusted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from toolkit.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
CHUNK = 64 * 2**20  # bytes hashed by one thread at a time


def write(path: Path, data: bytes) -> None:
    """Create ``path`` with ``data``, durably. The directory is not synced: the caller does it once for several files.

    Raises:
        FileExistsError: the name is taken.
        UserError: the filesystem is full or the quota is used up; nothing is left behind.
    """
    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        if error.errno in FULL:
            raise full_disk(path, error) from error
        raise


def full_disk(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path.name}: {error.strerror}. Nothing was published. "
        f"Free space (or inodes, or quota) on the filesystem of {path.parent}, then: metaapo resume RUN"
    )


def sync_file(path: Path) -> None:
    """fsync a file that another library wrote."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Make the names in ``directory`` durable, where the filesystem can."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some filesystems refuse fsync on directories
            raise
    finally:
        os.close(descriptor)


def refresh(directory: Path) -> bool:
    """Re-open ``directory``, which makes an NFS client drop stale negative lookups. False if it does not exist."""
    try:
        os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY))
    except FileNotFoundError:
        return False
    return True


def create_once(path: Path, data: bytes) -> bool:
    """Give ``path`` the content ``data`` unless the name is taken; durable on return.

    Returns:
        True if this call's content stands under the name, False if other content does. After any error of ``link`` the name
        itself is asked, because a network filesystem can lose the reply of a call that succeeded. ``data`` must therefore name
        its writer.
    """
    private = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    write(private, data)
    try:
        try:
            os.link(private, path)
        except OSError as error:
            try:
                won = path.read_bytes() == data
            except FileNotFoundError:
                if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    raise UserError(
                        f"the filesystem of {path.parent} refuses hard links ({error.strerror}); the exchange needs them. "
                        "Put the run on another filesystem (`metaapo doctor` tests one)."
                    ) from error
                if error.errno in FULL:
                    raise full_disk(path, error) from error
                raise error from None
        else:
            won = True
    finally:
        with contextlib.suppress(OSError):
            private.unlink()
    sync_directory(path.parent)
    return won


def replace(path: Path, data: bytes) -> None:
    """Replace ``path`` as a whole (a reader sees the old or the new content). For hints such as status.json, never for records."""
    private = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    write(private, data)
    private.replace(path)


def digest(path: Path) -> str:
    """Tree SHA-256 of a file: the hash of the hashes of its 64 MiB chunks, computed side by side; for a file of one chunk the plain hash."""
    size = path.stat().st_size
    if size <= CHUNK:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def chunk(offset: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return hashlib.sha256(file.read(CHUNK)).digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(pool.map(chunk, range(0, size, CHUNK)))).hexdigest()
