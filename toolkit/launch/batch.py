"""An attempt as a Slurm batch script, made and submitted through submitit's Slurm executor.

Used of submitit 1.5.4: the script, the pickle of one function and a path, and what runs it in the job. Not used, because they
lose jobs or nodes: its requeueing, its signal handling (`toolkit.signals` replaces it), its waiting for results.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmExecutor, SlurmJob

from toolkit.cluster import JobRequest
from toolkit.errors import UserError
from toolkit.launch.adapter import Busy, JobSpec, Unavailable
from toolkit.launch.job import ATTEMPT, run_job
from toolkit.signals import DEADLINE

KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")  # which cluster, and who asks
FOREIGN = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SACCT_", "SUBMITIT_", "METAAPO_", "PMI", "CUDA_VISIBLE_DEVICES")
FULL = (  # sbatch's words when it takes nothing now, and may later
    "SubmitJob",
    "Job limit",
    "MaxJobCount",
    "temporarily unable",
    "temporarily disabled",
    "queue full",
    "try again",
    "inactive or drain",
    "I/O error writing",
)
UNCLEAR = (
    "timed out",
    "Unable to contact",
    "Zero Bytes",
    "Connection",
    "endpoint",
    "Communication",
    "Unexpected message",
    "configuration source",
    "fetch_config",
    "resolve_ctls",
)


def job_name(attempt: str) -> str:
    """The name of an attempt's job, by which it is found whatever became of its submission."""
    return f"metaapo-{attempt}"


def client_environment() -> dict[str, str]:
    """This process's environment without what a surrounding job put there: it would change the jobs submitted from here."""
    return {key: value for key, value in os.environ.items() if key in KEPT or not key.startswith(FOREIGN)}


class _Executor(SlurmExecutor):
    """Writes the script of one attempt; submits it with a timeout and a clean environment."""

    def __init__(self, job: JobSpec, timeout: float) -> None:
        self.job, self.timeout = job, timeout
        request = job.request
        super().__init__(job.logs, python=request.python or shlex.quote(sys.executable))
        named = {
            "job_name": job_name(job.attempt),
            "comment": f"{job.root.name} {job.slot} {job.number}",
            "time": request.time_minutes,
            "nodes": job.nodes,
            "ntasks_per_node": job.tasks_per_node,
            "cpus_per_task": request.cpus_per_task,
            "account": request.account,
            "partition": request.partition,
            "qos": request.qos,
            "constraint": request.constraint,
            "exclude": ",".join(job.exclude) or None,
            "dependency": None if job.after is None else f"afterany:{job.after}",
            "additional_parameters": {"no-requeue": True, "chdir": job.root},
            "signal_delay_s": int(job.margin),
            "stderr_to_stdout": True,
            "setup": self._setup(),
            "srun_args": self._srun(),
        }
        self.update_parameters(**{key: value for key, value in named.items() if value not in (None, "")})

    @classmethod
    def affinity(cls) -> int:
        return 1  # scripts can be written where no Slurm is

    def _srun(self) -> list[str]:
        # srun does not inherit --cpus-per-task from 22.05 to 23.02; a rank that dies takes the others along at once
        cpus = self.job.request.cpus_per_task
        binding = [f"--cpus-per-task={cpus}"] if cpus is not None else []
        return [*binding, "--kill-on-bad-exit=1", "--wait=60", *self.job.request.srun]

    @property
    def _submitit_command_str(self) -> str:
        # until the role has handlers of its own (`toolkit.signals`), a warning must not kill it
        return 'sh -c \'trap "" TERM USR2; exec "$@"\' sh ' + super()._submitit_command_str

    def _setup(self) -> list[str]:
        job, request = self.job, self.job.request
        folder = shlex.quote(str(job.logs))
        seconds = (request.time_minutes or 0) * 60
        exports = {
            "PYTHONPATH": str(job.code),
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            # setproctitle, which vLLM's processes call, would else write over the environment that they are found by
            "SPT_NOENV": "1",
            ATTEMPT: job.attempt,
            "SLURM_EXPORT_ENV": "ALL",  # where sbatch exports nothing, srun would do likewise with what is set here
        }
        return [
            *preamble(request, exports),
            f"export {DEADLINE}=$((${{SLURM_JOB_END_TIME:-$(($(date +%s) + {seconds}))}} - {int(job.margin)}))",
            "# submitit renames the pickle after sbatch has returned; a submitter that died in between left it here",
            f'pickle={folder}/"$SLURM_JOB_ID"_submitted.pkl; [ -e "$pickle" ] || cp {folder}/????????????????????????????????.pkl "$pickle"',
        ]

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        job, request = self.job, self.job.request
        options = list(request.options)
        if request.reservation:
            options.append(f"--reservation={request.reservation}")
        if request.memory:
            options.append(request.memory)
        if job.gpus_per_node and request.gpu_request:
            options.append(request.gpu_request.format(gpus=job.gpus_per_node))
        lines = []
        for line in super()._make_submission_file_text(command, uid).splitlines():
            if line.startswith("#SBATCH --wckey="):
                continue  # submitit always sends one, which some sites refuse
            lines.append(line)
            if line == "# Parameters":
                lines += [f"#SBATCH {option}" for option in options]
        return "\n".join(lines) + "\n"

    def _submit_command(self, command: str) -> Any:
        script = self.job.logs / "job.sh"
        script.write_text(self._make_submission_file_text(command, ""), encoding="utf-8")
        job_id = sbatch(self.job, script, self.timeout)
        return SlurmJob(folder=self.folder, job_id=job_id, tasks=list(range(self.job.tasks)))


