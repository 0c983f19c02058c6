"""Whole runs with the real parts: Megatron-core, vLLM, the reward model, the sidecar, each in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from toolkit.exchange import layout
from toolkit.exchange.run import Run

ROOT = Path(__file__).parents[2]
SMALL = ["data.max_pairs=384", "data.heldout_prompts=24", "trainer.checkpoint_steps=2"]


def metaapo(*arguments: str, timeout: float = 400, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "toolkit.cli", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"metaapo {' '.join(arguments)} exited {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def background(*arguments: str) -> subprocess.Popen[str]:
    """The command line, left running."""
    return subprocess.Popen(
        [sys.executable, "-m", "toolkit.cli", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(true: Callable[[], object], timeout: float = 200, every: float = 0.05) -> None:
    deadline = time.monotonic() + timeout
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
    subprocess.run([sys.executable, "tools/toy_world.py", "--output", str(folder)], cwd=ROOT, check=True, timeout=600)
    return folder


@pytest.fixture
def no_leftovers(tmp_path: Path) -> Iterator[None]:
    """No process of an attempt of this test's runs is left when it ends."""
    yield
    left = [path for path in Path("/proc").iterdir() if path.name.isdigit() and _belongs(path, tmp_path)]
    assert not left, [(path / "cmdline").read_bytes() for path in left]


def _belongs(process: Path, folder: Path) -> bool:
    try:
        return f"PYTHONPATH={folder}".encode() in (process / "environ").read_bytes()
    except OSError:
        return False


@pytest.fixture(scope="session")
def finished_run(toy_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An undisturbed MetaAPO run: a warm-start round and three gated rounds."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    metaapo("launch", "experiment=quickstart", "cluster=local", f"run={folder}", f"toy={toy_world}", *SMALL)
    return Run.open(folder)
