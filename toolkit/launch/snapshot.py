"""The code that a run's jobs run: a copy of the package in the run directory, named by its digest."""

from __future__ import annotations

import hashlib
import secrets
import shutil
from pathlib import Path

import toolkit
from toolkit.exchange import filesystem

PACKAGE = Path(toolkit.__file__).parent


def _files(package: Path) -> list[Path]:
    return sorted(path for path in package.rglob("*.py") if "__pycache__" not in path.parts)


def package_digest(package: Path) -> str:
    """Digest of all Python files of a copy of the package: names and contents."""
    digest = hashlib.sha256()
    for path in _files(package):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def take(root: Path) -> str:
    """Copy the running package into ``<root>/code/<digest>/toolkit``, once.

    Returns:
        The digest, of the copy: a checkout that is edited meanwhile cannot make the two differ.
    """
    digest = package_digest(PACKAGE)
    if (directory(root, digest) / "toolkit").is_dir():
        return digest
    private = root / "code" / f".{secrets.token_hex(8)}"
    for path in _files(PACKAGE):
        copy = private / "toolkit" / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        filesystem.sync_file(copy)
    digest = package_digest(private / "toolkit")
    target = directory(root, digest)
    try:
        private.rename(target)  # the name is the content: whoever comes first, it is the same
    except OSError:
        shutil.rmtree(private)
        if not (target / "toolkit").is_dir():
            raise
    return digest


def directory(root: Path, digest: str) -> Path:
    """Where a run keeps the code of this digest; what a job's PYTHONPATH is set to."""
    return root / "code" / digest
