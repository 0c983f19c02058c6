"""The supported architectures, by the name that ``config.json`` gives them."""

from __future__ import annotations

from pathlib import Path

from toolkit.conversion import llama, qwen2, qwen3
from toolkit.conversion.shape import CONFIG_FILE, ConfigReader, ModelShape, read_config
from toolkit.errors import UserError

ARCHITECTURES = {
    "LlamaForCausalLM": llama.shape,
    "Qwen2ForCausalLM": qwen2.shape,
    "Qwen3ForCausalLM": qwen3.shape,
}
_BY_MODEL_TYPE = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def read_shape(folder: Path) -> ModelShape:
    """The shape of the model in ``folder``.

    Raises:
        UserError: no such folder, no ``config.json``, an unsupported architecture (the supported ones are listed), or
            a supported one with a feature that the toolkit doesn't have.
    """
    config = read_config(folder)
    names = config.get("architectures") or [_BY_MODEL_TYPE.get(config.get("model_type"), config.get("model_type"))]
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise UserError(
            f"unsupported architecture {', '.join(map(str, names))} in {folder / CONFIG_FILE}; "
            f"expected one of: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[names[0]](ConfigReader(config, str(folder / CONFIG_FILE)))
