"""The logs of a run's attempts: ``logs/<slot>/<number>-<attempt>/<job>_<rank>_log.out``, and the batch script ``job.sh`` beside them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.errors import UserError

if TYPE_CHECKING:
    from toolkit.exchange.run import Run

RANK_LOG = re.compile(r".+_(\d+)_log\.out")
BLOCK = 64 * 1024  # bytes read at a time, and looked at by `end`
COUNTED = 64 * 2**20  # bytes of a log before a line up to which its number is worth counting


def slots(root: Path) -> list[str]:
    """The slots that have a log folder."""
    return sorted(path.name for path in (root / "logs").glob("*") if path.is_dir())


def folders(root: Path, slot: str) -> dict[int, Path]:
    """The log folder of each attempt of a slot, by the attempt's number."""
    found = sorted(path for path in (root / "logs" / slot).glob("[0-9][0-9][0-9][0-9]*-*") if path.is_dir())
    return {int(path.name.partition("-")[0]): path for path in found}


def of_ranks(folder: Path) -> list[Path]:
    """The log of each rank of an attempt, in rank order.

    Raises:
        UserError: this user may not read them.
    """
    try:
        return sorted((path for path in folder.iterdir() if RANK_LOG.fullmatch(path.name)), key=rank)
    except PermissionError:
        raise UserError(f"only the owner of {folder} may read the logs in it") from None


def rank(path: Path) -> int:
    """The rank whose log a path is."""
    match = RANK_LOG.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def tail(path: Path, lines: int) -> tuple[str, int]:
    """The last lines of a log, and how many bytes come before them."""
    with path.open("rb") as file:
        size = start = file.seek(0, io.SEEK_END)
        data = b""
        while start > 0 and data.count(b"\n") <= lines:
            length = min(BLOCK, start)
            start -= length
            file.seek(start)
            data = file.read(length) + data
    kept = b"".join(io.BytesIO(data).readlines()[-lines:])
    return kept.decode("utf-8", "replace"), size - len(kept)


def end(path: Path) -> tuple[list[str], int]:
    """The lines in the last `BLOCK` bytes of a log, and how many bytes come before them."""
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - BLOCK))
        cut = file.readline() if size > BLOCK else b""
        data = file.read(BLOCK)
    return data.decode("utf-8", "replace").split("\n"), max(0, size - BLOCK) + len(cut)


def line_number(path: Path, offset: int) -> int | None:
    """The number of the line that begins at a byte of a log, from 1; None where counting would take long."""
    if offset > COUNTED:
        return None
    with path.open("rb") as file:
        return 1 + sum(file.read(min(BLOCK, offset - start)).count(b"\n") for start in range(0, offset, BLOCK))


# ------------------------------------------------------------------------------------------------- the verb


def wanted(root: Path, slot: str, attempt: int | None = None, only: int | None = None) -> list[Path]:
    """The logs of a slot's attempt (the newest that has any), of every rank or of one.

    Raises:
        UserError: there are none, or they may not be read; it names those that there are.
    """
    known = folders(root, slot)
    if not known:
        raise UserError(f"no logs of {slot} in {root}; there are logs of: {', '.join(slots(root)) or 'nobody'}")
    if attempt is not None and attempt not in known:
        raise UserError(f"{slot} has no attempt {attempt} with logs; there are: {', '.join(map(str, known))}")
    numbers = [attempt] if attempt is not None else sorted(known, reverse=True)
    paths = next((paths for number in numbers if (paths := of_ranks(known[number]))), [])
    if not paths:
        raise UserError(f"{slot} has not written a log yet; its jobs: metaapo logs {root} {slot} --list")
    if only is None:
        return paths
    chosen = [path for path in paths if rank(path) == only]
    if not chosen:
        raise UserError(f"no log of rank {only}; there are ranks {', '.join(str(rank(path)) for path in paths)}")
    return chosen


def overview(run: Run) -> Iterator[str]:
    """A line for each slot: how many attempts it had, and how the newest is."""
    from toolkit.launch.attempts import attempts, current, known_slots

    for slot in known_slots(run):
        history = attempts(run, slot)
        if history:
            newest = current(history)
            yield f"{slot}: {len(history)} attempt{'s' * (len(history) > 1)}, attempt {newest.number} {newest.outcome}"


def listing(run: Run, only: str | None = None) -> Iterator[str]:
    """Every attempt of every slot, or of one: how it ended, its job, where it ran, and its files."""
    from toolkit.launch.attempts import attempts, known_slots

    known = known_slots(run)
    if only is not None and only not in known:
        raise UserError(f"no attempts of {only} in {run.root}; there are attempts of: {', '.join(known) or 'nobody'}")
    for slot in known if only is None else [only]:
        where = folders(run.root, slot)
        for attempt in attempts(run, slot):
            start = {} if attempt.start is None else attempt.start.attributes
            death = attempt.death or {}
            kind = f" ({death['kind']})" if death else ""
            job = f", job {start['job']}" if "job" in start else ""
            nodes = death.get("nodes") or start.get("nodes") or start.get("host")
            yield f"{slot} attempt {attempt.number}: {attempt.outcome}{kind}{job}{f' on {nodes}' if nodes else ''}"
            yield from (f"  {line}" for line in (_files(where[attempt.number]) if attempt.number in where else ()))


def _files(folder: Path) -> list[str]:
    """What people read in an attempt's folder: the batch script and the logs."""
    try:
        ranks = of_ranks(folder)
    except UserError as error:
        return [str(error)]
    return [str(path) for path in (folder / "job.sh", folder / "submission.out", *ranks) if path.exists()]
