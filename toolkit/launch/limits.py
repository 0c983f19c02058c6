"""What sbatch lets pass and Slurm then never runs: times, GPUs and numbers of jobs, compared with the cluster's own limits."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence

from toolkit.config import Config
from toolkit.launch.adapter import JobSpec
from toolkit.launch.batch import client_environment


def check_limits(config: Config, jobs: Sequence[JobSpec]) -> list[str]:
    """A sentence for each job request that the cluster's partitions and QOS would never satisfy.

    Asks ``scontrol show partition``, ``sinfo`` and ``sacctmgr show qos``; what does not answer is not checked.
    """
    timeout = config.cluster.query_timeout
    partitions = parse_records(ask(["scontrol", "--oneliner", "show", "partition"], timeout))
    gpus = most_gpus(ask(["sinfo", "--noheader", "--Node", "--format=%R|%G"], timeout))
    qos = qos_limits(ask(["sacctmgr", "--noheader", "--parsable2", "show", "qos", f"format={QOS_FIELDS}"], timeout))
    default = next((name for name, facts in partitions.items() if facts.get("Default") == "YES"), None)
    problems: list[str] = []
    for job in jobs:
        wish = job.request
        for partition in (wish.partition or default or "").split(","):
            if partitions and partition not in partitions:
                known = ", ".join(sorted(partitions))
                problems.append(
                    f"{job.slot}: there is no partition {partition or '(none by default)'}; there are: {known}"
                )
                continue
            facts = partitions.get(partition, {})
            problems += _too_long(job, minutes(facts.get("MaxTime", "UNLIMITED")), f"partition {partition} (MaxTime)")
            most = gpus.get(partition)
            if most is not None and job.gpus_per_node > most:
                problems.append(
                    f"{job.slot}: asks for {job.gpus_per_node} GPUs on a node; nodes of partition {partition} have {most}"
                )
            total = facts.get("TotalNodes", "")
            if total.isdigit() and job.nodes > int(total):
                problems.append(f"{job.slot}: asks for {job.nodes} nodes; partition {partition} has {total}")
        name = wish.qos or "normal"
        if wish.qos and qos and name not in qos:
            problems.append(f"{job.slot}: there is no QOS {name}; there are: {', '.join(sorted(qos))}")
        limits = qos.get(name, {})
        problems += _too_long(job, minutes(limits.get("MaxWall") or "UNLIMITED"), f"QOS {name} (MaxWall)")
    return list(dict.fromkeys(problems)) + _too_many(config, jobs, qos)


QOS_FIELDS = "Name,MaxWall,MaxSubmitPU,MaxJobsPU"


def _too_long(job: JobSpec, limit: float | None, whose: str) -> list[str]:
    asked = job.request.time_minutes or 0
    if limit is None or asked <= limit:
        return []
    role = "worker" if job.slot.startswith("worker-") else job.slot
    return [f"{role}: cluster.{role}.time_minutes={asked} is over the limit of {whose}: {limit:g} min"]


def _too_many(config: Config, jobs: Sequence[JobSpec], qos: dict[str, dict[str, str]]) -> list[str]:
    """The first launch needs all its jobs in the queue at once, and the keeper's successor; with less room it only takes longer."""
    links = config.cluster.links if config.cluster.control == "chain" else 1
    needed = len(jobs) * links + (config.cluster.control == "job")
    problems = []
    for name in sorted({job.request.qos or "normal" for job in jobs}):
        limit = qos.get(name, {}).get("MaxSubmitPU", "")
        if limit.isdigit() and int(limit) < needed and (config.cluster.submit_limit or needed) > int(limit):
            problems.append(
                f"this run has {needed} jobs in the queue; QOS {name} lets you have {limit}. Fewer inference.workers"
                f"{' or cluster.links' if links > 1 else ''}, or cluster.submit_limit={limit}: then they take turns"
            )
    return problems


# ------------------------------------------------------------------------------------------ reading what Slurm says


def ask(command: list[str], timeout: float) -> str:
    """A Slurm command's output; empty if it is not there, fails or does not answer in time."""
    try:
        done = subprocess.run(
            command,
            env=client_environment() | {"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def parse_records(output: str) -> dict[str, dict[str, str]]:
    """Records of ``scontrol --oneliner``, by the value of each one's first key."""
    found = {}
    for line in output.splitlines():
        pairs = [word.partition("=") for word in line.split() if "=" in word]
        if pairs:
            found[pairs[0][2]] = {key: value for key, _, value in pairs}
    return found


def most_gpus(output: str) -> dict[str, int]:
    """Partition -> most GPUs of one of its nodes, from lines ``partition|gres``."""
    found: dict[str, int] = {}
    for line in output.splitlines():
        partition, _, gres = line.partition("|")
        counts = [int(count) for count in re.findall(r"\bgpu(?::[\w.-]+)*?:(\d+)", gres)]
        found[partition] = max(found.get(partition, 0), sum(counts))
    return found


def qos_limits(output: str) -> dict[str, dict[str, str]]:
    """QOS -> its limits by field."""
    keys = QOS_FIELDS.split(",")
    rows = [line.split("|") for line in output.splitlines()]
    return {row[0]: dict(zip(keys, row, strict=True)) for row in rows if len(row) == len(keys)}


def minutes(text: str) -> float | None:
    """Minutes of Slurm's ``[days-]hours:minutes:seconds``; None for no limit."""
    if text in ("UNLIMITED", "INFINITE", "NONE", ""):
        return None
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":") if part.isdigit()]
    if len(parts) == 1:
        parts = [0, parts[0], 0]  # minutes
    elif len(parts) == 2:
        parts = [*parts, 0] if days else [0, *parts]
    return 1440 * int(days or 0) + 60 * parts[0] + parts[1] + parts[2] / 60


def user() -> str:
    """This user's name for Slurm's commands; the number if it has none."""
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
