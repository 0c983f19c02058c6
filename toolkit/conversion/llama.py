"""Llama (2, 3, 3.x and what shares their code, such as Tulu 3)."""

from __future__ import annotations

from toolkit.conversion.shape import ConfigReader, ModelShape
from toolkit.errors import UserError


def shape(config: ConfigReader) -> ModelShape:
    """Biases come on all linear layers or on none: Megatron-core has one switch for the attention's and the MLP's."""
    attention, mlp = bool(config.get("attention_bias", False)), bool(config.get("mlp_bias", False))
    if attention != mlp:
        raise UserError(
            f"{config.source}: attention_bias={attention} with mlp_bias={mlp} is not supported; expected both or neither"
        )
    return config.shape(qkv_bias=attention, linear_bias=attention, qk_norm=False, head_dim=None)
