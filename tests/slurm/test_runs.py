"""Undisturbed runs on a real Slurm: how they are launched and kept going, and what they ask of Slurm."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from devcluster import DevCluster

from tests.slurm.runs import HELD, ROOT, PayloadRun, shim
from toolkit.exchange.run import Run

Make = Callable[..., PayloadRun]


def test_a_run_is_started_once_and_finishes_by_itself(make: Make, undisturbed: str, tmp_path: Path) -> None:
    """After one tick nobody is there but its own jobs. Two more ticks submit nothing, with at most two queries each."""
    run = make(step=HELD)
    run.tick()
    run.queued("sidecar", 1)
    asked = tmp_path / "asked"
    for program in ("squeue", "sacct", "scontrol", "sinfo", "sbatch"):
        shim(tmp_path / "bin", program, f'echo {program} >> {asked}\nexec $REAL "$@"')
    for _ in range(2):
        asked.write_text("")
        run.tick(path=tmp_path / "bin")
        assert len(asked.read_text().split()) <= 2 and "sbatch" not in asked.read_text()
    run.set_pace(0.05)
    run.assert_sound(undisturbed)
    assert {slot: run.outcomes(slot) for slot in ("trainer", "worker-000", "worker-001")} == {
        "trainer": ["done"],
        "worker-000": ["done"],
        "worker-001": ["done"],
    }
    assert run.outcomes("sidecar") == ["done", "voided"], "its successor waited in the queue and was withdrawn"


def test_the_sidecar_may_live_in_the_trainers_job(make: Make, undisturbed: str) -> None:
    run = make(step=HELD, cluster={"sidecar_in": "trainer", "trainer": {"memory": "--mem=1500M"}})
    run.tick()
    run.queued("trainer", 1)
    run.set_pace(0.05)
    run.assert_sound(undisturbed)
    assert not run.attempts("sidecar") and run.outcomes("trainer") == ["done", "voided"]


def test_offline_training_keeps_itself_going(make: Make) -> None:
    """A trainer and nothing else: its job hosts what ticks, and has its successor in the queue."""
    method = {"gate": {"kind": "none"}, "weight": {"kind": "one"}}
    run = make(step=1.0, method=method, cluster={"trainer": {"memory": "--mem=1500M"}}, inference={"does": ["sample"]})
    run.tick()
    run.until(lambda: run.steps() >= 2, "a checkpoint")
    run.set_pace(HELD)
    run.queued("trainer", 1)
    run.kill("trainer")
    run.set_pace(0.1)
    run.assert_sound()
    assert run.outcomes("trainer")[:2] == ["died", "done"]


def test_where_compute_nodes_may_not_submit_a_launch_follows(make: Make, undisturbed: str, tmp_path: Path) -> None:
    """control=login: the jobs find no sbatch, squeue or scancel; a process on the login node keeps the run going."""
    for program in ("sbatch", "squeue", "scancel", "sacct"):
        shim(tmp_path / "nothing", program, f"echo {program} >> {tmp_path}/called; exit 127")
    run = make(step=2.0, cluster={"control": "login", "jobs": {"setup": [f"export PATH={tmp_path}/nothing:$PATH"]}})
    follower, output = run.in_background("resume", str(run.root))
    try:
        run.cluster.run("scancel", run.job("trainer"))
        run.until(lambda: run.attempts("trainer")[0].over, "the trainer to leave")
        run.set_pace(0.05)
        run.finish()
        assert follower.wait(240) == 0, output.read_text()
    finally:
        follower.kill()
    run.assert_sound(undisturbed)
    assert len(run.attempts("sidecar")) == 1, "it queues no successor"
    assert not (tmp_path / "called").exists(), "the jobs know that they may not"
    assert len(run.attempts("trainer")) == 2


def test_a_follower_that_is_interrupted_leaves_the_jobs(make: Make, undisturbed: str) -> None:
    run = make(step=HELD, cluster={"control": "login"})
    follower, output = run.in_background("resume", str(run.root))
    try:
        run.job("worker-001")  # the last that it submits
        follower.send_signal(signal.SIGINT)
        assert follower.wait(240) == 130
    finally:
        follower.kill()
    said = output.read_text()
    assert "the jobs go on" in said and f"metaapo tick {run.root}" in said
    run.set_pace(0.05)
    run.assert_sound(undisturbed)


def test_a_chain_needs_nobody(make: Make, undisturbed: str) -> None:
    """control=chain: all attempts are in the queue from the start. A trainer is killed; the next link takes over."""
    run = make(step=1.0, cluster={"control": "chain", "links": 2})
    said = run.metaapo("resume", str(run.root), "--detach")
    assert "started" in said
    assert {slot: len(run.attempts(slot)) for slot in ("trainer", "sidecar", "worker-000")} == {
        "trainer": 2,
        "sidecar": 2,
        "worker-000": 2,
    }
    run.until(lambda: run.steps() >= 2, "a checkpoint")
    run.kill("trainer")
    run.set_pace(0.1)
    run.assert_sound(undisturbed)
    assert run.started("trainer", 1)["kind"] == "started"


def test_a_queued_job_runs_what_was_submitted(make: Make, undisturbed: str, tmp_path: Path) -> None:
    """Scenario 35: the checkout it was launched from is edited, even broken, while the job waits."""
    checkout = tmp_path / "checkout"
    for folder in ("toolkit", "configs"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
    run = make(cluster={"jobs": {"options": ["--hold"]}, "control": "login"})
    command = [sys.executable, "-m", "toolkit.cli", "tick", str(run.root)]
    subprocess.run(command, cwd=checkout, env=run.cluster.env, check=True, timeout=240, capture_output=True)
    for source in (checkout / "toolkit").rglob("*.py"):
        source.write_text("raise SystemExit('this is the edited checkout')\n")
    queued = [job["id"] for job in run.cluster.jobs() if job["name"] in run.names()]
    assert len(queued) == 4
    run.cluster.run("scontrol", "release", ",".join(queued))
    run.assert_sound(undisturbed)


def test_an_old_run_is_known_from_its_directory_alone(new_cluster: Callable[..., DevCluster], make: Make) -> None:
    """Scenarios 29, 31, 49: no accounting, a controller that forgets within seconds, and a shell that knows nothing."""
    forgetful = new_cluster(nodes=2, accounting=False, MinJobAge=2)
    run = make(on=forgetful)
    run.tick()
    run.finish()
    run.until(lambda: not forgetful.jobs(), "Slurm to forget the jobs")
    home = run.root.parent / "nobody"
    home.mkdir()
    bare = {"PATH": "/usr/bin:/bin:/usr/sbin", "HOME": str(home), "SLURM_CONF": forgetful.env["SLURM_CONF"]}
    for verb, words in (("status", "finished"), ("verify", "clean"), ("tick", "finished")):
        done = subprocess.run(
            [sys.executable, "-c", "from toolkit.cli import main; raise SystemExit(main())", verb, str(run.root)],
            cwd=home,
            env=bare | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0 and words in done.stdout, done.stdout + done.stderr
    closing = Run.open(run.root).closing()
    assert closing is not None and closing.attributes["outcome"] == "finished"
