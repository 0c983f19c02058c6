"""Which Hugging Face tensors make up which Megatron parameter, and how tensor parallelism cuts them.

Pure functions: tensor-parallel rank and size come as arguments. Parameters go by Megatron's names for its local layer
specification, with the layer's number in the whole model (``decoder.layers.17.mlp.linear_fc1.weight``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from toolkit.conversion.shape import ModelShape

Kind = Literal["replicated", "columns", "vocabulary", "gate_up", "qkv"]

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"

# Transformer Engine fuses the norms into the linear layers that follow them, and names them so.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter.

    Attributes:
        name: Megatron's name.
        sources: Hugging Face names of the tensors it is made of, in order.
        shapes: the shapes of these tensors.
        kind: how it is put together and cut: ``replicated`` on all tensor-parallel ranks; ``columns`` (second
            dimension) shared evenly; ``vocabulary``: rows shared evenly, padded with zeros where they don't divide;
            ``gate_up``: each rank holds its rows of the gate, then its rows of the up projection; ``qkv``: per
            key/value head its queries, then its key, then its value.
    """

    name: str
    sources: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kind: Kind


def weight_map(shape: ModelShape) -> dict[str, Weight]:
    """Every parameter of the model by its Megatron name, in the order of the layers.

    With tied embeddings ``output_layer.weight`` is there too, made of the embedding: a last pipeline stage of its own
    holds a copy.
    """
    table = ((shape.vocabulary, shape.hidden),)
    output = "model.embed_tokens.weight" if shape.tied else "lm_head.weight"
    weights = [
        Weight(EMBEDDING, ("model.embed_tokens.weight",), table, "vocabulary"),
        *(weight for layer in range(shape.layers) for weight in _block(shape, layer)),
        Weight("decoder.final_layernorm.weight", ("model.norm.weight",), ((shape.hidden,),), "replicated"),
        Weight(OUTPUT, (output,), table, "vocabulary"),
    ]
    return {weight.name: weight for weight in weights}


def _block(shape: ModelShape, layer: int) -> Iterator[Weight]:
    """The parameters of one transformer layer."""

    def weight(name: str, sources: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], kind: Kind) -> Weight:
        prefixed = tuple(f"model.layers.{layer}.{source}" for source in sources)
        return Weight(f"decoder.layers.{layer}.{name}", prefixed, shapes, kind)

    def norm(name: str, source: str, size: int) -> Weight:
        return weight(f"{name}.weight", (f"{source}.weight",), ((size,),), "replicated")

    def linear(
        name: str, sources: tuple[str, ...], rows: tuple[int, ...], columns: int, kind: Kind, bias: bool
    ) -> Iterator[Weight]:
        matrices = tuple((count, columns) for count in rows)
        yield weight(f"{name}.weight", tuple(f"{source}.weight" for source in sources), matrices, kind)
        if bias:  # of a layer cut by columns it is added after the outputs are summed: every rank holds all of it
            vectors = tuple((count,) for count in rows)
            kind = "replicated" if kind == "columns" else kind
            yield weight(f"{name}.bias", tuple(f"{source}.bias" for source in sources), vectors, kind)

    hidden, wide = shape.hidden, shape.feed_forward
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    projections = tuple(f"self_attn.{letter}_proj" for letter in "qkv")
    rows = (queries, keys, keys)
    yield norm("input_layernorm", "input_layernorm", hidden)
    yield from linear("self_attention.linear_qkv", projections, rows, hidden, "qkv", shape.qkv_bias)
    if shape.qk_norm:
        yield norm("self_attention.q_layernorm", "self_attn.q_norm", shape.head_dim)
        yield norm("self_attention.k_layernorm", "self_attn.k_norm", shape.head_dim)
    output = ("self_attn.o_proj",)
    yield from linear("self_attention.linear_proj", output, (hidden,), queries, "columns", shape.linear_bias)
    yield norm("pre_mlp_layernorm", "post_attention_layernorm", hidden)
    gate_up = ("mlp.gate_proj", "mlp.up_proj")
    yield from linear("mlp.linear_fc1", gate_up, (wide, wide), hidden, "gate_up", shape.linear_bias)
    yield from linear("mlp.linear_fc2", ("mlp.down_proj",), (hidden,), wide, "columns", shape.linear_bias)


def stage_weights(shape: ModelShape, stage: int, stages: int) -> list[Weight]:
    """The parameters that pipeline stage ``stage`` of ``stages`` exports: tied embeddings once, by the first stage."""
    per_stage = shape.layers // stages
    layers = range(stage * per_stage, (stage + 1) * per_stage)

    def belongs(name: str) -> bool:
        if name.startswith("decoder.layers."):
            return int(name.split(".")[2]) in layers
        if name == EMBEDDING:
            return stage == 0
        return stage == stages - 1 and not (name == OUTPUT and shape.tied)

    return [weight for name, weight in weight_map(shape).items() if belongs(name)]


def global_name(name: str, first_layer: int) -> str:
    """A parameter's name in the map, from its name within a pipeline stage whose layers begin at ``first_layer``."""
    for fused, plain in _FUSED_NORMS.items():
        name = name.replace(fused, plain)
    if name.startswith("decoder.layers."):
        layer, rest = name.removeprefix("decoder.layers.").split(".", 1)
        name = f"decoder.layers.{int(layer) + first_layer}.{rest}"
    return name


def to_shard(weight: Weight, sources: Sequence[Tensor], shape: ModelShape, rank: int, size: int) -> Tensor:
    """What tensor-parallel rank ``rank`` of ``size`` holds of a parameter.

    Args:
        sources: its Hugging Face tensors, or anything that gives a tensor when sliced, such as safetensors' lazy
            slices: only what the rank needs is read.
    """

    def rows(source: Tensor, count: int) -> Tensor:
        return source[rank * count // size : (rank + 1) * count // size]

    counts = [source_shape[0] for source_shape in weight.shapes]
    match weight.kind:
        case "replicated":
            return sources[0][:]
        case "columns":
            width = weight.shapes[0][1]
            return sources[0][:, rank * width // size : (rank + 1) * width // size]
        case "vocabulary":
            share = -(-shape.vocabulary // size)
            start, stop = (min(edge * share, shape.vocabulary) for edge in (rank, rank + 1))
            part = sources[0][start:stop]
            return torch.cat([part, part.new_zeros(share - len(part), *part.shape[1:])])
        case "gate_up":
            return torch.cat([rows(source, count) for source, count in zip(sources, counts, strict=True)])
        case "qkv":
            parts = [rows(source, count) for source, count in zip(sources, counts, strict=True)]
            groups = shape.kv_heads // size
            return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def from_shards(weight: Weight, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
    """The Hugging Face tensors of a parameter, in the order of ``weight.sources``; the inverse of ``to_shard``.

    Args:
        shards: what each tensor-parallel rank holds, in the order of the ranks (one is enough if ``replicated``).
    """
    match weight.kind:
        case "replicated":
            return [shards[0]]
        case "columns":
            return [torch.cat(list(shards), dim=1)]
        case "vocabulary":
            return [torch.cat(list(shards))[: shape.vocabulary]]
        case "gate_up":
            return [torch.cat(halves) for halves in zip(*(shard.chunk(2) for shard in shards), strict=True)]
        case "qkv":
            grouped = torch.cat(list(shards)).unflatten(0, (shape.kv_heads, -1))
            queries = shape.heads // shape.kv_heads * shape.head_dim
            return [part.flatten(0, 1) for part in grouped.split([queries, shape.head_dim, shape.head_dim], dim=1)]
