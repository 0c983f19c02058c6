"""``launch --dry-run``: every job that a launch would start, checked as far as it can be without starting it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import config as configuration
from toolkit.cluster import role_of
from toolkit.config import Config
from toolkit.errors import UserError
from toolkit.launch import snapshot
from toolkit.launch.adapter import JobSpec, Unavailable
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
    problems = []
    if config.cluster.kind == "slurm":
        problems = _scripts(config, jobs, console)
    else:
        for job in jobs:
            console.print(
                f"  {job.slot}: {job.tasks} process(es), {job.request.python} -u -m submitit.core._submit {job.logs}",
                soft_wrap=True,
            )
    for sentence in estimate(config, jobs):
        console.print(sentence, soft_wrap=True)
    if problems:
        raise UserError("these jobs would be refused, or never run:\n  " + "\n  ".join(problems))


def planned_jobs(config: Config) -> list[JobSpec]:
    """The first attempt of each slot, as a launch would submit it."""
    digest = snapshot.package_digest(snapshot.PACKAGE)
    return [specification(config, Path(config.run), slot, 0, "0" * 12, digest) for slot in slots(config)]


def asks_for_no_gpu(job: JobSpec) -> str | None:
    """A sentence if a role that computes asks for no GPU."""
    role = role_of(job.slot)
    if role == "sidecar" or job.request.gpu_request is not None:
        return None
    return f"no GPU is asked for: set cluster.jobs.gpu_request (docs/clusters.md), or {role} computes on CPUs"


def _scripts(config: Config, jobs: list[JobSpec], console: Console) -> list[str]:
    """One script a kind of role, printed, and put to sbatch --test-only where there is one.

    Returns:
        Why Slurm would refuse jobs, or never run them.
    """
    from toolkit.launch import batch

    here = shutil.which("sbatch") is not None
    unanswered, problems = not here, []
    shown: dict[str, int] = {}
    for job in jobs:
        role = role_of(job.slot)
        shown[role] = shown.get(role, 0) + 1
        if shown[role] > 1:
            continue
        console.rule(job.slot)
        console.print(batch.script(job), soft_wrap=True)
        if sentence := asks_for_no_gpu(job):
            console.print(f"warning: {sentence}", style="yellow", soft_wrap=True)
        if unanswered:
            continue
        try:
            console.print(batch.rehearse(job, config.cluster.query_timeout), soft_wrap=True)
        except UserError as error:
            problems.append(f"{role}: {error}")
        except Unavailable as error:
            unanswered = True
            console.print(
                f"Slurm did not answer, so it was asked nothing more: {error}", style="yellow", soft_wrap=True
            )
    for role, count in shown.items():
        if count > 1:
            console.print(f"{count} of the kind {role}", soft_wrap=True)
    if not here:
        console.print("there is no sbatch here, so Slurm was not asked", style="yellow")
    return problems if unanswered else problems + check_limits(config, jobs)
