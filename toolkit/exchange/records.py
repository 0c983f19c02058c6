"""The single-winner record: the one way anything is published in a run.

A record is a small JSON manifest under a final name that only one writer can take (``create_once``), and the data files it
names, each with its size and digest. Names carry a generation, ``<name>.g0.json``; a damaged record is condemned by a
tombstone ``<name>.g0.tombstone.json``, and the valid record is the lowest generation without one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from toolkit.errors import UserError
from toolkit.exchange import filesystem, tables

SCHEMA_VERSION = 1


class Corrupt(UserError):
    """A record whose bytes are not what its manifest says (or whose manifest is not what its own digest says)."""

    def __init__(self, manifest_path: Path, detail: str) -> None:
        super().__init__(
            f"record {manifest_path} is damaged: {detail}. Nothing was read from it. "
            "The run's tick condemns and re-makes it where it can; `metaapo verify RUN` lists every damaged record."
        )
        self.manifest_path = manifest_path
        self.detail = detail


class Superseded(UserError):
    """This process acts for an attempt or incarnation that is over; what it was about to publish is not wanted any more."""


class Closed(Superseded):
    """The run was closed under this process: it may still say farewell, by a checkpoint."""


@dataclass(frozen=True)
class Ref:
    """The name of a record: a directory relative to the run, and a name inside it."""

    directory: str
    name: str

    def __str__(self) -> str:
        return f"{self.directory}/{self.name}" if self.directory else self.name


@dataclass(frozen=True)
class File:
    """A data file of a record; ``path`` is relative to the record's directory."""

    path: str
    bytes: int
    digest: str
    rows: int | None = None


@dataclass(frozen=True)
class Manifest:
    """What is published: who made it, its files, and attributes (JSON)."""

    ref: Ref
    generation: int
    attempt: str
    files: tuple[File, ...]
    attributes: dict[str, Any]
    directory: Path
    written: float = 0.0  # the writer's clock, for people only
    schema_version: int = SCHEMA_VERSION
    _digest: str = field(default="", compare=False)

    @property
    def path(self) -> Path:
        return self.directory / f"{self.ref.name}.g{self.generation}.json"

    @property
    def digest(self) -> str:
        """Digest of the whole record (names, digests and attributes), by which others refer to it."""
        return self._digest

    def file(self, suffix: str) -> File:
        """The data file whose path ends with ``suffix``."""
        for entry in self.files:
            if entry.path.endswith(suffix):
                return entry
        raise UserError(f"record {self.path} has no file {suffix!r}; it has {', '.join(f.path for f in self.files)}")


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _encode(manifest: Manifest) -> bytes:
    body = {
        "schema_version": manifest.schema_version,
        "record": asdict(manifest.ref),
        "generation": manifest.generation,
        "attempt": manifest.attempt,
        "written": manifest.written,
        "files": [asdict(entry) for entry in manifest.files],
        "attributes": manifest.attributes,
    }
    return _sealed(body)


