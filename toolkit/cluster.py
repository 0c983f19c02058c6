"""What a site is like: the schema of a cluster profile (`configs/cluster/`), and what a role's jobs ask for there."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

ROLES = ("trainer", "worker", "sidecar")


@dataclass
class JobRequest:
    """What jobs ask the scheduler for. Null: what ``cluster.jobs`` says; lists and mappings add to those of ``cluster.jobs``."""

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    time_minutes: int | None = None  # wall time of an attempt
    gpu_request: str | None = None  # how the site wants GPUs asked for, {gpus} = devices a node; "": it is not said
    cpus_per_task: int | None = None
    memory: str | None = None  # an option such as --mem=64G, --mem-per-gpu=60G; "": it is not said
    options: list[str] = field(
        default_factory=list
    )  # further sbatch options as they are: --exclusive, --mail-type=FAIL
    srun: list[str] = field(default_factory=list)  # further srun options: --container-image=…, --network=…
    setup: list[str] = field(default_factory=list)  # lines of bash before the role: module load …, source …/activate
    python: str | None = (
        None  # what starts this role's Python: a path, or a command: apptainer exec --nv image.sif python3
    )
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Budgets:
    """How many deaths of a kind a slot may have without a record of progress in between, before the run is stopped."""

    crash: int = 5  # the program failed, or was killed by somebody unknown
    resource: int = 2  # out of memory
    node: int = 10
    preempted: int = 100
    time: int = 5  # killed at its wall time: it had not saved before
    unknown: int = 10  # the scheduler does not remember it


@dataclass
class ClusterConfig:
    name: str = "local"
    kind: str = "local"  # local, slurm
    control: str = (
        "job"  # who submits: job (the sidecar's), login (a launch that stays, or cron), chain (all at launch)
    )
    links: int = 4  # chain: attempts of each role that launch submits, one after the other
    sidecar_in: str = (
        "own"  # own (a job of its own), trainer (beside the trainer's first rank, where whole nodes are billed)
    )
    jobs: JobRequest = field(default_factory=JobRequest)  # of every role
    trainer: JobRequest = field(default_factory=JobRequest)
    worker: JobRequest = field(default_factory=JobRequest)
    sidecar: JobRequest = field(default_factory=JobRequest)
    ranks_per_node: int = 8  # trainer ranks on a node, one GPU each
    margin: float = 300.0  # seconds before the end of its wall time at which a role saves; also of the warning signal
    submit_limit: int | None = None  # jobs that you may have in the queue at once, those of others' making included
    preemption: str = "none"  # none, requeue, cancel, suspend: what the site does to jobs of the workers' partition
    grace: float = 0.0  # seconds between a preemption's signal and the kill
    interface: str | None = None  # network interface of the trainer's group: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME
    offline: bool = True  # compute nodes have no internet: Hugging Face libraries are told so
    staging: str | None = (
        None  # node-local directory into which policies are copied before they are loaded: $SLURM_TMPDIR
    )
    umask: str = "077"
    supervise: float = 60.0  # seconds between looks at the scheduler, at least
    query_timeout: float = 60.0  # seconds that a scheduler's command may take
    budgets: Budgets = field(default_factory=Budgets)

    @property
    def chained(self) -> bool:
        """Whether launch submits all attempts of a role at once."""
        return self.kind != "local" and self.control == "chain"


OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
}


def role_of(slot: str) -> str:
    """``trainer``, ``sidecar`` or ``worker`` of a slot's name."""
    return "worker" if slot.startswith("worker-") else slot


def request(cluster: ClusterConfig, role: str) -> JobRequest:
    """What the jobs of a role ask for: its own keys over those of all roles, with the profile's variables."""
    common, own = cluster.jobs, getattr(cluster, role)
    merged = {}
    for key in dataclasses.fields(JobRequest):
        a, b = getattr(common, key.name), getattr(own, key.name)
        merged[key.name] = (
            {**a, **b} if isinstance(a, dict) else a + b if isinstance(a, list) else a if b is None else b
        )
    found = JobRequest(**merged)
    variables = dict(OFFLINE) if cluster.offline and cluster.kind != "local" else {}
    if cluster.interface is not None and role == "trainer":
        variables |= {"NCCL_SOCKET_IFNAME": cluster.interface, "GLOO_SOCKET_IFNAME": cluster.interface}
    if cluster.staging is not None:
        variables["METAAPO_STAGING"] = cluster.staging
    return dataclasses.replace(
        found, time_minutes=found.time_minutes or 1440, environment=variables | found.environment
    )
