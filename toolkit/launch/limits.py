"""What sbatch lets pass and Slurm then never runs: requests compared with the limits of partitions, QOS and associations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from toolkit.cluster import JobRequest, role_of
from toolkit.config import Config
from toolkit.launch.adapter import JobSpec
from toolkit.launch.site import NOTHING, Site, amount, gpus_asked, minutes, read_site


def check_limits(config: Config, jobs: Sequence[JobSpec], site: Site | None = None) -> list[str]:
    """A sentence for each job request that Slurm would never satisfy, with the key to change.

    Args:
        jobs: the first attempt of each slot.
        site: what Slurm says of itself; None asks it. What did not answer is not checked.
    """
    site = read_site(config.cluster.query_timeout) if site is None else site
    roles = {role_of(job.slot): job for job in jobs}
    problems = [f"{role}: {problem}" for role, job in roles.items() for problem in _never_runs(site, role, job)]
    return problems + _too_many(site, config, jobs)


def _never_runs(site: Site, role: str, job: JobSpec) -> list[str]:
    wish, key = job.request, f"cluster.{role}"
    problems = [*_account(site, key, wish), *_qos(site, key, job)]
    if wish.partition:
        names = wish.partition.split(",")
    elif site.routes or not site.partitions:
        return problems  # the site's own plugin finds a partition
    elif site.default_partition is None:
        return [
            *problems,
            f"no partition is named and there is no default one: set {key}.partition to {_any(site.partitions)}",
        ]
    else:
        names = [site.default_partition]
    found = [list(_partition(site, key, name, job)) for name in names]
    if all(found):  # Slurm takes the first of several that suits
        problems += [problem for each in found for problem in each]
    return problems


def _account(site: Site, key: str, wish: JobRequest) -> Iterable[str]:
    if not site.associations or not site.enforces("associations"):
        return
    accounts = {row["Account"] for row in site.associations}
    account = wish.account or site.account
    if site.routes and account not in accounts:
        return  # the site's own plugin may name one, or know what is meant
    if not account:
        yield f"the site wants an account: set {key}.account to {_any(accounts)}"
    elif account not in accounts:
        yield f"you have no account {account}: set {key}.account to {_any(accounts)}"


def association(site: Site, wish: JobRequest) -> dict[str, str]:
    """This user's association that a request falls under; empty if there is none, or accounting does not answer."""
    account, partitions = wish.account or site.account, (wish.partition or "").split(",")
    mine = [row for row in site.associations if row["Account"] == account and row["Partition"] in ("", *partitions)]
    return max(mine, key=lambda row: row["Partition"] != "", default={})


def quality(site: Site, wish: JobRequest) -> str:
    """The QOS that a request falls under."""
    mine = association(site, wish)
    allowed = mine.get("QOS", "").split(",")
    return wish.qos or mine.get("DefaultQOS") or (allowed[0] if len(allowed) == 1 and allowed[0] else "normal")


def _qos(site: Site, key: str, job: JobSpec) -> Iterable[str]:
    wish, mine = job.request, association(site, job.request)
    allowed = {name for name in mine.get("QOS", "").split(",") if name}
    if site.routes and wish.qos and wish.qos not in site.qos:
        return  # the site's own plugin may know what is meant
    if wish.qos and site.qos and wish.qos not in site.qos:
        yield f"there is no QOS {wish.qos}: set {key}.qos to {_any(allowed or site.qos)}"
    elif wish.qos and allowed and wish.qos not in allowed and site.enforces("qos"):
        yield f"your account {mine['Account']} may not use QOS {wish.qos}: set {key}.qos to {_any(allowed)}"
    if not site.enforces("limits") and not site.enforces("qos"):
        return
    name = quality(site, wish)
    yield from _under_qos(site, key, job, name, f"QOS {name}")
    yield from _too_long(key, job, mine.get("MaxWall", ""), f"your account {mine.get('Account')} (MaxWall)")


def _under_qos(site: Site, key: str, job: JobSpec, name: str, whose: str) -> Iterable[str]:
    limits = site.qos.get(name, {})
    yield from _too_long(key, job, limits.get("MaxWall", ""), f"{whose} (MaxWall)")
    gpus = job.nodes * job.gpus_per_node if job.request.gpu_request else 0
    for field, words in (("MaxTRES", "a job"), ("MaxTRESPU", "a user"), ("GrpTRES", "all together")):
        for resource, asked in (("gres/gpu", gpus), ("node", job.nodes)):
            most = amount(limits.get(field, ""), resource)
            if most is not None and asked > most:
                yield f"asks for {asked} {_named(resource)}; {whose} gives {words} {most} ({field})"


def _named(resource: str) -> str:
    return {"gres/gpu": "GPUs", "node": "nodes"}[resource]


