from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from toolkit.errors import UserError
from toolkit.inference.model_folder import check_reward_model, check_same_tensors, tensor_shapes


def folder(
    path: Path, tied: bool = False, index: dict[str, str] | None = None, **files: dict[str, tuple[int, ...]]
) -> Path:
    (path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    for name, shapes in files.items():
        tensors = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
        save_file(tensors, path / f"{name}.safetensors")
    if index is not None:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


def test_one_file(tmp_path: Path) -> None:
    made = folder(tmp_path, model={"a": (2, 3), "lm_head.weight": (4,)})
    assert tensor_shapes(made) == {"a": (2, 3), "lm_head.weight": (4,)}


def test_tied_output_weights_are_the_embeddings(tmp_path: Path) -> None:
    assert tensor_shapes(folder(tmp_path, tied=True, model={"a": (2, 3), "lm_head.weight": (4,)})) == {"a": (2, 3)}


def test_files_of_an_index(tmp_path: Path) -> None:
    index = {"a": "x.safetensors", "b": "y.safetensors"}
    assert tensor_shapes(folder(tmp_path, index=index, x={"a": (2,)}, y={"b": (3,)})) == {"a": (2,), "b": (3,)}


def test_an_index_must_keep_its_promise(tmp_path: Path) -> None:
    index = {"a": "x.safetensors", "b": "x.safetensors"}
    with pytest.raises(UserError, match=r"index.json promises 1 tensor\(s\) that no file has: b"):
        tensor_shapes(folder(tmp_path, index=index, x={"a": (2,)}))


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*config.json.*Expected a Hugging Face model folder"):
        tensor_shapes(tmp_path)
    with pytest.raises(UserError, match=r"cannot read the weights .*model.safetensors"):
        tensor_shapes(folder(tmp_path))


def test_a_filesystem_that_fails_is_not_the_folders_fault(tmp_path: Path) -> None:
    """It is the node's: a UserError would end the run."""
    (tmp_path / "config.json").mkdir()
    with pytest.raises(IsADirectoryError):
        check_reward_model(tmp_path)
    (tmp_path / "other").mkdir()
    made = folder(tmp_path / "other")
    (made / "model.safetensors").mkdir()
    with pytest.raises(OSError, match="os error"):
        tensor_shapes(made)


def test_differences_are_named() -> None:
    expected = {"a": (2, 3), "b": (4,), "c": (5,)}
    check_same_tensors(Path("new"), dict(expected), expected)
    with pytest.raises(
        UserError, match=r"1 missing: b; 1 unknown: d; 1 of another shape: a \(3, 2\), expected \(2, 3\)"
    ):
        check_same_tensors(Path("new"), {"a": (3, 2), "c": (5,), "d": (1,)}, expected)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"architectures": ["LlamaForCausalLM"], "id2label": {"0": "x"}}, r"LlamaForCausalLM, 1 label"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"LlamaForSequenceClassification, 2 label"),
        ({}, "no architecture"),
    ],
)
def test_what_is_no_reward_model_is_refused(tmp_path: Path, config: dict, what: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{what}.* no reward model; expected a sequence classifier with one label"):
        check_reward_model(tmp_path)


def test_a_classifier_with_one_label_is_a_reward_model(tmp_path: Path) -> None:
    config = {"architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_reward_model(tmp_path)
