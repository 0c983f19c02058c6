"""Dying well: TERM and USR2 only set a flag, which the roles look at where stopping is safe; so does a deadline."""

from __future__ import annotations

import os
import signal
import time

DEADLINE = "METAAPO_DEADLINE"  # seconds since the epoch at which the job should be saving
SLICE = 0.2  # seconds between two looks at the flag of one who sleeps


class StopFlag:
    """Set by a signal, or true once the deadline has passed. It takes no lock: the handler may run inside of any of its calls."""

    def __init__(self, deadline: float | None = None) -> None:
        self._stopped = False
        self._deadline = deadline

    @classmethod
    def install(cls) -> StopFlag:
        """A flag that TERM, USR2 and INT set; the deadline comes from the environment.

        Call it after submitit has installed its own handlers, which it replaces.
        """
        deadline = os.environ.get(DEADLINE)
        flag = cls(float(deadline) if deadline else None)
        for name in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(name, lambda *_: flag.set())
        signal.signal(signal.SIGCONT, signal.SIG_IGN)
        return flag

    def set(self) -> None:
        self._stopped = True

    def is_set(self) -> bool:
        return self._stopped or (self._deadline is not None and time.time() >= self._deadline)

    def sleep(self, seconds: float) -> bool:
        """Sleep, but wake up when the flag is set. Returns whether it is."""
        end = time.monotonic() + seconds
        while not self.is_set() and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, SLICE))
        return self.is_set()
