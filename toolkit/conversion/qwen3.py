"""Qwen3 (dense): Llama's block with RMS norms on each head's queries and keys, and a head size of its own."""

from __future__ import annotations

from toolkit.conversion.shape import ConfigReader, ModelShape


def shape(config: ConfigReader) -> ModelShape:
    """``head_dim`` is independent of ``hidden_size / num_attention_heads``; 128 where ``config.json`` omits it."""
    config.expect("attention_bias", False, False)
    return config.shape(qkv_bias=False, linear_bias=False, qk_norm=True, head_dim=128)
