from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit.conversion.registry import read_shape
from toolkit.conversion.shape import ModelShape
from toolkit.errors import UserError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def read(folder: Path, **changes: Any) -> ModelShape:
    config = {**CONFIG, **changes}
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value != "absent"})
    )
    return read_shape(folder)


def test_llama(tmp_path: Path) -> None:
    assert read(tmp_path, tie_word_embeddings=True, head_dim=None, rope_theta=5e5, rope_scaling=LLAMA3) == ModelShape(
        model_type="llama",
        layers=2,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        feed_forward=96,
        vocabulary=100,
        max_positions=4096,
        norm_epsilon=1e-5,
        rope_theta=5e5,
        rope_factor=32.0,
        tied=True,
    )


def test_rope_as_transformers_5_writes_it(tmp_path: Path) -> None:
    old = read(tmp_path, rope_theta=5e5, rope_scaling=LLAMA3)
    assert read(tmp_path, rope_parameters={**LLAMA3, "rope_theta": 5e5}) == old


def test_what_the_families_add(tmp_path: Path) -> None:
    assert read(tmp_path, num_key_value_heads="absent").kv_heads == 4
    assert read(tmp_path, attention_bias=True, mlp_bias=True).linear_bias
    qwen2 = read(tmp_path, architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    assert (qwen2.qkv_bias, qwen2.linear_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = read(tmp_path, architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)
    assert read(tmp_path, architectures="absent", model_type="qwen3").qk_norm


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GemmaForCausalLM"]},
            "GemmaForCausalLM.*LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "unsupported architecture"),
        ({"architectures": "absent", "model_type": "absent"}, "unsupported architecture None"),
        ({"hidden_size": "absent"}, "hidden_size must be a whole number"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*'silu'"),
        ({"attention_bias": True}, "expected both or neither"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'.*default, llama3"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 8.0}}, "high_freq_factor=8.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, r"num_attention_heads\(4\) % num_key_value_heads\(3\)"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, r"hidden_size\(64\)"),
        ({"architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, "attention_bias=True"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, **changes)


def test_missing_or_broken_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model folder"):
        read_shape(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no config\.json"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_shape(tmp_path)


def test_needs_no_torch() -> None:
    code = "import sys, toolkit.conversion.registry, toolkit.training.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
