"""Qwen2 and Qwen2.5: Llama's block with biases on the query, key and value projections."""

from __future__ import annotations

from toolkit.conversion.shape import ConfigReader, ModelShape


def shape(config: ConfigReader) -> ModelShape:
    """The biases are part of the family: ``config.json`` doesn't mention them."""
    return config.shape(qkv_bias=True, linear_bias=False, qk_norm=False, head_dim=None)
