"""Jobs as processes of this machine, through submitit's local executor.

Each attempt gets a session of its own, so that neither Ctrl-C in the launcher's terminal nor its end reaches it. An attempt's
processes are found by its id in their environment; nothing depends on pids that could be reused.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from toolkit.errors import UserError
from toolkit.exchange.jobs import process_start
from toolkit.launch.adapter import Job, JobSpec, State
from toolkit.launch.job import ATTEMPT, run_job


class LocalAdapter:
    """Runs attempts on this machine."""

    same_machine = True

    def submit(self, job: JobSpec) -> str:
        python = job.request.python or shlex.quote(sys.executable)
        program, *others = shlex.split(python)
        if others or shutil.which(program) is None:
            raise UserError(f"could not start {job.slot} here: its interpreter {python} is no program")
        job.logs.parent.mkdir(parents=True, exist_ok=True)
        job.logs.mkdir(mode=0o700, exist_ok=True)  # submitit's pickles lie here
        specification = {
            "root": str(job.root),
            "slot": job.slot,
            "number": job.number,
            "logs": str(job.logs),
            "tasks": job.tasks,
            "python": program,
            "minutes": job.request.time_minutes,
        }
        environment = os.environ | {key: os.path.expandvars(value) for key, value in job.request.environment.items()}
        environment |= {ATTEMPT: job.attempt, "PYTHONPATH": str(job.code), "PYTHONSAFEPATH": "1"}
        # setproctitle, which vLLM's processes call, would else write over the environment that they are found by.
        environment["SPT_NOENV"] = "1"
        # Into a file, not a pipe: the job inherits it, and whoever reads a pipe to its end waits for the job's end.
        answer = job.logs / "submission.out"
        with answer.open("wb") as output:
            done = subprocess.run(
                [sys.executable, "-m", "toolkit.launch.local", json.dumps(specification)],
                env=environment,
                cwd=job.root,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        text = answer.read_text(encoding="utf-8", errors="replace").strip()
        if done.returncode:
            raise UserError(f"could not start {job.slot} here: {text[-2000:]}")
        return text.split()[-1]

    def look(self, attempts: Collection[str], since: float = 0.0) -> dict[str, Job]:
        alive = processes(attempts)
        return {attempt: Job(State.RUNNING if alive[attempt] else State.GONE) for attempt in attempts}

    def room(self) -> None:
        return None

    def cancel(self, jobs: Collection[str], kill: bool = False) -> None:
        for pids in processes(jobs).values():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)


def processes(attempts: Collection[str]) -> dict[str, list[int]]:
    """The living processes of each attempt on this machine (of this user)."""
    wanted = {f"{ATTEMPT}={attempt}".encode(): attempt for attempt in attempts}
    found: dict[str, list[int]] = {attempt: [] for attempt in attempts}
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            variables = set((directory / "environ").read_bytes().split(b"\0"))
        except OSError:
            continue
        pid = int(directory.name)
        for variable in wanted.keys() & variables:
            if process_start(pid) is not None:
                found[wanted[variable]].append(pid)
    return found


def start(specification: dict[str, object]) -> str:
    """Start an attempt through submitit from this process, whose session it inherits. Returns submitit's job id."""
    from submitit import LocalExecutor

    executor = LocalExecutor(str(specification["logs"]), python=str(specification["python"]))
    executor.update_parameters(
        tasks_per_node=specification["tasks"],
        timeout_min=specification["minutes"],
        signal_delay_s=120,
        stderr_to_stdout=True,
    )
    job = executor.submit(run_job, specification["root"], specification["slot"], specification["number"])
    return job.job_id


if __name__ == "__main__":
    print(start(json.loads(sys.argv[1])))
