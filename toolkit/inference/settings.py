"""What an engine and a sampling call are told."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.config import Config
from toolkit.errors import UserError, unknown

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class EngineSettings:
    """How one vLLM engine runs; policy and reward model each have their own.

    Attributes:
        dtype: of weights and arithmetic; ``auto`` takes the model folder's.
        max_model_len: tokens of the longest sequence, prompt and response together.
        tensor_parallel: GPUs (of one node) that share the engine's weights.
        kv_cache_gib: memory of the key-value cache, GiB; None (GPU only): what ``gpu_memory_utilization`` leaves.
        gpu_memory_utilization: share of each GPU's memory that the engine may fill, in (0, 1]; unused with ``kv_cache_gib``.

    Raises:
        UserError: a value out of range.
    """

    dtype: str
    max_model_len: int
    tensor_parallel: int = 1
    kv_cache_gib: float | None = None
    gpu_memory_utilization: float = 0.9

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown("dtype of an inference engine", self.dtype, DTYPES)
        _positive(self, "max_model_len", "tensor_parallel", "gpu_memory_utilization")
        if self.kv_cache_gib is not None:
            _positive(self, "kv_cache_gib")
        if self.gpu_memory_utilization > 1:
            raise UserError(f"gpu_memory_utilization: expected a share in (0, 1], got {self.gpu_memory_utilization}")


def engine_settings(config: Config) -> EngineSettings:
    """Of each engine of a worker: the policy's and one per reward model, which share the GPU's memory in equal parts."""
    inference = config.inference
    gated = any(config.gated)
    rewards = {config.reward.model} if gated and "annotate" in inference.does else set()
    if config.evaluates:
        rewards.add(config.evaluation_reward)
    engines = len(rewards) + (config.evaluates or (gated and "sample" in inference.does))
    return EngineSettings(
        dtype=inference.dtype,
        max_model_len=inference.max_model_len,
        tensor_parallel=inference.tensor_parallel,
        kv_cache_gib=inference.kv_cache_gib,
        gpu_memory_utilization=inference.gpu_memory_utilization / max(1, engines),
    )


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are drawn.

    Attributes:
        samples: responses to each prompt (K).
        temperature: 0 takes the likeliest token.
        top_p: nucleus sampling; 1 samples from the whole distribution.
        max_new_tokens: tokens of the longest response, its end-of-turn token included.

    Raises:
        UserError: a value out of range.
    """

    samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        _positive(self, "samples", "max_new_tokens", "top_p")
        if self.temperature < 0:
            raise UserError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.top_p > 1:
            raise UserError(f"top_p: expected a probability in (0, 1], got {self.top_p}")


def _positive(settings: object, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) > 0:
            raise UserError(f"{name}: expected a value above 0, got {getattr(settings, name)!r}")
