"""Records under running numbers: checkpoints, policies, versions, shards. Where a series stands takes one look, however long it is.

A number whose record was condemned, or lost, is a hole; it hides nothing that comes after it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path

from toolkit.exchange.records import Manifest, Records, Ref

MANIFEST = re.compile(r"(.+)\.g\d+\.json")
Series = Callable[[int], Ref]  # the record of a number, as in `toolkit.exchange.layout`


def numbers(root: Path, series: Series) -> list[int]:
    """The numbers that ever had a record, the newest first. A listing of one directory, which may be a little old on NFS."""
    first = series(0)
    name = re.compile(rf"(\d+){re.escape(first.name.lstrip('0'))}\.g\d+\.json")
    entries = _entries(root / first.directory)
    return sorted({int(match[1]) for path in entries if (match := name.fullmatch(path.name))}, reverse=True)


def valid(find: Callable[[Ref], Manifest | None], root: Path, series: Series) -> Iterator[Manifest]:
    """The valid records of a series, the newest first; each is read when it is asked for.

    Args:
        find: `Records.find`, or what does the same.
    """
    listed = numbers(root, series)
    later = []  # than what an old listing showed: looked up by name, which is never old
    for number in count(listed[0] + 1 if listed else 0):
        if (manifest := find(series(number))) is None:
            break
        later.append(manifest)
    yield from reversed(later)
    for number in listed:
        if (manifest := find(series(number))) is not None:
            yield manifest


def newest(records: Records, series: Series) -> Manifest | None:
    """The valid record with the highest number."""
    return next(valid(records.find, records.root, series), None)


def names(root: Path, directory: str) -> set[str]:
    """The names in a directory that ever had a record, condemned ones too."""
    return {match[1] for path in _entries(root / directory) if (match := MANIFEST.fullmatch(path.name))}


def present(root: Path, refs: Iterable[Ref]) -> set[Ref]:
    """Those that ever had a record, condemned ones too, by one listing of each directory.

    To look for each by name costs several operations for each that is not there.
    """
    wanted: dict[str, set[Ref]] = {}
    for ref in refs:
        wanted.setdefault(ref.directory, set()).add(ref)
    there = {directory: names(root, directory) for directory in wanted}
    return {ref for own in wanted.values() for ref in own if ref.name in there[ref.directory]}


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


def number(manifest: Manifest) -> int:
    """The number of a record of a series."""
    digits = re.match(r"\d+", manifest.ref.name)
    assert digits is not None
    return int(digits[0])
