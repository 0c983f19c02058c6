"""What goes wrong between a submitter and Slurm. The numbers are those of docs/reliability.md."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from devcluster import DevCluster

from tests.slurm.runs import HELD, ROOT, PayloadRun, shim
from toolkit.exchange import jobs
from toolkit.exchange.run import Run

Make = Callable[..., PayloadRun]
SLOTS = ("trainer", "sidecar", "worker-000", "worker-001")


def test_1_accepted_but_the_client_is_told_otherwise(make: Make, undisturbed: str, tmp_path: Path) -> None:
    """Every sbatch of this run, those of its own jobs too: the job is taken, the client sees a timeout."""
    path = shim(
        tmp_path / "bin",
        "sbatch",
        '$REAL "$@" > /dev/null\n'
        'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1',
    )
    run = make()
    said = run.tick(path=path)
    assert said.count("unclear") == 4
    for _ in range(3):
        run.tick(path=path)
    assert {slot: len(run.attempts(slot)) for slot in SLOTS[2:]} == {"worker-000": 1, "worker-001": 1}
    run.assert_sound(undisturbed)


def test_1_a_controller_that_answers_too_late(
    new_cluster: Callable[..., DevCluster], make: Make, undisturbed: str
) -> None:
    slow = new_cluster(nodes=2, MessageTimeout=3)
    run = make(on=slow)
    slow.pause_controller()
    with ThreadPoolExecutor() as threads:
        ticking = threads.submit(run.tick)
        run.until(lambda: run.attempts("sidecar"), "the trainer's sbatch to give up")
        slow.resume_controller()  # it finds the request in its socket
        assert "submission of trainer unclear" in ticking.result()
    run.assert_sound(undisturbed)


def test_2_the_client_dies_after_sbatch(make: Make, undisturbed: str, tmp_path: Path) -> None:
    path = shim(tmp_path / "bin", "sbatch", '$REAL "$@" > /dev/null\nkill -9 $PPID')
    run = make()
    run.tick(code=-9, path=path)
    assert {slot: len(run.attempts(slot)) for slot in SLOTS} == {"trainer": 1} | dict.fromkeys(SLOTS[1:], 0)
    run.tick()
    run.assert_sound(undisturbed)
    assert run.outcomes("trainer") == ["done"], "the attempt whose submitter died was adopted"


def test_3_no_controller_during_a_tick(new_cluster: Callable[..., DevCluster], make: Make, undisturbed: str) -> None:
    private = new_cluster(nodes=2)
    run = make(on=private, step=0.6)
    run.tick()
    run.queued("sidecar", 1)
    run.until(lambda: run.steps() >= 4, "training, and Slurm to have saved its state")
    run.set_pace(HELD)
    private.kill_controller()
    before = [(attempt.slot, attempt.number) for attempt in run.every_attempt()]
    said = run.tick(code=75)
    assert "does not answer" in said and "try again later" in said
    time.sleep(5)  # the sidecar's own looks fail as well
    assert [(attempt.slot, attempt.number) for attempt in run.every_attempt()] == before
    private.start_controller()
    run.set_pace(0.1)
    run.assert_sound(undisturbed)


def test_4_a_limit_on_submitted_jobs(make: Make, undisturbed: str) -> None:
    """The QOS allows 4 jobs, the run wants 7: it goes on with what it gets, and asks less and less often for the rest."""
    run = make(cluster={"jobs": {"qos": "few", "time_minutes": 3}}, inference={"workers": 4})
    run.tick()
    turned_away = [attempt for attempt in run.every_attempt() if attempt.turned_away]
    assert turned_away and all("SubmitJob" in attempt.start.attributes["reason"] for attempt in turned_away)
    run.assert_sound(undisturbed)
    assert len(run.every_attempt()) < 40


def test_4_a_known_limit_is_kept(make: Make, undisturbed: str) -> None:
    run = make(cluster={"jobs": {"qos": "few", "time_minutes": 3}, "submit_limit": 4}, inference={"workers": 4})
    run.tick()
    run.assert_sound(undisturbed)
    assert not any(attempt.turned_away for attempt in run.every_attempt())


def test_6_what_can_never_run_is_fatal(make: Make) -> None:
    """sbatch takes a job that is longer than its partition allows; it would wait for ever."""
    run = make(cluster={"trainer": {"partition": "short", "time_minutes": 10}})
    run.tick()
    run.until(lambda: any(job["reason"] == "PartitionTimeLimit" for job in run.cluster.jobs()), "Slurm to say so")
    run.tick(code=None)
    closing = Run.open(run.root).closing()
    assert closing is not None and "PartitionTimeLimit" in closing.attributes["reason"]
    assert "time_minutes" in closing.attributes["reason"]
    run.until(lambda: not run.in_queue(), "all jobs to leave")
    run = make(cluster={"trainer": {"options": ["--gres=gpu:9"]}})
    said = run.tick(code=2)
    assert "Slurm refused trainer" in said and "job.sh" in said


def test_8_a_link_whose_dependency_is_dropped_runs_beside_its_predecessor(make: Make, undisturbed: str) -> None:
    """Slurm forgets what a job waits for: two trainers at once. One of them loses the next checkpoint and stops."""
    run = make(step=2.0, cluster={"control": "chain", "links": 2})
    run.metaapo("resume", str(run.root), "--detach")
    run.until(lambda: run.steps() >= 2, "the first trainer's checkpoint")
    run.cluster.run("scontrol", "update", f"jobid={run.queued('trainer', 1)}", "dependency=")
    link = run.attempts("trainer")[1].id
    run.until(lambda: jobs.claims(run.root, "trainer", link), "the second trainer to be at work")
    assert run.outcomes("trainer")[0] == "running"
    run.set_pace(0.2)
    run.assert_sound(undisturbed)
    assert sorted(run.outcomes("trainer")) == ["done", "superseded"]


def test_9_a_dependency_that_can_never_be_satisfied_is_replaced(make: Make, undisturbed: str) -> None:
    run = make(step=HELD)
    failed = run.cluster.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=exit 1").stdout.strip()
    run.tick()
    successor = run.queued("sidecar", 1)
    run.cluster.run("scontrol", "update", f"jobid={successor}", f"dependency=afterok:{failed}")
    run.until(lambda: len(run.attempts("sidecar")) == 3, "another successor")
    assert run.outcomes("sidecar")[1] == "voided"
    run.set_pace(0.1)
    run.assert_sound(undisturbed)


def test_10_submission_from_inside_an_array_job(make: Make, undisturbed: str) -> None:
    """The jobs are as if submitted from a login node: their own memory, no array, the same cluster."""
    run = make()
    command = f"{sys.executable} -m toolkit.cli tick {run.root}"
    run.cluster.run(
        "sbatch",
        "--array=7-7",
        "--mem=900M",
        "--cpus-per-task=2",
        "--output=/dev/null",
        f"--chdir={ROOT}",
        f"--wrap=srun {command}",
    )
    run.job("trainer")
    job = run.job("worker-000")
    shown = run.cluster.run("scontrol", "show", "job", job).stdout
    assert "ArrayJobId" not in shown and "NumCPUs=1 " in shown and "500M" in shown
    run.assert_sound(undisturbed)


def test_28_a_controller_that_crashes_loses_and_replays_jobs(
    new_cluster: Callable[..., DevCluster], make: Make, undisturbed: str
) -> None:
    private = new_cluster(nodes=2)
    run = make(on=private, step=0.2)
    run.tick()
    time.sleep(2.5)
    private.kill_controller()
    time.sleep(1)
    private.start_controller()
    for _ in range(40):  # somebody has to: it may be that every job of the run was lost
        run.tick(code=None)
        if Run.open(run.root).closing() is not None:
            break
        time.sleep(3)
    run.assert_sound(undisturbed, accounting=False)  # what Slurm itself forgot, its accounting may have wrong
    assert len(run.every_attempt()) < 20


@pytest.mark.parametrize("how", ["late", "down"])
def test_29_accounting_that_is_late_or_down(
    new_cluster: Callable[..., DevCluster], make: Make, undisturbed: str, tmp_path: Path, how: str
) -> None:
    """What only accounting would know is unknown, and unknown is not dead."""
    private = new_cluster(nodes=2, MinJobAge=2)
    asked = tmp_path / "asked"
    answer = "sleep 60" if how == "late" else 'exec $REAL "$@"'
    path = shim(tmp_path / "bin", "sacct", f"echo >> {asked}\n{answer}")
    # control=login: nobody asks but us, here, and that after Slurm has forgotten the job.
    run = make(on=private, step=HELD, cluster={"control": "login", "query_timeout": 5.0})
    run.tick()
    job = run.job("worker-000")
    if how == "down":
        private.stop_accounting()
    run.kill("worker-000")
    run.until(lambda: all(known["id"] != job for known in private.jobs()), "the controller to forget the job")
    run.tick(path=path)
    assert asked.exists(), "accounting was asked"

    def buried() -> bool:
        run.tick(code=None, path=path)
        return run.attempts("worker-000")[0].over

    run.until(buried, "it to be given up")
    death = run.attempts("worker-000")[0].death
    assert death is not None and death["kind"] == "unknown", death
    run.set_pace(0.1)
    run.assert_sound(undisturbed, accounting=how == "late")


def test_33_ticks_in_parallel_submit_each_attempt_once(make: Make, undisturbed: str) -> None:
    run = make()
    command = [sys.executable, "-m", "toolkit.cli", "tick", str(run.root)]
    ticks = [subprocess.Popen(command, cwd=ROOT, env=run.cluster.env, stdout=subprocess.DEVNULL) for _ in range(3)]
    try:
        assert [tick.wait(240) for tick in ticks] == [0, 0, 0]
    finally:
        for tick in ticks:
            tick.kill()
    names = [job["name"] for job in run.cluster.jobs() if job["name"] in run.names()]
    assert len(names) == len(set(names)) and {len(run.attempts(slot)) for slot in SLOTS[2:]} == {1}
    run.assert_sound(undisturbed)
