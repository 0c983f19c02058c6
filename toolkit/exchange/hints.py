"""Files that are replaced in place and that nothing depends on: the frontier and the status."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from toolkit.exchange import filesystem


def frontier(root: Path) -> dict[str, Any]:
    """The sidecar's hint of what is open: ``round``, and the open shards to ``sample`` and to ``annotate``, oldest first;
    ``done``: shards of the round that are annotated. Empty if there is none."""
    return _read(root / "frontier.json")


def set_frontier(root: Path, value: dict[str, Any]) -> None:
    filesystem.replace(root / "frontier.json", json.dumps(value).encode())


def status(root: Path) -> dict[str, Any]:
    """The newest status, with ``written`` (seconds since the epoch). Empty if there is none."""
    return _read(root / "status.json")


def set_status(root: Path, value: dict[str, Any]) -> None:
    filesystem.replace(root / "status.json", json.dumps(value | {"written": time.time()}, indent=1).encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
