"""From overrides to a configuration: the shipped files, new runs, existing runs, replays."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch.conftest import make_config, publish_pairs
from toolkit.config import Config
from toolkit.errors import UserError
from toolkit.exchange import layout
from toolkit.exchange.run import Run
from toolkit.launch import control
from toolkit.launch.compose import compose, config_directory, replayed, updated

MINIMUM = ["data.path=pairs.jsonl", "model.policy=policy", "reward.model=reward"]


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (config_directory() / group).glob("*.yaml"))


def composed(*overrides: str) -> Config:
    return compose([*MINIMUM, *overrides], Path("/base"))


# ---------------------------------------------------------------------------------------------- the shipped files


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_loads(experiment: str) -> None:
    assert composed(f"experiment={experiment}").data.path == "pairs.jsonl"


@pytest.mark.parametrize("method", names("method"))
@pytest.mark.parametrize("experiment", [[], ["experiment=quickstart"]])
def test_every_method_loads_in_every_experiment(method: str, experiment: list[str]) -> None:
    assert composed(*experiment, f"method={method}").method.name == method


@pytest.mark.parametrize(
    ("group", "name"),
    [(group, name) for group in ("cluster", "data", "model", "inference", "reward") for name in names(group)],
)
def test_every_choice_of_every_group_loads(group: str, name: str) -> None:
    composed(f"{group}={name}", "data.max_prompt_tokens=256")


def test_the_defaults_of_the_keys_are_the_recommended_ones() -> None:
    """Who writes a configuration without a preset's file gets no mixture of two."""
    assert Config().method.meta == composed("method=metaapo").method.meta


# ---------------------------------------------------------------------------------------------- a new run


def test_overrides_win_over_the_files() -> None:
    found = composed(
        "experiment=quickstart", "method.rounds=7", "cluster.trainer.python=null", "inference.does=[sample,annotate]"
    )
    assert (found.method.rounds, found.method.shard_size, found.inference.does) == (7, 64, ["sample", "annotate"])
    assert found.name == "quickstart" and found.run == "/base/runs/quickstart"


