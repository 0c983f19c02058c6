from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from toolkit.conversion.shape import ModelShape
from toolkit.conversion.weights import Weight, from_shards, global_name, stage_weights, to_shard, weight_map

SHAPE = ModelShape(
    model_type="llama",
    layers=4,
    hidden=8,
    heads=8,
    kv_heads=4,
    head_dim=2,
    feed_forward=12,
    vocabulary=13,
    max_positions=64,
    norm_epsilon=1e-5,
    rope_theta=1e4,
)
SHAPES = {
    "plain": SHAPE,
    "biases": replace(SHAPE, qkv_bias=True, linear_bias=True),
    "qwen3": replace(SHAPE, head_dim=6, qk_norm=True),
    "tied": replace(SHAPE, tied=True, qkv_bias=True),
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shards_go_back_to_what_they_were_cut_from(shape: ModelShape, size: int) -> None:
    for weight in weight_map(shape).values():
        sources = [torch.randn(sizes) for sizes in weight.shapes]
        shards = [to_shard(weight, sources, shape, rank, size) for rank in range(size)]
        assert len({shard.shape for shard in shards}) == 1, weight.name
        for found, expected in zip(from_shards(weight, shards, shape), sources, strict=True):
            assert torch.equal(found, expected), weight.name


def test_qkv_keeps_each_group_of_heads_together() -> None:
    weight = weight_map(replace(SHAPE, heads=4, kv_heads=2, head_dim=1))[
        "decoder.layers.0.self_attention.linear_qkv.weight"
    ]
    queries, keys, values = torch.arange(4.0), torch.arange(10.0, 12.0), torch.arange(20.0, 22.0)
    sources = [part[:, None] for part in (queries, keys, values)]
    shape = replace(SHAPE, heads=4, kv_heads=2, head_dim=1)
    assert to_shard(weight, sources, shape, 0, 1).flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert to_shard(weight, sources, shape, 1, 2).flatten().tolist() == [2, 3, 11, 21]


def test_each_rank_has_its_rows_of_the_gate_and_of_the_up_projection() -> None:
    weight = Weight("x", ("gate", "up"), ((4, 1), (4, 1)), "gate_up")
    sources = [torch.arange(4.0)[:, None], torch.arange(10.0, 14.0)[:, None]]
    assert to_shard(weight, sources, SHAPE, 1, 2).flatten().tolist() == [2, 3, 12, 13]


def test_padding_rows_are_zero_wherever_they_fall() -> None:
    weight = weight_map(SHAPE)["embedding.word_embeddings.weight"]
    table = torch.ones(13, 8)
    shards = [to_shard(weight, [table], replace(SHAPE, vocabulary=13), rank, 8) for rank in range(8)]
    assert [int(shard.sum()) // 8 for shard in shards] == [2, 2, 2, 2, 2, 2, 1, 0]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_stages_export_every_source_once(shape: ModelShape) -> None:
    every = {source for weight in weight_map(shape).values() for source in weight.sources}
    for stages in (1, 2, 4):
        sources = [
            s for stage in range(stages) for weight in stage_weights(shape, stage, stages) for s in weight.sources
        ]
        assert sorted(sources) == sorted(every)


@pytest.mark.parametrize(
    ("local", "expected"),
    [
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("decoder.layers.1.mlp.linear_fc1.weight", "decoder.layers.7.mlp.linear_fc1.weight"),
        ("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.6.input_layernorm.weight"),
        ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "decoder.layers.6.pre_mlp_layernorm.weight"),
    ],
)
def test_global_name(local: str, expected: str) -> None:
    assert global_name(local, 6) == expected
