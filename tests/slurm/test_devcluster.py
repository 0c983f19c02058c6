"""The development cluster behaves as a Slurm cluster does, and leaves nothing behind."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import devcluster
import pytest
from devcluster import DevCluster, DevClusterError
from keeper import descendants
from ports import claim_ports

from tests.slurm.conftest import SLURM, new_root, state, submit, wait_for, wait_until

NewCluster = Callable[..., DevCluster]
GLOO = """
import os, torch, torch.distributed as dist
rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
dist.init_process_group("gloo", init_method=f"tcp://{os.environ['FIRST']}", rank=rank, world_size=size)
total = torch.tensor(rank + 1)
dist.all_reduce(total)
dist.destroy_process_group()
print(os.environ["SLURMD_NODENAME"], int(total))
"""


def processes_of(cluster: DevCluster) -> list[int]:
    assert cluster._keeper is not None
    return [cluster._keeper.pid, *descendants(cluster._keeper.pid)]


def name_of(process: int) -> str:
    """Its program's; empty if it has ended."""
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""


def none_exists(processes: list[int]) -> bool:
    return not any(Path(f"/proc/{process}").exists() for process in processes)


def cgroups() -> set[Path]:
    return set(Path("/sys/fs/cgroup").glob("**/*slurm*"))


# --- one cluster ----------------------------------------------------------------------------------------------------


def test_a_step_runs_on_every_node(cluster: DevCluster) -> None:
    ran = cluster.run("srun", "--nodes=4", "printenv", "SLURMD_NODENAME").stdout.split()
    assert sorted(ran) == cluster.nodes == ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"]


def test_gpus_are_handed_out(cluster: DevCluster) -> None:
    gpus = ("srun", "--partition=gpu", "--nodes=2", "--gpus-per-node=2")
    assert cluster.run(*gpus, "printenv", "CUDA_VISIBLE_DEVICES").stdout.split() == ["0,1", "0,1"]
    one_each = (*gpus, "--ntasks=4", "--gpus-per-task=1", "printenv", "CUDA_VISIBLE_DEVICES")
    assert sorted(cluster.run(*one_each).stdout.split()) == ["0", "0", "1", "1"]
    with pytest.raises(DevClusterError, match="Requested node configuration is not available"):
        cluster.run("srun", "--partition=gpu", "--gres=gpu:3", "true")


def test_a_qos_limits_what_a_user_submits_and_the_accounting_knows_the_jobs(cluster: DevCluster) -> None:
    held = [submit(cluster, "--qos=few", "--time=1", "--hold", "--wrap=true") for _ in range(4)]
    with pytest.raises(DevClusterError, match="QOSMaxSubmitJobPerUserLimit"):
        submit(cluster, "--qos=few", "--time=1", "--hold", "--wrap=true")
    cluster.run("scancel", *held)
    failed = submit(cluster, "--job-name=fails", "--wrap=exit 3")

    def row() -> dict[str, str]:
        rows = cluster.sacct("JobID", "JobName", "State", "ExitCode", "QOS", "Account")
        return next((row for row in rows if row["JobID"] == failed), {})

    wait_until(lambda: row().get("State") == "FAILED")
    assert row() == {
        "JobID": failed,
        "JobName": "fails",
        "State": "FAILED",
        "ExitCode": "3:0",
        "QOS": "normal",
        "Account": "dev",
    }


def test_torch_distributed_meets_over_gloo(cluster: DevCluster) -> None:
    claim, port = claim_ports(1)
    step = ("srun", "--nodelist=127.0.0.[2-3]", "--ntasks=2", f"--export=ALL,FIRST=127.0.0.2:{port}")
    with claim:
        lines = cluster.run(*step, sys.executable, "-c", GLOO, timeout=300).stdout.splitlines()
    assert sorted(lines) == ["127.0.0.2 3", "127.0.0.3 3"]


def test_a_paused_controller_answers_nobody(cluster: DevCluster) -> None:
    cluster.pause_controller()
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            cluster.run("squeue", timeout=1)
    finally:
        cluster.resume_controller()
    assert cluster.run("squeue").returncode == 0


def test_work_goes_on_without_accounting(cluster: DevCluster) -> None:
    cluster.stop_accounting()
    try:
        with pytest.raises(DevClusterError, match="Connection refused"):
            cluster.sacct("JobID")
        job = submit(cluster, "--wrap=true")
        wait_for(cluster, job, "COMPLETED")
    finally:
        cluster.start_accounting()
    wait_until(lambda: {"JobID": job, "State": "COMPLETED"} in cluster.sacct("JobID", "State"))


