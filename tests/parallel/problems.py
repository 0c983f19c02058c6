"""Small models and batches that every layout must treat alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.training.microbatches import MASKED, Pair

VOCABULARY = 131  # a prime: every tensor-parallel layout has to pad
LEARNING: dict[str, Any] = {
    "learning_rate": 1e-2,
    "betas": (0.9, 0.95),
    "epsilon": 1e-3,  # large enough that Adam doesn't turn the rounding of tiny gradients into whole steps
    "weight_decay": 0.1,
    "clip_gradient": 1.0,
    "schedule": "constant",
    "warmup_fraction": 0.0,
}
_COMMON = {
    "vocab_size": VOCABULARY,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "intermediate_size": 144,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"hidden_size": 128, "tie_word_embeddings": True, "rope_parameters": _LLAMA3}),
    "llama-bias": ("Llama", {"hidden_size": 128, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {"hidden_size": 128, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"hidden_size": 96, "head_dim": 32, "tie_word_embeddings": False}),
}


def make_model(name: str, folder: Path, seed: int = 0) -> Path:
    """A random model saved by transformers. Norms and biases too are random: at one and zero they would hide faults."""
    import transformers

    family, sizes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**_COMMON, **sizes})
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (1.0 + 0.1 * noise) if parameter.ndim == 1 else 0.08 * noise
    model.save_pretrained(folder)
    return folder


def make_pairs(seed: int = 0) -> list[Pair]:
    """Eight pairs of uneven lengths: four with both halves, three without the online one, one masked."""
    generator = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> np.ndarray:
        return generator.integers(0, VOCABULARY, generator.integers(low, high)).astype(np.int32)

    pairs = []
    for number in range(8):
        prompt = tokens(1, 12)
        sequences = [np.concatenate([prompt, tokens(1, 40)]) for _ in range(4)]
        halves = sequences if number % 2 == 0 else [*sequences[:2], None, None]
        pairs.append(MASKED if number == 5 else Pair(len(prompt), tuple(halves)))
    return pairs


def meta_weighted_dpo(logprobs: Tensor, reference: Tensor, pairs: Sequence[Pair], positions: Tensor) -> Tensor:
    """(n,) losses of the pairs at ``positions``: w L_off + (1 - w) L_on, or L_off alone, or 0 if masked."""
    margins = logprobs - reference
    offline, online = (-F.logsigmoid(0.1 * (margins[:, i] - margins[:, i + 1])) for i in (0, 2))
    weight = torch.sigmoid(positions.to(logprobs) - 3.0)
    has_online = torch.tensor([pairs[p].sequences[2] is not None for p in positions.tolist()])
    real = torch.tensor([pairs[p].sequences[0] is not None for p in positions.tolist()])
    losses = torch.where(has_online, weight * offline + (1 - weight) * online, offline)
    return torch.where(real, losses, torch.zeros_like(losses))
