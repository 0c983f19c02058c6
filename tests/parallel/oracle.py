"""Plain dense computation of what the parallel trainer should give: one sequence at a time, in any float type."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from tests.parallel.problems import LEARNING, meta_weighted_dpo
from toolkit.training.microbatches import Pair


@dataclass(frozen=True)
class Dense:
    """Results of one optimizer step: log-probs (B, 4), losses (B,), gradients before clipping and weights after it."""

    logprobs: Tensor
    losses: Tensor
    gradients: dict[str, Tensor]
    norm: float
    weights: dict[str, Tensor]


def load(folder: Path, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, weights) of a Hugging Face folder."""
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(file))
    return json.loads((folder / "config.json").read_text()), {name: w.to(dtype) for name, w in weights.items()}


def logits(config: Mapping[str, Any], weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """(n, vocabulary) of one sequence (n,): a decoder as Llama, Qwen2 and Qwen3 have it, in the weights' type."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    n = len(tokens)
    x = weights["model.embed_tokens.weight"][tokens]
    cos, sin = (part.to(x.dtype) for part in rotary(config["rope_parameters"], size, n))

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]) * weights[name]

    def rotate(x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."

        def linear(x: Tensor, name: str, prefix: str = prefix) -> Tensor:
            return F.linear(x, weights[f"{prefix}{name}.weight"], weights.get(f"{prefix}{name}.bias"))

        y = norm(x, f"{prefix}input_layernorm.weight")
        q, k, v = (linear(y, f"self_attn.{letter}_proj").view(n, -1, size).transpose(0, 1) for letter in "qkv")
        if f"{prefix}self_attn.q_norm.weight" in weights:
            q, k = norm(q, f"{prefix}self_attn.q_norm.weight"), norm(k, f"{prefix}self_attn.k_norm.weight")
        q, k = rotate(q), rotate(k)
        k, v = (part.repeat_interleave(heads // kv_heads, 0) for part in (k, v))
        scores = q @ k.transpose(1, 2) / size**0.5
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), "self_attn.o_proj")
        y = norm(x, f"{prefix}post_attention_layernorm.weight")
        x = x + linear(F.silu(linear(y, "mlp.gate_proj")) * linear(y, "mlp.up_proj"), "mlp.down_proj")
    head = weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return norm(x, "model.norm.weight") @ head.T


def rotary(rope: Mapping[str, Any], size: int, n: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (n, size), in fp32 as every implementation has them."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (smooth + (1 - smooth) / rope["factor"])
    angles = torch.outer(torch.arange(n, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def sequence_logprob(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], sequence: NDArray[np.int32], prompt_length: int
) -> Tensor:
    """Sum of log p over the response's tokens."""
    tokens = torch.from_numpy(sequence.astype(np.int64))
    table = logits(config, weights, tokens).log_softmax(-1)
    return sum(table[t - 1, tokens[t]] for t in range(prompt_length, len(tokens)))


def pair_logprobs(config: Mapping[str, Any], weights: Mapping[str, Tensor], pairs: Sequence[Pair]) -> Tensor:
    """(B, 4); 0 where a sequence is absent."""
    zero = next(iter(weights.values())).new_zeros(())
    rows = [
        [zero if s is None else sequence_logprob(config, weights, s, pair.prompt_length) for s in pair.sequences]
        for pair in pairs
    ]
    return torch.stack([torch.stack(row) for row in rows])


def step(folder: Path, pairs: Sequence[Pair], reference: NDArray[np.float64], dtype: torch.dtype) -> Dense:
    """One step of AdamW on the mean loss of the pairs that aren't masked, with ``problems.LEARNING``."""
    config, weights = load(folder, dtype)
    for weight in weights.values():
        weight.requires_grad_()
    logprobs = pair_logprobs(config, weights, pairs)
    real = torch.tensor([pair.sequences[0] is not None for pair in pairs])
    losses = meta_weighted_dpo(logprobs, torch.from_numpy(reference).to(dtype), pairs, torch.arange(len(pairs)))
    (losses.sum() / real.sum()).backward()
    gradients = {name: weight.grad.clone() for name, weight in weights.items()}
    groups = [
        {"params": [w for w in weights.values() if w.ndim > 1], "weight_decay": LEARNING["weight_decay"]},
        {"params": [w for w in weights.values() if w.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=LEARNING["learning_rate"], betas=LEARNING["betas"], eps=LEARNING["epsilon"])
    norm = torch.nn.utils.clip_grad_norm_(weights.values(), LEARNING["clip_gradient"])
    adam.step()
    after = {name: weight.detach() for name, weight in weights.items()}
    return Dense(logprobs.detach(), losses.detach(), gradients, float(norm), after)
