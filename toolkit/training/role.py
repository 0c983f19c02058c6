"""The trainer as a job: meet the other ranks, build the engine, train."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch.distributed as dist

from toolkit.data.publish import prepare_run
from toolkit.errors import UserError
from toolkit.exchange import jobs
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

MEETING_PATIENCE = 300.0  # seconds that a rank waits for rank 0 to say where the ranks meet


def main(run: Run, slot: str, number: int, rank: int, size: int, stop: StopFlag) -> str:
    """Train as rank ``rank`` of ``size``.

    Returns:
        ``done``, ``saved`` or ``starved``.
    """
    if rank == 0:
        prepare_run(run)  # if nobody did
    config = run.config.trainer
    layout = ParallelLayout(config.tensor, config.pipeline, size, config.sequence_parallel)
    local_rank = int(os.environ.get("SLURM_LOCALID", os.environ.get("SUBMITIT_LOCAL_LOCALID", rank)))
    device.initialize(layout, rank=rank, meeting=_meet(run, slot, number, rank), local_rank=local_rank)
    try:
        engine = PolicyEngine(layout, run.config.model.policy, _settings(run))
        metrics = MetricsWriter(run.root, slot, run.attempt) if rank == 0 else None
        heartbeat = jobs.Heartbeat(run.root, slot, run.attempt) if rank == 0 else None
        if heartbeat is not None:
            heartbeat.start(run.config.inference.heartbeat)
        outcome = Trainer(run, engine, Control(stop), metrics, heartbeat).train()
        if rank == 0 and run.is_complete():  # where there is no sidecar, nobody else may be there to say so
            run.finish()
        return outcome
    finally:
        device.shutdown()


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


def _meet(run: Run, slot: str, number: int, rank: int) -> dist.Store:
    """The store through which the ranks of this attempt find each other: on a port that the system gave rank 0, told by a record."""
    ref = Ref(f"jobs/{slot}", f"{number:04d}.meeting")
    local = run.config.cluster.kind == "local"
    if local:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    patience = timedelta(seconds=MEETING_PATIENCE)
    if rank == 0:
        host = "127.0.0.1" if local else _host()
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
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
