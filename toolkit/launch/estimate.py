"""What a run will write and spend, from its configuration alone: for ``launch --dry-run``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from toolkit.config import Config
from toolkit.launch.adapter import JobSpec


def weight_bytes(folder: str) -> int:
    """Bytes of a model folder's safetensors."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def parameters(folder: str) -> int:
    """Parameters of a model folder: elements of its safetensors, read from their headers."""
    count = 0
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                elements = 1
                for size in entry["shape"]:
                    elements *= size
                count += elements
    return count


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
        _bound(jobs),
    ]


def _bound(jobs: Sequence[JobSpec]) -> str:
    """What one attempt of each job may cost at most."""
    hours = sum(job.nodes * job.gpus_per_node * (job.request.time_minutes or 0) / 60 for job in jobs)
    trainer = sum(job.nodes * job.gpus_per_node for job in jobs if job.slot == "trainer")
    others = sum(job.nodes * job.gpus_per_node for job in jobs if job.slot != "trainer")
    longest = max((job.request.time_minutes or 0) / 60 for job in jobs)
    return (
        f"devices: {trainer} for the trainer, {others} for inference; one attempt of each is bounded by {hours:,.1f} GPU-hours "
        f"({longest:g} h wall time); attempts that die or reach their wall time are followed by others"
    )
