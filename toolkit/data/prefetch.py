"""Models and data brought to where jobs without a network can read them: ``metaapo prefetch``, on a node that has one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from toolkit.config import Config
from toolkit.errors import UserError

# Weights as safetensors, tokenizer, template, descriptions; no pickles, no code, no other formats of the same weights.
MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
]
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
DATA_FILE = re.compile(r"\.(parquet|arrow|jsonl?(\.gz|\.zst)?)$")
MODELS = ("model.policy", "model.reference", "reward.model", "evaluation.reward")


def fetch(config: Config, to: Path, say: Callable[[str], object] = print) -> dict[str, str]:
    """Download what the configuration names by hub id into ``to``: a folder for each model, a Parquet file for the data's split.

    Local paths are left alone. What is there already is not downloaded again.

    Returns:
        Key -> local path, for those that were named by hub id.

    Raises:
        UserError: no network, no access, or a model without safetensors.
    """
    found: dict[str, str] = {}
    for key in MODELS:
        group, _, name = key.partition(".")
        given = getattr(getattr(config, group), name)
        if given and is_hub_id(given):
            folder = to / "models" / given.replace("/", "--")
            if str(folder) not in found.values():
                say(f"{key}: {given} -> {folder}")
                _model(key, given, folder)
            found[key] = str(folder)
    if is_hub_id(config.data.path):
        file = to / "data" / f"{config.data.path.replace('/', '--')}.{config.data.split}.parquet"
        say(f"data.path: {config.data.path} [{config.data.split}] -> {file}")
        if not file.exists():
            _data(config.data.path, config.data.split, file)
        found["data.path"] = str(file)
    return found


def is_hub_id(name: str) -> bool:
    """Whether a path of the configuration names something on the Hub: ``owner/name``, no data file, nothing that is here."""
    return HUB_ID.fullmatch(name) is not None and DATA_FILE.search(name) is None and not Path(name).exists()


def _model(key: str, name: str, folder: Path) -> None:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise _lacking(error) from None
    try:
        snapshot_download(name, local_dir=folder, allow_patterns=MODEL_FILES, ignore_patterns=["*/*"])
    except Exception as error:  # of several libraries, without a common class
        raise _refused(key, name, error) from error
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{key}: {name} has no weights as safetensors, and nothing else is read (pickles can run code). "
            "Take a version of the model that has them, or convert it with transformers: save_pretrained(FOLDER)"
        )


def _data(name: str, split: str, file: Path) -> None:
    try:
        import datasets
    except ImportError as error:
        raise _lacking(error) from None
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise _refused("data.path", f"{name} [{split}]", error) from error
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}")
    rows.to_parquet(str(unfinished))
    unfinished.rename(file)


def _lacking(error: ImportError) -> UserError:
    return UserError(
        f"prefetch needs {error.name}, which is not installed here; in a clone of this project: pip install '.[trainer]'"
    )


def _refused(key: str, name: str, error: Exception) -> UserError:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        advice = "its owner gives access on its page on the Hub; then log in here: hf auth login"
    elif kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        advice = "there is no such repository, or it is private: check the name, or log in: hf auth login"
    elif kinds & {"OSError", "TimeoutError"}:
        advice = (
            "this machine may have no network: call it on a login or data-transfer node; behind a proxy, set HTTPS_PROXY; "
            "HF_HUB_OFFLINE must not be 1"
        )
    else:
        advice = "check the name and, for data, data.split"
    return UserError(
        f"{key}: could not download {name}: {advice}\n  ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
    )
