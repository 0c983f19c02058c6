"""What Slurm says of itself: partitions, nodes, QOS, associations, configuration. Read by `doctor` and ``launch --dry-run``."""

from __future__ import annotations

import grp
import os
import pwd
import re
import subprocess
from dataclasses import dataclass, field

from toolkit.launch.batch import client_environment

NODES = "%R|%G|%c|%m|%f|%D"  # partition, generic resources, cores, MB, features, how many such nodes
QOS = (
    "Name",
    "MaxWall",
    "MaxSubmitPU",
    "MaxTRES",
    "MaxTRESPU",
    "GrpTRES",
    "Preempt",
    "PreemptMode",
    "GraceTime",
)
ASSOCIATION = ("Cluster", "Account", "Partition", "QOS", "DefaultQOS", "MaxWall", "MaxSubmitJobs")
NOTHING = ("", "(null)", "N/A", "NONE", "None")  # Slurm's words for a key without a value


@dataclass(frozen=True)
class Nodes:
    """Nodes of a partition that are alike."""

    partition: str
    gpus: dict[str, int]  # of a node, by type; type "" where the site names none
    cores: int
    memory: int  # MB
    features: frozenset[str]
    count: int


@dataclass(frozen=True)
class Site:
    """A cluster in Slurm's own words; what did not answer is empty."""

    config: dict[str, str] = field(default_factory=dict)
    partitions: dict[str, dict[str, str]] = field(default_factory=dict)
    nodes: tuple[Nodes, ...] = ()
    qos: dict[str, dict[str, str]] = field(default_factory=dict)
    associations: tuple[dict[str, str], ...] = ()  # of this user on this cluster
    account: str | None = None  # this user's default
    groups: frozenset[str] = frozenset()  # this user's, by name

    @property
    def default_partition(self) -> str | None:
        return next((name for name, facts in self.partitions.items() if facts.get("Default") == "YES"), None)

    @property
    def routes(self) -> bool:
        """Whether a plugin of the site may choose the partition of a job that names none."""
        return self.config.get("JobSubmitPlugins", "") not in NOTHING

    def enforces(self, what: str) -> bool:
        """Whether ``associations``, ``limits`` or ``qos`` are more than records."""
        return what in self.config.get("AccountingStorageEnforce", "").lower().split(",")

    def in_partition(self, name: str) -> list[Nodes]:
        return [nodes for nodes in self.nodes if nodes.partition == name]

    def preemption(self, partition: str, qos: str | None = None) -> tuple[str, float]:
        """What happens to jobs of a partition that others have precedence over.

        Returns:
            ``none``, ``requeue``, ``cancel`` or ``suspend``; seconds between the signal and the kill.
        """
        kind = self.config.get("PreemptType", "").rpartition("/")[2]
        facts = self.partitions.get(partition, {})
        if kind == "qos":
            mine = self.qos.get(qos or "", {})
            if not any(qos in other.get("Preempt", "").split(",") for other in self.qos.values()):
                return "none", 0.0
            mode, grace = mine.get("PreemptMode", "cluster"), seconds(mine.get("GraceTime", "0"))
            return _mode(self.config.get("PreemptMode", "") if mode == "cluster" else mode), grace
        if kind != "partition_prio":
            return "none", 0.0
        tiers = [int(other.get("PriorityTier", 1)) for other in self.partitions.values()]
        if int(facts.get("PriorityTier", 1)) >= max(tiers, default=1):
            return "none", 0.0  # nothing has precedence over it
        return _mode(facts.get("PreemptMode", "OFF")), seconds(facts.get("GraceTime", "0"))


def _mode(words: str) -> str:
    """Slurm's PreemptMode, which may be a list such as ``GANG,SUSPEND``, in a profile's words."""
    return next((mode for mode in ("requeue", "cancel", "suspend") if mode in words.lower().split(",")), "none")


def read_site(timeout: float) -> Site:
    """Ask Slurm, in six queries; after the first without an answer no more are asked.

    Args:
        timeout: seconds for each.
    """
    config = ask(["scontrol", "show", "config"], timeout)
    if not config:
        return Site()
    rows = ["sacctmgr", "--noheader", "--parsable2", "show"]
    return parse_site(
        config=config,
        partitions=ask(["scontrol", "--all", "--oneliner", "show", "partition"], timeout),
        nodes=ask(["sinfo", "--all", "--noheader", "--exact", f"--format={NODES}"], timeout),
        qos=ask([*rows, "qos", f"format={','.join(QOS)}"], timeout),
        associations=ask([*rows, "assoc", f"user={user()}", f"format={','.join(ASSOCIATION)}"], timeout),
        account=ask([*rows, "user", user(), "format=DefaultAccount"], timeout),
        groups=_groups(),
    )


