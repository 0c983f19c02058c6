"""Whole runs as Slurm jobs with the real trainer (TP=2 in a node, PP=2 across two) and vLLM, undisturbed and through the worst."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from devcluster import DevCluster

from tests.e2e.conftest import SMALL, toy_world, weight_digests
from tests.slurm.runs import ROOT, PayloadRun, environment_of, processes_of
from toolkit.exchange import layout, lineage
from toolkit.exchange.run import Run
from toolkit.launch.attempts import attempts

__all__ = ["toy_world"]
LAYOUT = [
    "trainer.tensor=2",
    "trainer.pipeline=2",
    "inference.workers=2",
    "inference.heartbeat=1",
]
PATIENT = [f"cluster.budgets.{kind}=1000" for kind in ("crash", "node", "unknown", "time", "resource")]


class RealRun(PayloadRun):
    """A run of the toy world, with the roles that people use."""

    def __init__(self, on: DevCluster, root: Path, toy: Path, *overrides: str, by_sbatch: bool = False) -> None:
        self.cluster, self.root = on, root
        overrides = ("experiment=quickstart", "cluster=devcluster", f"toy={toy}", f"run={root}", *LAYOUT, *overrides)
        if by_sbatch:
            output, script = root.with_suffix(".out"), ROOT / "slurm" / "metaapo.sbatch"
            command = ["sbatch", "--wait", f"--output={output}", str(script), *overrides]
            done = subprocess.run(command, env=on.env | {"METAAPO_VENV": sys.prefix}, check=False, timeout=900)
            assert done.returncode == 0, output.read_text()
        else:
            self.metaapo("launch", *overrides)
        self.run = Run.open(root)

    def assert_replayed(self) -> None:
        """Trained again on its records, in the same layout, as processes of this machine: the same bits."""
        again = self.root.with_name(f"{self.root.name}-again")
        self.metaapo("launch", f"replay_from={self.root}", f"run={again}", "cluster=local")
        replayed, last = Run.open(again), self.run.plan.rounds
        for version in range(1, last + 1):
            if (self.run.records.require(layout.policy(version)).directory).exists():
                digests = [weight_digests(run, version) for run in (self.run, replayed)]
                assert digests[0] == digests[1] and digests[0], f"policy {version} differs"


def send(pids: list[int], name: signal.Signals) -> None:
    """A signal to those that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, name)


@pytest.fixture(scope="module")
def site(slurm_programs: None) -> Iterator[DevCluster]:
    from tests.slurm.conftest import new_root

    with DevCluster(new_root(), nodes=3) as running:
        yield running


def test_an_undisturbed_run(site: DevCluster, toy_world: Path, tmp_path: Path) -> None:
    """Launched with no Python on the login node: sbatch slurm/metaapo.sbatch …"""
    run = RealRun(site, tmp_path / "run", toy_world, *SMALL, by_sbatch=True)
    job = run.job("trainer")
    assert site.run("squeue", "-h", "-j", job, "-o", "%D %C").stdout.split() == ["2", "4"]
    run.assert_sound()
    ranks = sorted(path.name.split("_")[1] for path in run.root.glob("logs/trainer/0000-*/*_log.out"))
    assert ranks == ["0", "1", "2", "3"], "each rank has a log"
    run.metaapo("report", str(run.root))
    summary = json.loads((run.root / "summary.json").read_text())
    assert [entry["round"] for entry in summary["rounds"]] == [1, 2, 3]
    run.assert_replayed()


