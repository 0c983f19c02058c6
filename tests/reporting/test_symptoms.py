"""What lines of logs mean. The logs are those of real tools: Slurm 22.05, torch 2.13, vLLM, submitit, bash."""

from __future__ import annotations

import pytest

from toolkit.reporting import symptoms
from toolkit.reporting.symptoms import SYMPTOMS, UNKNOWN_ERROR, excerpt, order, signs

STEP = "slurmstepd-n1: error: *** STEP 4.0 ON n1 CANCELLED AT 2026-11-21T12:11:31 ***\nsrun: error: n1: task 0: Terminated\n"


def best(*logs: str) -> str | None:
    """The name of the symptom that explains logs of several ranks."""
    found = sorted((sign for log in logs for sign in signs(log.splitlines())), key=order)
    return found[0].symptom.name if found else None


@pytest.mark.parametrize(
    ("name", "log"),
    [
        ("crash in native code", f"srun: error: n1: task 1: Segmentation fault (core dumped)\n{STEP}"),
        ("bus error", f"srun: error: n1: task 1: Bus error\n{STEP}"),
        ("another processor", f"srun: error: n1: task 1: Illegal instruction\n{STEP}"),
        ("killed", f"srun: error: n1: task 1: Killed\n{STEP}"),
        ("killed", f"srun: error: n1: tasks 0-3: Exited with exit code 137\n{STEP}"),
        (None, f"srun: error: n1: task 1: Exited with exit code 3\n{STEP}"),
        ("memory", "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed."),
        ("memory", "slurmstepd: error: Detected 2 oom-kill event(s) in step 37.batch cgroup."),
        ("memory", "srun: error: n1: task 4: Out Of Memory"),
        ("memory", "slurmstepd-n1: error: StepId=11.0 exceeded memory limit (410927104 > 52428800), being killed"),
        ("memory", "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 8.00 GiB for an array"),
        ("wall time", "slurmstepd: error: *** JOB 1 ON n1 CANCELLED AT 2026-11-21T12:12:58 DUE TO TIME LIMIT ***"),
        ("preempted", "slurmstepd: error: *** STEP 2.0 ON n1 CANCELLED AT 2026-11-21T12:14:34 DUE TO PREEMPTION ***"),
        ("node failed", "srun: error: Node failure on n3"),
        ("cancelled", f"{STEP}slurmstepd-n1: error: *** JOB 3 ON n1 CANCELLED AT 2026-11-21T12:11:33 ***"),
        (None, STEP),
        ("program not found", "slurmstepd-n2: error: execve(): /no/such/python: No such file or directory"),
    ("program not found", "sh: 1: exec: /no/such/python: not found"),
    ("program not found", "sh: line 1: /no/such/python: No such file or directory"),
        ("setup failed", "/var/spool/slurmd/job00003/slurm_script: line 7: module: command not found"),
        ("environment", "Traceback (most recent call last):\n  File \"x\", line 1\nModuleNotFoundError: No module named 'torch'"),
        ("environment", "/lib64/libc.so.6: version `GLIBC_2.34' not found (required by /opt/python)"),
        ("GPU driver", "RuntimeError: CUDA error: no kernel image is available for execution on the device"),
        ("GPU driver", "CUDA driver version is insufficient for CUDA runtime version"),
        ("no GPU", "RuntimeError: No CUDA GPUs are available"),
        ("GPU memory", "[rank3]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
        ("GPU memory for vLLM", "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"),
        ("GPU fault", "RuntimeError: CUDA error: uncorrectable ECC error encountered"),
        ("disk full", "toolkit.errors.UserError: cannot write a.parquet: No space left on device. Nothing was published."),
        ("disk full", "OSError: [Errno 122] Disk quota exceeded: '/scratch/run/x'"),
        ("filesystem", "OSError: [Errno 116] Stale file handle: '/scratch/run/x'"),
        ("permission", "PermissionError: [Errno 13] Permission denied: '/models/policy'"),
        ("limits", "OSError: [Errno 24] Too many open files"),
        ("port taken", "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. "
         "port: 29873, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use"),
        ("ranks did not meet", "torch.distributed.DistNetworkError: The client socket has timed out after 3000ms while trying to "
         "connect to (127.0.0.1, 29873)."),
        ("waited in vain", "[rank0]: RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms for recv "
         "operation to complete"),
        ("waited in vain", "[rank4]:[E321 02:07:08.41 ProcessGroupNCCL.cpp:607] [Rank 4] Watchdog caught collective operation "
         "timeout: WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600067 milliseconds before timing out."),
        ("wrong code", "toolkit.errors.UserError: this job was submitted with code 0a1b2c3d4e5f and runs 112233445566 from /x."),
        ("refused", "toolkit.errors.UserError: no such folder: /models/policy"),
        ("damaged record", "toolkit.exchange.records.Corrupt: record /run/a.g0.json is damaged: its file a is missing."),
    ],
)  # fmt: skip
def test_what_a_line_means(name: str | None, log: str) -> None:
    assert best(log) == name


LOST = (
    "[rank0]: RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:28082. This is typically "
    "caused by a remote worker crashing."
)
UNKNOWN = 'Traceback (most recent call last):\n  File "/x/a.py", line 3, in f\n    d["shape"]\nKeyError: \'shape\'\n'


def test_a_cause_on_any_rank_comes_before_its_consequences() -> None:
    out_of_memory = "[rank1]: torch.OutOfMemoryError: CUDA out of memory."
    assert best(LOST, f"{UNKNOWN}{out_of_memory}") == "GPU memory"
    assert best(LOST, UNKNOWN) == "unknown error"
    assert best(f"{LOST}\nsrun: error: n1: task 1: Killed") == "killed"
    assert best(LOST, "toolkit.training.control.LeaderFailed: rank 0: No space left on device") == "another rank failed"
    assert best(LOST) == "lost another rank"


def test_an_unknown_exception_is_seen_at_the_end_of_its_traceback_alone() -> None:
    [sign] = signs(f"note: this is nothing\nKeyError: not raised\n{UNKNOWN}".splitlines())
    assert (sign.symptom, sign.own, sign.line) == (UNKNOWN_ERROR, "KeyError: 'shape'", 5)


def test_warnings_and_what_was_lived_with_are_no_signs() -> None:
    told = "UserWarning: Permission denied: no cache\nINFO 11-21 10:49:15 [x.py:1] CUDA out of memory is avoided\n"
    assert (
        best(f"{told}supervise: Unavailable: squeue: Connection refused\nhandover: OSError: No space left on device\n")
        is None
    )


def test_prefixes_of_ranks_and_engines_are_looked_through() -> None:
    engine = "(EngineCore_DP0 pid=77) "
    log = f"{engine}Traceback (most recent call last):\n{engine}  File 'x'\n{engine}ImportError: libcudart.so.12: cannot open"
    assert best(f"{log}\nRuntimeError: Engine core initialization failed. See root cause above.") == "environment"
    dated = "ERROR 05-23 09:31:47 [core.py:396] "
    assert (
        best(f"{dated}Traceback (most recent call last):\n{dated}  File 'x'\n{dated}KeyError: 'a'") == "unknown error"
    )


def test_an_excerpt_shows_where_it_was_raised_and_the_whole_message() -> None:
    lines = [*UNKNOWN.splitlines(), "  and its second line", "", "srun: error: n1: task 0: Exited with exit code 1"]
    assert [lines[at] for at in excerpt(lines, 3)] == lines[1:5]
    assert list(excerpt(lines, 6)) == [6]


def test_kinds_of_death_have_words_without_a_log() -> None:
    found = {kind: symptoms.of_death(kind) for kind in ("resource", "time", "preempted", "node", "cancelled", "crash")}
    assert [symptom.name if symptom else None for symptom in found.values()] == [
        "memory",
        "wall time",
        "preempted",
        "node failed",
        "cancelled",
        None,
    ]


def test_every_entry_of_the_table_can_be_said() -> None:
    words = dict.fromkeys(("run", "role", "slot", "number", "job", "own", "saving"), "x")
    for symptom in (*SYMPTOMS, UNKNOWN_ERROR, symptoms.UNKNOWN):
        assert symptom.meaning.format(**words) and symptom.advice.format(**words)