def parse_site(
    config: str = "",
    partitions: str = "",
    nodes: str = "",
    qos: str = "",
    associations: str = "",
    account: str = "",
    groups: frozenset[str] = frozenset(),
) -> Site:
    """A `Site` from the outputs of the commands of `read_site`."""
    known = _config(config)
    mine = [
        row for row in _rows(associations, ASSOCIATION) if row["Cluster"] == known.get("ClusterName", row["Cluster"])
    ]
    return Site(
        config=known,
        partitions=_partitions(partitions),
        nodes=tuple(found for line in nodes.splitlines() if (found := _nodes(line)) is not None),
        qos={row["Name"]: row for row in _rows(qos, QOS)},
        associations=tuple(mine),
        account=next((line.strip() for line in account.splitlines() if line.strip()), None),
        groups=groups,
    )


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
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _config(output: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in output.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _partitions(output: str) -> dict[str, dict[str, str]]:
    found = {}
    for line in output.splitlines():
        facts = {key: value for key, equals, value in (word.partition("=") for word in line.split()) if equals}
        if "PartitionName" in facts:
            found[facts["PartitionName"]] = facts
    return found


def _nodes(line: str) -> Nodes | None:
    fields = line.split("|")
    if len(fields) != 6:
        return None
    partition, gres, cores, memory, features, count = fields
    return Nodes(
        partition,
        gpus_of(gres),
        _number(cores),
        _number(memory),
        frozenset() if features in NOTHING else frozenset(features.split(",")),
        _number(count),
    )


def _number(text: str) -> int:
    digits = re.match(r"\d+", text)
    return int(digits[0]) if digits else 0


def _rows(output: str, fields: tuple[str, ...]) -> list[dict[str, str]]:
    rows = (line.split("|") for line in output.splitlines())
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def gpus_of(gres: str) -> dict[str, int]:
    """GPUs by type of ``gpu:a100:4(S:0-1),gpu:3g.20gb:2,nvme:1``; type "" where none is named."""
    found: dict[str, int] = {}
    for kind, count in re.findall(r"(?:^|,)gpu(?::([^:,(]+))??:(\d+)(?=[,(]|$)", gres):
        found[kind] = found.get(kind, 0) + int(count)
    return found


def gpus_asked(request: str) -> tuple[str, int] | None:
    """Type and number of ``--gres=gpu:a100:4``, ``--gpus-per-node=4``, …; None for other words."""
    found = re.search(r"(?:--gres=(?:.*,)?gpu:|--gpus(?:-per-node)?=)(?:([^:,\s]+):)?(\d+)(?=[,\s]|$)", request)
    return (found[1] or "", int(found[2])) if found else None


def minutes(text: str) -> float | None:
    """Minutes of Slurm's ``[days-]hours[:minutes[:seconds]]`` or ``[[hours:]minutes:]seconds``; None for no limit."""
    if text.upper() in ("UNLIMITED", "INFINITE", "NONE", "NOT_SET", "", "-1"):
        return None
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, mins, secs = (*parts, 0, 0)[:3]
    else:
        hours, mins, secs = (0, *parts, 0) if len(parts) == 1 else (0, *parts)[-3:]
    return 1440 * int(days or 0) + 60 * hours + mins + secs / 60


def seconds(text: str) -> float:
    """Seconds of a grace time: a plain number of seconds (scontrol) or a clock (sacctmgr)."""
    return float(text) if text.isdigit() else 60 * (minutes(text) or 0.0)


def amount(resources: str, name: str) -> int | None:
    """How many of ``name`` a list of trackable resources such as ``cpu=64,gres/gpu=8`` allows; None: as many as you like."""
    counts = dict(item.partition("=")[::2] for item in resources.split(",") if item)
    return int(counts[name]) if counts.get(name, "").isdigit() else None


def user() -> str:
    """This user's name for Slurm's commands; the number if it has none."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _groups() -> frozenset[str]:
    names = set()
    for number in {os.getgid(), *os.getgroups()}:
        try:
            names.add(grp.getgrgid(number).gr_name)
        except KeyError:
            continue
    return frozenset(names)