def test_a_run_that_suffers(new_cluster: Callable[..., DevCluster], toy_world: Path, tmp_path: Path) -> None:
    """In turn: workers preempted, the trainer killed, its node crashed, the sidecar cancelled, the controller killed."""
    site = new_cluster(nodes=4, SlurmdTimeout=5, MessageTimeout=3)
    # A node for each worker: else its neighbour stays, and the other job waits.
    run = RealRun(site, tmp_path / "run", toy_world, *SMALL[1:], *PATIENT, "cluster.worker.cpus_per_task=4")
    run.job("worker-000")
    node = str(run.started("worker-000")["nodes"])
    run.until(lambda: run.run.records.find(layout.requests(1, 0)), "the first gate decisions")
    site.run("sbatch", "--partition=high", f"--nodelist={node}", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    run.until(lambda: run.attempts("worker-000")[0].over, "its preemption")

    run.until(lambda: run.steps() >= 2, "a checkpoint")
    trainer = run.attempts("trainer")[-1]
    last = [pid for pid in processes_of(trainer.id) if b"SLURM_PROCID=3" in environment_of(pid).split(b"\0")]
    os.kill(last[0], signal.SIGKILL)
    run.until(lambda: len(run.attempts("trainer")) == 2, "the next trainer")

    run.job("trainer", 1)
    at = run.steps()
    run.until(lambda: run.steps() > at, "progress")
    crashed = site.run("scontrol", "show", "hostnames", str(run.started("trainer", 1)["nodes"])).stdout.split()[-1]
    site.crash_node(crashed)
    run.until(lambda: len(run.attempts("trainer")) == 3, "a third trainer")
    site.start_node(crashed)

    newest = len(run.attempts("sidecar")) - 1
    running = [attempt for attempt in run.attempts("sidecar") if attempt.outcome == "running"]
    assert running, newest
    site.run("scancel", str(running[-1].start.attributes["job"]))
    run.until(lambda: run.steps() > at + 2, "more progress")
    site.kill_controller()
    time.sleep(5)
    site.start_controller()
    for _ in range(100):  # whoever looks after it on the login node, should Slurm have lost the sidecar's job
        if Run.open(run.root).closing() is not None:
            break
        run.tick(code=None)
        time.sleep(5)
    run.assert_sound()
    assert len(lineage.chain(run.run.records)) > 3
    run.assert_replayed()


def test_a_split_brain(new_cluster: Callable[..., DevCluster], toy_world: Path, tmp_path: Path) -> None:
    """Slurm gives up a trainer's node whose processes live on."""
    site = new_cluster(nodes=4, SlurmdTimeout=5, MessageTimeout=3)
    run = RealRun(site, tmp_path / "run", toy_world, *SMALL[1:], *PATIENT, "trainer.pipeline=1")
    run.until(lambda: run.steps() >= 2, "a checkpoint")
    old = run.attempts("trainer")[0]
    send(processes_of(old.id), signal.SIGSTOP)  # so that it is still there when its successor is
    site.kill_slurmd(str(run.started("trainer")["nodes"]))
    at = run.steps()
    run.until(lambda: run.steps() > at and len(run.attempts("trainer")) > 1, "the second trainer's checkpoint")
    assert processes_of(old.id), "the first one lives on"
    send(processes_of(old.id), signal.SIGCONT)
    run.until(lambda: not processes_of(old.id), "the old one to be fenced")
    run.assert_sound()
    run.assert_replayed()


def test_soak(new_cluster: Callable[..., DevCluster], toy_world: Path, tmp_path: Path) -> None:
    """Random kills of random roles. METAAPO_SOAK_SECONDS makes it longer; METAAPO_SOAK_SEED repeats one."""
    seconds = float(os.environ.get("METAAPO_SOAK_SECONDS", "100"))
    seed = int(os.environ.get("METAAPO_SOAK_SEED", str(time.time_ns() % 10**6)))
    print(f"METAAPO_SOAK_SEED={seed}")
    chance = random.Random(seed)
    site = new_cluster(nodes=4, SlurmdTimeout=5, MessageTimeout=3)
    run = RealRun(site, tmp_path / "run", toy_world, *SMALL[1:], *PATIENT, "trainer.pipeline=1", "method.epochs=3")
    until = time.monotonic() + seconds
    down: list[str] = []
    while time.monotonic() < until and Run.open(run.root).closing() is None:
        time.sleep(chance.uniform(3, 12))
        slot = chance.choice(["trainer", "worker-000", "worker-001", "sidecar"])
        deed = chance.choice(["kill", "cancel", "pause", "crash", "slurmd"])
        living = [attempt for attempt in attempts(Run.open(run.root), slot) if attempt.outcome == "running"]
        if not living:
            continue
        facts = living[-1].start.attributes
        print(f"{deed} {slot} attempt {living[-1].number} (job {facts['job']} on {facts['nodes']})")
        pids = processes_of(living[-1].id)
        if deed == "kill" and pids:
            send([chance.choice(pids)], signal.SIGKILL)
        elif deed == "cancel":
            site.run("scancel", str(facts["job"]), check=False)
        elif deed == "pause":
            send(pids, signal.SIGSTOP)
            time.sleep(chance.uniform(1, 8))
            send(pids, signal.SIGCONT)
        elif not down:  # one node at a time
            node = site.run("scontrol", "show", "hostnames", str(facts["nodes"])).stdout.split()[0]
            (site.crash_node if deed == "crash" else site.kill_slurmd)(node)
            down.append(node)
            continue
        if down:
            site.start_node(down.pop())
    for node in down:
        site.start_node(node)
    run.until(lambda: Run.open(run.root).closing(), "the end", 3600)
    run.assert_sound()
    run.assert_replayed()
    print(
        subprocess.run(
            [sys.executable, "-m", "toolkit.cli", "status", str(run.root)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        ).stdout
    )
