"""``metaapo doctor``: what would go wrong with a profile, an environment or a filesystem, said before a job finds out."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from toolkit import config as configuration
from toolkit.cluster import request, role_of
from toolkit.config import Config
from toolkit.errors import UserError
from toolkit.launch import batch, snapshot
from toolkit.launch.adapter import JobSpec, Unavailable
from toolkit.launch.attempts import slots
from toolkit.launch.environments import check_environments
from toolkit.launch.finding import Finding, fault, note, ok, warning
from toolkit.launch.handover import keeper
from toolkit.launch.limits import check_limits, quality
from toolkit.launch.preflight import preflight
from toolkit.launch.rehearsal import asks_for_no_gpu, planned_jobs
from toolkit.launch.site import Site, read_site
from toolkit.launch.storage import check_storage, probe_directory

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "sacct")
POLITE = 60.0  # seconds between two looks at the scheduler that no site minds
STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "fault": "bold red"}


def diagnose(config: Config, environments: bool = True) -> Iterator[Finding]:
    """Everything that can be looked at from here, without submitting a job.

    Args:
        config: need not be complete; what it does not name is not looked at.
        environments: try the Python of each role, which takes a minute.
    """
    refusal = _refusal(config)
    if refusal is not None:
        yield fault("configuration", refusal)
        return
    yield _configuration(config)
    if config.cluster.kind == "slurm":
        yield from _slurm(config)
    with probe_directory(Path(config.run)) as probe:
        if environments:
            # the code where a job would find it: then an image that does not see the run directory shows here
            code = snapshot.PACKAGE.parent if probe is None else snapshot.directory(probe, snapshot.take(probe))
            yield from check_environments(config, list(dict.fromkeys(map(role_of, slots(config)))), code)
        else:
            yield note("environments", "not tried")
        yield from check_storage(config, probe)
    yield from _network(config)


def show(findings: Iterator[Finding], console: Console) -> bool:
    """Print findings as they come, and their sum.

    Returns:
        Whether there is no fault among them.
    """
    levels = []
    for found in findings:
        levels.append(found.level)
        console.print(f"{found.level:<8}", style=STYLES[found.level], end="")
        console.print(f"{found.subject}: {found.message}", soft_wrap=True)
    console.print(f"{levels.count('fault')} fault(s), {levels.count('warning')} warning(s)")
    return "fault" not in levels


def _refusal(config: Config) -> str | None:
    """Why no run could be made of the values; data and models that are not named pass."""
    named = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=config.data.path or "any"),
        model=dataclasses.replace(config.model, policy=config.model.policy or "any"),
        reward=dataclasses.replace(config.reward, model=config.reward.model or "any"),
    )
    try:
        configuration.validate(named)
    except UserError as error:
        return str(error)
    return None


def _configuration(config: Config) -> Finding:
    if not (config.data.path and config.model.policy):
        return note(
            "configuration", "no data and model are named, so the cluster alone is looked at (experiment=… adds a run)"
        )
    try:
        configuration.validate(config)
        preflight(config)
    except UserError as error:
        return fault("configuration", str(error))
    return ok("configuration", f"profile {config.cluster.name}; data, models, method and layout go together")


# ------------------------------------------------------------------------------------------------------------- Slurm


def _slurm(config: Config) -> Iterator[Finding]:
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if "sbatch" in missing:
        yield fault("Slurm", "there is no sbatch here: call this on a login node of the cluster, or cluster=local")
        return
    if missing:
        yield warning("Slurm", f"no {', '.join(missing)} here; what they tell is missing")
    site = read_site(config.cluster.query_timeout)
    if not site.config:
        yield fault(
            "Slurm", "scontrol does not answer: is this a login node, and is the controller up (scontrol ping)?"
        )
        return
    name, version = site.config.get("ClusterName", "?"), site.config.get("SLURM_VERSION", "?")
    yield ok("Slurm", f"{version}, cluster {name}, {len(site.partitions)} partitions")
    if site.config.get("AccountingStorageType", "").rpartition("/")[2] in ("", "none"):
        yield warning("accounting", "it is off: what a job died of is not told, so such deaths count as unknown")
    jobs = planned_jobs(config)
    yield from _requests(config, jobs, site)
    yield from _rehearsed(config, jobs)
    yield from _preemption(config, site)
    yield from _control(config, site)
    yield from _interface(config)


def _requests(config: Config, jobs: list[JobSpec], site: Site) -> Iterator[Finding]:
    problems = check_limits(config, jobs, site)
    for problem in problems:
        yield fault("request", problem)
    for role, job in {role_of(job.slot): job for job in jobs}.items():
        if (sentence := asks_for_no_gpu(job)) is not None:
            yield warning(f"{role} request", sentence)
        if not any(problem.startswith(f"{role}:") for problem in problems):
            yield ok(f"{role} request", f"{_words(job, site)}: within the limits that Slurm tells")


def _words(job: JobSpec, site: Site) -> str:
    wish = job.request
    where = wish.partition or (
        "the site's choice of partition" if site.routes else f"{site.default_partition} (the default)"
    )
    gpus = f", {wish.gpu_request.format(gpus=job.gpus_per_node)}" if wish.gpu_request and job.gpus_per_node else ""
    return f"{where}, QOS {quality(site, wish)}, {job.nodes} node(s) x {job.tasks_per_node} task(s){gpus}, {wish.time_minutes} min"


def _rehearsed(config: Config, jobs: list[JobSpec]) -> Iterator[Finding]:
    """What sbatch itself says of a script of each role."""
    for role, job in {role_of(job.slot): job for job in jobs}.items():
        try:
            yield ok(f"{role} script", batch.rehearse(job, config.cluster.query_timeout))
        except UserError as error:
            yield fault(f"{role} script", str(error))
        except Unavailable as error:
            yield warning(f"{role} script", f"Slurm did not answer: {error}")


def _preemption(config: Config, site: Site) -> Iterator[Finding]:
    said = config.cluster.preemption, config.cluster.grace
    wish = request(config.cluster, "worker")
    for partition in (wish.partition or site.default_partition or "").split(","):
        if partition not in site.partitions:
            continue
        found = site.preemption(partition, quality(site, wish))
        subject = f"preemption in {partition}"
        if found[0] != said[0]:
            yield warning(subject, f"the profile says {said[0]}, Slurm {found[0]}: set cluster.preemption={found[0]}")
        elif found[0] != "none" and found[1] < said[1]:
            yield warning(
                subject,
                f"the profile says {said[1]:g} s until the kill, Slurm {found[1]:g} s: set cluster.grace={found[1]:g}",
            )
        else:
            yield ok(
                subject,
                found[0] if found[0] == "none" else f"{found[0]}, {found[1]:g} s between the signal and the kill",
            )


def _control(config: Config, site: Site) -> Iterator[Finding]:
    cluster, every = config.cluster, config.cluster.supervise
    if every < POLITE and cluster.control != "chain":
        yield warning(
            "queries",
            f"Slurm would be asked every {every:g} s; on a shared cluster set cluster.supervise={POLITE:g} or more",
        )
    if cluster.control != "job":
        return
    keepers = request(cluster, keeper(config))
    nodes = site.partitions.get(keepers.partition or site.default_partition or "", {}).get("AllocNodes", "ALL")
    advice = "if compute nodes may not submit, set cluster.control=login or chain"
    if nodes != "ALL":
        yield warning("control", f"jobs may only be submitted from {nodes}: {advice}")
    else:
        yield note(
            "control",
            f"jobs submit jobs here; that they may is not seen from outside. In a job: sbatch --version && squeue --me; {advice}",
        )


def _interface(config: Config) -> Iterator[Finding]:
    if config.cluster.interface is None:
        return
    here = {path.name for path in Path("/sys/class/net").iterdir()}
    missing = [name for name in config.cluster.interface.split(",") if name not in here]
    if missing:
        yield warning(
            "interface",
            f"no {', '.join(missing)} on this machine, which has {', '.join(sorted(here))}; nodes may differ: ip link, in a job",
        )
    else:
        yield ok(
            "interface", f"{config.cluster.interface} is on this machine; that nodes have it, too, is for you to see"
        )


def _network(config: Config) -> Iterator[Finding]:
    if config.cluster.kind == "local" or not config.cluster.offline or not config.model.policy:
        return
    names = (
        config.data.path,
        config.model.policy,
        config.model.reference,
        config.reward.model,
        config.evaluation.reward,
    )
    distant = [name for name in names if name and not Path(name).exists()]
    if distant:
        yield warning(
            "offline",
            f"jobs cannot download {', '.join(distant)}: metaapo prefetch … --to DIR, where there is a network",
        )
    else:
        yield ok("offline", "jobs are told that there is no network, and need none: models and data are files")