def _partition(site: Site, key: str, name: str, job: JobSpec) -> Iterable[str]:
    if not site.partitions:
        return
    facts, wish = site.partitions.get(name), job.request
    if facts is None:
        yield f"there is no partition {name}: set {key}.partition to {_any(site.partitions)}"
        return
    where = f"partition {name}"
    if facts.get("State", "UP") != "UP":
        yield f"{where} is {facts['State']}: no job starts there now"
    yield from _too_long(key, job, facts.get("MaxTime", ""), f"{where} (MaxTime)")
    qos = facts.get("QoS", "N/A")
    if qos in site.qos:
        yield from _under_qos(site, key, job, qos, f"{where}'s QOS {qos}")
    for field in ("TotalNodes", "MaxNodes"):
        most = facts.get(field, "")
        if most.isdigit() and job.nodes > int(most):
            yield f"asks for {job.nodes} nodes; {where} gives {most} ({field}): set {key}.partition, or a smaller layout"
            break
    yield from _not_allowed(site, key, where, facts, wish)
    yield from _gpus(site, key, name, job)
    yield from _features(site, key, name, wish.constraint or "")


def _features(site: Site, key: str, partition: str, constraint: str) -> Iterable[str]:
    """Features that a constraint wants and no node has; alternatives (a|b) are left to sbatch."""
    offered = {feature for nodes in site.in_partition(partition) for feature in nodes.features}
    wanted = {re.sub(r"\*\d+$", "", word) for word in re.split(r"[&|,()\[\]\s]+", constraint)} - {""}
    lacking = sorted(wanted - offered)
    if site.in_partition(partition) and lacking and "|" not in constraint:
        there = f"; its nodes have {', '.join(sorted(offered))}" if offered else ", nor any other"
        yield f"no node of partition {partition} has the feature {', '.join(lacking)}{there}: set {key}.constraint"


def _not_allowed(site: Site, key: str, where: str, facts: dict[str, str], wish: JobRequest) -> Iterable[str]:
    mine = {
        ("Accounts", "account"): {wish.account or site.account or ""} - {""},
        ("Qos", "qos"): {quality(site, wish)} if site.qos else set(),
        ("Groups", "partition"): set(site.groups),
    }
    for (what, name), names in mine.items():
        allowed, denied = facts.get(f"Allow{what}", "ALL"), facts.get(f"Deny{what}", "")
        change = f"set {key}.partition" + (f" or {key}.{name}" if name != "partition" else "")
        if names and allowed not in ("ALL", *NOTHING) and not names & set(allowed.split(",")):
            yield f"{where} is for {what.lower()} {allowed}, not for {', '.join(sorted(names))}: {change}"
        elif names and names <= set(denied.split(",")):
            yield f"{where} is not for {what.lower()} {denied}: {change}"


def _gpus(site: Site, key: str, partition: str, job: JobSpec) -> Iterable[str]:
    request = job.request.gpu_request or ""
    asked = gpus_asked(request.format(gpus=job.gpus_per_node)) if job.gpus_per_node else None
    offers = [nodes.gpus for nodes in site.in_partition(partition)]
    if asked is None or not offers:
        return
    kind, count = asked
    most = max(offer.get(kind, 0) if kind else sum(offer.values()) for offer in offers)
    if count <= most:
        return
    there = sorted({f"{number} {name}".strip() for offer in offers for name, number in offer.items()}) or ["none"]
    size = "cluster.ranks_per_node" if job.slot == "trainer" else "inference.tensor_parallel"
    yield (
        f"asks for {count} GPUs{f' of type {kind}' if kind else ''} on a node; nodes of partition {partition} have "
        f"{' or '.join(there)}: set {key}.partition, {key}.gpu_request or {size}"
    )


def _too_long(key: str, job: JobSpec, limit: str, whose: str) -> Iterable[str]:
    most, asked = minutes(limit), job.request.time_minutes or 0
    if most is not None and asked > most:
        yield f"{key}.time_minutes={asked} is over the limit of {whose}: set it to {most:g} at most"


def _too_many(site: Site, config: Config, jobs: Sequence[JobSpec]) -> list[str]:
    """More jobs than Slurm lets this user have in the queue at once: all slots, their further links, and the keeper's successor."""
    cluster = config.cluster
    chain = cluster.control == "chain"
    limits: dict[str, tuple[int, int]] = {}  # whose -> its limit, the jobs that count against it
    for number, job in enumerate(jobs):
        count = cluster.links if chain else 1
        if cluster.control == "job" and number == _keeper(config, jobs):
            count += 1
        mine, qos = association(site, job.request), quality(site, job.request)
        for whose, most in (
            (f"QOS {qos}", site.qos.get(qos, {}).get("MaxSubmitPU", "")),
            (f"your account {mine.get('Account')}", mine.get("MaxSubmitJobs", "")),
        ):
            if most.isdigit():
                limits[whose] = int(most), limits.get(whose, (0, 0))[1] + count
    enforced = site.enforces("limits") or site.enforces("qos")
    return [
        f"this run has {needed} jobs in the queue; {whose} lets you have {most}: "
        + (
            "fewer inference.workers or cluster.links"
            if chain
            else f"fewer inference.workers, or cluster.submit_limit={most}, and they take turns"
        )
        for whose, (most, needed) in limits.items()
        if enforced and needed > most and (chain or (cluster.submit_limit or needed) > most)
    ]


def _keeper(config: Config, jobs: Sequence[JobSpec]) -> int | None:
    """Which of the jobs has its successor queued, if any."""
    from toolkit.launch.handover import keeper

    return next((number for number, job in enumerate(jobs) if job.slot == keeper(config)), None)


def _any(names: Iterable[str]) -> str:
    found = sorted(names)
    return ("one of: " if len(found) > 1 else "") + (", ".join(found) or "(none)")
