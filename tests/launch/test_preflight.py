"""What is refused on a login node, before anything is spent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import World, model_folder
from toolkit.launch.estimate import estimate, parameters, weight_bytes
from toolkit.launch.preflight import preflight
from toolkit.launch.rehearsal import planned_jobs


def test_what_is_in_order_passes(world: World) -> None:
    preflight(world.config())
    preflight(world.config(trainer={"tensor": 2, "pipeline": 4}))
    preflight(world.config(data={"path": "organisation/dataset"}))


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_the_supported_architectures_pass(world: World, tmp_path: Path, architecture: str) -> None:
    preflight(world.config(model={"policy": str(model_folder(tmp_path / "other", architecture))}))


def test_data_that_is_not_there(world: World) -> None:
    for path in ("pairs.parquet", "./org/pairs", "/data/pairs.jsonl"):
        world.refused(
            f"data.path: expected a file or a dataset id, got {path}, which does not exist", data={"path": path}
        )


def test_a_model_folder_that_is_missing_incomplete_or_of_another_kind(world: World, tmp_path: Path) -> None:
    world.refused(
        "model.policy: expected a Hugging Face folder, got org/model, which is not a dir", model={"policy": "org/model"}
    )
    (tmp_path / "empty").mkdir()
    world.refused("has no config.json", model={"policy": str(tmp_path / "empty")})
    other = model_folder(tmp_path / "other", "GPT2LMHeadModel")
    expected = (
        "unknown model.policy: architecture 'GPT2LMHeadModel'; expected one of: LlamaForCausalLM, Qwen2ForCausalLM"
    )
    world.refused(expected, model={"policy": str(other)})
    world.refused("model.reference: architecture 'GPT2LMHeadModel'", model={"reference": str(other)})
    world.refused(
        r"reward.model: expected a sequence classifier \(.*\), got LlamaForCausalLM",
        reward={"model": str(world.policy)},
    )
    world.refused("evaluation.reward: expected a sequence classifier", evaluation={"reward": str(world.policy)})
    (world.policy / "config.json").write_text("{")
    world.refused("policy/config.json is not JSON")


def test_weights_that_are_incomplete_by_their_own_index(world: World) -> None:
    (world.policy / "model.safetensors").rename(world.policy / "model-00001-of-00002.safetensors")
    world.refused("is incomplete: model.safetensors missing")
    shards = {name: f"model-0000{number}-of-00002.safetensors" for number, name in ((1, "a"), (2, "b"))}
    (world.policy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    world.refused("is incomplete: model-00002-of-00002.safetensors missing")
    (world.policy / "model-00002-of-00002.safetensors").touch()
    preflight(world.config())


def test_a_tokenizer_without_chat_template(world: World) -> None:
    for folder, key in ((world.policy, "model.policy"), (world.reward, "reward.model")):
        (folder / "tokenizer_config.json").write_text("{}")
        world.refused(f"{key}: the tokenizer of .* has no chat template")
        (folder / "chat_template.jinja").touch()
        preflight(world.config())
        (folder / "chat_template.jinja").unlink()
        (folder / "tokenizer_config.json").unlink()
        (folder / "tokenizer.json").unlink()
        world.refused(f"{key}: .* has no tokenizer")
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "t"}))


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            {"tensor": 3},
            r"trainer.tensor=3 does not divide the model's 8 attention heads \(layout: 3 = tensor 3 x pipeline 1 x data 1\)",
        ),
        ({"tensor": 4}, "trainer.tensor=4 does not divide the model's 2 key-value heads"),
        (
            {"pipeline": 3, "data": 2},
            r"trainer.pipeline=3 does not divide the model's 4 layers \(layout: 6 = tensor 1 x pipeline 3 x data 2\)",
        ),
    ],
)
def test_a_layout_that_the_model_cannot_fill(world: World, trainer: dict, message: str) -> None:
    world.refused(message, trainer=trainer)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"objective": {"name": "dpo", "parameters": {"betta": 1}}},
            "objective 'dpo' has no parameter 'betta'; its parameters: beta",
        ),
        ({"objective": {"name": "dpo", "parameters": {"beta": -1}}}, "dpo: beta must be a number > 0, got -1"),
        ({"gate": {"kind": "random"}}, "gate 'random' needs the parameter 'probability'"),
        ({"meta": {"exploration": 1}}, r"exploration must be in \[0, 1\), got 1"),
        ({"weight": {"kind": "constant"}}, r"method.weight.parameters.value in \[0, 1\], got None"),
        ({"gate_reference": "behaviour"}, "behaviour"),
    ],
)
def test_a_method_that_makes_no_sense(world: World, method: dict, message: str) -> None:
    world.refused(message, method={"rounds": 2, "warm_start": "none", "global_batch": 2, "shard_size": 4, **method})


def test_the_estimate_counts_parameters_bytes_and_devices(world: World, tmp_path: Path) -> None:
    assert (
        parameters(str(world.policy)) == 36
        and weight_bytes(str(world.policy)) == (world.policy / "model.safetensors").stat().st_size
    )
    config = world.config(trainer={"tensor": 2, "data": 3}, cluster={"jobs": {"time_minutes": 30}})
    sentences = "\n".join(estimate(config, planned_jobs(config)))
    assert "3 rounds" in sentences and "6 for the trainer, 1 for inference" in sentences
    assert "3.5 GPU-hours (0.5 h wall time)" in sentences


def test_a_login_node_needs_no_torch(world: World) -> None:
    """The launcher, with torch out of reach, as in a base install."""
    source = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "vllm", "megatron", "datasets"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Refuse())
from toolkit.cli import main
sys.exit(main(sys.argv[1:]))
"""
    overrides = [
        f"data.path={world.data}",
        f"model.policy={world.policy}",
        f"reward.model={world.reward}",
        f"run={world.data.parent / 'run'}",
    ]
    done = subprocess.run(
        [sys.executable, "-c", source, "launch", "--dry-run", *overrides], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "trainer: 1 process(es)" in done.stdout and "worker-000" in done.stdout and "GPU-hours" in done.stdout
    assert not (world.data.parent / "run").exists(), "a dry run writes nothing"
