"""The shipped cluster profiles: each composes, is documented, and makes the scripts that its kind of site wants."""

from __future__ import annotations

import dataclasses
import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from tests.exchange.conftest import ROOT
from tests.launch.conftest import World
from tests.launch.test_slurm import say
from toolkit.cluster import Budgets, ClusterConfig, JobRequest
from toolkit.config import Config, build
from toolkit.errors import UserError
from toolkit.launch import batch
from toolkit.launch.compose import compose, config_directory
from toolkit.launch.estimate import estimate
from toolkit.launch.rehearsal import dry_run, planned_jobs

PROFILES = sorted(path.stem for path in (config_directory() / "cluster").glob("*.yaml"))
EXAMPLES = [name for name in PROFILES if name.startswith("example_")]


def composed(world: World, profile: str, *overrides: str) -> Config:
    given = [f"data.path={world.data}", f"model.policy={world.policy}", f"reward.model={world.reward}"]
    run = f"run={world.data.parent / 'run'}"
    return compose([f"cluster={profile}", *given, run, "trainer.tensor=2", "trainer.data=4", *overrides], Path("/base"))


def scripts(config: Config) -> dict[str, str]:
    """The script of each slot, which bash must understand."""
    found = {job.slot: batch.script(job) for job in planned_jobs(config)}
    for text in found.values():
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0, text
        assert not re.search(r"#SBATCH \S*=(''|None|null)?$|\{gpus\}", text, re.MULTILINE), text
        assert "#SBATCH --no-requeue" in text and "--kill-on-bad-exit=1" in text and "--array" not in text
    return found


