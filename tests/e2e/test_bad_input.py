"""What a user gets wrong: one message with what was expected, what came and what to do; exit 2; nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.e2e.conftest import SMALL, metaapo
from toolkit.exchange import layout
from toolkit.exchange.run import Run


def refused(*arguments: str) -> str:
    done = metaapo(*arguments, check=False)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture
def quickstart(toy_world: Path, tmp_path: Path) -> list[str]:
    return ["launch", "experiment=quickstart", f"run={tmp_path / 'run'}", f"toy={toy_world}", *SMALL]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.rouds=3", ["method.rouds", "rounds", "global_batch"]),
        ("experiment=quikstart", ["quikstart", "quickstart", "alpaca_eval"]),
        ("method=metaapoo", ["metaapoo", "online_dpo"]),
        ("method.gate.kind=mta", ["mta", "all, fixed, meta, none, random, threshold"]),
        ("method.objective.name=dop", ["dop", "dpo, ipo, ipo_sum, simpo"]),
        ("+method.objective.parameters.bta=0.1", ["bta", "beta"]),
        ("method.shard_size=40", ["40", "multiple", "16"]),
        ("trainer.tensor=3", ["trainer.tensor=3", "3 = tensor 3 x pipeline 1 x data 1", "heads"]),
        ("trainer.data=3", ["method.global_batch", "16", "3 x 8 = 24"]),
        ("method.gate_reference=behaviour", ["behaviour", "initial, previous, ema"]),
        ("model.policy=/nowhere", ["model.policy", "/nowhere"]),
        ("data.path=/nowhere.jsonl", ["data.path", "/nowhere.jsonl"]),
        ("reward.model=null", ["reward.model"]),
        ("seed=many", ["seed", "many"]),
    ],
)
def test_a_bad_override_is_refused_before_anything_is_spent(
    quickstart: list[str], tmp_path: Path, override: str, said: list[str]
) -> None:
    message = refused(*quickstart, override)
    for part in said:
        assert part in message, message
    assert not (tmp_path / "run").exists()


def changed_model(source: Path, target: Path, **config: object) -> Path:
    shutil.copytree(source, target)
    values = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(values))
    return target


def test_an_unsupported_architecture_is_named(quickstart: list[str], toy_world: Path, tmp_path: Path) -> None:
    model = changed_model(
        toy_world / "policy", tmp_path / "model", architectures=["BloomForCausalLM"], model_type="bloom"
    )
    message = refused(*quickstart, f"model.policy={model}")
    assert "BloomForCausalLM" in message and "LlamaForCausalLM" in message


def test_an_incomplete_model_folder_is_named(quickstart: list[str], toy_world: Path, tmp_path: Path) -> None:
    model = changed_model(toy_world / "policy", tmp_path / "model")
    (model / "model.safetensors").unlink()
    message = refused(*quickstart, f"model.policy={model}")
    assert "incomplete" in message and "model.safetensors" in message


def test_a_tokenizer_without_chat_template_is_refused(quickstart: list[str], toy_world: Path, tmp_path: Path) -> None:
    model = changed_model(toy_world / "policy", tmp_path / "model")
    (model / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "chat template" in refused(*quickstart, f"model.policy={model}")


def test_a_policy_in_the_place_of_the_reward_model_is_refused(quickstart: list[str], toy_world: Path) -> None:
    assert "sequence classifier" in refused(*quickstart, f"reward.model={toy_world / 'policy'}")


def test_a_directory_with_something_else_in_it_is_left_alone(quickstart: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    assert "not empty" in refused(*quickstart)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_row_that_cannot_be_read_is_named_and_the_run_stays_valid(
    quickstart: list[str], toy_world: Path, tmp_path: Path
) -> None:
    rows = (toy_world / "pairs.jsonl").read_text().splitlines()[:50]
    rows[17] = json.dumps(json.loads(rows[17]) | {"chosen": 5})
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    message = refused(*quickstart, f"data.path={tmp_path / 'bad.jsonl'}")
    assert "bad.jsonl" in message and "17" in message and "chosen" in message
    assert Run.open(tmp_path / "run").records.find(layout.PAIRS) is None


def test_weights_that_are_not_finite_stop_the_run_with_a_reason(
    quickstart: list[str], toy_world: Path, tmp_path: Path
) -> None:
    model = changed_model(toy_world / "policy", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][0, 0] = np.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    done = metaapo(*quickstart, f"model.policy={model}", check=False)
    assert done.returncode == 1
    assert "not finite" in done.stdout and "layers.1.mlp" in done.stdout
    run = Run.open(tmp_path / "run")
    assert run.newest_policy() is None
    assert run.closing().attributes["outcome"] == "failed"
    assert metaapo("verify", str(run.root)).returncode == 0


def test_a_record_of_a_newer_version_is_refused(finished_run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished_run.root, copy, ignore=shutil.ignore_patterns("logs", "code"))
    path = copy / "policies/0000.g0.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    done = metaapo("verify", str(copy), check=False)
    assert done.returncode == 1 and "newer version" in done.stdout and "99" in done.stdout


def test_no_run_there(tmp_path: Path) -> None:
    for verb in ("status", "verify", "cancel", "resume", "report", "tick"):
        assert "no run" in refused(verb, str(tmp_path))


def test_a_dry_run_starts_and_writes_nothing(quickstart: list[str], tmp_path: Path) -> None:
    shown = metaapo(*quickstart, "--dry-run").stdout
    assert "trainer: 1 process" in shown and "worker-000" in shown and "GiB" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="giving a directory to another user needs root")
def test_another_users_run_is_read_but_not_acted_for(finished_run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished_run.root, copy, ignore=shutil.ignore_patterns("logs", "code"))
    os.chown(copy, 65534, 65534)
    for verb in ("tick", "cancel", "resume"):
        message = refused(verb, str(copy))
        assert "belongs to user 65534" in message
    assert "finished" in metaapo("status", str(copy)).stdout
