"""A Megatron GPT model of a given shape."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from toolkit.conversion.shape import ModelShape
from toolkit.training import device
from toolkit.training.layout import ParallelLayout

try:
    import transformer_engine  # noqa: F401

    _HAS_TRANSFORMER_ENGINE = torch.cuda.is_available()
except ImportError:
    _HAS_TRANSFORMER_ENGINE = False

RECOMPUTE = ("none", "selective", "full")
"""What is computed again in the backward pass: nothing, the attention, or whole layers."""


class RMSNorm(torch.nn.RMSNorm):
    """RMS norm that also works with sequence parallelism, which Megatron's own without Transformer Engine refuses.

    Each tensor-parallel rank then sees a part of the sequence only: Megatron sums the gradients of parameters marked
    ``sequence_parallel`` over these ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


class CausalAttention(MegatronModule):
    """Causal attention by torch's fused kernel, in place of Megatron's, which keeps all scores in memory.

    Shapes: query (s, b, heads, d), key and value (s, b, kv_heads, d), result (s, b, heads * d); heads are this
    tensor-parallel rank's.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str, **_: Any
    ) -> None:
        super().__init__(config=config)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Padding may only follow the tokens: no mask but the causal one is applied."""
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return context.permute(2, 0, 1, 3).flatten(2)


def transformer_config(
    shape: ModelShape, layout: ParallelLayout, dtype: torch.dtype, recompute: str
) -> TransformerConfig:
    """Megatron's description of the model: no dropout, no fusions that need a GPU, micro-batches of any length."""
    recomputation: dict[str, Any] = {}
    if recompute == "full":
        recomputation = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif recompute == "selective":
        recomputation = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.feed_forward,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        qk_layernorm=shape.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=shape.linear_bias,
        add_qkv_bias=shape.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # The weights are always loaded. Megatron's own initialisation still runs, for it marks the parameters that tensor
        # parallelism cuts: without the marks the gradient's norm would leave out all ranks but the first.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        attention_softmax_in_fp32=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        batch_p2p_sync=False,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the default one refuses variable_seq_lengths, though no MoE is here
        calculate_per_token_loss=True,  # gradients are plain sums over micro-batches and copies: see engine.py
        **recomputation,
    )


def _leave(weight: Tensor) -> None:
    """Initialise nothing."""


def build_model(config: TransformerConfig, shape: ModelShape, layout: ParallelLayout) -> GPTModel:
    """This rank's part of the model, its parameters allocated but not set."""
    model = GPTModel(
        config,
        _layer_spec(config),
        vocab_size=layout.padded_vocabulary(shape.vocabulary),
        max_sequence_length=shape.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        rope_scaling=shape.rope_factor is not None,
        rope_scaling_factor=shape.rope_factor or 8.0,
    )
    return model.to(device.current(), config.params_dtype)  # Megatron puts its own layers there, torch's norms go along


def _layer_spec(config: TransformerConfig) -> Any:
    """Transformer Engine's layers where it is installed, else Megatron's with the norm and attention from above."""
    if _HAS_TRANSFORMER_ENGINE:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = [layer] * get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
