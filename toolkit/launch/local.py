"""Jobs as processes of this machine, through submitit's local executor.

Each attempt gets a session of its own, so that neither Ctrl-C in the launcher's terminal nor its end reaches it. An attempt's
processes are found by its id in their environment; nothing depends on pids that could be reused.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from toolkit.cluster import role_of
from toolkit.config import Config
from toolkit.errors import UserError
from toolkit.exchange.jobs import process_start
from toolkit.exchange.run import Run
from toolkit.launch.adapter import Job, JobSpec, State
from toolkit.launch.attempts import slots
from toolkit.launch.job import ATTEMPT, run_job
from toolkit.signals import DEADLINE

VISIBLE = "CUDA_VISIBLE_DEVICES"
FOREIGN = ("SLURM_", "SUBMITIT_", "PMI", DEADLINE)  # what a job around says of itself: its ranks, its nodes, its end
ALL = "METAAPO_GPUS"  # what VISIBLE was before a job's own were cut from it: a job may host the sidecar, which submits others


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
        own_variables = {key: os.path.expandvars(value) for key, value in job.request.environment.items()}
        environment = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)} | own_variables
        there = visible(environment)
        if VISIBLE not in job.request.environment and (own := gpus(Run.open(job.root).config, job.slot, there)):
            environment |= {VISIBLE: ",".join(own), ALL: ",".join(there)}
        specification["gpus"] = environment.get(VISIBLE)
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


def visible(environment: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """The GPUs that may be used: those that the environment names, else all of this machine. Needs no torch."""
    named = environment.get(ALL, environment.get(VISIBLE))
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [
        str(index)
        for index in range(sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in devices.iterdir()))
    ]


def gpus(config: Config, slot: str, there: Sequence[str]) -> list[str]:
    """Those of ``there`` that a slot's job has to itself: the trainer the first ones, then each worker its own. None there: none.

    Raises:
        UserError: the run needs more.
    """
    trainer, each = (
        config.trainer.tensor * config.trainer.pipeline * config.trainer.data,
        config.inference.tensor_parallel,
    )
    workers = [name for name in slots(config) if role_of(name) == "worker"]
    needed = trainer + len(workers) * each
    if there and len(there) < needed:
        raise UserError(
            f"{needed} GPUs = {trainer} of the trainer (trainer.tensor x pipeline x data) + {len(workers)} workers x "
            f"inference.tensor_parallel={each} are needed, there are {len(there)} ({', '.join(there)}). In {VISIBLE}, "
            f"{','.join([there[0]] * needed)} shares one among all (with a smaller inference.gpu_memory_utilization), and nothing "
            "(empty) does without"
        )
    if slot in workers:
        first = trainer + workers.index(slot) * each
        return list(there[first : first + each])
    return list(there[:trainer]) if slot == "trainer" else []


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
    from toolkit.launch.local import run_on  # by its name, which the job imports: here it is __main__'s

    names = ("gpus", "root", "slot", "number")
    return executor.submit(run_on, *(specification[name] for name in names)).job_id


def run_on(gpus: str | None, root: str, slot: str, number: int) -> str:
    """`run_job` with this CUDA_VISIBLE_DEVICES (None: without), which submitit empties."""
    os.environ.pop(VISIBLE, None)
    if gpus is not None:
        os.environ[VISIBLE] = gpus
    return run_job(root, slot, number)


if __name__ == "__main__":
    print(start(json.loads(sys.argv[1])))
