"""What lines of a log mean: the table by which `toolkit.reporting.explain` tells a cause from its consequences. Pure functions of text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

CAUSE, ERROR, DOUBTFUL, CONSEQUENCE = range(4)  # how much a line explains: the first kind there is counts


@dataclass(frozen=True)
class Symptom:
    """What some lines of logs have in common.

    In ``meaning`` and ``advice`` may stand {run}, {role}, {slot}, {number}, {job}, {own} (what the line itself says) and {saving}.
    A line of an advice that is a command is one to be copied.
    """

    name: str
    pattern: str  # searched in a line; what it names is what the line itself says
    meaning: str
    advice: str
    weight: int = CAUSE
    death: str = ""  # the kind of death that says the same
    beside: bool = False  # whether its lines are shown beside those of another symptom, which may follow from it


@dataclass(frozen=True)
class Sign:
    """A line that shows a symptom. ``line`` is an index into the lines looked at."""

    symptom: Symptom
    line: int
    own: str = ""


RESUME = "\nmetaapo resume {run}"
MEMORY = """ 'cluster.{role}.memory="--mem=128G"'"""  # quoted for the shell, and for hydra
SAVING = {  # GPU memory, by role
    "trainer": "trainer.recompute=full, trainer.micro_batch=1, trainer.distributed_optimizer=true, or more GPUs: trainer.tensor, "
    "trainer.pipeline",
    "worker": "a smaller inference.gpu_memory_utilization (the share of a GPU that all engines of a worker take together) or "
    "inference.max_model_len, or a larger inference.tensor_parallel",
}

# The first entry that fits a line counts. Of the lines of all ranks counts the least weight, then the first entry.
SYMPTOMS = (
    Symptom(
        "another rank failed",
        r"\bLeaderFailed\b|See root cause above|EngineDeadError",
        "It ended because another of its processes had failed; the logs do not show why that one did.",
        "Look at the logs of all ranks.\nmetaapo logs {run} {slot} --attempt {number}",
        CONSEQUENCE,
    ),
    Symptom(
        "lost another rank",
        r"[Cc]onnection (closed|reset) by peer|Broken pipe|remote worker crashing|ncclRemoteError|communicator was aborted",
        "It lost the connection to another of its ranks, which ended first and left no word. A rank that ends without a word was "
        "killed: by the kernel for want of memory, or by somebody.",
        "The accounting may know more.\nsacct -j {job} --format=JobID,State,ExitCode,MaxRSS",
        CONSEQUENCE,
    ),
    Symptom(
        "GPU memory",
        r"OutOfMemoryError|(CUDA|HIP) out of memory|CUDA error: out of memory|CUDA_ERROR_OUT_OF_MEMORY",
        "The memory of a GPU was not enough.",
        "What takes less: {saving}. If another program was on the GPU, ask for whole ones." + RESUME + " KEY=VALUE",
        death="resource",
    ),
    Symptom(
        "GPU memory for vLLM",
        r"No available memory for the cache blocks|needed, which is larger than the available KV cache|"
        r"Free memory on device .* is less than desired",
        "vLLM found too little GPU memory for the model and its cache.",
        "What helps: {saving}." + RESUME + " KEY=VALUE",
        death="resource",
    ),
    Symptom(
        "memory",
        r"oom[-_ ]?kill|OOM Killed|: Out Of Memory|exceeded memory limit|Exceeded \w+ memory limit|^[\w.]*MemoryError\b|"
        r"Cannot allocate memory|can't allocate memory|not enough memory: you tried",
        "It needed more memory than its job, or the machine, had.",
        "Ask for more." + RESUME + MEMORY,
        death="resource",
    ),
    Symptom(
        "wall time",
        r"DUE TO TIME LIMIT",
        "It was killed at its wall time before it had saved. What it did since its last checkpoint is done again.",
        "Give it more than a checkpoint takes before its end (cluster.margin, seconds), or a longer cluster.{role}.time_minutes; "
        "a smaller trainer.checkpoint_steps bounds what is lost." + RESUME + " KEY=VALUE",
        death="time",
    ),
    Symptom(
        "preempted",
        r"DUE TO PREEMPTION",
        "Its nodes were taken for a job of higher priority. It is submitted again by itself.",
        "If it happens too often, another partition or QOS may help." + RESUME + " cluster.{role}.partition=…",
        death="preempted",
    ),
    Symptom(
        "node failed",
        r"DUE TO NODE FAILURE|srun: error: Node failure on",
        "A node of its job failed. It is submitted again by itself; a node that fails again is avoided.",
        "Tell the site if it is always the same node.",
        death="node",
    ),
    Symptom(
        "wrong code",
        r"(?P<own>this job was submitted with code .*)",
        "Its process ran another copy of the package than was submitted: {own}",
        "Take PYTHONPATH out of the profile's environment and of what its setup loads." + RESUME,
    ),
    Symptom(
        "program not found",
        r"(?:error: execve\(\)|^sh: (?:line )?\d+): (?:exec: )?(?P<own>.*)",
        "The node could not start the role's program: {own}",
        "cluster.{role}.python must name a program that the compute nodes have." + RESUME + " cluster.{role}.python=…",
    ),
    Symptom(
        "setup failed",
        r"slurm_script: line \d+: (?P<own>.*(not found|No such file or directory|Permission denied))",
        "A line of the job's setup failed: {own}",
        "Mend cluster.{role}.setup (or cluster.jobs.setup) in the profile." + RESUME + " cluster=PROFILE",
        DOUBTFUL,
        beside=True,
    ),
    Symptom(
        "GPU driver",
        r"driver version is insufficient|no kernel image is available|forward compatibility was attempted|"
        r"driver on your system is too old",
        "The environment's CUDA does not fit the driver, or the kind of GPU, of that node.",
        "Install a torch built for them, or stay on nodes that fit." + RESUME + " cluster.{role}.constraint=…",
    ),
    Symptom(
        "no GPU",
        r"No CUDA GPUs are available|no CUDA-capable device|Found no NVIDIA driver|invalid device ordinal|CUDA_ERROR_NO_DEVICE",
        "A process found no GPU of its own.",
        "A job must ask for as many GPUs as it has ranks on a node: cluster.{role}.gpu_request, cluster.ranks_per_node. If it "
        "does, the node is ill: who else had it?\nmetaapo logs {run} --list",
    ),
    Symptom(
        "GPU fault",
        r"uncorrectable ECC|CUDA error: (unspecified launch failure|hardware)|\bXid\b",
        "The GPU failed.",
        "Tell the site which node it was, and avoid it." + RESUME + """ 'cluster.jobs.options=["--exclude=NODE"]'""",
    ),
    Symptom(
        "environment",
        r"^(ModuleNotFoundError|ImportError): (?P<own>.*)|(?P<library>(error while loading shared libraries|version `GLIBC).*)",
        "The role's environment lacks something: {own}",
        "The Python of cluster.{role}.python needs the role's packages, and the modules that its setup loads." + RESUME,
    ),
    Symptom(
        "disk full",
        r"No space left on device|Disk quota exceeded|ENOSPC|EDQUOT",
        "A filesystem was full, or a quota of bytes or files used up. Nothing half written is ever read.",
        "Free space or files: look at the quota, df -h, df -i, and at /tmp and /dev/shm of the node." + RESUME,
    ),
    Symptom(
        "filesystem",
        r"Stale (NFS )?file handle|Input/output error|Transport endpoint is not connected|Remote I/O error",
        "The shared filesystem failed under it. Nothing of the run is lost.",
        "If it is always the same node, tell the site." + RESUME,
    ),
    Symptom(
        "permission",
        r"^PermissionError: (?P<own>.*)|(?P<text>Permission denied.*)",
        "It was not allowed to read or write something: {own}",
        "Give yourself the right, or name another path." + RESUME,
    ),
    Symptom(
        "limits",
        r"Too many open files|can't start new thread|pthread_create failed|Resource temporarily unavailable",
        "It reached a limit of the node on files, threads or processes.",
        "Raise it in the profile (cluster.{role}.setup: ulimit -n 65536), or start fewer threads (OMP_NUM_THREADS in "
        "cluster.{role}.environment)." + RESUME + " cluster=PROFILE",
    ),
    Symptom(
        "bus error",
        r"\bBus error\b|SIGBUS",
        "It touched memory that was not there: /dev/shm of the node was full, or a file was cut while it was mapped.",
        "Look at df -h /dev/shm on the node; a container may have to be given more of it.",
    ),
    Symptom(
        "crash in native code",
        r"Segmentation fault|SIGSEGV|core dumped",
        "A library crashed in native code.",
        "If it is always the same node, tell the site; else compare the versions installed with the tested ones.",
    ),
    Symptom(
        "another processor",
        r"Illegal instruction|SIGILL",
        "A library was built for another kind of processor than that node has.",
        "Build the environment for all nodes, or stay on one kind." + RESUME + " cluster.{role}.constraint=…",
    ),
    Symptom(
        "port taken",
        r"EADDRINUSE|[Aa]ddress already in use",
        "A port was taken on the node where the ranks meet. The next attempt takes another one.",
        "It needs nothing of you, unless it happens again and again.",
    ),
    Symptom(
        "ranks did not meet",
        r"cannot reach rank 0|did not (say|start) within|client socket has timed out|Connection refused|connectFullMesh failed|"
        r"No route to host|Network is unreachable",
        "The trainer's ranks could not meet: rank 0 was not there, or the nodes do not reach each other by that address.",
        "If all ranks had started, name the network interface that connects the nodes."
        + RESUME
        + " cluster.interface=ib0",
        DOUBTFUL,
    ),
    Symptom(
        "damaged record",
        r"\brecords\.Corrupt: (?P<own>.*)",
        "{own}",
        "The tick condemns it, and it is made again. If it happens again and again, the filesystem is ill.",
    ),
    Symptom(
        "refused",
        r"\berrors\.UserError: (?P<own>.*)",
        "{own}",
        "Mend what the sentence names." + RESUME,
        death="refused",
    ),
    Symptom(
        "killed",
        r"srun: error: .*: tasks? [\d,-]+: Killed|[Ee]xit(ed with exit)? code 137\b",
        "A process was killed from outside and left no word: by the kernel for want of memory, or by somebody.",
        "If memory is short, ask for more." + RESUME + MEMORY,
        DOUBTFUL,
    ),
    Symptom(
        "waited in vain",
        r"[Ww]atchdog caught collective operation timeout|Timed out waiting \d+ms|ncclSystemError|NCCL timeout",
        "A rank waited in vain for the others, and none of them shows an error: one of them hung, or the network did.",
        "Name the interface that connects the nodes; if it is always the same node, tell the site."
        + RESUME
        + " cluster.interface=ib0",
        DOUBTFUL,
    ),
    Symptom(
        "cancelled",
        r"\*\*\* JOB \S+ ON \S+ CANCELLED AT \S+ (\*\*\*|DUE to SIGNAL)",
        "Somebody cancelled its job. While the run is open it is submitted again by itself.",
        "To stop the run:\nmetaapo cancel {run}",
        DOUBTFUL,
        death="cancelled",
    ),
)
UNKNOWN_ERROR = Symptom(
    "unknown error",
    "",
    "An error that is not among the known ones: {own}",
    "The whole log:\nmetaapo logs {run} {slot} --attempt {number} --all",
    ERROR,
)
UNKNOWN = Symptom(
    "unknown",
    "",
    "It is not known why: {own}",
    "A process that ends without a word was killed: by the kernel for want of memory, or by somebody. The whole log:\n"
    "metaapo logs {run} {slot} --attempt {number} --all",
    CONSEQUENCE,
)

_COMPILED = [(symptom, re.compile(symptom.pattern)) for symptom in SYMPTOMS]
_PREFIX = re.compile(
    r"(\[rank\d+\]:\s?|\([\w ]*pid=\d+\)\s?|(ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\]\s?)+"
)  # torch's, vLLM's
_NOISE = re.compile(r"\b(\w*Warning|WARNING|INFO|DEBUG)\b|^(supervise|handover): ")  # told, and lived with
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(:|$)")
_AFTER = re.compile(
    r"\s*$|srun:|slurmstepd|submitit|Traceback|During handling|The above|terminate called|frame #|\[rank"
)
_BEFORE, _BEHIND = 12, 3  # lines around an exception that belong to it


def bare(line: str) -> str:
    """A line of a log without what torch and vLLM put in front of it."""
    return _PREFIX.sub("", line, count=1) if _PREFIX.match(line) else line


def match(text: str) -> tuple[Symptom, str] | None:
    """The first symptom of the table that fits a line, and what the line itself says of it."""
    for symptom, pattern in _COMPILED:
        found = pattern.search(text)
        if found is not None:
            own = next((value for value in found.groupdict().values() if value), found[0])
            return symptom, own.strip()
    return None


def signs(lines: Sequence[str]) -> Iterator[Sign]:
    """All that the lines of one log show: known symptoms, and exceptions of tracebacks that are not known."""
    inside = False
    for number, line in enumerate(lines):
        text = bare(line)
        if text.startswith("Traceback (most recent call last)"):
            inside = True
            continue
        raised = inside and _EXCEPTION.match(text) is not None
        inside = inside and not raised
        if _NOISE.search(line) and not raised:
            continue
        found = match(text)
        if found is not None:
            yield Sign(found[0], number, found[1])
        elif raised:
            yield Sign(UNKNOWN_ERROR, number, text.strip())


def order(sign: Sign) -> tuple[int, int]:
    """By which the sign that explains most comes first."""
    return sign.symptom.weight, SYMPTOMS.index(sign.symptom) if sign.symptom in SYMPTOMS else len(SYMPTOMS)


def of_death(kind: str) -> Symptom | None:
    """What a kind of death means where no log tells more."""
    return next((symptom for symptom in reversed(SYMPTOMS) if symptom.death == kind), None)


def excerpt(lines: Sequence[str], at: int) -> range:
    """The lines that show what is at ``at``: of an exception also where it was raised, and the rest of its message."""
    first = after = at
    if _EXCEPTION.match(bare(lines[at])):
        above = takewhile(lambda number: bare(lines[number]).startswith(" "), range(at - 1, max(-1, at - _BEFORE), -1))
        first = next((number for number in above if bare(lines[number]).startswith('  File "')), at)
        while after + 1 < min(len(lines), at + 1 + _BEHIND) and not _AFTER.match(lines[after + 1]):
            after += 1
    return range(first, after + 1)
