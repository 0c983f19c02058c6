"""A first draft of a site's profile, from what Slurm says of itself; each line with a comment on where it came from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from toolkit.cluster import JobRequest
from toolkit.errors import UserError
from toolkit.launch.limits import association, quality
from toolkit.launch.site import NOTHING, Site, minutes, read_site

TIMEOUT = 60.0  # seconds for each question
DAY = 1440  # minutes
PREEMPTIBLE = ("requeue", "cancel")  # a suspended job keeps its memory, and its place is not free


def write(path: Path) -> None:
    """Draft a profile of the cluster that this machine belongs to.

    Raises:
        UserError: Slurm does not answer, it has no partition for this user, or the file exists.
    """
    site = read_site(TIMEOUT)
    if not site.config:
        raise UserError(
            "Slurm does not answer here, so there is nothing to draft from: call this on a login node (scontrol ping)"
        )
    text = draft(site, path.stem)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path} exists, and is not overwritten: name another file") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


@dataclass(frozen=True)
class Place:
    """A partition as a place for a role's jobs."""

    name: str
    minutes: float  # wall time that it allows, a day at most
    limit: str  # who limits it
    gpus: dict[str, int]  # of a node, by type; of the kind of node with the most
    nodes: int  # of that kind
    cores: int  # of such a node, at least
    memory: int  # MB of such a node, at least
    preemption: str
    grace: float  # seconds
    default: bool

    @property
    def kind(self) -> str:
        """The type of GPU of which a node has most."""
        return max(self.gpus, key=lambda kind: self.gpus[kind], default="")

    @property
    def count(self) -> int:
        return self.gpus.get(self.kind, 0)


def places(site: Site) -> list[Place]:
    """The partitions that this user may use, as far as Slurm tells."""
    accounts = {row["Account"] for row in site.associations} | {site.account or ""}
    found = []
    for name, facts in site.partitions.items():
        open_to_us = _allows(facts, "Accounts", accounts - {""}) and _allows(facts, "Groups", site.groups)
        if facts.get("State", "UP") != "UP" or not open_to_us or facts.get("RootOnly") == "YES":
            continue
        kinds = sorted(site.in_partition(name), key=lambda nodes: (sum(nodes.gpus.values()) * nodes.count, nodes.count))
        best = kinds[-1] if kinds else None
        mode, grace = site.preemption(name, quality(site, JobRequest(partition=name)))
        limit = _wall_time(site, name, JobRequest(partition=name))
        found.append(
            Place(
                name,
                *limit,
                best.gpus if best else {},
                best.count if best else 0,
                best.cores if best else 0,
                best.memory if best else 0,
                mode,
                grace,
                facts.get("Default") == "YES",
            )
        )
    return found


def _wall_time(site: Site, partition: str, wish: JobRequest) -> tuple[float, str]:
    """Minutes that a job may take, a day at most, and what limits it most."""
    own = quality(site, wish)
    limits = {
        f"scontrol show partition {partition}: MaxTime": site.partitions[partition].get("MaxTime", ""),
        f"sacctmgr show qos {own}: MaxWall": site.qos.get(own, {}).get("MaxWall", ""),
        f"sacctmgr show assoc: MaxWall of {site.account}": association(site, wish).get("MaxWall", ""),
    }
    known = {source: limit for source, text in limits.items() if (limit := minutes(text)) is not None}
    source = min(known, key=lambda source: known[source], default=f"scontrol show partition {partition}: no limit")
    most = known.get(source)
    return min(most or DAY, DAY), source if most is None else f"{source} {most:g}"


def _preemptible_qos(site: Site) -> str | None:
    """A QOS of this user's that others have precedence over, where preemption goes by QOS."""
    if not site.config.get("PreemptType", "").endswith("/qos"):
        return None
    mine = {name for row in site.associations for name in row["QOS"].split(",")} or set(site.qos)
    return next((name for name in site.qos if name in mine and site.preemption("", name)[0] in PREEMPTIBLE), None)


def _allows(facts: dict[str, str], what: str, mine: Iterable[str]) -> bool:
    allowed, denied = facts.get(f"Allow{what}", "ALL"), facts.get(f"Deny{what}", "")
    mine = set(mine)
    return not mine or (
        (allowed in ("ALL", *NOTHING) or bool(mine & set(allowed.split(",")))) and not mine <= set(denied.split(","))
    )


def choose(found: list[Place]) -> tuple[Place, Place, Place]:
    """Places for trainer, workers and sidecar: long times and many GPUs; preemptible GPUs if there are any; no GPUs if that can be."""
    trainer = max(
        found,
        key=lambda p: (
            p.count > 0,
            p.preemption == "none",
            p.minutes,
            p.count * p.nodes,
            "gpu" in p.name.lower(),
            p.default,
        ),
    )
    worker = max(
        (p for p in found if p.count and p.preemption in PREEMPTIBLE),
        key=lambda p: (p.minutes, p.grace, p.count * p.nodes),
        default=trainer,
    )
    sidecar = max(
        found, key=lambda p: (p.count == 0, p.preemption == "none", p.minutes, "cpu" in p.name.lower(), p.default)
    )
    return trainer, worker, sidecar


