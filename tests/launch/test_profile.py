"""Profiles drafted from what Slurm says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.launch import captured
from tests.launch.conftest import World
from tests.launch.test_profiles import composed
from toolkit.config import validate
from toolkit.errors import UserError
from toolkit.launch import profile
from toolkit.launch.compose import compose
from toolkit.launch.limits import check_limits
from toolkit.launch.rehearsal import planned_jobs
from toolkit.launch.site import Site, parse_site

SITES = {"development": captured.development(), "campus": captured.campus(), "national": captured.national()}


@pytest.mark.parametrize("name", SITES)
def test_a_draft_loads_and_asks_for_nothing_that_never_runs(world: World, tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.yaml"
    path.write_text(profile.draft(SITES[name], name))
    config = composed(world, str(path), "trainer.data=1")
    validate(config)
    assert config.cluster.kind == "slurm" and config.cluster.name == name
    assert check_limits(config, planned_jobs(config), SITES[name]) == []


def test_of_the_development_cluster() -> None:
    text = profile.draft(SITES["development"], "dev")
    found = yaml.safe_load(text)
    assert {role: found[role]["partition"] for role in ("trainer", "worker", "sidecar")} == {
        "trainer": "gpu",
        "worker": "preemptible",
        "sidecar": "cpu",
    }
    assert found["jobs"]["account"] == "dev" and found["control"] == "job"
    assert (found["ranks_per_node"], found["submit_limit"], found["margin"]) == (2, 7, 300)
    assert (found["preemption"], found["grace"]) == ("requeue", 10)
    assert found["trainer"]["gpu_request"] == "--gres=gpu:{gpus}" and "gpu_request" not in found["sidecar"]
    assert "submit_limit: 7  # sacctmgr show assoc: MaxSubmitJobs of dev" in text
    assert "memory: --mem=7200M  # sinfo: 16000 MB a node; without this a job gets 4000 MB a core" in text


def test_of_a_campus() -> None:
    """The day that QOS normal allows counts, not the partition's two; a100, of which there are more; scavenger for the workers."""
    text = profile.draft(SITES["campus"], "campus")
    found = yaml.safe_load(text)
    assert found["trainer"] == {
        "partition": "gpu",
        "time_minutes": 1440,
        "gpu_request": "--gres=gpu:a100:{gpus}",
        "cpus_per_task": 16,
    }
    assert "time_minutes: 1440  # sacctmgr show qos normal: MaxWall 1440" in text
    assert (found["worker"]["qos"], found["worker"]["partition"]) == ("scavenger", "gpu")
    assert (found["preemption"], found["grace"]) == ("cancel", 120)
    assert found["sidecar"]["partition"] == "normal"
    assert found["control"] == "login" and "login[1-4] only" in text, "that is what AllocNodes says"
    assert found["ranks_per_node"] == 4 and found["submit_limit"] == 100
    assert "# other accounts of yours: teaching" in text
    assert "owners" not in text and "old" not in text, "partitions of others, and one that is drained"


def test_the_limit_of_another_account_is_not_this_ones() -> None:
    site = parse_site(
        "ClusterName = x\n",
        "PartitionName=a Default=YES State=UP MaxTime=UNLIMITED\n",
        associations="x|lab||normal|normal||100\nx|teaching||normal|normal||2\n",
        account="lab\n",
    )
    assert "submit_limit: 100  # sacctmgr show assoc: MaxSubmitJobs of lab" in profile.draft(site, "x")


def test_of_whole_nodes_without_gpus_in_slurm() -> None:
    found = yaml.safe_load(profile.draft(SITES["national"], "national"))
    assert (found["trainer"]["gpu_request"], found["trainer"]["partition"]) == ("", "batch")
    assert (found["trainer"]["time_minutes"], found["preemption"]) == (720, "none")
    assert "account" not in found["jobs"] and "submit_limit" not in found


def test_names_that_yaml_would_read_otherwise_are_quoted() -> None:
    site = parse_site("ClusterName = x\n", "PartitionName=on Default=YES State=UP MaxTime=00:02:00\n", account="0123\n")
    found = yaml.safe_load(profile.draft(site, "no"))
    assert (found["name"], found["jobs"]["account"], found["trainer"]["partition"]) == ("no", "0123", "on")
    assert found["margin"] == 30, "of two minutes"


def test_where_there_is_nothing_to_draft_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no partition that you may use; it has: none"):
        profile.draft(Site({"ClusterName": "x"}), "x")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="Slurm does not answer here"):
        profile.write(tmp_path / "mine.yaml")
    assert not list(tmp_path.iterdir())


def test_a_file_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "read_site", lambda timeout: SITES["development"])
    path = tmp_path / "mine.yaml"
    profile.write(path)
    assert compose([f"cluster={path}"], tmp_path, complete=False).cluster.name == "mine"
    path.write_text("precious")
    with pytest.raises(UserError, match="exists, and is not overwritten"):
        profile.write(path)
    assert path.read_text() == "precious"
    with pytest.raises(UserError, match=r"cannot write .*No such file or directory"):
        profile.write(tmp_path / "nowhere" / "mine.yaml")
