"""Where preference data comes from: one local file, or one split of a Hugging Face dataset.

A row is known by its number in its source (counted from 0), and a source by its digest, so that a pair keeps its id
whatever is filtered or reordered later.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from toolkit.data.prefetch import DATA_FILE, is_hub_id
from toolkit.errors import UserError

TABLE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
JSON_NAME = re.compile(r"\.jsonl?(\.gz|\.zst)?$")
SUFFIXES = ".parquet, .arrow, .json, .jsonl (the last two also .gz or .zst)"


@dataclass(frozen=True)
class Source:
    """The rows of a source and what identifies them.

    ``digest`` is the SHA-256 of a file's bytes, or of a hub dataset's id, split and fingerprint; ``name`` is what messages call it.
    """

    name: str
    digest: str
    columns: tuple[str, ...]
    table: Sequence[Mapping[str, Any]] | datasets.Dataset

    def __len__(self) -> int:
        return len(self.table)

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """(row number, the ``columns`` that the row has) of every row, in the source's order."""
        table = self.table
        if isinstance(table, datasets.Dataset):
            table = table.select_columns([name for name in columns if name in self.columns])
        return enumerate(table)

    def first(self, rows: int | None) -> Source:
        """This source cut to its first ``rows`` rows (None: all); digest and row numbers stay."""
        if rows is None or rows >= len(self):
            return self
        if rows < 1:
            raise UserError(f"limit of rows is {rows}; expected at least 1")
        table = self.table.select(range(rows)) if isinstance(self.table, datasets.Dataset) else self.table[:rows]
        return Source(self.name, self.digest, self.columns, table)


def load(
    location: str | Path,
    *,
    split: str = "train",
    cache_dir: Path | None = None,
    limit: int | None = None,
) -> Source:
    """The source at ``location``: a Parquet, Arrow or JSON (lines) file, or a Hugging Face dataset id ``owner/name``.

    Args:
        split: of a dataset id, which must have one configuration only; a file has none.
        cache_dir: where ``datasets`` keeps its Arrow files. A local file never touches the network.
        limit: take the first ``limit`` rows only.

    Raises:
        UserError: nothing there, an unknown kind of file, unreadable content, no rows.
    """
    path = Path(location)
    if is_hub_id(str(location)):
        source = _load_hub(str(location), split, cache_dir)
    elif path.exists() or DATA_FILE.search(path.name):
        source = _load_file(path, cache_dir)
    else:
        raise UserError(f"no data at {location}: expected a file ({SUFFIXES}) or a Hugging Face dataset id owner/name")
    if not len(source):
        raise UserError(f"{source.name} holds no rows")
    return source.first(limit)


def _load_file(path: Path, cache_dir: Path | None) -> Source:
    if not path.is_file():
        raise UserError(f"data file {path} {'is not a file' if path.exists() else 'does not exist'}")
    if JSON_NAME.search(path.name):
        table: Any = _read_json(path)
        columns = tuple(dict.fromkeys(name for row in table[:100] for name in row))
    elif path.suffix in TABLE_BUILDERS:
        table = _load_dataset(
            str(path),
            TABLE_BUILDERS[path.suffix],
            data_files=glob.escape(str(path)),
            split="train",
            cache_dir=cache_dir,
        )
        columns = tuple(table.column_names)
    else:
        raise UserError(f"{path} has an unknown kind of name; expected one of {SUFFIXES}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Source(str(path), digest, columns, table)


def _load_hub(name: str, split: str, cache_dir: Path | None) -> Source:
    table = _load_dataset(name, name, split=split, cache_dir=cache_dir)
    # The fingerprint of a freshly loaded split covers the resolved commit of its files, not this machine's paths.
    identity = json.dumps([name, split, table._fingerprint])
    digest = hashlib.sha256(identity.encode()).hexdigest()
    return Source(f"{name} [{split}]", digest, tuple(table.column_names), table)


def _load_dataset(shown: str, builder: str, cache_dir: Path | None, **options: Any) -> datasets.Dataset:
    try:
        return datasets.load_dataset(builder, cache_dir=None if cache_dir is None else str(cache_dir), **options)
    except StopIteration:  # how `datasets` reports a file without rows
        raise UserError(f"{shown} holds no rows") from None
    # RuntimeError: a dataset made by a script, which `datasets` does not run
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        hint = (
            "; without internet here, fetch it into the cache elsewhere first. If it has several configurations, or is made by "
            "a script, export the rows wanted to Parquet and name that file"
        )
        hint = "" if "data_files" in options else hint
        raise UserError(f"cannot read {shown}: {error.__cause__ or error}{hint}") from error


def _read_json(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON array or of JSON lines (blank lines skipped), decompressed by the file's suffix.

    Not read through ``datasets``: its reader casts a value whose type differs from an earlier block's to a string,
    and a row that is not what its format says must be an error that names it.
    """
    rows: list[Any] = []
    line = 0
    try:
        with pa.input_stream(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as text:
            for content in text:
                line += 1
                if not rows and content.lstrip().startswith("["):
                    rows = json.loads(content + text.read())
                elif content.strip():
                    rows.append(json.loads(content))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} line {max(line, 1)}: not readable as JSON: {error}") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number}: found {type(row).__name__}, expected an object with named columns")
    return rows
