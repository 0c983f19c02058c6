"""Slurm as the control plane sees it: one squeue for what is alive, one sacct for what is not there any more.

Slurm's memory is no ledger: it forgets jobs after minutes (MinJobAge), loses or replays some when its controller crashes, and its
accounting lags or is off. So a job is known by its name, which holds the attempt's id; what only accounting says of a job counts
when it says that it has ended; and a job nobody remembers is UNKNOWN, not dead.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Collection, Iterable

from toolkit.cluster import ClusterConfig
from toolkit.errors import UserError
from toolkit.launch import batch
from toolkit.launch.adapter import Job, JobSpec, State, Unavailable

COMPLETING = "COMPLETING"  # its processes are being ended; it stays so while one of them cannot be
PENDING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
RUNNING = {"RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"}
DEATHS = {  # Slurm's word for the end of a job -> kind of death, what it means
    "COMPLETED": ("crash", "its job ended without a word of the role"),
    "FAILED": ("crash", "its job failed without a word of the role"),
    "OUT_OF_MEMORY": ("resource", "it needed more memory than its job had"),
    "TIMEOUT": ("time", "it was killed at its wall time before it had saved"),
    "DEADLINE": ("time", "it was killed at its deadline before it had saved"),
    "PREEMPTED": ("preempted", "it was preempted"),
    "NODE_FAIL": ("node", "its node failed"),
    "BOOT_FAIL": ("node", "its node failed to start"),
    "LAUNCH_FAILED": ("node", "its node could not start it"),
    "CANCELLED": ("cancelled", "somebody cancelled its job"),
}
CHUNK = 500  # ids of one scancel


class SlurmAdapter:
    """The cluster that SLURM_CONF, or the machine's own configuration, names."""

    same_machine = False

    def __init__(self, cluster: ClusterConfig) -> None:
        self.timeout = cluster.query_timeout
        self.limit = cluster.submit_limit
        self._jobs: dict[str, Job] = {}  # by job name, as of the last look
        self._mine = 0  # jobs of this user that count against the limit

    def submit(self, job: JobSpec) -> str:
        found = batch.submit(job, self.timeout)
        self._mine += 1
        self._jobs[batch.job_name(job.attempt)] = Job(State.PENDING, found)
        return found

    def look(self, attempts: Collection[str], since: float) -> dict[str, Job]:
        self._squeue()
        names = {attempt: batch.job_name(attempt) for attempt in attempts}
        missing = [name for name in names.values() if name not in self._jobs]
        past = self._sacct(missing, since) if missing else {}
        unknown = Job(State.UNKNOWN, kind="unknown", message="the scheduler does not remember its job")
        return {attempt: self._jobs.get(name) or past.get(name, unknown) for attempt, name in names.items()}

    def room(self) -> int | None:
        return None if self.limit is None else max(0, self.limit - self._mine)

    def cancel(self, jobs: Collection[str], kill: bool = False) -> None:
        known = [self._jobs[name] for name in map(batch.job_name, jobs) if name in self._jobs]
        pending = [job.id for job in known if job.state is State.PENDING and job.id]
        running = [job.id for job in known if job.state is State.RUNNING and job.id]
        # A signal to a running job's steps leaves it all the time it needs; without one Slurm kills it after KillWait.
        for options, ids in (
            ([], pending + running if kill else pending),
            (["--signal=TERM"], [] if kill else running),
        ):
            for first in range(0, len(ids), CHUNK):
                self._ask(["scancel", *options, *ids[first : first + CHUNK]], must=False)

    # ------------------------------------------------------------------------------------------------ the two queries

    def _squeue(self) -> None:
        command = ["squeue", "--noheader", f"--user={os.getuid()}", "--states=all", "--format=%i|%j|%T|%r|%N|%M"]
        output = self._ask(command)
        assert output is not None
        self._jobs, self._mine = {}, 0
        for fields in _rows(output, 6):
            number, name, word, reason, nodes, elapsed = fields
            job = _job(word, number, reason, nodes, _seconds(elapsed))
            self._mine += job.state in (State.PENDING, State.RUNNING)
            if name not in self._jobs or job.state is not State.GONE:  # a job that Slurm ran twice: the living one
                self._jobs[name] = job

    def _sacct(self, names: Iterable[str], since: float) -> dict[str, Job]:
        start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - 86400))
        command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--starttime={start}"]
        command += [f"--name={','.join(names)}", "--format=JobIDRaw,JobName,State,Reason,NodeList,ElapsedRaw"]
        found = {}
        for number, name, word, reason, nodes, elapsed in _rows(self._ask(command, must=False) or "", 6):
            job = _job(word.partition(" ")[0], number, reason, nodes, float(elapsed or 0))
            if job.state is State.GONE:  # of the living, squeue is the judge
                found[name] = job
        return found

    def _ask(self, command: list[str], must: bool = True) -> str | None:
        """A command's output; None if it failed and need not work."""
        try:
            done = subprocess.run(
                command,
                env=batch.client_environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",  # jobs of this user may have any names
                timeout=self.timeout,
                check=False,
            )
        except FileNotFoundError:
            if not must:
                return None
            raise UserError(
                f"there is no {command[0]} here. cluster.kind=slurm is supervised where Slurm's commands are: a login node, or "
                "compute nodes that have them (cluster.control=job)"
            ) from None
        except subprocess.TimeoutExpired:
            if not must:
                return None
            raise Unavailable(f"{command[0]} did not answer within {self.timeout:.0f} s") from None
        if done.returncode == 0:
            return done.stdout
        if must:
            raise Unavailable(f"{command[0]}: {' '.join(done.stderr.split()) or f'exit status {done.returncode}'}")
        return None


def _rows(output: str, columns: int) -> list[list[str]]:
    """Fields of each line; lines of jobs with odd names, which are not ours, are left out."""
    return [fields for line in output.splitlines() if len(fields := line.split("|")) == columns]


def _job(word: str, number: str, reason: str, nodes: str, seconds: float) -> Job:
    if word in PENDING:
        return Job(State.PENDING, number, reason)
    if word == COMPLETING:
        return Job(State.RUNNING, number, word, nodes, "node", "Slurm cannot end its processes", seconds)
    if word in RUNNING:
        return Job(State.RUNNING, number, "" if reason == "None" else reason, nodes, seconds=seconds)
    if word not in DEATHS:
        return Job(State.UNKNOWN, number, kind="unknown", message=f"Slurm says {word}")
    kind, message = DEATHS[word]
    return Job(State.GONE, number, reason, nodes, kind, f"{message} (Slurm: {word}, job {number})", seconds)


def _seconds(elapsed: str) -> float:
    """Seconds of squeue's ``[days-][[hours:]minutes:]seconds``."""
    days, _, clock = elapsed.rpartition("-")
    total = 0.0
    for part in clock.split(":"):
        if not part.isdigit():
            return 0.0  # INVALID, of a job without a start
        total = total * 60 + int(part)
    return total + 86400 * int(days or 0)
