"""What is refused on a login node, before anything is spent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import World, model_folder
from toolkit.launch.estimate import estimate, parameters
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
    for path in (
        "pairs.parquet",
        "./org/pairs",
        "/data/pairs.jsonl",
        "data/pears.jsonl",
        "data/pears.json.gz",
        "a/b/c",
    ):
        world.refused(
            f"data.path: expected a file or a dataset id owner/name, got {path}, which does not exist",
            data={"path": path},
        )
    world.refused("data.path: .* which is not a file", data={"path": str(world.policy)})


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
    shutil.copy(world.reward / "model.safetensors", world.policy / "model-00002-of-00002.safetensors")
    preflight(world.config())
    (world.policy / "model-00002-of-00002.safetensors").write_bytes(b"")
    world.refused("model.policy: .*/model-00002-of-00002.safetensors is no complete safetensors file")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 16060556\n"


def header(values: object) -> bytes:
    text = json.dumps(values).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [b"", b"1234", POINTER, header([]), header({"a": 3}), header({"a": {"shape": [1]}}), b"\x02" + bytes(7) + b"{"],
    ids=["empty", "short", "git-lfs", "list", "entry", "no-offsets", "no-json"],
)
def test_weights_that_are_none(world: World, content: bytes) -> None:
    (world.reward / "model.safetensors").write_bytes(content)
    world.refused(r"reward.model: .*/model.safetensors is no complete safetensors file \(.* Git LFS pointer")


def test_a_download_that_was_interrupted(world: World) -> None:
    weights = world.policy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    world.refused("model.policy: .*/model.safetensors is no complete safetensors file")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
def test_descriptions_that_are_none(world: World, name: str) -> None:
    for content, words in ((b"", "is not JSON"), (POINTER, "is not JSON"), (b"[]", "expected keys and values")):
        (world.policy / name).write_bytes(content)
        world.refused(f"model.policy: .*{words}")


def test_descriptions_that_lack_something(world: World) -> None:
    config = world.policy / "config.json"
    complete = json.loads(config.read_text())
    for name in ("num_hidden_layers", "num_attention_heads", "intermediate_size"):
        config.write_text(json.dumps({key: value for key, value in complete.items() if key != name}))
        world.refused(f"model.policy: expected a number {name} in .*/config.json, got None")
    config.write_text(json.dumps(complete))
    (world.policy / "model.safetensors.index.json").write_text("{}")
    world.refused("model.policy: .*index.json has no weight_map")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"method": {"sampling": {"top_p": 3.0}}}, "method.sampling.top_p: expected a probability in"),
        ({"method": {"sampling": {"temperature": -1.0}}}, "method.sampling.temperature: expected 0 or more, got -1"),
        ({"evaluation": {"temperature": -1.0}}, "evaluation.temperature: expected 0 or more, got -1"),
        ({"inference": {"gpu_memory_utilization": 1.5}}, "inference.gpu_memory_utilization: expected a share in"),
        ({"inference": {"kv_cache_gib": -1.0}}, "inference.kv_cache_gib: expected a value above 0"),
        (
            {"inference": {"tensor_parallel": 3}},
            "tensor_parallel=3 does not divide the 8 attention heads of reward.model",
        ),
        (
            {"evaluation": {"metrics": {"gold": {"file": "/nowhere/gold.py"}}}},
            "evaluation.metrics.gold.file: expected a Python file, got '/nowhere/gold.py'",
        ),
    ],
)
def test_what_would_fail_in_a_workers_job(world: World, groups: dict, message: str) -> None:
    world.refused(message, **groups)


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
    assert parameters(str(world.policy)) == 36
    config = world.config(trainer={"tensor": 2, "data": 3}, inference={"workers": 2})
    sentences = "\n".join(estimate(config, planned_jobs(config)))
    assert "3 rounds" in sentences and "6 for the trainer, 2 for inference" in sentences
    assert "GPU-hours" not in sentences, "nobody bills this machine"


def base_install(world: World, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command line with all packages of the roles out of reach."""
    source = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "vllm", "megatron", "datasets", "jinja2"):
            raise ModuleNotFoundError(f"No module named {name!r}")
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
    return subprocess.run(
        [sys.executable, "-c", source, *arguments, *overrides],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_login_node_needs_no_torch(world: World) -> None:
    done = base_install(world, "launch", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "trainer: 1 process(es)" in done.stdout and "worker-000" in done.stdout and "devices: 1" in done.stdout
    assert not (world.data.parent / "run").exists(), "a dry run writes nothing"


def test_where_data_cannot_be_prepared_the_trainer_does_it(world: World) -> None:
    done = base_install(world, "prepare")
    assert done.returncode == 2 and "pip install '.[trainer]'" in done.stderr, done.stderr
    nowhere = {"PATH": str(world.data.parent)}  # without Slurm: it comes so far and no further
    done = base_install(world, "launch", "cluster=slurm", **nowhere)
    assert done.returncode == 2 and "there is no squeue here" in done.stderr, done.stderr
    assert "the trainer will prepare the data" in done.stdout
