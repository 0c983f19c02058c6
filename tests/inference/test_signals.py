"""A worker's shards outlive the signals that ask it to save. vLLM's own take too long to start here; they are spawned in the same way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection

from toolkit.inference.engine import _shielded


def shard(pipe: Connection) -> None:
    """As vLLM's: ends at TERM or INT, has no handler of USR2, and otherwise when its pipe is closed."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: sys.exit(3))
    pipe.send("ready")
    try:
        pipe.recv()
    except EOFError:
        sys.exit(0)


def test_shards_end_with_the_workers_pipe_and_not_by_a_signal() -> None:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=shard, args=(theirs,))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with _shielded():
        child.start()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    theirs.close()
    assert ours.recv() == "ready"
    for name in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        os.kill(child.pid, name)
    child.join(1)
    assert child.is_alive()
    ours.close()
    child.join(20)
    assert child.exitcode == 0