def _sealed(body: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest: ``body`` with its own digest."""
    digest = hashlib.sha256(_canonical(body)).hexdigest()
    return json.dumps({**body, "digest": digest}, indent=1, sort_keys=True).encode() + b"\n"


def decode(path: Path, data: bytes) -> Manifest:
    """The manifest in ``data``, read from ``path``.

    Raises:
        Corrupt: not JSON, not what its own digest says, or the manifest of another record.
        UserError: written by a newer version of the toolkit.
    """
    try:
        body = json.loads(data)
        version = body["schema_version"]
        if version > SCHEMA_VERSION:
            raise UserError(
                f"record {path} was written by a newer version of the toolkit: schema {version}, this one reads up to "
                f"{SCHEMA_VERSION}. Install the version that wrote it (see {path.name}'s run: operations/)."
            )
        claimed = body.pop("digest")
        if _sealed(body) != data:
            raise Corrupt(path, "its manifest does not have the digest it states")
        manifest = Manifest(
            ref=Ref(**body["record"]),
            generation=body["generation"],
            attempt=body["attempt"],
            files=tuple(File(**entry) for entry in body["files"]),
            attributes=body["attributes"],
            directory=path.parent,
            written=body["written"],
            schema_version=version,
            _digest=claimed,
        )
        own_names = (manifest.path.name, f"{manifest.ref.name}.json")  # the second is a tombstone's
        if path.name not in own_names or not path.parent.as_posix().endswith(manifest.ref.directory):
            raise Corrupt(path, f"it is a copy of the record {manifest.ref}, generation {manifest.generation}")
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(path, f"its manifest is not readable ({error})") from error


class Records:
    """Publishes and reads the records under ``root`` for one attempt.

    Args:
        root: the run directory.
        attempt: id of this attempt; every manifest names it.
        guard: called before each publication, with whether it is a farewell; raises `Superseded` when this attempt must not act
            any more.
    """

    def __init__(self, root: Path, attempt: str, guard: Callable[[bool], None] | None = None) -> None:
        self.root = root
        self.attempt = attempt
        self._guard = guard or (lambda farewell: None)
        self._verified: set[tuple[Path, str]] = set()

    def find(self, ref: Ref) -> Manifest | None:
        """The valid record of this name, or None. Re-opens the directory first (negative lookups are cached on NFS)."""
        directory = self.root / ref.directory
        if not filesystem.refresh(directory):
            return None
        generation = self._generation(directory, ref)
        path = directory / f"{ref.name}.g{generation}.json"
        try:
            return decode(path, path.read_bytes())
        except FileNotFoundError:
            return None

    def require(self, ref: Ref) -> Manifest:
        """The valid record of this name; UserError if there is none."""
        manifest = self.find(ref)
        if manifest is None:
            raise UserError(
                f"record {ref} is not published in {self.root}. `metaapo verify {self.root}` shows what is missing."
            )
        return manifest

    @staticmethod
    def _generation(directory: Path, ref: Ref) -> int:
        generation = 0
        while (directory / f"{ref.name}.g{generation}.tombstone.json").exists():
            generation += 1
        return generation

    def stage(self, ref: Ref, private: bool = False) -> Path:
        """A new directory of this attempt beside the record, for data files written by other libraries or other ranks.

        Args:
            private: for its owner alone: what lies in it is read with pickle (Megatron's checkpoint metadata).
        """
        directory = self.root / ref.directory / f"{ref.name}.{self.attempt}.{secrets.token_hex(3)}"
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700 if private else 0o777)
        return directory

    def publish(
        self,
        ref: Ref,
        attributes: Mapping[str, Any],
        *,
        table: pa.Table | None = None,
        blobs: Mapping[str, bytes] | None = None,
        staged: Sequence[File] = (),
        farewell: bool = False,
    ) -> tuple[Manifest, bool]:
        """Publish a record; the first writer of a name wins.

        Args:
            ref: the record's name.
            attributes: JSON values that describe it.
            table: rows, written as ``.parquet``.
            blobs: further small files by suffix.
            staged: files already written and synced below a directory of `stage`, paths relative to the record's directory.
            farewell: what an attempt that was told to stop may still publish.

        Returns:
            The valid manifest and whether it is this call's. A loser's files are garbage that the tick removes.

        Raises:
            Superseded: the attempt is over.
            UserError: no space, no hard links, or a re-made record that others were derived from differs from the first.
        """
        directory = self.root / ref.directory
        directory.mkdir(parents=True, exist_ok=True)
        existing = self.find(ref)
        if existing is not None:
            return existing, False
        self._guard(farewell)
        generation = self._generation(directory, ref)
        stem = f"{ref.name}.g{generation}.{self.attempt}.{secrets.token_hex(3)}"
        files = list(staged)
        contents = dict(blobs or {})
        if table is not None:
            contents[".parquet"] = tables.to_parquet(table)
        for suffix, data in contents.items():
            path = directory / f"{stem}{suffix}"
            filesystem.write(path, data)
            rows = table.num_rows if table is not None and suffix == ".parquet" else None
            files.append(File(path.name, len(data), hashlib.sha256(data).hexdigest(), rows))
        self._check_remade(directory, ref, generation, files)
        filesystem.sync_directory(directory)
        manifest = Manifest(
            ref, generation, self.attempt, tuple(files), dict(attributes), directory, written=time.time()
        )
        data = _encode(manifest)
        if filesystem.create_once(manifest.path, data):
            return decode(manifest.path, data), True
        return self.require(ref), False

    def _check_remade(self, directory: Path, ref: Ref, generation: int, files: Sequence[File]) -> None:
        """A record that a checkpoint consumed, or others were made from, may only be re-made to the same bytes."""
        if generation == 0:
            return
        path = directory / f"{ref.name}.g{generation - 1}.tombstone.json"
        required = decode(path, path.read_bytes()).attributes.get("must_equal")
        if required is not None and sorted(entry.digest for entry in files) != sorted(required):
            raise UserError(
                f"record {ref} was damaged after others were made from it, and making it again gave other bytes: this run can't go "
                f"on. Its policies stay usable: metaapo launch run=NEW model.policy=POLICY with a folder of {self.root}/policies."
            )

    def table(self, manifest: Manifest, row_group: int | None = None) -> pa.Table:
        """The verified rows of a record.

        Raises:
            Corrupt: the file is missing, or its size or digest is wrong.
        """
        return tables.read_parquet(self.verified(manifest, manifest.file(".parquet")), row_group)

    def verified(self, manifest: Manifest, entry: File) -> Path:
        """The path of a data file whose size and digest were checked (once per process)."""
        path = manifest.directory / entry.path
        if (path, entry.digest) not in self._verified:
            check(manifest, entry)
            self._verified.add((path, entry.digest))
        return path

    def condemn(self, manifest_path: Path, ref: Ref, reason: str, seen: str, must_equal: Sequence[str] | None) -> None:
        """Publish the tombstone of a damaged record (only the tick does this).

        Args:
            must_equal: digests that a re-made record must have, when others were made from the damaged one.
        """
        generation = int(manifest_path.name.removesuffix(".json").rpartition(".g")[2])
        attributes = {
            "reason": reason,
            "seen": seen,
            "must_equal": list(must_equal) if must_equal is not None else None,
        }
        tombstone = Manifest(
            Ref(ref.directory, f"{ref.name}.g{generation}.tombstone"),
            0,
            self.attempt,
            (),
            attributes,
            manifest_path.parent,
        )
        filesystem.create_once(manifest_path.with_name(f"{ref.name}.g{generation}.tombstone.json"), _encode(tombstone))


def check(manifest: Manifest, entry: File) -> None:
    """Raise `Corrupt` unless the data file exists and can be read with the size and digest that the manifest states."""
    path = manifest.directory / entry.path
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            raise Corrupt(manifest.path, f"its file {entry.path} has {size} bytes, expected {entry.bytes}")
        found = filesystem.digest(path)
    except FileNotFoundError:
        raise Corrupt(manifest.path, f"its file {entry.path} is missing") from None
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise Corrupt(manifest.path, f"its file {entry.path} cannot be read: {error.strerror}") from error
    if found != entry.digest:
        raise Corrupt(manifest.path, f"its file {entry.path} has digest {found}, expected {entry.digest}")
