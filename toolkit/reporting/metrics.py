"""Metrics: one JSON-lines file an attempt, merged along the lineage when read."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class MetricsWriter:
    """Appends lines ``{"time", "kind", ...}`` to ``metrics/<slot>.<attempt>.jsonl``; the only writer of that file."""

    def __init__(self, root: Path, slot: str, attempt: str) -> None:
        directory = root / "metrics"
        directory.mkdir(exist_ok=True)
        self._file = (directory / f"{slot}.{attempt}.jsonl").open("a", encoding="utf-8")

    def write(self, kind: str, **values: Any) -> None:
        """Append a line; it is flushed, not synced: metrics are for people, nothing is derived from them."""
        self._file.write(json.dumps({"time": round(time.time(), 3), "kind": kind, **values}) + "\n")
        self._file.flush()


def read(root: Path) -> Iterator[dict[str, Any]]:
    """All lines of all attempts with their ``slot`` and ``attempt``, in the order of time; a torn last line is left out."""
    lines = []
    for path in sorted((root / "metrics").glob("*.jsonl")):
        slot, _, attempt = path.stem.rpartition(".")
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text) | {"slot": slot, "attempt": attempt})
            except ValueError:
                continue
    yield from sorted(lines, key=lambda line: line["time"])


def steps(root: Path) -> list[dict[str, Any]]:
    """One line an optimizer step: of a step that was done again after a death, the latest."""
    latest = {line["step"]: line for line in read(root) if line["kind"] == "step"}
    return [latest[step] for step in sorted(latest)]
