"""A run that is disturbed: a worker dies inside a shard, the sidecar is away, a trainer sleeps and another takes over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.e2e.conftest import ROOT, SMALL, Background, metaapo, wait_until
from toolkit.cluster import JobRequest
from toolkit.exchange import layout, lineage
from toolkit.exchange.run import Run
from toolkit.launch import snapshot
from toolkit.launch.local import LocalAdapter, processes
from toolkit.launch.supervise import specification
from toolkit.reporting import metrics


def pid_of(run: Run, slot: str, number: int = 0) -> int:
    return int(run.records.require(layout.job(slot, number, "start")).attributes["pid"])


def claims(folder: Path, slot: str) -> list[str]:
    try:
        return json.loads((folder / "heartbeats" / f"{slot}.json").read_text())["working_on"]
    except (OSError, ValueError):
        return []


def test_nothing_is_lost_or_doubled_whatever_dies(
    toy_world: Path, tmp_path: Path, background: Callable[..., Background]
) -> None:
    folder = tmp_path / "run"
    launcher = background(
        "launch",
        "experiment=quickstart",
        f"run={folder}",
        f"toy={toy_world}",
        *SMALL[1:],  # all pairs: the run must outlast the minute
        "method.shard_size=32",
        "inference.workers=2",
        "inference.heartbeat=1",
        "cluster.budgets.crash=100",  # the sidecar dies more often than a run would put up with
    )
    wait_until(lambda: (folder / "jobs/worker-001/0000.start.g0.json").exists())
    run = Run.open(folder)

    # A worker is killed while it holds a shard.
    victim = "worker-000"
    wait_until(lambda: any("responses" in claim for claim in claims(folder, victim)), every=0.005)
    os.kill(pid_of(run, victim), signal.SIGKILL)

    # The sidecar is killed, and again as soon as it is back, for a minute.
    until = time.monotonic() + 60
    killed = set()
    while time.monotonic() < until:
        number = len(killed)
        if run.records.find(layout.job("sidecar", number, "start")) is not None:
            os.kill(pid_of(run, "sidecar", number), signal.SIGKILL)
            killed.add(number)
        time.sleep(0.01)
    assert killed

    # The trainer is paused; a second one of the same run takes over; then the first wakes up.
    os.kill(pid_of(run, "trainer"), signal.SIGSTOP)
    second = submit_second_trainer(run)
    before = sequence(run)
    wait_until(lambda: sequence(run) > before + 1)
    os.kill(pid_of(run, "trainer"), signal.SIGCONT)
    assert launcher.wait() == 0, launcher.output()
    assert "clean" in metaapo("verify", str(folder)).stdout
    chain = lineage.chain(run.records)
    assert second in {manifest.attempt for manifest in chain}
    first_trainer = run.records.require(layout.job("trainer", 0, "end")).attributes
    assert first_trainer["outcome"] in ("superseded", "done"), first_trainer


def test_a_damaged_record_is_condemned_and_made_again(
    toy_world: Path, tmp_path: Path, background: Callable[..., Background]
) -> None:
    folder = tmp_path / "run"
    launcher = background("launch", "experiment=quickstart", f"run={folder}", f"toy={toy_world}", *SMALL)
    wait_until(lambda: (folder / "rounds/001/requests/000/000001.g0.json").exists(), every=0.01)
    run = Run.open(folder)
    trainer = pid_of(run, "trainer")
    os.kill(trainer, signal.SIGSTOP)  # so that it has not read what is damaged now
    wait_until(lambda: run.records.find(layout.annotations(1, 1)) is not None)
    data = next((folder / "rounds/001/annotations/000").glob("000001.g0.*.parquet"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 255
    data.write_bytes(content)
    os.kill(trainer, signal.SIGCONT)
    assert launcher.wait() == 0, launcher.output()
    assert run.records.require(layout.job("trainer", 0, "end")).attributes["kind"] == "corrupt"
    assert run.records.require(layout.annotations(1, 1)).generation == 1
    verified = metaapo("verify", str(folder)).stdout
    assert "clean" in verified and "condemned" in verified


def sequence(run: Run) -> int:
    newest = lineage.newest(run.records)
    return -1 if newest is None else lineage.sequence(newest)


def submit_second_trainer(run: Run) -> str:
    """What a tick would do that took the paused trainer for dead."""
    attempt = "second-trainer"
    code = snapshot.take(run.root)
    attributes = {
        "attempt": attempt,
        "slot": "trainer",
        "number": 1,
        "incarnation": 0,
        "operations": 0,
        "code": code,
        "progress": [],
        "gpus": 0,
    }
    run.records.publish(layout.job("trainer", 1, "intent"), attributes)
    job = specification(run.config, run.root, "trainer", 1, attempt, code)
    LocalAdapter().submit(replace(job, request=JobRequest(time_minutes=60, environment={"OMP_NUM_THREADS": "1"})))
    return attempt


def test_ctrl_c_saves_and_the_run_goes_on(
    toy_world: Path, tmp_path: Path, background: Callable[..., Background]
) -> None:
    folder = tmp_path / "run"
    launcher = background("launch", "experiment=quickstart", f"run={folder}", f"toy={toy_world}", *SMALL)
    wait_until(lambda: (folder / "checkpoints/000004.g0.json").exists())
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.wait() == 130
    assert f"metaapo resume {folder}" in launcher.output()
    run = Run.open(folder)
    attempt = run.records.require(layout.job("trainer", 0, "intent")).attributes["attempt"]
    assert not processes([attempt])[attempt]
    assert run.records.require(layout.job("trainer", 0, "end")).attributes["outcome"] == "saved"
    assert lineage.progress(lineage.newest(run.records)).step == metrics.steps(folder)[-1]["step"] + 1, (
        "a step was lost"
    )
    # The checkout changes; the run goes on with the code it has a snapshot of, or takes a new one: both are recorded.
    assert metaapo("resume", str(folder), "inference.workers=1").returncode == 0
    assert "clean" in metaapo("verify", str(folder)).stdout


def test_cancel_leaves_nothing_behind_and_a_tick_does_not_resurrect(
    toy_world: Path, tmp_path: Path, no_leftovers: None
) -> None:
    folder = tmp_path / "run"
    metaapo("launch", "--detach", "experiment=quickstart", f"run={folder}", f"toy={toy_world}", *SMALL)
    wait_until(lambda: (folder / "jobs/trainer/0000.start.g0.json").exists())
    metaapo("cancel", str(folder))
    metaapo("cancel", str(folder))
    metaapo("tick", str(folder))
    assert not list((folder / "jobs/trainer").glob("0001.intent*"))
    assert subprocess.run(["pgrep", "-f", str(folder)], cwd=ROOT, capture_output=True, check=False).returncode == 1
