"""The parent of a development cluster's processes: when the cluster's owner ends, however that is, they end too.

Killing the daemons alone would not do. Slurm's step daemons detach themselves from slurmd so that jobs outlive it, and
a job's own processes may detach themselves likewise. This process is therefore a *child subreaper*
(``PR_SET_CHILD_SUBREAPER``, prctl(2)): whatever descends from it, however often it forks, has it as its nearest living
ancestor and is found by walking the tree of processes. Environment variables and process groups can't promise that.

``devcluster.py`` starts it with one end of a sequenced-packet socket as standard input. A packet is JSON: an object
starts a daemon (``argv``, ``cwd``, and ``log`` for its output) and is answered with the daemon's process id; ``null``
says that from now on the cluster has no owner and lives until this process gets SIGTERM. When the socket closes or the
owner dies, everything is killed and the cluster's directory removed, unless it holds a file named ``keep``.
Only kill -9 of this process itself leaves something behind: the jobs.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h

_prctl = ctypes.CDLL(None).prctl


def _state_and_parent(process: int) -> tuple[str, int]:
    """proc(5): the state's letter and the parent's id. Raises OSError if there is no such process."""
    # The process's name comes before, in parentheses, and may contain anything.
    fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[1])


def alive(process: int) -> bool:
    """Whether it exists, and not just as a zombie."""
    try:
        return _state_and_parent(process)[0] not in "ZX"
    except OSError:
        return False


def descendants(ancestor: int) -> list[int]:
    """The ids of all processes below ``ancestor``, parents before their children; zombies don't count."""
    children: dict[int, list[int]] = {}
    for process in [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]:
        with contextlib.suppress(OSError):  # it may end while it is looked at
            state, parent = _state_and_parent(process)
            if state not in "ZX":
                children.setdefault(parent, []).append(process)
    found: list[int] = []
    level = children.get(ancestor, [])
    while level:
        found += level
        level = [child for process in level for child in children.get(process, [])]
    return found


def kill(processes: list[int]) -> None:
    """Send SIGKILL to each that still exists."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _reap(*_: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _serve(owner: socket.socket) -> None:
    """Start daemons for the owner until it ends or lets go."""
    parent = os.getppid()
    # The socket alone would not tell the owner's death while a child that the owner forked still holds its other end.
    owner.settimeout(1.0)
    while os.getppid() == parent:
        try:
            packet = owner.recv(1 << 16)
        except TimeoutError:
            continue
        if not packet:
            return
        request = json.loads(packet)
        if request is None:
            while True:
                signal.pause()
        with Path(request["log"]).open("ab") as log:
            daemon = subprocess.Popen(
                request["argv"],
                cwd=request["cwd"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # should this process itself be killed
            )
        owner.send(str(daemon.pid).encode())


def main(root: Path) -> None:
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGCHLD, _reap)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        _serve(socket.socket(fileno=0))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with contextlib.suppress(ChildProcessError):  # no child is left, so no descendant is
            while True:
                kill(descendants(os.getpid()))
                os.waitpid(-1, 0)
        if not (root / "keep").exists():
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
