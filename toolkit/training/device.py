"""Where a trainer's process computes: CUDA with NCCL, or the CPU with gloo through a thin adapter.

Megatron-core names CUDA in many places. Without a GPU the adapter answers these with the CPU: a function mode, torch's
public mechanism for this, rewrites devices and type names, and the few functions of ``torch.cuda`` that Megatron calls
are replaced. With a GPU nothing is touched.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from toolkit.training.layout import ParallelLayout

_CPU = torch.device("cpu")
_adapter: TorchFunctionMode | None = None


class _CudaMeansCpu(TorchFunctionMode):
    """``device="cuda"``, ``.cuda()``, ``.to("cuda")`` and pinned memory become the CPU's; ``.type()`` says "cuda".

    Megatron's optimizers accept only parameters whose type is named ``torch.cuda.FloatTensor`` and the like.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _is_cuda(device: Any) -> bool:
    return str(device).startswith("cuda") if isinstance(device, (str, torch.device)) else False


def current() -> torch.device:
    """The device of this process' model."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU


def prepare() -> None:
    """Make this process ready for Megatron. Once per process (again does no harm), before any other call in training.

    With CUDA does nothing. On the CPU installs the adapter for the rest of the process, switches ``torch.compile`` off
    (it takes longer than the small models that run on a CPU) and, unless OMP_NUM_THREADS says otherwise, computes with
    one thread: sums are then always in the same order, and the ranks of one machine don't fight for its cores.
    """
    global _adapter
    if torch.cuda.is_available() or _adapter is not None:
        return
    torch.compiler.set_stance("force_eager")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)

    from megatron.core.tensor_parallel import random  # after the functions above: it may look at them when imported

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    _adapter = _CudaMeansCpu()
    _adapter.__enter__()


def initialize(
    layout: ParallelLayout,
    *,
    rank: int,
    meeting: str | dist.Store,
    local_rank: int = 0,
    timeout_seconds: float = 1800.0,
    seed: int = 0,
) -> None:
    """Join the process group and divide it as ``layout`` says. Every rank calls it, and calls ``shutdown`` at the end.

    A process can do both again and again, with other layouts.

    Args:
        rank: this process' number among ``layout.world_size``.
        meeting: where the ranks meet: a store that they are connected to, or ``file:///path`` for a fresh path on a
            filesystem that all of them share and that locks files.
        local_rank: this process' number on its node; its GPU among those that it sees.
        timeout_seconds: after which a collective call that some rank never joins fails.
        seed: of Megatron's generators (they matter with dropout only, which is off).

    Raises:
        ConnectionError: the processes don't find each other; another attempt may.
    """
    prepare()
    from megatron.core import parallel_state, tensor_parallel

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())  # a site may show each rank its own GPU only
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        dist.init_process_group(
            backend,
            **({"init_method": meeting} if isinstance(meeting, str) else {"store": meeting}),
            rank=rank,
            world_size=layout.world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
    except (dist.DistError, RuntimeError, OSError) as error:
        raise ConnectionError(
            f"rank {rank} of {layout.world_size} could not join the others within "
            f"{timeout_seconds:.0f} s: {error}. Check that all ranks started and reach that place; where a machine has "
            "several networks, name one in GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME)."
        ) from error
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        distributed_timeout_minutes=max(1, round(timeout_seconds / 60)),
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def shutdown() -> None:
    """Leave the process group; a no-op outside one."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
