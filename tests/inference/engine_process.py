"""The one process that holds the tests' engines: vLLM changes the process it runs in, and pytest's must stay as it is."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from toolkit.inference import environment
from toolkit.inference.settings import EngineSettings

ENGINES: dict[str, Any] = {}


def start(reward: Path, settings: EngineSettings) -> None:
    environment.prepare()
    from toolkit.inference.engine import PolicyEngine, RewardEngine

    ENGINES["policy"] = PolicyEngine(settings)
    ENGINES["reward"] = RewardEngine(reward, settings)


def call(engine: str, method: str, *arguments: Any) -> Any:
    return getattr(ENGINES[engine], method)(*arguments)


def listening() -> list[str]:
    """Addresses at which this process accepts connections."""
    sockets = psutil.Process(os.getpid()).net_connections(kind="inet")
    return [socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN]


class Remote:
    """An engine's methods, called in its process."""

    def __init__(self, pool: ProcessPoolExecutor, engine: str) -> None:
        self._pool, self._engine = pool, engine

    def __getattr__(self, method: str) -> Any:
        return lambda *arguments: self._pool.submit(call, self._engine, method, *arguments).result()