def test_the_toy_world_can_lie_anywhere() -> None:
    found = compose(["experiment=quickstart", "toy=/toy"], Path("/base"))
    assert (found.data.path, found.model.policy) == ("/toy/pairs.jsonl", "/toy/policy")
    assert (found.reward.model, found.evaluation.metrics["gold"].file) == ("/toy/reward", "/toy/gold.py")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.beta=1", r"method.beta=1: .*keys there: .*gate_reference.*groups: cluster, data"),
        ("metod.beta=1", "metod.beta=1: .*keys there: cluster, data, .*groups: "),
        ("method.meta.lagg=1", "method.meta.lagg=1: .*keys there: clamp, epochs.* lag,"),
        ("+method.meta.lagg=1", "unknown configuration key 'method.meta.lagg'; expected one of: .*method.meta.lag,"),
        ("method=metapo", "Available options in 'method': bpo dpo metaapo metaapo_paper"),
        ("metod=metaapo", "metod=metaapo: .*groups: cluster, data, experiment"),
        ("experiment=nothing", "Available options in 'experiment': alpaca_eval quickstart"),
        ("method.gate.kind=some", "unknown method.gate.kind 'some'; expected one of: all, fixed, meta"),
        ("method.rounds=many", "method.rounds=many: .*Value 'many' of type 'str' could not be converted to Integer"),
        ("method.rounds=2.5", "method.rounds=2.5: .*could not be converted to Integer"),
        ("method.objective=simpo", "method.objective=simpo: .*Invalid type assigned: str"),
        ("method.shard_size=500", "multiple of method.global_batch"),
        ("data.path=${oops}", "Interpolation key 'oops' not found"),
        ("data.path=${oops}", r"a shell's variable is \$NAME.* \\\$\{NAME\}"),
        ("seed", "expected key=value, got 'seed': missing EQUAL"),
        ("=3", "expected key=value, got '=3'"),
        ("method.rounds=1,2", "method.rounds=1,2: .*Value '1,2' of type 'str' could not be converted to Integer"),
    ],
)
def test_what_is_wrong_is_said_with_what_would_be_right(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        composed(override)
    assert re.search(message, str(error.value), re.DOTALL), str(error.value)


def test_the_override_that_is_wrong_is_named() -> None:
    """Not another one whose key is in the message, too; and without hydra's advice, which does not hold here."""
    for overrides, wrong in (
        (["method=dpo", "method.rouns=3"], "method.rouns=3"),
        (["run=/x/multirun", "method.name=dpo", "cluster=nothing"], "cluster=nothing"),
        (["method.meta.lag=1", "method.meta=3"], "method.meta=3"),
    ):
        with pytest.raises(UserError) as error:
            composed(*overrides)
        message = str(error.value)
        assert message.startswith(f"{wrong}: "), message
        assert "To append" not in message and "Config search path" not in message


VALUES = {
    "cluster.trainer.memory": "--mem=64G",
    "cluster.jobs.gpu_request": "--gres=gpu:{gpus}",
    "cluster.trainer.partition": "a,b",
    "cluster.trainer.qos": "it's",
    "cluster.worker.python": r"C:\'new'\\",
    "run": "/x/date=2024/a(b)/é",
}


@pytest.mark.parametrize("key", VALUES)
def test_a_value_may_have_any_characters(run: Run, key: str) -> None:
    """They are a shell's and Slurm's, not those of hydra's grammar."""
    value: Any = composed(f"{key}={VALUES[key]}")
    for part in key.split("."):
        value = getattr(value, part)
    assert value == VALUES[key]
    if key != "run":
        value = updated(run, [f"{key}={VALUES[key]}"])
        for part in key.split("."):
            value = getattr(value, part)
        assert value == VALUES[key]


def test_a_path_of_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert composed("data.path=~/pairs.jsonl").data.path == f"{tmp_path}/pairs.jsonl"


def test_a_python_of_a_virtual_environment_is_found_from_everywhere(tmp_path: Path) -> None:
    """Its link is not followed: where it leads is another Python, without the environment's packages."""
    (tmp_path / "my env" / "bin").mkdir(parents=True)
    (tmp_path / "my env" / "bin" / "python").symlink_to(sys.executable)
    given = {
        "worker": "'my env/bin/python'",
        "trainer": "apptainer exec my env/bin/python",
        "sidecar": "nowhere/python",
    }
    overrides = [f'cluster.{role}.python="{python}"' for role, python in given.items()]
    found = compose([*MINIMUM, *overrides], tmp_path).cluster
    assert found.worker.python == f"'{tmp_path}/my env/bin/python'"
    assert (found.trainer.python, found.sidecar.python) == (given["trainer"], given["sidecar"])


def test_a_shell_variable_in_braces_is_escaped(tmp_path: Path) -> None:
    mine = profile(tmp_path / "mine.yaml", "jobs: {setup: ['cd \\${HOME}', 'cd $HOME']}\n")
    assert composed(f"cluster={mine}").cluster.jobs.setup == ["cd ${HOME}", "cd $HOME"]


def test_what_is_missing_is_said() -> None:
    with pytest.raises(UserError, match=r"data\.path: expected a preference dataset"):
        compose([], Path.cwd())


# ---------------------------------------------------------------------------------------------- files of one's own


def profile(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_group_takes_a_file_of_ones_own(tmp_path: Path) -> None:
    profile(tmp_path / "my site.yaml", "kind: slurm\njobs: {partition: a, environment: {A: '1'}}\n")
    for given in ("my site.yaml", f"{tmp_path}/my site.yaml"):
        overrides = [f"cluster={given}", "cluster.jobs.partition=b", "cluster.jobs.environment.B=2"]
        found = compose([*MINIMUM, *overrides], tmp_path).cluster
        assert (found.kind, found.jobs.partition, found.jobs.environment) == ("slurm", "b", {"A": "1", "B": "2"})


def test_a_file_of_ones_own_may_start_from_a_shipped_one_and_fill_other_groups(tmp_path: Path) -> None:
    mine = profile(tmp_path / "mine.yaml", "defaults: [devcluster, _self_]\ninterface: eth7\n")
    found = composed(f"cluster={mine}").cluster
    assert (found.name, found.interface) == ("devcluster", "eth7")
    text = "# mine\n# @package _global_\ndefaults: [{override /method: bpo}]\nname: all\ntrainer: {tensor: 2}\n"
    found = composed(f"experiment={profile(tmp_path / 'all.yaml', text)}")
    assert (found.name, found.method.name, found.trainer.tensor) == ("all", "bpo", 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cluster=.*mine.yaml: cannot read .*No such file"),
        ("- a", "expected keys and values in .*mine.yaml, got '- a'"),
        ("a: [", "cannot read .*mine.yaml as a configuration file: while parsing"),
        ("partitoin: a", "Key 'partitoin' not in 'ClusterConfig'.*keys there: budgets, control, grace,"),
        ("jobs: {partitoin: a}", "Key 'partitoin' not in 'JobRequest'.*keys there: account,"),
        ("kind: pbs", "unknown cluster.kind 'pbs'; expected one of: local, slurm"),
    ],
)
def test_a_file_of_ones_own_that_is_wrong(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "mine.yaml"
    if text is not None:
        profile(path, text)
    with pytest.raises(UserError) as error:
        composed(f"cluster={path}")
    assert re.search(message, str(error.value), re.DOTALL), str(error.value)


def test_a_cluster_alone_can_be_composed() -> None:
    """As `metaapo doctor` does, before there is anything to run."""
    found = compose(["cluster=devcluster"], Path("/base"), complete=False)
    assert (found.cluster.name, found.data.path, found.model.policy) == ("devcluster", "", "")


# ---------------------------------------------------------------------------------------------- an existing run


def test_resume_changes_operations(run: Run) -> None:
    found = updated(
        run,
        [
            "inference.workers=3",
            "trainer.poll=1e-1",
            "cluster.umask=027",
            "cluster.jobs.environment.OMP_NUM_THREADS=4",
            "+cluster.jobs.environment.NCCL_DEBUG=WARN",
            "inference.does=[sample, annotate]",
            "cluster.trainer.python=/envs/trainer/bin/python",
        ],
    )
    assert (found.inference.workers, found.trainer.poll, found.cluster.umask) == (3, 0.1, "027")
    assert found.cluster.jobs.environment == {"OMP_NUM_THREADS": "4", "NCCL_DEBUG": "WARN"}
    assert found.inference.does == ["sample", "annotate"] and found.cluster.trainer.python == "/envs/trainer/bin/python"
    assert found.method == run.config.method
    assert run.operations_version() == 0, "nothing is written yet"


def test_resume_and_replay_take_another_profile(run: Run, tmp_path: Path) -> None:
    mine = profile(tmp_path / "mine.yaml", "kind: slurm\njobs: {python: /env/python}\n")
    found = updated(run, ["cluster.interface=ib0", f"cluster={mine}"]).cluster
    assert (found.kind, found.interface, found.jobs.python) == ("slurm", "ib0", "/env/python")
    run.set_operations(updated(run, [f"cluster={mine}"]))
    again = replayed(
        [f"replay_from={run.root}", "run=again", "cluster=local", "inference=cpu", "inference.max_model_len=2048"],
        Path("/base"),
    )
    assert (again.cluster.kind, again.cluster.jobs.python) == ("local", sys.executable)
    assert again.inference.dtype == "float32"


@pytest.mark.parametrize(
    "key", ["data.path", "+data.path", "method.rounds", "seed", "model.policy", "evaluation.reward", "replay_from"]
)
def test_resume_refuses_keys_of_the_identity_by_name(run: Run, key: str) -> None:
    with pytest.raises(
        UserError,
        match=rf"{key.lstrip('+')} belongs to the identity .*can change: trainer, inference, sidecar, cluster",
    ):
        updated(run, ["inference.workers=3", f"{key}=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inference.wokers=3", "unknown configuration key 'inference.wokers'; expected one of: .*inference.workers"),
        ("infrence.workers=3", "unknown configuration key 'infrence.workers'; expected one of: cluster"),
        ("inference.workers.more=3", "unknown configuration key 'inference.workers.more'"),
        ("inference.workers=many", "inference.workers: expected int, got 'many'"),
        ("inference.workers=0", "needs at least 1, got 0"),
        ("inference=3", "inference=3: Config group override must be a string"),
        ("inference=tpu", "Available options in 'inference': cpu gpu"),
        ("experiment=quickstart", "unknown configuration key 'experiment'; expected one of: cluster"),
        ("run=elsewhere", "run was decided at launch.* These can change: trainer, inference"),
        ("name=other", "name was decided at launch"),
        ("trainer.recompute=some", "unknown trainer.recompute 'some'; expected one of: full, none, selective"),
        ("inference.workers", "expected key=value, got 'inference.workers'"),
        ("~inference.workers", "expected key=value, got '~inference.workers'"),
        ("inference.workers=1,2", "inference.workers: expected int, got '1,2'"),
        ("inference.does=[", r"inference.does: expected a list, got '\['"),
    ],
)
def test_resume_says_what_is_wrong(run: Run, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        updated(run, [override])


# ---------------------------------------------------------------------------------------------- a replay


def replay(run: Run, *overrides: str) -> Config:
    return replayed([f"replay_from={run.root}", *overrides], Path("/base"))


def test_a_replay_is_the_run_with_other_operations(run: Run) -> None:
    found = replay(run, "run=again", "trainer.tensor=2")
    assert found.method == run.config.method and found.data == run.config.data
    assert (found.replay_from, found.run, found.trainer.tensor) == (str(run.root), "/base/again", 2)


def test_a_replay_finds_its_source_from_where_it_is_launched(run: Run) -> None:
    found = replayed([f"replay_from={run.root.name}", "run=again"], run.root.parent)
    assert found.replay_from == str(run.root)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["run=again", "method.rounds=1"],
            "method.rounds: a replay trains .* again as it was; only these can change: run, trainer",
        ),
        (["trainer.tensor=2"], "a directory of its own: run=DIR"),
    ],
)
def test_a_replay_changes_nothing_else(run: Run, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replay(run, *overrides)


def test_a_replay_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        replayed([f"replay_from={tmp_path}", "run=again"], tmp_path)


# ---------------------------------------------------------------------------------------------- records of a replay


@pytest.fixture
def source(tmp_path: Path) -> Run:
    """A finished run, as far as a replay looks at it."""
    made = Run.create(tmp_path / "source", make_config(tmp_path / "source"), "test")
    publish_pairs(made)
    publish: Any = made.records.publish
    for index in (1, 2):
        publish(layout.statistics(index), {"statistics": {"mean": index}})
        for shard in (0, 1):
            publish(
                layout.requests(index, shard),
                {"shard": shard},
                blobs={".parquet": f"requests {index} {shard}".encode()},
            )
    publish(layout.annotations(1, 1), {"shard": 1}, blobs={".parquet": b"annotations"})
    for version in range(len(made.plan.boundaries) + 1):
        publish(layout.phi(version), {"version": version}, blobs={".safetensors": f"phi {version}".encode()})
    for version in range(4):
        publish(layout.policy(version), {})
    return made


def test_a_replay_takes_the_records_over_byte_for_byte(source: Run, tmp_path: Path) -> None:
    from toolkit.launch.replay import import_records

    run = Run.create(tmp_path / "replay", make_config(tmp_path / "replay", replay_from=str(source.root)), "replay")
    count = import_records(source, run)
    assert count == 1 + 2 + 4 + 1 + 3
    assert import_records(source, run) == count, "again, after it was interrupted"
    for ref in (layout.PAIRS, layout.requests(2, 1), layout.annotations(1, 1), layout.phi(2)):
        old, new = source.records.require(ref), run.records.require(ref)
        assert [entry.digest for entry in new.files] == [entry.digest for entry in old.files]
        assert new.attributes == old.attributes | {"replayed_from": old.digest}
        # <name>.g0.<attempt>.<token>.<what it is>
        assert [entry.path.split(".", 4)[4] for entry in new.files] == [
            entry.path.split(".", 4)[4] for entry in old.files
        ]
        for entry in new.files:
            run.records.verified(new, entry)
    assert run.pairs(2, 1) == source.pairs(2, 1) and run.heldout() == source.heldout()
    assert run.plan == source.plan
    assert run.records.find(layout.annotations(1, 0)) is None and run.newest_policy() is None


def test_a_run_that_is_not_finished_cannot_be_replayed(run: Run, tmp_path: Path) -> None:
    config = make_config(tmp_path / "again", replay_from=str(run.root))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control, "preflight", lambda config: None)
        with pytest.raises(UserError, match="has not trained its last round"):
            control.create(config)
    assert not (tmp_path / "again").exists(), "a refused launch leaves no directory that is in the way of the next one"