def draft(site: Site, name: str) -> str:
    """The YAML of a profile.

    Raises:
        UserError: there is no partition that this user may use.
    """
    found = places(site)
    if not found:
        raise UserError(
            f"Slurm names no partition that you may use; it has: {', '.join(sorted(site.partitions)) or 'none'}"
        )
    trainer, worker, sidecar = choose(found)
    qos = _preemptible_qos(site)
    mode, grace = site.preemption(worker.name, qos) if qos else (worker.preemption, worker.grace)
    told = f"scontrol show partition {worker.name}" if qos is None else f"sacctmgr show qos {qos}"
    lines = [
        f"# Drafted by `metaapo doctor --write-profile` from Slurm {site.config.get('SLURM_VERSION', '')}, cluster "
        f"{site.config.get('ClusterName', '')}. Read it, and set what it",
        "# can't know (setup and python of each role, interface, staging), then: metaapo doctor cluster=THIS_FILE. All keys: docs/clusters.md",
        _line("name", name),
        "kind: slurm",
        *_control(site, sidecar),
        "",
        "jobs:",
        *_jobs(site),
        "",
        "trainer:",
        *_role(site, "trainer", trainer),
        "",
        "worker:",
        *([_line("qos", qos, f"{told}: others have precedence over it", "  ")] if qos else []),
        *_role(site, "worker", worker),
        "",
        "sidecar:",
        *_role(site, "sidecar", sidecar),
        "",
        _line("ranks_per_node", max(trainer.count, 1), f"sinfo: GPUs of most nodes of {trainer.name}"),
        _line(
            "margin",
            _margin(min(trainer.minutes, worker.minutes, sidecar.minutes)),
            "seconds to save in, before the wall time",
        ),
        *_submit_limit(site),
        _line("preemption", mode, f"scontrol show config: PreemptType; {told}: PreemptMode"),
        _line("grace", int(grace), f"{told}: GraceTime"),
        "# interface: ib0  # ip link, on a compute node: the fast network; without it NCCL chooses",
        "offline: true  # a guess: most sites' compute nodes have no internet",
        "# staging: $TMPDIR  # a disk of the node's own, if there is one",
    ]
    return "\n".join(lines) + "\n"


def _line(key: str, value: object, source: str = "", indent: str = "") -> str:
    plain = not isinstance(value, str) or yaml.safe_load(value) == value
    return f"{indent}{key}: {value if plain else json.dumps(value)}" + (f"  # {source}" if source else "")


def _control(site: Site, sidecar: Place) -> list[str]:
    submits = site.partitions[sidecar.name].get("AllocNodes", "ALL")
    if submits == "ALL":
        return ["control: job  # a guess: if compute nodes may not submit jobs, login or chain"]
    return [
        f"control: login  # scontrol show partition {sidecar.name}: jobs are submitted from {submits} only; or chain"
    ]


def _jobs(site: Site) -> list[str]:
    lines = []
    if site.account:
        lines.append(_line("account", site.account, "sacctmgr show user: your default", "  "))
    others = sorted({row["Account"] for row in site.associations} - {site.account})
    if others:
        lines.append(f"  # other accounts of yours: {', '.join(others)}")
    return [
        *lines,
        "  setup: []  # lines of bash before each role: module purge, module load …",
        "  python: null  # /path/to/env/bin/python, or apptainer exec --nv image.sif python3; here, or for each role its own",
    ]


def _role(site: Site, role: str, place: Place) -> list[str]:
    lines = [
        _line("partition", place.name, _why(role, place), "  "),
        _line("time_minutes", int(place.minutes), place.limit, "  "),
    ]
    if role == "sidecar":
        return [*lines, "  cpus_per_task: 2"]
    if place.count:
        kind = f"{place.kind}:" if place.kind else ""
        lines.append(_line("gpu_request", f"--gres=gpu:{kind}{{gpus}}", f"sinfo: GPUs of {place.name}", "  "))
    else:
        lines.append('  gpu_request: ""  # sinfo knows of no GPUs here: whole nodes?')
    share = max(place.count, 1)
    if place.cores:
        cores = max(place.cores // share, 1)
        lines.append(_line("cpus_per_task", cores, f"sinfo: {place.cores} cores a node, {share} GPU(s)", "  "))
    default = _default_memory(site, place.name)
    if place.memory and default:
        asked = f"--mem={place.memory * 9 // 10 // (1 if role == 'trainer' else share)}M"
        lines.append(f"  # memory: {asked}  # sinfo: {place.memory} MB a node; without this a job gets {default}")
    return lines


def _why(role: str, place: Place) -> str:
    gpus = f"{place.count} GPUs a node" if place.count else "no GPUs"
    if role == "worker" and place.preemption in PREEMPTIBLE:
        return f"sinfo: {gpus}; preemptible ({place.preemption})"
    return f"sinfo: {gpus}" + ("; the default partition" if place.default else "")


def _default_memory(site: Site, partition: str) -> str | None:
    facts = site.partitions[partition]
    for key, words in (("DefMemPerNode", "a node"), ("DefMemPerCPU", "a core"), ("DefMemPerGPU", "a GPU")):
        value = facts.get(key) or site.config.get(key, "")
        if value.isdigit() and int(value):
            return f"{value} MB {words}"
    return None


def _margin(shortest: float) -> int:
    """Seconds before the wall time to save in: five minutes, but no more than a quarter of a short job."""
    return int(min(300, shortest * 60 / 4))


def _submit_limit(site: Site) -> list[str]:
    usual = quality(site, JobRequest())
    limits = [(site.qos.get(usual, {}).get("MaxSubmitPU", ""), f"sacctmgr show qos {usual}: MaxSubmitPU")]
    own = association(site, JobRequest()).get("MaxSubmitJobs", "")
    limits.append((own, f"sacctmgr show assoc: MaxSubmitJobs of {site.account}"))
    known = [(int(limit), source) for limit, source in limits if limit.isdigit()]
    if not known:
        return ["# submit_limit: 100  # sacctmgr knows of none for you; Slurm's refusals say when the queue is full"]
    return [_line("submit_limit", *min(known))]
