"""Replays of recorded requests, annotations and meta-learner versions: bit for bit in one layout, within a tolerance across layouts."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.e2e.conftest import Background, metaapo, wait_until, weight_digests
from toolkit.exchange import layout, lineage
from toolkit.exchange.run import Run

# Largest difference of any final weight across layouts, fp32, after 24 steps: other orders of summation, which Adam amplifies where a
# gradient is close to 0. Measured 4e-7 (docs/numerics.md); the weights themselves move by 4e-3.
ACROSS_LAYOUTS = 5e-6


def replay(source: Run, folder: Path, *arguments: str) -> Run:
    metaapo("launch", f"replay_from={source.root}", f"run={folder}", *arguments)
    return Run.open(folder)


def weights(run: Run) -> dict:
    manifest = run.records.require(layout.policy(run.plan.rounds))
    found: dict = {}
    for entry in manifest.files:
        if entry.path.endswith(".safetensors"):
            found |= load_file(manifest.directory / entry.path)
    return found


@pytest.mark.parametrize(
    "split", [["trainer.tensor=2"], ["trainer.pipeline=2"], ["trainer.tensor=2", "trainer.pipeline=2"]], ids=" ".join
)
def test_a_replay_in_another_layout_gives_the_same_weights(finished_run: Run, tmp_path: Path, split: list[str]) -> None:
    again = replay(finished_run, tmp_path / "run", *split)
    expected, found = weights(finished_run), weights(again)
    assert expected.keys() == found.keys()
    worst = max(float(abs(expected[name] - found[name]).max()) for name in expected)
    moved = max(float(abs(expected[name] - value).max()) for name, value in weights_at_start(finished_run).items())
    print(f"largest difference of a weight {worst:.1e}; the weights moved by up to {moved:.1e}")
    assert worst <= ACROSS_LAYOUTS < moved / 100
    assert metaapo("verify", str(again.root)).returncode == 0


def weights_at_start(run: Run) -> dict:
    manifest = run.records.require(layout.policy(0))
    return {
        name: value
        for entry in manifest.files
        if entry.path.endswith(".safetensors")
        for name, value in load_file(manifest.directory / entry.path).items()
    }


def test_kill_9_in_the_middle_then_resume_gives_the_same_bits(
    finished_run: Run, tmp_path: Path, background: Callable[..., Background]
) -> None:
    folder = tmp_path / "run"
    launcher = background("launch", f"replay_from={finished_run.root}", f"run={folder}")
    for sequence in (2, 7):  # in the warm start's middle, and in a gated round's
        wait_until(lambda sequence=sequence: (folder / f"checkpoints/{sequence:06d}.g0.json").exists(), every=0.01)
        start = newest_start(Run.open(folder))
        os.kill(start["pid"], signal.SIGKILL)
        launcher.process.kill()
        launcher.wait()
        launcher = background("resume", str(folder))
    assert launcher.wait() == 0, launcher.output()
    run = Run.open(folder)
    assert len({manifest.attempt for manifest in lineage.chain(run.records)}) == 3
    for version in range(run.plan.rounds + 1):
        assert weight_digests(run, version) == weight_digests(finished_run, version)
    assert metaapo("verify", str(folder)).returncode == 0


def newest_start(run: Run) -> dict:
    number, found = 0, None
    while (start := run.records.find(layout.job("trainer", number, "start"))) is not None:
        number, found = number + 1, start
    assert found is not None
    return found.attributes
