"""Processes that run test cases together, as the ranks of a trainer, one case after another.

Starting a process costs far more than a case (imports), so the processes stay, and each case divides as many of them as
it needs anew. They are told what to run through their standard input and end when it closes.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from toolkit.training.layout import ParallelLayout

ROOT = Path(__file__).parents[2]


class Pool:
    """Use ``run``; ``close`` at the end.

    Args:
        directory: for the processes' logs and meeting places.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []
        self._runs = 0

    def run(self, case: str, layout: ParallelLayout, timeout: float = 900.0, **arguments: Any) -> list[Any]:
        """Run ``package.module:function`` on every rank of ``layout`` and return each rank's result, in order.

        The function gets ``layout``, ``rank`` and ``arguments`` inside an initialised process group; arguments and
        results go through JSON (paths become strings). Raises AssertionError with the traceback as soon as a rank fails,
        whether or not others wait for it, or with the log of one that doesn't answer in time; the next run then begins
        with new processes.
        """
        while len(self._processes) < layout.world_size:
            self._start()
        self._runs += 1
        job = {
            "case": case,
            "layout": asdict(layout),
            "store": f"file://{self.directory / f'store-{self._runs}'}",
            "arguments": arguments,
        }
        ranks = self._processes[: layout.world_size]
        for rank, process in enumerate(ranks):
            process.stdin.write((json.dumps({**job, "rank": rank}, default=str) + "\n").encode())
            process.stdin.flush()
        deadline = time.monotonic() + timeout
        results: list[Any] = [None] * len(ranks)
        waiting = {process.stdout: rank for rank, process in enumerate(ranks)}
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
            for stream in ready or list(waiting):
                rank = waiting.pop(stream)
                answer = self._answer(rank, stream, bool(ready))
                if "result" not in answer:
                    self.close()
                    raise AssertionError(f"{case} failed on rank {rank} of {layout}:\n{answer['error']}")
                results[rank] = answer["result"]
        return results

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        self._processes = []

    def _start(self) -> None:
        log = self.directory / f"rank-{len(self._processes)}.log"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
            "PYTHONWARNINGS": "ignore",
        }
        with log.open("ab") as stderr:
            command = [sys.executable, "-m", "tests.parallel.worker"]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, cwd=ROOT, env=environment
            )
        self._processes.append(process)

    def _answer(self, rank: int, stream: IO[bytes], ready: bool) -> dict[str, Any]:
        """The process' one line of answer, or what its log says if none comes."""
        line = stream.readline() if ready else b""
        if line:
            return json.loads(line)
        log = (self.directory / f"rank-{rank}.log").read_text(errors="replace")
        return {"error": f"{'it died' if ready else 'no answer in time'}; end of its log:\n{log[-3000:]}"}