def preamble(request: JobRequest, exports: Mapping[str, str]) -> list[str]:
    """Lines of bash before a role's Python: the profile's setup, ``exports`` as they are, the profile's variables."""
    return [
        *request.setup,
        *(f"export {key}={shlex.quote(value)}" for key, value in exports.items()),
        *(f'export {key}="{_expandable(value)}"' for key, value in request.environment.items()),
    ]


def _expandable(value: str) -> str:
    """For double quotes in bash: variables are expanded when the job starts, nothing else is special."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`").replace("$(", "\\$(")


def script(job: JobSpec) -> str:
    """The batch script of an attempt. Needs no Slurm, writes nothing."""
    executor = _Executor(job, 0.0)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit(job: JobSpec, timeout: float) -> str:
    """Submit an attempt, once. Returns Slurm's job id.

    Raises:
        UserError: Slurm refused it, and would again.
        Busy: Slurm takes no more jobs of this user now.
        RuntimeError, TimeoutExpired: unclear; the job may have been accepted.
    """
    job.logs.parent.mkdir(parents=True, exist_ok=True)
    job.logs.mkdir(mode=0o700, exist_ok=True)  # submitit's pickles lie here
    return str(_Executor(job, timeout).submit(run_job, str(job.root), job.slot, job.number).job_id)


def sbatch(job: JobSpec, path: Path, timeout: float) -> str:
    """Call sbatch for a script. For errors see `submit`."""
    try:
        done = _call(["sbatch", "--parsable", str(path)], timeout, cwd=job.root)
    except subprocess.TimeoutExpired as error:
        # where Slurm is full, sbatch itself asks again and again, for two minutes
        words = " ".join((error.stderr or b"").decode(errors="replace").split())
        if any(word in words for word in FULL):
            raise Busy(words) from None
        raise
    if done.returncode == 0:
        return done.stdout.strip().splitlines()[-1].partition(";")[0]
    words = " ".join(done.stderr.split())
    if any(word in words for word in FULL):
        raise Busy(words)
    if not words or any(word in words for word in UNCLEAR):
        raise RuntimeError(f"sbatch did not say whether it took {job.slot}: {words or 'no word'}")
    raise UserError(
        f"Slurm refused {job.slot}: {words}\n  the script: {path}\n  Mend the profile ({job.slot}'s keys under cluster), "
        f"then: metaapo resume {job.root} KEY=VALUE"
    )


def rehearse(job: JobSpec, timeout: float) -> str:
    """What ``sbatch --test-only`` says of an attempt's script; that Slurm has no room just now is no refusal.

    Raises:
        UserError: Slurm would refuse it.
        Unavailable: it did not answer.
    """
    # there is no run directory yet, and sbatch looks for the working directory
    text = script(job).replace(f"--chdir={job.root}", "--chdir=/")
    try:
        done = _call(["sbatch", "--test-only", "/dev/stdin"], timeout, text=text)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"sbatch --test-only said nothing in {timeout:g} s") from error
    words = " ".join(done.stderr.split())
    if done.returncode == 0:
        return words
    if any(word in words for word in FULL):
        return f"Slurm has no room for it now: {words}"
    if not words or any(word in words for word in UNCLEAR):
        raise Unavailable(words or f"sbatch --test-only ended with {done.returncode}, without a word")
    raise UserError(f"Slurm would refuse it: {words}")


def _call(
    command: list[str], timeout: float, cwd: Path | None = None, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            env=client_environment(),
            input=text if text is not None else "",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError:
        raise UserError(
            "there is no sbatch here. cluster.kind=slurm needs Slurm's commands where jobs are submitted: a login node; "
            "where compute nodes have none, set cluster.control=login or chain"
        ) from None
