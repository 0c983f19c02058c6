"""Whole runs with the real parts: Megatron-core, vLLM, the reward model, the sidecar, each in its own process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from toolkit.exchange import layout
from toolkit.exchange.run import Run

ROOT = Path(__file__).parents[2]
SMALL = ["data.max_pairs=384", "data.heldout_prompts=24", "trainer.checkpoint_steps=2"]
PATIENCE = 900.0  # seconds that anything here may take on a busy machine


def metaapo(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "toolkit.cli", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"metaapo {' '.join(arguments)} exited {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def wait_until(true: Callable[[], object], every: float = 0.05) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every)


def weight_digests(run: Run, version: int) -> dict[str, str]:
    """Digests of a policy's weight files by name."""
    manifest = run.records.require(layout.policy(version))
    return {Path(f.path).name: f.digest for f in manifest.files if f.path.endswith(".safetensors")}


@pytest.fixture(scope="session")
def toy_world() -> Path:
    """The toy world that the quickstart makes, made here if it is not there yet."""
    folder = ROOT / "toy-world"
    subprocess.run(
        [sys.executable, "tools/toy_world.py", "--output", str(folder)], cwd=ROOT, check=True, timeout=PATIENCE
    )
    return folder


@pytest.fixture
def no_leftovers(tmp_path: Path) -> Iterator[None]:
    """No process of an attempt of this test's runs is left when it ends. What is left is killed, for the sake of the next tests."""
    yield
    found = left = _processes(tmp_path)
    while left:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        left = _processes(tmp_path)
    assert not found


def _processes(folder: Path) -> dict[int, bytes]:
    """Command lines by process id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"PYTHONPATH={folder}".encode() in (path / "environ").read_bytes():
                found[int(path.name)] = (path / "cmdline").read_bytes()
    return found


@dataclass
class Background:
    """A command line that is left running."""

    process: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        return self.log.read_text()

    def wait(self) -> int:
        """Its exit status."""
        return self.process.wait(PATIENCE)


@pytest.fixture
def background(tmp_path: Path, no_leftovers: None) -> Iterator[Callable[..., Background]]:
    """Starts command lines; those that still run when the test ends are killed."""
    started: list[Background] = []

    def start(*arguments: str) -> Background:
        log = tmp_path / f"output-{len(started)}"  # a pipe that nobody reads would block it at 64 KiB
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "toolkit.cli", *arguments],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        started.append(Background(process, log))
        return started[-1]

    yield start
    for command in started:
        command.process.kill()
        command.process.wait()


@pytest.fixture(scope="session")
def finished_run(toy_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An undisturbed MetaAPO run: a warm-start round and three gated rounds."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    metaapo("launch", "experiment=quickstart", "cluster=local", f"run={folder}", f"toy={toy_world}", *SMALL)
    return Run.open(folder)