def test_there_are_three_examples_of_different_kinds() -> None:
    assert len(EXAMPLES) == 3
    assert {"local", "slurm", "devcluster"} <= set(PROFILES)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_dry_run_of_every_profile(world: World, profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed(world, profile)
    assert config.cluster.name == profile
    console = Console(file=io.StringIO(), width=200)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")  # a Slurm that is installed here would be asked
        dry_run(config, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("GPU-hours" in printed) == (profile != "local")
    assert printed.count("#!/bin/bash") == (0 if profile == "local" else 2 + (config.cluster.sidecar_in == "own"))
    scripts(config)


SAID = "sbatch: Job 7 to start at 2026-11-21T12:09:05 using 1 processors on nodes n1 in partition gpu"


def rehearsed(world: World, patch: pytest.MonkeyPatch, words: str, status: int, *overrides: str) -> str:
    """A dry run where sbatch says this, and Slurm nothing else."""
    say(world.data.parent, patch, "sbatch", words, status)
    console = Console(file=io.StringIO(), width=200)
    try:
        dry_run(composed(world, "example_gres_modules", *overrides), console)
    except UserError as error:
        console.print(f"refused: {error}")
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_dry_run_asks_sbatch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = rehearsed(world, monkeypatch, SAID, 0)
    assert printed.count("#!/bin/bash") == 3 and "refused" not in printed and "GPU-hours" in printed


@pytest.mark.parametrize(
    "words",
    [
        "sbatch: error: fetch_config: DNS SRV lookup failed\nsbatch: fatal: Could not establish a configuration source",
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "",
    ],
)
def test_a_slurm_that_does_not_answer_refuses_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """All scripts are printed, and the sum; it is asked once, not once a script."""
    printed = rehearsed(world, monkeypatch, words, 1)
    assert printed.count("#!/bin/bash") == 3 and "refused" not in printed and "GPU-hours" in printed
    assert printed.count("Slurm did not answer") == 1


def test_a_full_queue_refuses_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = rehearsed(world, monkeypatch, "sbatch: error: QOSMaxSubmitJobPerUserLimit", 1)
    assert "refused" not in printed and printed.count("Slurm has no room for it now: sbatch: error: QOSMax") == 3


def test_all_scripts_are_printed_before_what_is_wrong(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = rehearsed(world, monkeypatch, "sbatch: error: invalid partition specified: gpu", 1)
    scripts, _, refusal = printed.partition("refused: ")
    assert scripts.count("#!/bin/bash") == 3 and "GPU-hours" in scripts
    for role in ("trainer", "worker", "sidecar"):
        assert f"{role}: Slurm would refuse it: sbatch: error: invalid partition" in refusal


def test_a_dry_run_warns_where_no_gpu_is_asked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = rehearsed(world, monkeypatch, SAID, 0, "cluster.jobs.gpu_request=null")
    for role in ("trainer", "worker"):
        assert f"or {role} computes on CPUs" in printed
    assert "or sidecar computes" not in printed
    assert "computes on CPUs" not in rehearsed(world, monkeypatch, SAID, 0)


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        # 8 GPUs of the trainer for two days, one of a worker for 12 h
        ("example_gres_modules", "one attempt of each cost at most 396.0 GPU-hours (wall times up to 48 h)"),
        # 6 links of 8 + 1 GPUs, a day each
        (
            "example_gpus_per_node_apptainer",
            "6 attempts of each cost at most 1,296.0 GPU-hours (wall times up to 24 h)",
        ),
        # 2 + 1 nodes of 4 GPUs for 12 h
        ("example_whole_node_pyxis", "cost at most 144.0 GPU-hours (wall times up to 12 h; whole nodes of 4 GPUs"),
    ],
)
def test_what_the_jobs_may_cost(world: World, profile: str, words: str) -> None:
    config = composed(world, profile)
    assert words in "\n".join(estimate(config, planned_jobs(config)))


def test_the_generic_profile_shows_every_key_with_its_default() -> None:
    """What people copy is the whole schema, and says of no key what is not so."""
    values = yaml.safe_load((config_directory() / "cluster/slurm.yaml").read_text())
    assert values.keys() == {field.name for field in dataclasses.fields(ClusterConfig)}
    assert values["jobs"].keys() == {field.name for field in dataclasses.fields(JobRequest)}
    assert values["budgets"].keys() == {field.name for field in dataclasses.fields(Budgets)}
    default = ClusterConfig(name="slurm", kind="slurm", jobs=JobRequest(time_minutes=1440))
    assert build(ClusterConfig, values) == default


def test_every_key_is_in_the_documentation() -> None:
    text = (ROOT / "docs/clusters.md").read_text()
    for kind in (ClusterConfig, JobRequest, Budgets):
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in text or f"`budgets.{field.name}`" in text, field.name
    for name in PROFILES:
        assert name in text


def test_gres_and_modules(world: World) -> None:
    found = scripts(composed(world, "example_gres_modules"))
    assert "#SBATCH --gres=gpu:a100:4\n" in found["trainer"] and "#SBATCH --nodes=2\n" in found["trainer"]
    assert "#SBATCH --gres=gpu:a100:1\n" in found["worker-000"]
    assert "--gres" not in found["sidecar"]
    for text in found.values():
        assert "#SBATCH --account=lab_nlp\n" in text and 'METAAPO_STAGING="$TMPDIR"' in text
        assert 'HF_HUB_OFFLINE="1"' in text
    assert [slot for slot in found if 'NCCL_SOCKET_IFNAME="ib0"' in found[slot]] == ["trainer"]
    # the role's lines follow those of all roles, and come before Python
    lines = found["trainer"].splitlines()
    purge, cuda = lines.index("module purge"), lines.index("module load cuda/12.8")
    command = next(number for number, line in enumerate(lines) if line.startswith("srun "))
    assert purge < cuda < command and "/projects/lab_nlp/envs/trainer/bin/python -u -m submitit" in lines[command]
    assert "#SBATCH --partition=gpu-preempt\n" in found["worker-000"] and "cuda" not in found["sidecar"]


def test_gpus_per_node_and_apptainer(world: World) -> None:
    found = scripts(composed(world, "example_gpus_per_node_apptainer"))
    assert "#SBATCH --gpus-per-node=4\n" in found["trainer"] and "#SBATCH --gpus-per-node=1\n" in found["worker-000"]
    assert "--gpus" not in found["sidecar"] and "--nv" not in found["sidecar"]
    for text in found.values():
        assert "--mem" not in text and "--gres" not in text
        assert "apptainer exec" in text and "python3 -u -m submitit.core._submit" in text
        assert "--env PYTHONPATH=$PYTHONPATH" in text, "for bash to expand"


def test_whole_nodes_and_pyxis(world: World) -> None:
    config = composed(world, "example_whole_node_pyxis")
    found = scripts(config)
    assert set(found) == {"trainer", "worker-000"}, "the sidecar lives in the trainer's job"
    for text in found.values():
        assert "#SBATCH --exclusive\n" in text and "--gres" not in text and "--gpus" not in text
        assert "--partition" not in text
    step = next(line for line in found["trainer"].splitlines() if line.startswith("srun "))
    options, _, command = step.partition(" python3 ")
    assert {"--container-image=/scratch/m4242/images/trainer.sqsh", "--cpus-per-task=32"} <= set(shlex.split(options))
    assert command.startswith("-u -m submitit.core._submit")
    assert (
        "#SBATCH --constraint='gpu&hbm80g'\n" in found["trainer"] and "#SBATCH --qos=preempt\n" in found["worker-000"]
    )


def test_a_role_unsays_what_all_roles_say(world: World) -> None:
    said = [
        "cluster.jobs.constraint=gpu",
        "cluster.jobs.qos=q",
        "cluster.sidecar.constraint=''",
        "cluster.sidecar.qos=''",
    ]
    found = scripts(composed(world, "slurm", *said))
    assert "--constraint=gpu\n" in found["trainer"] and "--qos=q\n" in found["trainer"]
    assert "constraint" not in found["sidecar"] and "qos" not in found["sidecar"]
