"""The trainer as a job: meet the other ranks, build the engine, train."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from toolkit.cluster import request
from toolkit.errors import UserError
from toolkit.exchange import jobs
from toolkit.exchange.layout import PAIRS
from toolkit.exchange.records import Ref
from toolkit.exchange.run import Run
from toolkit.reporting.metrics import MetricsWriter
from toolkit.signals import StopFlag
from toolkit.training import device
from toolkit.training.control import Control
from toolkit.training.engine import EngineSettings, PolicyEngine
from toolkit.training.layout import ParallelLayout
from toolkit.training.optimizer import OptimizerSettings
from toolkit.training.trainer import Trainer

NVIDIA_DRIVER = Path("/dev/nvidiactl")
PREPARING_PATIENCE = 12 * 3600.0  # seconds, for rank 0 to prepare the data; if it dies, so do the ranks that wait
MEETING_PATIENCE = 300.0  # seconds that a rank waits for rank 0 to say where the ranks meet


def main(run: Run, slot: str, number: int, rank: int, size: int, stop: StopFlag) -> str:
    """Train as rank ``rank`` of ``size``.

    Returns:
        ``done``, ``saved`` or ``starved``.
    """
    _prepare(run, slot, number, rank)
    config = run.config.trainer
    layout = ParallelLayout(config.tensor, config.pipeline, size, config.sequence_parallel)
    local_rank = int(os.environ.get("SLURM_LOCALID", os.environ.get("SUBMITIT_LOCAL_LOCALID", rank)))
    _check_gpu(run)
    device.initialize(layout, rank=rank, meeting=_meet(run, slot, number, rank, size), local_rank=local_rank)
    engine = PolicyEngine(layout, run.config.model.policy, _settings(run))
    metrics = MetricsWriter(run.root, slot, run.attempt) if rank == 0 else None
    heartbeat = jobs.Heartbeat(run.root, slot, run.attempt) if rank == 0 else None
    if heartbeat is not None:
        heartbeat.start(run.config.inference.heartbeat)
    outcome = Trainer(run, engine, Control(stop), metrics, heartbeat).train()
    if rank == 0 and run.is_complete():  # where there is no sidecar, nobody else may be there to say so
        run.finish()
    device.shutdown()  # never after an error: NCCL would wait there for the others, who wait for this rank elsewhere
    return outcome


def _check_gpu(run: Run) -> None:
    """A job that was given GPUs and cannot use them must not train on the CPU.

    Raises:
        RuntimeError: so it is here. Another attempt may get another node, so it is no refusal.
    """
    asked = run.config.cluster.kind == "slurm" and request(run.config.cluster, "trainer").gpu_request is not None
    if asked and NVIDIA_DRIVER.exists() and not torch.cuda.is_available():
        raise RuntimeError(
            f"{socket.gethostname()} has an NVIDIA driver, but torch {torch.__version__} (built for CUDA {torch.version.cuda}) cannot "
            "use a GPU. Expected one for each rank: see whether the job got GPUs (nvidia-smi in a job there), and whether this torch "
            "is built for CUDA and for a version that the driver knows."
        )


def _prepare(run: Run, slot: str, number: int, rank: int) -> None:
    """The run's pairs, if nobody has prepared them: rank 0 does, the others wait, which has nothing to do with how they meet."""
    if rank > 0:
        missing = f"{slot} attempt {number} did not prepare the data within {PREPARING_PATIENCE:.0f} s"
        jobs.word_of_rank_0(run.records, PAIRS, PREPARING_PATIENCE, missing)
    elif run.records.find(PAIRS) is None:
        from toolkit.data.publish import prepare_run

        prepare_run(run)


def _settings(run: Run) -> EngineSettings:
    config, optimizer = run.config.trainer, run.config.method.optimizer
    return EngineSettings(
        dtype=run.config.model.dtype,
        micro_batch_pairs=config.micro_batch,
        recompute=config.recompute,
        distributed_optimizer=config.distributed_optimizer,
        optimizer=OptimizerSettings(
            learning_rate=optimizer.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            epsilon=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            clip_gradient=optimizer.clip_grad,
            schedule=optimizer.schedule,
            warmup_fraction=optimizer.warmup_fraction,
            min_learning_rate_ratio=optimizer.min_ratio,
        ),
    )


def _meet(run: Run, slot: str, number: int, rank: int, size: int) -> dist.Store:
    """The store through which the ranks of this attempt find each other: on a port that the system gave rank 0, told by a record.

    Such a store asks nobody who they are. So a rank alone has none, and that of ranks on one node can only be reached from there.
    """
    ref = Ref(f"jobs/{slot}", f"{number:04d}.meeting")
    one_node = size == 1 or run.config.cluster.kind == "local" or os.environ.get("SLURM_NNODES") == "1"
    if one_node:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if size == 1:
        return dist.HashStore()
    patience = timedelta(seconds=MEETING_PATIENCE)
    if rank == 0:
        host, port, listening = ("127.0.0.1" if one_node else _host()), 0, None
        if one_node:  # torch by itself listens on all addresses, whatever the host
            server = socket.create_server((host, 0))
            port, listening = server.getsockname()[1], server.detach()
        store = dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, timeout=patience, master_listen_fd=listening
        )
        run.records.publish(ref, {"host": host, "port": store.port})
        return store
    missing = f"{slot} attempt {number} did not say within {MEETING_PATIENCE:.0f} s where to meet"
    place = jobs.word_of_rank_0(run.records, ref, MEETING_PATIENCE, missing).attributes
    try:
        return dist.TCPStore(place["host"], place["port"], is_master=False, timeout=patience)
    except (dist.DistError, RuntimeError) as error:
        raise ConnectionError(
            f"rank {rank} on {socket.gethostname()} cannot reach rank 0 at {place['host']}:{place['port']}: {error}"
        ) from error


def _host() -> str:
    """This node's name, as the other nodes of the job know it."""
    for name in (os.environ.get("SLURMD_NODENAME", ""), socket.gethostname()):
        try:
            socket.getaddrinfo(name, None)
            return name
        except OSError:
            continue
    raise UserError(f"this node's name {socket.gethostname()} has no address; the trainer's ranks cannot meet here")
