"""What a run will write and spend, from its configuration alone: for ``launch --dry-run``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from toolkit.cluster import ClusterConfig
from toolkit.config import Config
from toolkit.launch.adapter import JobSpec
from toolkit.launch.models import read_header


def parameters(folder: str) -> int:
    """Parameters of a model folder: elements of its safetensors, read from their headers."""
    headers = (read_header(path) for path in Path(folder).glob("*.safetensors"))
    return sum(math.prod(entry["shape"]) for header in headers for entry in header.values())


def disk(config: Config, count: int) -> tuple[int, int, int]:
    """Bytes of a checkpoint, of a policy, and of all that are kept at a time, at most.

    Args:
        count: parameters of the policy.
    """
    width = 4 if config.model.dtype == "float32" else 2
    optimizer = 8 if width == 4 else 12  # two fp32 moments, and an fp32 copy where weights are bf16
    checkpoint, policy = count * (width + optimizer), count * width
    policies = min(len(config.gated) + 1, config.retention.policies + 2)
    return checkpoint, policy, checkpoint * (config.retention.checkpoints + 1) + policy * policies


def estimate(config: Config, jobs: Sequence[JobSpec]) -> list[str]:
    """Sentences about disk space and processes."""
    count = parameters(config.model.policy)
    checkpoint, policy, peak = disk(config, count)
    return [
        f"{count / 1e6:,.1f} M parameters; {len(config.gated)} rounds",
        f"disk: a checkpoint {checkpoint / 2**30:.2f} GiB, a policy {policy / 2**30:.2f} GiB, at most {peak / 2**30:.2f} GiB at a time "
        f"(retention.checkpoints={config.retention.checkpoints}, retention.policies={config.retention.policies})",
        _devices(config.cluster, jobs),
    ]


def _devices(cluster: ClusterConfig, jobs: Sequence[JobSpec]) -> str:
    """What the jobs compute on, and what of that may be billed at most."""
    trainer = sum(job.nodes * job.gpus_per_node for job in jobs if job.slot == "trainer")
    others = sum(job.nodes * job.gpus_per_node for job in jobs if job.slot != "trainer")
    devices = f"devices: {trainer} for the trainer, {others} for inference"
    if cluster.kind == "local":
        return devices
    links = cluster.links if cluster.chained else 1
    billed = [
        job.nodes * (cluster.ranks_per_node if _is_whole(job) else job.gpus_per_node)
        for job in jobs
        if job.gpus_per_node
    ]
    minutes = [job.request.time_minutes or 0 for job in jobs if job.gpus_per_node]
    hours = links * sum(gpus * time / 60 for gpus, time in zip(billed, minutes, strict=True))
    return (
        f"{devices}; {f'{links} attempts' if links > 1 else 'one attempt'} of each cost at most {hours:,.1f} GPU-hours "
        f"(wall times up to {max(minutes, default=0) / 60:g} h"
        + (
            f"; whole nodes of {cluster.ranks_per_node} GPUs: cluster.ranks_per_node"
            if any(map(_is_whole, jobs))
            else ""
        )
        + "); attempts that die or reach their wall time are followed by others"
    )


def _is_whole(job: JobSpec) -> bool:
    """Whether a job is given nodes of its own, all of whose GPUs count."""
    return job.gpus_per_node > 0 and (not job.request.gpu_request or "--exclusive" in job.request.options)
