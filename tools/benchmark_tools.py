"""What the benchmarks share: counting file operations with strace, and printing tables."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

# Operations that a network filesystem's server has to answer, by the system calls that ask for them.
OPERATIONS = {
    "open": ("open", "openat", "creat"),
    "stat": ("stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "readlink", "readlinkat"),
    "list": ("getdents64",),
    "link": ("link", "linkat"),
    "unlink": ("unlink", "unlinkat", "rmdir"),
    "rename": ("rename", "renameat", "renameat2"),
    "mkdir": ("mkdir", "mkdirat"),
    "sync": ("fsync", "fdatasync"),
}
OPERATION = {call: name for name, calls in OPERATIONS.items() for call in calls}
CALL = re.compile(r"\d+ +(\w+)\(")
SECTION = re.compile(r'section:([^"]*)"')
NO_STRACE = (
    "operations are not counted: strace is not installed (apt-get install strace), or may not watch processes here"
)


def section(name: str) -> None:
    """For the process that is watched: from here on its operations count under this name."""
    os.access(f"section:{name}", os.F_OK)  # only strace sees it


def can_count() -> bool:
    """Whether `count_operations` works here."""
    return shutil.which("strace") is not None and subprocess.run(["strace", "-o", os.devnull, "true"]).returncode == 0


def count_operations(command: Sequence[str], root: Path) -> dict[str, Counter[str]]:
    """Run a command under strace and count its operations on files below ``root``.

    Opening a directory counts as ``open``; reading, writing and closing an open file do not count.

    Returns:
        By `section` and kind of operation (`OPERATIONS`); what comes before the first section is left out.

    Raises:
        RuntimeError: the command failed.
    """
    with tempfile.NamedTemporaryFile("r", suffix=".strace") as log:
        trace = ["strace", "-f", "-y", "-s", "4096", "--seccomp-bpf", "-e", f"trace={','.join(OPERATION)}"]
        done = subprocess.run([*trace, "-o", log.name, *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} exited {done.returncode} under strace:\n{done.stderr[-4000:]}")
        found: dict[str, Counter[str]] = {}
        current: Counter[str] = Counter()
        for line in log:
            call, begins = CALL.match(line), SECTION.search(line)
            of_descriptor = ', "", ' in line  # fstat: answered from what the open brought
            if begins is not None:
                current = found.setdefault(begins[1], Counter())
            elif call is not None and call[1] in OPERATION and str(root) in line and not of_descriptor:
                current[OPERATION[call[1]]] += 1
        return found


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table, columns aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    print("\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]), flush=True)
