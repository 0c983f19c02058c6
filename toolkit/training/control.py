"""What the trainer's ranks tell each other beside tensors: rank 0 reads and waits, the others follow.

All messages are JSON or Arrow bytes in CPU tensors, which go over gloo; nothing is pickled. Every function here is collective:
all ranks call it, in the same order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist

from toolkit.exchange.records import Closed
from toolkit.signals import StopFlag

DATA, NOT_YET, IDLE, OVER = range(4)


class Stopped(Exception):
    """The ranks agreed to stop here: a signal came, the deadline is near, or the run was closed."""


class LeaderFailed(Exception):
    """Rank 0 could not do its part; its own error tells why."""


class Starved(Exception):
    """Nothing to do came for so long that the trainer frees its nodes."""


class Control:
    """Rank 0's voice.

    Args:
        stop: this rank's flag, set by signals; any rank's flag stops all.
    """

    def __init__(self, stop: StopFlag) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._stop = stop

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share_bytes(self, data: bytes | None) -> bytes:
        """Rank 0's bytes, on every rank."""
        if self.size == 1:
            assert data is not None
            return data
        length = torch.tensor([len(data) if data is not None else 0])
        dist.broadcast(length, 0)
        buffer = torch.empty(int(length), dtype=torch.uint8)
        if data:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        if len(buffer):
            dist.broadcast(buffer, 0)
        return buffer.numpy().tobytes()

    def share(self, value: Any = None) -> Any:
        """Rank 0's JSON value, on every rank."""
        return json.loads(self.share_bytes(json.dumps(value).encode() if self.leads else None))

    def share_table(self, table: pa.Table | None) -> pa.Table:
        """Rank 0's table, on every rank."""
        data = None
        if self.leads:
            assert table is not None
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            data = sink.getvalue().to_pybytes()
        return pa.ipc.open_stream(self.share_bytes(data)).read_all()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]))
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return [json.loads(part[: int(n)].numpy().tobytes()) for part, n in zip(parts, lengths, strict=True)]

    def lead(self, action: Callable[[], Any]) -> Any:
        """Rank 0 does ``action``; every rank gets its JSON result, or rank 0's error as an exception of its own.

        Raises:
            Stopped: on all ranks, where the run was closed before something was published: what was trained is to be saved.
            LeaderFailed: on the other ranks, with the words of rank 0's error.
        """
        outcome: Any = None
        error: BaseException | None = None
        if self.leads:
            try:
                outcome = {"value": action()}
            except Closed:
                outcome = {"stopped": True}
            except Exception as caught:
                error, outcome = caught, {"error": f"rank 0: {caught}"}
        outcome = self.share(outcome)
        if "stopped" in outcome:
            raise Stopped
        if error is not None:
            raise error
        if "error" in outcome:
            raise LeaderFailed(outcome["error"])
        return outcome["value"]

    def lead_table(self, action: Callable[[], pa.Table]) -> pa.Table:
        """Rank 0 does ``action``; every rank gets its table, or rank 0's error as `lead` gives it."""
        made: list[pa.Table] = []
        self.lead(lambda: made.append(action()))
        return self.share_table(made[0] if made else None)

    def check_stop(self) -> None:
        """Raise `Stopped` on all ranks if any rank's flag is set."""
        flag = torch.tensor([int(self._stop.is_set())])
        if self.size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag.item():
            raise Stopped

    def wait(
        self, look: Callable[[], bool], poll: float, idle_exit: float, is_over: Callable[[], bool] = lambda: False
    ) -> None:
        """Wait until rank 0's ``look()`` is true: a loop of short broadcasts, so that no collective times out.

        Args:
            is_over: whether the run was closed meanwhile, as rank 0 sees it.

        Raises:
            Stopped, Starved: on all ranks.
        """
        started = time.monotonic()

        def state() -> int:
            if look():
                return DATA
            if is_over():
                return OVER
            return IDLE if time.monotonic() - started > idle_exit else NOT_YET

        while (now := self.lead(state)) != DATA:
            self.check_stop()
            if now == OVER:
                raise Stopped
            if now == IDLE:
                raise Starved
            self._stop.sleep(poll)