# --- what goes wrong on a cluster -----------------------------------------------------------------------------------


def test_a_running_job_outlives_the_controller(new_cluster: NewCluster) -> None:
    private = new_cluster(nodes=1, accounting=False)
    end = private.root / "end"
    job = submit(private, f"--wrap=until test -e {end}; do sleep 0.1; done")
    wait_for(private, job, "RUNNING")
    # The controller saves jobs when one is submitted, at the latest after five seconds, but not when one starts.
    submitted = time.time()
    submit(private, "--hold", "--wrap=true")
    wait_until(lambda: (private.root / "state/job_state").stat().st_mtime > submitted)
    private.kill_controller()
    private.start_controller()
    assert state(private, job) == "RUNNING"
    end.touch()
    wait_for(private, job, "COMPLETED")


def test_preemption(new_cluster: NewCluster) -> None:
    private = new_cluster(accounting=False, KillWait=1)
    private.run("scontrol", "update", "PartitionName=preemptible", "GraceTime=0")
    ready = f"touch {private.root}/trap-$SLURM_JOB_ID"
    stubborn = ("--exclusive", f"--wrap=trap '' TERM; {ready}; sleep 300")
    warned = f"trap 'exit 5' USR2; {ready}; while true; do sleep 0.1; done"
    requeued = submit(private, "--partition=preemptible", *stubborn)
    not_requeued = submit(private, "--partition=preemptible", "--no-requeue", *stubborn)
    cancelled = submit(private, "--partition=nograce", *stubborn)
    polite = submit(private, "--partition=preemptible_cancel", "--exclusive", "--signal=B:USR2@60", f"--wrap={warned}")
    jobs = (requeued, not_requeued, cancelled, polite)
    wait_until(lambda: all((private.root / f"trap-{job}").exists() for job in jobs))
    high = submit(private, "--partition=high", "--nodes=4", "--exclusive", "--wrap=true")
    wait_for(private, polite, "FAILED")  # by its own exit within the grace time
    assert "ExitCode=5:0" in private.run("scontrol", "show", "job", polite).stdout
    wait_for(private, not_requeued, "PREEMPTED")
    wait_for(private, cancelled, "PREEMPTED")
    wait_until(lambda: "Restarts=1" in private.run("scontrol", "show", "job", requeued).stdout)
    wait_for(private, high, "COMPLETED")


def test_nodes_die(new_cluster: NewCluster) -> None:
    private = new_cluster(nodes=3, accounting=False, SlurmdTimeout=5, MessageTimeout=3)
    crashed, cut_off, healthy = private.nodes
    detached = "srun sh -c 'setsid --fork sleep 300; sleep 300'"
    jobs = [submit(private, "--no-requeue", f"--nodelist={node}", f"--wrap={detached}") for node in private.nodes]

    def tasks(node: str) -> list[str]:
        return [name for process in private.processes(node) if (name := name_of(process)) == "sleep"]

    wait_until(lambda: all(len(tasks(node)) == 2 for node in private.nodes))
    private.crash_node(crashed)
    private.kill_slurmd(cut_off)
    for job in jobs[:2]:
        wait_for(private, job, "NODE_FAIL")
    assert private.processes(crashed) == []
    assert len(tasks(cut_off)) == 2, "tasks outlive their slurmd"
    assert state(private, jobs[2]) == "RUNNING"

    private.start_node(crashed)
    private.run("srun", f"--nodelist={crashed}", "true")
    private.set_node(healthy, "down", reason="a test")
    assert state(private, jobs[2]) in ("COMPLETING", "NODE_FAIL")


# --- several, and their end -----------------------------------------------------------------------------------------


def test_clusters_run_side_by_side_and_leave_nothing(slurm_programs: None) -> None:
    before = cgroups()
    both = [DevCluster(new_root(), nodes=2, accounting=accounting) for accounting in (True, False)]
    # Started by threads that end at once: that must not end the clusters.
    with ThreadPoolExecutor() as threads:
        list(threads.map(DevCluster.start, both))
    left = []
    try:
        for private in both:
            job = submit(
                private, "--nodes=2", "--wrap=srun sh -c 'env --ignore-environment setsid --fork sleep 300; sleep 300'"
            )
            assert job == "1"
            wait_for(private, job, "RUNNING")
            wait_until(lambda private=private: len(private.processes()) >= 9)
            left += processes_of(private)
    finally:
        for private in both:
            private.stop()
    assert none_exists(left)
    assert not any(private.root.exists() for private in both)
    assert cgroups() <= before


