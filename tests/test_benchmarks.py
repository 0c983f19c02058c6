"""The benchmarks in tools/ start, and the quickest of them runs; what they measure is not tested."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(TOOLS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["advance", "launch", "metadata", "schedules"])
def test_a_benchmark_says_what_it_measures(name: str) -> None:
    assert f"python tools/benchmark_{name}.py" in run(f"benchmark_{name}.py", "--help")


def test_advance_is_measured_on_a_small_run(tmp_path: Path) -> None:
    printed = run("benchmark_advance.py", "--shards=40", "--workers=5", "--times=2", f"--directory={tmp_path}")
    rows = {cells[1].strip(): cells for cells in (line.split("|") for line in printed.splitlines()) if len(cells) > 4}
    for look in ("advance, again and again", "advance, by a fresh process", "supervise, again and again"):
        assert re.fullmatch(r" *\d+\.\d{3} *", rows[look][3]), rows[look]
    assert list(tmp_path.iterdir()) == [], "the run was removed"
