"""Dying well: TERM and USR2 only set a flag, which the roles look at where stopping is safe; so does a deadline."""

from __future__ import annotations

import os
import signal
import threading
import time

DEADLINE = "METAAPO_DEADLINE"  # seconds since the epoch at which the job should be saving


class StopFlag:
    """Set by a signal, or true once the deadline has passed."""

    def __init__(self, deadline: float | None = None) -> None:
        self._event = threading.Event()
        self._deadline = deadline

    @classmethod
    def install(cls) -> StopFlag:
        """A flag that TERM, USR2 and INT set; the deadline comes from the environment.

        Call it after submitit has installed its own handlers, which it replaces, and before starting threads that must not
        receive signals.
        """
        deadline = os.environ.get(DEADLINE)
        flag = cls(float(deadline) if deadline else None)
        for name in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(name, lambda *_: flag.set())
        signal.signal(signal.SIGCONT, signal.SIG_IGN)
        return flag

    def set(self) -> None:
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set() or (self._deadline is not None and time.time() >= self._deadline)

    def sleep(self, seconds: float) -> bool:
        """Sleep, but wake up when the flag is set. Returns whether it is."""
        if self._deadline is not None:
            seconds = min(seconds, max(0.0, self._deadline - time.time()))
        self._event.wait(seconds)
        return self.is_set()
