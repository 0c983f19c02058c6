"""What can be checked on a login node before anything is spent. Imports neither torch nor transformers."""

from __future__ import annotations

import json
from pathlib import Path

from toolkit.algorithms import gates, objectives, references
from toolkit.config import Config
from toolkit.errors import UserError, unknown

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
    if not Path(config.data.path).exists() and ("/" not in config.data.path or config.data.path.startswith(("/", "."))):
        raise UserError(f"data.path: expected a file or a dataset id, got {config.data.path}, which does not exist")
    model = check_model("model.policy", config.model.policy, POLICIES)
    check_chat_template("model.policy", Path(config.model.policy))
    if config.model.reference is not None:
        check_model("model.reference", config.model.reference, POLICIES)
    for key, folder in (("reward.model", config.reward.model), ("evaluation.reward", config.evaluation.reward)):
        if folder is not None:
            check_model(key, folder, None)
            check_chat_template(key, Path(folder))
    _check_layout(config, model)


def check_model(key: str, folder: str, architectures: set[str] | None) -> dict:
    """The ``config.json`` of a Hugging Face folder that is complete, by its own index, and of a supported architecture.

    Args:
        architectures: the supported ones; None for a sequence classifier.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(
            f"{key}: expected a Hugging Face folder, got {folder}, which is not a directory. A model of the Hub is downloaded "
            f"first, where there is a network: metaapo prefetch … {key}={folder} --to DIR"
        )
    try:
        description = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{key}: {folder} has no config.json; is it a Hugging Face folder?") from None
    except ValueError as error:
        raise UserError(f"{key}: {folder}/config.json is not JSON: {error}") from error
    found = (description.get("architectures") or ["none named"])[0]
    if architectures is not None and found not in architectures:
        raise unknown(f"{key}: architecture", found, architectures)
    if architectures is None and not found.endswith("ForSequenceClassification"):
        raise UserError(f"{key}: expected a sequence classifier (…ForSequenceClassification), got {found} in {folder}")
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise UserError(f"{key}: {folder} is incomplete: {', '.join(missing)} missing (only safetensors are read)")
    return description


def check_chat_template(key: str, path: Path) -> None:
    """Refuse a tokenizer folder without chat template."""
    settings = path / "tokenizer_config.json"
    if not settings.exists() and not (path / "tokenizer.json").exists():
        raise UserError(f"{key}: {path} has no tokenizer (tokenizer.json, tokenizer_config.json)")
    inside = settings.exists() and json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    if not inside and not (path / "chat_template.jinja").exists() and not (path / "chat_template.json").exists():
        raise UserError(
            f"{key}: the tokenizer of {path} has no chat template, so prompts cannot be rendered. Add chat_template.jinja to the "
            "folder (from the instruct version of the model, for instance)."
        )


def _check_layout(config: Config, model: dict) -> None:
    trainer = config.trainer
    layers, heads = model["num_hidden_layers"], model["num_attention_heads"]
    groups = model.get("num_key_value_heads") or heads
    world = trainer.tensor * trainer.pipeline * trainer.data
    equation = f"{world} = tensor {trainer.tensor} x pipeline {trainer.pipeline} x data {trainer.data}"
    for what, count, by, key in (
        ("attention heads", heads, trainer.tensor, "trainer.tensor"),
        ("key-value heads", groups, trainer.tensor, "trainer.tensor"),
        ("hidden units of the MLP", model["intermediate_size"], trainer.tensor, "trainer.tensor"),
        ("layers", layers, trainer.pipeline, "trainer.pipeline"),
    ):
        if count % by:
            raise UserError(f"{key}={by} does not divide the model's {count} {what} (layout: {equation})")
