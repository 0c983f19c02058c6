"""``launch --dry-run``: every job that a launch would start, checked as far as it can be without starting it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import config as configuration
from toolkit.cluster import role_of
from toolkit.config import Config
from toolkit.errors import UserError
from toolkit.launch import snapshot
from toolkit.launch.adapter import JobSpec
from toolkit.launch.attempts import slots
from toolkit.launch.estimate import estimate
from toolkit.launch.limits import check_limits
from toolkit.launch.preflight import preflight
from toolkit.launch.supervise import specification

if TYPE_CHECKING:
    from rich.console import Console


def dry_run(config: Config, console: Console) -> None:
    """Say what a launch would start and write; start nothing.

    Raises:
        UserError: something would be refused, or wait for ever.
    """
    configuration.validate(config)
    preflight(config)
    console.print(f"run directory: {config.run}" + (" (exists)" if Path(config.run).exists() else ""), soft_wrap=True)
    jobs = planned_jobs(config)
    if config.cluster.kind == "slurm":
        _scripts(config, jobs, console)
    else:
        for job in jobs:
            console.print(
                f"  {job.slot}: {job.tasks} process(es), {job.request.python} -u -m submitit.core._submit {job.logs}",
                soft_wrap=True,
            )
    for sentence in estimate(config, jobs):
        console.print(sentence, soft_wrap=True)


def planned_jobs(config: Config) -> list[JobSpec]:
    """The first attempt of each slot, as a launch would submit it."""
    digest = snapshot.package_digest(snapshot.PACKAGE)
    return [specification(config, Path(config.run), slot, 0, "0" * 12, digest) for slot in slots(config)]


def _scripts(config: Config, jobs: list[JobSpec], console: Console) -> None:
    """One script a kind of role, printed, and put to sbatch --test-only where there is one."""
    from toolkit.launch import batch

    here = shutil.which("sbatch") is not None
    shown: dict[str, int] = {}
    for job in jobs:
        role = role_of(job.slot)
        shown[role] = shown.get(role, 0) + 1
        if shown[role] > 1:
            continue
        console.rule(job.slot)
        console.print(batch.script(job), soft_wrap=True)
        if here:
            try:
                console.print(batch.rehearse(job, config.cluster.query_timeout))
            except subprocess.TimeoutExpired:
                console.print("sbatch --test-only did not answer")
    for role, count in shown.items():
        if count > 1:
            console.print(f"{count} of the kind {role}", soft_wrap=True)
    if not here:
        console.print("there is no sbatch here, so Slurm was not asked", style="yellow")
    problems = check_limits(config, jobs) if here else []
    if problems:
        raise UserError("Slurm would take these jobs and never run them:\n  " + "\n  ".join(problems))
