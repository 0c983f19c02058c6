"""What may stand in a configuration, what is refused, and that its names are those of the code."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from tests.exchange.conftest import make_config
from toolkit import config as configuration
from toolkit.algorithms import features, gates, meta_learner, objectives, references, weighting
from toolkit.config import CHOICES, IDENTITY, OPERATIONS, POSITIVE, Config, build, lookup, validate
from toolkit.errors import UserError


def config(**groups: Any) -> Config:
    from pathlib import Path

    return make_config(Path("run"), **groups)


# ---------------------------------------------------------------------------------------------- building


def test_missing_keys_take_their_defaults() -> None:
    assert build(Config, {}) == Config()
    assert build(Config, {"method": {"meta": {"lag": 0}}}).method.meta == configuration.MetaConfig(lag=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metod": {}}, "unknown configuration key 'metod'; expected one of: cluster, data, "),
        (
            {"method": {"meta": {"lagg": 1}}},
            "unknown configuration key 'method.meta.lagg'; expected one of: .*method.meta.lag,",
        ),
        ({"method": 3}, "method: expected a group of keys, got 3"),
        ({"method": {"rounds": "3"}}, "method.rounds: expected int, got '3'"),
        ({"method": {"rounds": 2.0}}, "method.rounds: expected int, got 2.0"),
        ({"method": {"rounds": True}}, "method.rounds: expected int, got True"),
        ({"method": {"rounds": None}}, "method.rounds: expected int, got None"),
        ({"method": {"ema_decay": True}}, "method.ema_decay: expected float, got True"),
        ({"data": {"path": ["a"]}}, r"data.path: expected str, got \['a'\]"),
        ({"data": {"limit": "all"}}, "data.limit: expected int, got 'all'"),
        ({"trainer": {"sequence_parallel": 1}}, "trainer.sequence_parallel: expected bool, got 1"),
        ({"inference": {"does": "sample"}}, "inference.does: expected a list, got 'sample'"),
        ({"inference": {"does": [None]}}, "inference.does: expected str, got None"),
        ({"cluster": {"jobs": {"environment": ["A"]}}}, "cluster.jobs.environment: expected a mapping"),
        (
            {"evaluation": {"metrics": {"gold": {"flie": ""}}}},
            "evaluation.metrics.gold.flie.*evaluation.metrics.gold.file",
        ),
    ],
)
def test_what_does_not_fit_is_named(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(Config, values)


def test_numbers_take_the_type_of_their_key() -> None:
    found = build(
        Config, {"method": {"ema_decay": 1}, "cluster": {"jobs": {"environment": {"OMP_NUM_THREADS": 4}}}, "name": 7}
    )
    assert isinstance(found.method.ema_decay, float)
    assert found.cluster.jobs.environment == {"OMP_NUM_THREADS": "4"} and found.name == "7"
    assert build(Config, {"data": {"limit": None}}).data.limit is None


def test_identity_and_operations_are_two_halves_that_survive_json() -> None:
    made = config(evaluation={"metrics": {"gold": {"file": "gold.py"}}})
    halves = configuration.identity(made), configuration.operations(made)
    assert not halves[0].keys() & halves[1].keys()
    names = {field.name for field in dataclasses.fields(Config)}
    assert set(IDENTITY) | set(OPERATIONS) | {"name", "run"} == names, "a group belongs to neither half"
    again = build(Config, json.loads(json.dumps(halves[0] | halves[1])))
    assert dataclasses.replace(again, run=made.run) == made


# ---------------------------------------------------------------------------------------------- validating


@pytest.mark.parametrize("key", CHOICES)
def test_an_unknown_choice_lists_the_valid_ones(key: str) -> None:
    made = config()
    *parents, leaf = key.split(".")
    setattr(lookup(made, ".".join(parents)), leaf, "nonsense")
    with pytest.raises(
        UserError, match=f"unknown {key} 'nonsense'; expected one of: {', '.join(sorted(CHOICES[key]))}"
    ):
        validate(made)


@pytest.mark.parametrize("key", POSITIVE)
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_what_must_be_positive(key: str, value: float) -> None:
    made = config()
    *parents, leaf = key.split(".")
    setattr(lookup(made, ".".join(parents)), leaf, value)
    with pytest.raises(UserError, match=f"{key}: expected a value above 0, got {value}"):
        validate(made)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"method": {"global_batch": 4, "shard_size": 10}}, "multiple of method.global_batch, got 10 = 2 x 4 [+] 2"),
        (
            {"trainer": {"data": 2, "micro_batch": 2}},
            "multiple of trainer.data x trainer.micro_batch, got 2 and 2 x 2 = 4",
        ),
        ({"data": {"path": ""}}, "data.path: expected a preference dataset"),
        ({"model": {"policy": ""}}, "model.policy: expected the Hugging Face folder"),
        ({"reward": {"model": None}}, "set reward.model, or choose method.gate.kind=none"),
        ({"method": {"sampling": {"samples": 1}}}, "at least 2 responses, got 1"),
        ({"method": {"meta": {"lag": -1}}}, "method.meta.lag: expected 0 or more, got -1"),
        (
            {"inference": {"does": ["sample", "fly"]}},
            "unknown inference.does 'fly'; expected one of: annotate, evaluate, sample",
        ),
        ({"inference": {"workers": 0}}, "inference.workers: this method needs at least 1, got 0"),
        ({"inference": {"max_model_len": 1024}}, "leaves no room for a response"),
        ({"cluster": {"umask": "9"}}, "cluster.umask: expected an octal number in quotes, such as \"027\", got '9'"),
        ({"cluster": {"umask": 0o027}}, "cluster.umask: .*got '23'; YAML reads 027 without quotes as 23"),
        ({"cluster": {"umask": 0o077}}, "cluster.umask: .*got '63'"),
        ({"cluster": {"umask": "002"}}, "cluster.umask: '002' lets others write into the run"),
        (
            {"cluster": {"worker": {"gpu_request": "--gres=gpu:{type}:{gpus}"}}},
            "cluster.worker.gpu_request: expected no braces but {gpus}.*got '--gres=gpu:{type}:{gpus}'",
        ),
        ({"cluster": {"jobs": {"gpu_request": "--gres=gpu:{}"}}}, "cluster.trainer.gpu_request: .*got '--gres=gpu:{}'"),
        ({"cluster": {"jobs": {"gpu_request": "--gres=gpu:{gpus"}}}, "cluster.trainer.gpu_request"),
        ({"cluster": {"supervise": 0}}, "cluster.supervise: expected a value above 0"),
        ({"inference": {"does": ["sample"]}}, "gate.kind=meta needs sample and annotate, got sample; .* for ever"),
        ({"inference": {"does": []}}, "inference.does: .* needs sample and annotate, got nothing"),
        ({"data": {"heldout_prompts": -1}}, "data.heldout_prompts: expected 0 or more, got -1"),
        ({"method": {"meta": {"clamp": 0.7}}}, r"method.meta.clamp: expected a value in \[0, 0.5\), got 0.7"),
        (
            {"method": {"warm_start_pairs": 7}},
            "method.warm_start_pairs: expected a multiple of method.global_batch=2, got 7",
        ),
        ({"method": {"warm_start_pairs": 4, "warm_start": "none"}}, "warm_start_pairs=4, but there is no round"),
        ({"trainer": {"sequence_parallel": True}}, "trainer.sequence_parallel: expected trainer.tensor of 2 or more"),
        ({"retention": {"checkpoints": 0}}, "retention.checkpoints: expected a value above 0"),
    ],
)
def test_what_no_run_could_be_made_of_is_refused(groups: dict, message: str) -> None:
    validate(config())
    merged = {"method": {"global_batch": 2, "shard_size": 4} | groups.pop("method", {}), **groups}
    with pytest.raises(UserError, match=message):
        validate(config(**merged))


def test_offline_training_needs_neither_reward_model_nor_workers() -> None:
    offline = config(
        method={"gate": {"kind": "none"}, "weight": {"kind": "one"}}, reward={"model": None}, inference={"workers": 0}
    )
    validate(offline)
    assert (offline.needs_workers, offline.learns, offline.evaluates) == (False, False, False)
    judged = config(method={"gate": {"kind": "none"}, "weight": {"kind": "one"}})
    assert (judged.needs_workers, judged.learns, judged.evaluates) == (True, False, True)
    alone = dataclasses.replace(judged, inference=configuration.InferenceConfig(does=["sample", "annotate"]))
    validate(alone)
    assert (alone.needs_workers, alone.evaluates) == (False, False), "no GPU waits for work that never comes"
    assert config().learns and config(method={"weight": {"kind": "one"}}).learns


def test_a_warm_start_round_asks_for_nothing() -> None:
    assert config().gated == (False, True, True)
    assert config(method={"warm_start": "none"}).gated == (True, True)
    assert config(method={"gate": {"kind": "none"}}).gated == (False, False, False)


# ---------------------------------------------------------------------------------------------- names of the code


def test_the_choices_are_what_the_code_has() -> None:
    """A name that is registered and not listed here could not be configured; one that is only listed would fail in a job."""
    assert set(CHOICES["method.objective.name"]) == set(objectives.OBJECTIVES)
    assert set(CHOICES["method.gate.kind"]) == set(gates.KINDS)
    assert set(CHOICES["method.gate_reference"]) == set(CHOICES["method.loss_reference"]) == set(references.CHOICES)
    assert set(CHOICES["method.missing_online"]) == set(weighting.MISSING)
    assert set(CHOICES["method.meta.feature"]) == set(features.KINDS)
    assert set(CHOICES["method.warm_start"]) == set(references.WARM_STARTS)
    for key, valid in meta_learner._CHOICES.items():
        assert set(CHOICES[f"method.meta.{key}"]) == set(valid)


def test_the_defaults_are_valid() -> None:
    made = Config()
    for key, valid in CHOICES.items():
        assert lookup(made, key) in valid
    for key in POSITIVE:
        assert lookup(made, key) is None or lookup(made, key) > 0


def test_a_key_that_may_be_null_is_no_mistake() -> None:
    made = config(data={"limit": None}, method={"meta": {"minibatch": None}}, cluster={"submit_limit": None})
    validate(made)


def test_nobody_leaves_a_chain_for_want_of_work() -> None:
    """The next link would start at once, and links are few."""
    groups = {"trainer": {"idle_exit": 60.0}, "inference": {"idle_exit": 70.0}}
    for cluster in ({}, {"control": "chain"}, {"kind": "slurm"}):
        assert config(**groups, cluster=cluster).idle_exits == {"trainer": 60.0, "worker": 70.0}
    chain = config(**groups, cluster={"kind": "slurm", "control": "chain"}).idle_exits
    assert chain == {"trainer": float("inf"), "worker": float("inf")}
