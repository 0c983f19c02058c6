"""What can be checked on a login node before anything is spent. Imports neither torch nor transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from toolkit.algorithms import gates, objectives, references
from toolkit.config import Config
from toolkit.data.prefetch import is_hub_id
from toolkit.errors import UserError
from toolkit.inference.settings import EngineSettings, SamplingSettings
from toolkit.launch import local
from toolkit.launch.models import check_chat_template, check_model, size

POLICIES = {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


def preflight(config: Config) -> None:
    """Refuse what would fail in a job: names, folders, architectures, layouts.

    Raises:
        UserError: one sentence of what was expected, what came, what to do.
    """
    method = config.method
    objective = objectives.get(method.objective.name, **method.objective.parameters)
    gates.get(method.gate.kind, **config.gate_parameters)
    references.validate(
        method.gate_reference,
        method.loss_reference,
        method.gate.kind,
        method.warm_start,
        len(config.gated),
        objective.needs_reference,
        initial_is_policy=config.model.reference in (None, config.model.policy),
    )
    if method.weight.kind == "constant" and not 0 <= method.weight.parameters.get("value", -1) <= 1:
        raise UserError(
            "method.weight.kind=constant needs method.weight.parameters.value in [0, 1], got "
            f"{method.weight.parameters.get('value')!r}"
        )
    path = Path(config.data.path)
    if not path.is_file() and not is_hub_id(config.data.path):
        what = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"data.path: expected a file or a dataset id owner/name, got {config.data.path}, which {what}")
    for name, metric in config.evaluation.metrics.items():
        if not Path(metric.file).is_file():
            raise UserError(
                f"evaluation.metrics.{name}.file: expected a Python file, got {metric.file!r}, which is none"
            )
    _check_inference(config)
    model = check_model("model.policy", config.model.policy, POLICIES)
    check_chat_template("model.policy", Path(config.model.policy))
    if config.model.reference is not None:
        check_model("model.reference", config.model.reference, POLICIES)
    for key, folder in (("reward.model", config.reward.model), ("evaluation.reward", config.evaluation.reward)):
        if folder is not None:
            judge = check_model(key, folder, None)
            check_chat_template(key, Path(folder))
            _check_workers(config, key, folder, judge)
    _check_layout(config, model)
    _check_workers(config, "model.policy", config.model.policy, model)
    if config.cluster.kind == "local":
        local.gpus(config, "trainer", local.visible(os.environ))


def _check_inference(config: Config) -> None:
    """What the engines would refuse in a job."""
    inference, sampling, evaluation = config.inference, config.method.sampling, config.evaluation
    try:
        where = "method.sampling"
        SamplingSettings(sampling.samples, sampling.temperature, sampling.top_p, sampling.max_new_tokens)
        where = "evaluation"
        SamplingSettings(1, evaluation.temperature, evaluation.top_p, sampling.max_new_tokens)
        where = "inference"
        EngineSettings(
            inference.dtype,
            inference.max_model_len,
            inference.tensor_parallel,
            inference.kv_cache_gib,
            inference.gpu_memory_utilization,
        )
    except UserError as error:
        raise UserError(f"{where}.{error}") from None


def _check_workers(config: Config, key: str, folder: str, model: dict[str, Any]) -> None:
    heads = size(key, folder, model, "num_attention_heads")
    if heads % config.inference.tensor_parallel:
        raise UserError(
            f"inference.tensor_parallel={config.inference.tensor_parallel} does not divide the {heads} attention heads of {key}"
        )


def _check_layout(config: Config, model: dict[str, Any]) -> None:
    trainer = config.trainer
    layers, heads, hidden = (
        size("model.policy", config.model.policy, model, name)
        for name in ("num_hidden_layers", "num_attention_heads", "intermediate_size")
    )
    groups = model.get("num_key_value_heads") or heads
    world = trainer.tensor * trainer.pipeline * trainer.data
    equation = f"{world} = tensor {trainer.tensor} x pipeline {trainer.pipeline} x data {trainer.data}"
    for what, count, by, key in (
        ("attention heads", heads, trainer.tensor, "trainer.tensor"),
        ("key-value heads", groups, trainer.tensor, "trainer.tensor"),
        ("hidden units of the MLP", hidden, trainer.tensor, "trainer.tensor"),
        ("layers", layers, trainer.pipeline, "trainer.pipeline"),
    ):
        if count % by:
            raise UserError(f"{key}={by} does not divide the model's {count} {what} (layout: {equation})")