def test_the_owners_death_ends_the_cluster(slurm_programs: None) -> None:
    root = new_root()
    owner = """
import sys, time
from pathlib import Path
from devcluster import DevCluster
cluster = DevCluster(Path(sys.argv[1]), nodes=2, accounting=False).start()
cluster.run("sbatch", "--output=/dev/null", "--nodes=2", "--wrap=srun sh -c 'setsid --fork sleep 300; sleep 300'")
while len(cluster.processes()) < 12:
    time.sleep(0.1)
print(cluster._keeper.pid, flush=True)
time.sleep(300)
"""
    with subprocess.Popen([sys.executable, "-c", owner, root], cwd=SLURM, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        keeper = int(process.stdout.readline())
        running = [keeper, *descendants(keeper)]
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: none_exists(running[1:]) and not root.exists(), timeout=60)


def test_a_clash_of_ports_is_overcome(new_cluster: NewCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = devcluster.claim_ports
    others: list[socket.socket] = []

    def too_slow(count: int) -> tuple[socket.socket, int]:
        held, first = claim(count)
        if not others:  # another program takes one of the ports after they were looked at
            others.append(socket.create_server(("", first + count - 1)))
        return held, first

    monkeypatch.setattr(devcluster, "claim_ports", too_slow)
    assert new_cluster(nodes=1, accounting=False).run("srun", "echo", "up").stdout == "up\n"
    others[0].close()


def test_strangers_do_not_reach_the_database(cluster: DevCluster) -> None:
    assert (cluster.root / "database/mariadb.sock").is_socket()
    for private in ("munge", "database", "database-tmp"):
        assert stat.S_IMODE((cluster.root / private).stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make something of another user's")
def test_a_directory_of_somebody_else_is_refused(slurm_programs: None) -> None:
    root = new_root()
    root.mkdir()
    os.chown(root, pwd.getpwnam("nobody").pw_uid, -1)
    try:
        with pytest.raises(DevClusterError, match="belongs to somebody else"):
            DevCluster(root, accounting=False).start()
        assert not any(root.iterdir())
    finally:
        root.rmdir()


def test_what_is_wrong_is_said(slurm_programs: None) -> None:
    root = new_root()
    with pytest.raises(DevClusterError, match=r"(?s)slurmctld has ended, .*KillWeight"):
        DevCluster(root, accounting=False, KillWeight=3).start()
    assert not root.exists()
    with pytest.raises(DevClusterError, match="is not empty"):
        DevCluster(Path("/usr"), accounting=False).start()
    with pytest.raises(DevClusterError, match="at most 60 characters"):
        DevCluster(Path("/tmp") / ("x" * 60), accounting=False).start()


def test_a_shell_starts_uses_and_stops_one(slurm_programs: None) -> None:
    root, command = new_root(), f"{sys.executable} {SLURM}/devcluster.py"
    script = f"""
        set -e
        eval "$({command} start {root} --nodes 1 --no-accounting)"
        srun printenv SLURMD_NODENAME
        {command} stop {root}
        {command} run --nodes 1 --no-accounting -- sh -c 'sinfo --noheader --format=%D --partition=cpu; exit 7'
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "127.0.0.1\n1\n", "")
    assert not root.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run something as another user")
def test_an_ordinary_user_has_one_too(slurm_programs: None) -> None:
    # The checkout, or the interpreter, may lie where only we can read.
    scripts = new_root()
    step = "srun --nodes=2 --qos=few --time=1 id --user --name; sacctmgr --noheader show user format=user"
    nobody = f"setpriv --reuid=nobody --regid={pwd.getpwnam('nobody').pw_gid} --clear-groups"
    try:
        shutil.copytree(SLURM, scripts)
        done = subprocess.run(
            [*nobody.split(), "python3", scripts / "devcluster.py", "run", "--nodes=2", "--", "sh", "-c", step],
            env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    finally:
        shutil.rmtree(scripts)
    assert (done.returncode, done.stdout.split()) == (0, ["nobody", "nobody", "nobody", "root"]), done.stderr
