"""How fast the trainer goes, from the ends of its newest attempt's metrics: a look, however long the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.exchange import jobs
from toolkit.exchange.run import Run

STEPS = 20  # the last steps, whose tokens/s are shown
END = 64 * 1024  # bytes read of a metrics file's end


def pace(run: Run) -> dict[str, Any]:
    """Where the trainer's newest attempt stands.

    Returns:
        ``step``: optimizer steps done; ``tokens_per_second`` of its last steps; ``seconds_per_step``: wall time of a step since
        the attempt began, waits and scoring included. None where its metrics do not tell.
    """
    found: dict[str, Any] = {"step": None, "tokens_per_second": None, "seconds_per_step": None}
    lines = _ends(run)
    steps = [line for line in lines if line["kind"] == "step"]
    begun = next((line for line in lines if line["kind"] in ("start", "restore")), None)
    if begun is not None:
        found["step"] = begun["step"]
    if steps:
        last = steps[-1]
        found["step"] = last["step"] + 1
        timed = [line for line in steps[-STEPS:] if line.get("seconds")]
        if timed:
            found["tokens_per_second"] = sum(line["tokens"] for line in timed) / sum(line["seconds"] for line in timed)
        if begun is not None and last["step"] >= begun["step"]:
            found["seconds_per_step"] = (last["time"] - begun["time"]) / (last["step"] + 1 - begun["step"])
    return found


def _ends(run: Run) -> list[dict[str, Any]]:
    """The first line and the last lines of the trainer's newest attempt."""
    try:
        newest = jobs.newest_started(run.records, "trainer")
    except UserError:  # a damaged record: the pace is not worth an error
        return []
    if newest is None:
        return []
    path = run.root / "metrics" / f"trainer.{newest.attributes['attempt']}.jsonl"
    return _parse(_read_ends(path))


def _read_ends(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            if size <= END:
                return file.read().split(b"\n")
            first = file.readline()
            file.seek(size - END)
            return [first, *file.read().split(b"\n")[1:]]  # without the line that was cut
    except OSError:
        return []


def _parse(lines: list[bytes]) -> list[dict[str, Any]]:
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # a torn last line
    return found
