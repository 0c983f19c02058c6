"""What the Slurm adapter makes of Slurm's words. Slurm itself is in tests/slurm; here a script says what it would say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.cluster import ClusterConfig, JobRequest
from toolkit.errors import UserError
from toolkit.launch import batch
from toolkit.launch.adapter import Busy, JobSpec, State, Unavailable
from toolkit.launch.slurm import SlurmAdapter, _seconds


def job(root: Path, **request: object) -> JobSpec:
    wish = JobRequest(time_minutes=90, python="/envs/trainer/bin/python", **request)
    return JobSpec(root, "trainer", 2, "abc", root / "code", 2, 4, 4, wish, 120.0, "77", ("n3", "n4"))


def say(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str, words: str, status: int = 0) -> None:
    """A program that says this."""
    path = folder / "bin" / program
    path.parent.mkdir(exist_ok=True)
    stream = ">&2" if status else ""
    text = f"#!/bin/sh\ncat {stream} <<'END'\n{words}\nEND\nexit {status}\n"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")


def test_a_script_says_what_the_profile_wants(tmp_path: Path) -> None:
    text = batch.script(
        job(
            tmp_path,
            partition="gpu",
            account="lab",
            reservation="class",
            gpu_request="--gres=gpu:a100:{gpus}",
            cpus_per_task=6,
            memory="--mem=0",
            options=["--exclusive"],
            srun=["--container-image=a.sqsh"],
            setup=["module load cuda"],
            environment={"DATA": "$TMPDIR/a b", "QUOTE": 'say "`x`" $(date)'},
        )
    )
    lines = text.splitlines()
    for option in (
        "--job-name=metaapo-abc",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--cpus-per-task=6",
        "--partition=gpu",
        "--account=lab",
        "--reservation=class",
        "--gres=gpu:a100:4",
        "--mem=0",
        "--exclusive",
        "--time=90",
        "--signal=USR2@120",
        "--no-requeue",
        "--dependency=afterany:77",
        "--exclude=n3,n4",
        f"--chdir={tmp_path}",
    ):
        assert f"#SBATCH {option}" in lines, option
    assert "wckey" not in text and "--array" not in text and "--requeue" not in text
    assert 'export DATA="$TMPDIR/a b"' in lines
    assert lines.index("module load cuda") < lines.index(f"export PYTHONPATH={tmp_path}/code")
    command = lines[-1]
    assert command.startswith("srun ") and "/envs/trainer/bin/python -u -m submitit.core._submit" in command
    for option in ("--cpus-per-task=6", "--kill-on-bad-exit=1", "--wait=60", "--container-image=a.sqsh"):
        assert f" {option} " in command
    # bash understands it, and expands variables and nothing else
    body = "\n".join(line for line in lines if line.startswith("export ") and "QUOTE" in line)
    said = subprocess.run(["bash", "-c", body + '; echo "$QUOTE"'], capture_output=True, text=True, check=True).stdout
    assert said == 'say "`x`" $(date)\n'


def test_what_is_null_is_not_said(tmp_path: Path) -> None:
    text = batch.script(JobSpec(tmp_path, "sidecar", 0, "abc", tmp_path, 1, 1, 0, JobRequest(time_minutes=5), 30.0))
    for word in ("partition", "account", "qos", "gres", "gpus", "mem", "cpus-per-task", "exclude", "dependency"):
        assert f"--{word}" not in text, word


def test_the_deadline_is_before_the_end_of_the_wall_time(tmp_path: Path) -> None:
    [line] = [line for line in batch.script(job(tmp_path)).splitlines() if "METAAPO_DEADLINE" in line]
    command = f'{line}; echo "$METAAPO_DEADLINE $(date +%s)"'
    deadline, now = map(int, subprocess.run(["bash", "-c", command], capture_output=True, text=True).stdout.split())
    assert 90 * 60 - 120 - 2 <= deadline - now <= 90 * 60 - 120
    known = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env={"SLURM_JOB_END_TIME": "5000", "PATH": "/usr/bin:/bin"},
    )
    assert known.stdout.split()[0] == "4880"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates …",
            Busy,
        ),
        ("sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying", Busy),
        (
            "sbatch: error: Slurm job queue full, sleeping and retrying\nsbatch: error: Batch job submission failed: …",
            Busy,
        ),
        ("sbatch: Job creation temporarily disabled, retrying\nsbatch: error: Batch job submission failed: …", Busy),
        ("sbatch: error: Batch job submission failed: Required partition not available (inactive or drain)", Busy),
        ("sbatch: error: Batch job submission failed: I/O error writing script/environment to file", Busy),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", RuntimeError),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller", RuntimeError),
        ("sbatch: error: invalid partition specified: nowhere", UserError),
        ("sbatch: error: QOSMaxWallDurationPerJobLimit\nsbatch: error: Job violates accounting/QOS policy", UserError),
    ],
)
def test_why_sbatch_failed_decides_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, error: type[Exception]
) -> None:
    say(tmp_path, monkeypatch, "sbatch", words, 1)
    with pytest.raises(error) as caught:
        batch.submit(job(tmp_path), 10)
    assert type(caught.value) is error
    if error is UserError:
        assert "Slurm refused trainer" in str(caught.value) and "job.sh" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying", Busy),
        ("", subprocess.TimeoutExpired),
    ],
)
def test_a_full_cluster_is_told_from_a_silent_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, error: type[Exception]
) -> None:
    """Where Slurm is full, sbatch says so and tries for two minutes."""
    say(tmp_path, monkeypatch, "sbatch", "")
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\necho '{words}' >&2\nexec sleep 30\n")
    with pytest.raises(error):
        batch.submit(job(tmp_path), 1)


@pytest.mark.parametrize("name", ["USR2", "TERM"])
def test_a_warning_does_not_kill_a_role_that_is_not_there_yet(tmp_path: Path, name: str) -> None:
    """Python starts for seconds before it has handlers."""
    body = f"import os, signal, sys; os.kill(os.getpid(), signal.SIG{name}); print('alive', *sys.argv[1:])"
    wish = JobRequest(python=f'{sys.executable} -c "{body}" "a b"')
    executor = batch._Executor(JobSpec(tmp_path, "trainer", 0, "abc", tmp_path, 1, 1, 0, wish), 1.0)
    done = subprocess.run(["bash", "-c", executor._submitit_command_str], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("alive a b -u -m submitit.core._submit "), done


def test_a_submitted_job_needs_nothing_of_its_submitter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(tmp_path, monkeypatch, "sbatch", "41;cluster")
    assert batch.submit(job(tmp_path), 10) == "41"
    folder = job(tmp_path).logs
    assert (folder / "41_submitted.pkl").exists() and folder.stat().st_mode & 0o077 == 0
    # as a submitter leaves it that died before submitit could rename its pickle
    (folder / "41_submitted.pkl").rename(folder / ("0" * 32 + ".pkl"))
    [line] = [line for line in (folder / "job.sh").read_text().splitlines() if line.startswith("pickle=")]
    subprocess.run(["bash", "-c", line], env={"SLURM_JOB_ID": "42", "PATH": "/usr/bin:/bin"}, check=True)
    assert (folder / "42_submitted.pkl").exists()


def test_jobs_are_submitted_as_from_a_login_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in (
        "SLURM_MEM_PER_NODE",
        "SLURM_ARRAY_TASK_ID",
        "SBATCH_PARTITION",
        "SUBMITIT_FOLDER",
        "CUDA_VISIBLE_DEVICES",
    ):
        monkeypatch.setenv(key, "of the job around")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    found = batch.client_environment()
    assert "of the job around" not in found.values() and found["SLURM_CONF"] == "/etc/slurm.conf" and "PATH" in found


QUEUE = """7|metaapo-a|RUNNING|None|n1|1-02:03:04
8|metaapo-b|PENDING|Resources||0:00
9|metaapo-c|PREEMPTED|None|n2|10:00
10|metaapo-d|WHAT_IS_THIS|None||0:00
11|somebody|else|s|job|RUNNING|None|n1|5:00
12|other|RUNNING|None|n1|5:00
13|metaapo-a|FAILED|None|n1|0:10
14|metaapo-h|COMPLETING|None|n5|5:00
15|metaapo-i|REVOKED|None||0:00
16|caf\udce9|RUNNING|None|n1|5:00"""
PAST = """20|metaapo-e|CANCELLED by 1000|None|n4|33
21|metaapo-f|RUNNING|None|n4|33"""


def test_squeue_for_the_living_and_sacct_for_the_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(tmp_path, monkeypatch, "squeue", QUEUE)
    say(tmp_path, monkeypatch, "sacct", PAST)
    slurm = SlurmAdapter(ClusterConfig(kind="slurm", submit_limit=7))
    found = slurm.look(list("abcdefghi"), 1e9)
    assert {name: job.state for name, job in found.items()} == {
        "a": State.RUNNING,  # Slurm ran it twice: the living one counts
        "b": State.PENDING,
        "c": State.GONE,
        "d": State.UNKNOWN,
        "e": State.GONE,
        "f": State.UNKNOWN,  # accounting that lags behind is no proof of life
        "g": State.UNKNOWN,
        "h": State.RUNNING,
        "i": State.UNKNOWN,  # its sibling in another cluster may live
    }
    assert (found["h"].reason, found["h"].kind, found["h"].nodes) == ("COMPLETING", "node", "n5")
    assert found["a"].seconds == 93784 and found["b"].reason == "Resources"
    assert (found["c"].kind, found["e"].kind, found["g"].kind) == ("preempted", "cancelled", "unknown")
    assert slurm.room() == 2, "five of seven jobs are there, of whatever making"


def test_no_answer_is_no_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(tmp_path, monkeypatch, "squeue", "slurm_load_jobs error: Unable to contact slurm controller", 1)
    with pytest.raises(Unavailable, match="Unable to contact"):
        SlurmAdapter(ClusterConfig(kind="slurm")).look(["a"], 1e9)
    say(tmp_path, monkeypatch, "squeue", QUEUE)
    say(tmp_path, monkeypatch, "sacct", "Slurm accounting storage is disabled", 1)
    assert SlurmAdapter(ClusterConfig(kind="slurm")).look(["e"], 1e9)["e"].state is State.UNKNOWN


def test_without_slurms_commands_it_says_where_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"there is no squeue here\. .* login node"):
        SlurmAdapter(ClusterConfig(kind="slurm")).look(["a"], 1e9)
    with pytest.raises(UserError, match=r"there is no sbatch here\. .*cluster\.control=login"):
        batch.submit(job(tmp_path), 1)


@pytest.mark.parametrize(
    ("text", "seconds"), [("0:00", 0), ("5:07", 307), ("1:00:00", 3600), ("2-00:00:01", 172801), ("INVALID", 0)]
)
def test_elapsed_times(text: str, seconds: float) -> None:
    assert _seconds(text) == seconds
