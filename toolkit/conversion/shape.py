"""The shape of a decoder-only transformer, read from a Hugging Face ``config.json``. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import UserError

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class ModelShape:
    """All that Megatron has to know of a model, whatever the family it comes from.

    Attributes:
        model_type: the family's name in ``config.json``.
        layers, hidden, heads, kv_heads, head_dim, feed_forward, vocabulary: the usual sizes.
        max_positions: longest sequence the model was made for, in tokens.
        norm_epsilon: of the RMS norms.
        rope_theta: base period of the rotary position embedding.
        rope_factor: how far Llama 3's rotary scaling stretches the context; None without scaling.
        tied: whether the output layer is the embedding.
        qkv_bias: biases on the query, key and value projections.
        linear_bias: biases on all linear layers of a block (implies ``qkv_bias``).
        qk_norm: RMS norms on each head's queries and keys.
    """

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    max_positions: int
    norm_epsilon: float
    rope_theta: float
    rope_factor: float | None = None
    tied: bool = False
    qkv_bias: bool = False
    linear_bias: bool = False
    qk_norm: bool = False


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder. Raises UserError if the folder or the file is missing or no JSON object."""
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise UserError(f"no model folder at {folder}; expected a folder in Hugging Face format")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"incomplete model folder {folder}: no {CONFIG_FILE}; download the model again") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); download the model again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object; got {type(config).__name__}")
    return config


class ConfigReader:
    """Reads fields of a ``config.json``, and refuses by name what the toolkit would otherwise silently get wrong."""

    def __init__(self, config: dict[str, Any], source: str) -> None:
        self.config = config
        self.source = source

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value, or ``default`` where it is absent or null."""
        value = self.config.get(name)
        return default if value is None else value

    def positive(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{self.source}: {name} must be a whole number of at least 1; got {value!r}")
        return value

    def expect(self, name: str, allowed: Any, default: Any) -> None:
        """Refuse any value but ``allowed``."""
        value = self.get(name, default)
        if value != allowed:
            raise UserError(f"{self.source}: {name}={value!r} is not supported; expected {allowed!r}")

    def rope(self) -> tuple[float, float | None]:
        """(theta, Llama 3 scaling factor or None), from ``rope_parameters`` or from the older two fields.

        Megatron-core fixes all numbers of Llama 3's rule but the factor; other numbers, and other rules, are refused.
        """
        rope = dict(self.get("rope_parameters") or self.get("rope_scaling") or {})
        theta = float(rope.get("rope_theta") or self.get("rope_theta", 10000.0))
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if rope.get("partial_rotary_factor") not in (None, 1.0) or self.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(f"{self.source}: partial_rotary_factor other than 1 is not supported")
        if kind == "default":
            return theta, None
        if kind != "llama3":
            raise UserError(f"{self.source}: rope_type {kind!r} is not supported; expected one of: default, llama3")
        fixed = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
        for name, value in fixed.items():
            if rope.get(name, value) != value:
                raise UserError(f"{self.source}: rope {name}={rope[name]!r} is not supported; expected {value}")
        return theta, float(rope["factor"])

    def shape(self, *, qkv_bias: bool, linear_bias: bool, qk_norm: bool, head_dim: int | None) -> ModelShape:
        """The fields that all supported families share; ``head_dim`` is the family's default (None: hidden / heads)."""
        self.expect("hidden_act", "silu", "silu")
        for name in ("use_sliding_window", "use_mrope", "quantization_config"):
            if self.get(name):
                raise UserError(f"{self.source}: {name} is not supported; use a model without it")
        if any(kind != "full_attention" for kind in self.get("layer_types", [])):
            raise UserError(f"{self.source}: layer_types other than full_attention are not supported")
        heads, hidden = self.positive("num_attention_heads"), self.positive("hidden_size")
        if self.get("head_dim", head_dim) is None and hidden % heads:
            raise UserError(f"{self.source}: hidden_size({hidden}) is not a multiple of num_attention_heads({heads})")
        theta, factor = self.rope()
        kv_heads = self.positive("num_key_value_heads", heads)
        if heads % kv_heads:
            raise UserError(f"{self.source}: num_attention_heads({heads}) % num_key_value_heads({kv_heads}) != 0")
        return ModelShape(
            model_type=self.get("model_type"),
            layers=self.positive("num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=self.positive("head_dim", head_dim or hidden // heads),
            feed_forward=self.positive("intermediate_size"),
            vocabulary=self.positive("vocab_size"),
            max_positions=self.positive("max_position_embeddings", 2048),
            norm_epsilon=float(self.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_factor=factor,
            tied=bool(self.get("tie_word_embeddings", False)),
            qkv_bias=qkv_bias,
            linear_bias=linear_bias,
            qk_norm=qk_norm,
        )
