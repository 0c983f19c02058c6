"""Whether a Hugging Face folder is what a role can load: description, weights, tokenizer. Reads headers, not weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from toolkit.errors import UserError, unknown

INDEX = "model.safetensors.index.json"


def check_model(key: str, folder: str, architectures: set[str] | None) -> dict[str, Any]:
    """The ``config.json`` of a Hugging Face folder that is complete, by its own index, and of a supported architecture.

    Args:
        key: of the configuration, for messages.
        architectures: the supported ones; None for a sequence classifier.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(
            f"{key}: expected a Hugging Face folder, got {folder}, which is not a directory. A model of the Hub is downloaded "
            f"first, where there is a network: metaapo prefetch … {key}={folder} --to DIR"
        )
    if not (path / "config.json").exists():
        raise UserError(f"{key}: {folder} has no config.json; is it a Hugging Face folder?")
    description = _json(key, path / "config.json")
    found = (description.get("architectures") or ["none named"])[0]
    if architectures is not None and found not in architectures:
        raise unknown(f"{key}: architecture", found, architectures)
    if architectures is None and not found.endswith("ForSequenceClassification"):
        raise UserError(f"{key}: expected a sequence classifier (…ForSequenceClassification), got {found} in {folder}")
    names = ["model.safetensors"]
    if (path / INDEX).exists():
        shards = _json(key, path / INDEX).get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(f"{key}: {path / INDEX} has no weight_map; is it complete?")
        names = sorted(set(shards.values()))
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise UserError(f"{key}: {folder} is incomplete: {', '.join(missing)} missing (only safetensors are read)")
    for name in names:
        try:
            read_header(path / name)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    return description


def size(key: str, folder: str, description: dict[str, Any], name: str) -> int:
    """A size that a model's ``config.json`` must name."""
    found = description.get(name)
    if not isinstance(found, int) or found < 1:
        raise UserError(f"{key}: expected a number {name} in {folder}/config.json, got {found!r}")
    return found


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """The tensors that a safetensors file describes, by name: ``dtype``, ``shape``, ``data_offsets``.

    Raises:
        UserError: the file does not hold what it describes.
    """
    there = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if 8 + length <= there else b""  # of another kind of file, a length means nothing
    try:
        tensors = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        complete = there == 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f"{file} is no complete safetensors file (an interrupted download, or a Git LFS pointer?)")
    return tensors


def check_chat_template(key: str, path: Path) -> None:
    """Refuse a tokenizer folder without chat template."""
    settings = path / "tokenizer_config.json"
    if not settings.exists() and not (path / "tokenizer.json").exists():
        raise UserError(f"{key}: {path} has no tokenizer (tokenizer.json, tokenizer_config.json)")
    inside = settings.exists() and _json(key, settings).get("chat_template")
    if not inside and not (path / "chat_template.jinja").exists() and not (path / "chat_template.json").exists():
        raise UserError(
            f"{key}: the tokenizer of {path} has no chat template, so prompts cannot be rendered. Add chat_template.jinja to the "
            "folder (from the instruct version of the model, for instance)."
        )


def _json(key: str, file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{key}: {file} is not JSON: {error} (an interrupted download, or a Git LFS pointer?)"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{key}: expected keys and values in {file}, got {str(found)[:40]}")
    return found
