"""A run directory: identity, operations, incarnations, typed access."""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path

import pytest

from tests.exchange.conftest import PAIRS_PER_ROUND, make_config, publish_pairs
from toolkit.config import Config
from toolkit.errors import UserError
from toolkit.exchange import layout
from toolkit.exchange.records import Corrupt
from toolkit.exchange.run import Run, differences, resolved


def test_a_run_can_be_reconstructed_from_its_directory_alone(run: Run) -> None:
    again = Run.open(run.root)
    expected = make_config(run.root)
    # `run` and `name` say where it is, not what it is
    assert dataclasses.replace(again.config, run=expected.run, name=expected.name) == expected
    assert again.plan.pairs_per_round == PAIRS_PER_ROUND and again.plan.gated == (False, True, True)
    assert again.pairs(1, 1)["pair_id"].to_pylist() == ["r1-4", "r1-5", "r1-6"]
    assert again.pairs(2, 0)["shard"].to_pylist() == [0, 0, 0, 0]
    assert again.heldout().num_rows == 0
    assert again.provenance == {"digests": {"tokenizer": "t"}}


def test_launching_the_same_again_reopens_it(run: Run) -> None:
    again = Run.create(run.root, make_config(run.root), "launch")
    assert again.current_incarnation() == 0 and again.operations_version() == 0


def test_another_identity_is_refused_and_the_run_stays_valid(run: Run) -> None:
    other = make_config(run.root, seed=7, method={"epochs": 2})
    with pytest.raises(UserError, match="holds another run") as error:
        Run.create(run.root, other, "launch")
    assert "method.epochs: 1 -> 2" in str(error.value) and "seed: 0 -> 7" in str(error.value)
    assert "metaapo resume" in str(error.value)
    assert Run.open(run.root).config.seed == 0


def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("!")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        Run.create(tmp_path, make_config(tmp_path), "launch")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="not a directory"):
        Run.create(tmp_path / "thesis.tex", make_config(tmp_path), "launch")


def test_a_launch_that_died_before_it_was_a_run_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / ".identity.g0.json.0123456789ab").write_text("half of")
    assert Run.create(tmp_path, make_config(tmp_path), "launch").config.seed == 0


def test_a_directory_without_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        Run.open(tmp_path)
    with pytest.raises(UserError, match="holds no run"):
        Run.open(tmp_path / "absent")


def test_a_damaged_identity_stops_everything(run: Run) -> None:
    path = run.root / "identity.g0.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(Corrupt, match=r"identity\.g0\.json"):
        Run.open(run.root)
    with pytest.raises(Corrupt, match=r"identity\.g0\.json"):
        Run.create(run.root, make_config(run.root), "launch")


def test_a_bad_configuration_makes_no_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shard_size"):
        Run.create(tmp_path / "run", make_config(tmp_path, method={"shard_size": 3}), "launch")
    assert not (tmp_path / "run").exists()


def test_a_run_is_closed_to_others_unless_it_is_shared(tmp_path: Path) -> None:
    def mode(name: str, **cluster: str) -> int:
        run = Run.create(tmp_path / name, make_config(tmp_path / name, cluster=cluster), "launch")
        return stat.S_IMODE(run.root.stat().st_mode)

    assert mode("private") == 0o700
    assert mode("shared", umask="027") == 0o750


def test_operations_are_versions_that_are_appended(run: Run) -> None:
    changed = dataclasses.replace(run.config, inference=dataclasses.replace(run.config.inference, workers=5))
    run.set_operations(changed)
    run.set_operations(changed)
    assert run.operations_version() == 1 and run.config.inference.workers == 5
    assert Run.open(run.root).config.inference.workers == 5
    assert run.records.require(layout.operations(0)).attributes["inference"]["workers"] == 1


def test_incarnations_are_opened_and_closed_one_after_the_other(run: Run) -> None:
    assert run.current_incarnation() == 0 and run.closing() is None
    assert run.reopen() == 0, "an open one goes on"
    run.close("cancelled", "by hand")
    run.close("failed", "too late")
    closing = run.closing()
    assert closing is not None and closing.attributes == {"outcome": "cancelled", "reason": "by hand"}
    assert run.reopen() == 1 and run.reopen() == 1
    assert run.closing() is None and run.closing(0) is not None


def test_a_run_is_finished_with_its_last_policy_and_complete_with_all_evaluations(run: Run) -> None:
    assert run.newest_policy() is None and not run.finished()
    for version in range(3):
        run.records.publish(layout.policy(version), {"version": version})
    assert run.newest_policy() == 2 and not run.finished()
    run.records.publish(layout.policy(3), {"version": 3})
    assert run.finished() and not run.is_complete()
    run.records.publish(layout.phi(len(run.plan.boundaries)), {})
    for version in (0, 1, 3):
        run.records.publish(layout.evaluation(version), {})
    assert not run.is_complete()
    run.records.publish(layout.evaluation(2), {})
    assert run.is_complete()
    run.finish()
    assert run.closing().attributes["outcome"] == "finished"


@pytest.mark.parametrize(
    "groups",
    [
        pytest.param({"inference": {"does": ["sample", "annotate"]}}, id="nobody-evaluates"),
        pytest.param({"replay_from": "other"}, id="a-replay"),
        pytest.param({"reward": {"model": None}, "method": {"gate": {"kind": "none"}}}, id="no-reward-model"),
    ],
)
def test_a_run_that_evaluates_nothing_is_complete_without_evaluations(tmp_path: Path, groups: dict) -> None:
    run = Run.create(tmp_path, make_config(tmp_path, **groups), "test")
    publish_pairs(run)
    for version in range(4):
        run.records.publish(layout.policy(version), {})
    run.records.publish(layout.phi(len(run.plan.boundaries)), {})
    assert run.is_complete()


def test_a_run_of_another_version_names_its_own_copy(run: Run) -> None:
    run.records.publish(layout.operations(1), run.records.require(layout.operations(0)).attributes | {"olden": 1})
    with pytest.raises(UserError, match=r"another version of the toolkit.*'olden'.*none is there"):
        _ = Run.open(run.root).config
    for name in ("0a", "0b", ".partial"):
        (run.root / "code" / name).mkdir(parents=True)
    os.utime(run.root / "code/0b", (0, 0))
    with pytest.raises(UserError, match=f"PYTHONPATH={run.root}/code/0a python -m toolkit.cli"):
        _ = Run.open(run.root).config


def test_differences_name_dotted_keys() -> None:
    old = {"a": {"b": 1, "c": {}}, "d": [1]}
    assert differences(old, old) == []
    assert differences(old, {"a": {"b": 2, "c": {"e": 3}}, "d": [1]}) == [
        "a.b: 1 -> 2",
        "a.c: {} -> None",
        "a.c.e: None -> 3",
    ]


def test_local_paths_become_absolute_and_hub_ids_stay(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    config: Config = make_config(tmp_path, data={"path": "pairs.jsonl"}, model={"policy": "org/name"})
    config = dataclasses.replace(config, run="runs/a", reward=dataclasses.replace(config.reward, model="./absent"))
    found = resolved(config, tmp_path)
    assert found.data.path == str(tmp_path / "pairs.jsonl")
    assert found.model.policy == "org/name"
    assert found.reward.model == str(tmp_path / "absent")
    assert found.run == str(tmp_path / "runs/a")
