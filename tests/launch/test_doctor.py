"""`metaapo doctor` as a whole, without Slurm; on a real cluster: tests/slurm/test_doctor.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import captured
from tests.launch.conftest import World
from toolkit import cli
from toolkit.config import Config, build
from toolkit.launch import doctor
from toolkit.launch.doctor import diagnose
from toolkit.launch.site import Site


def levels(found: list, *levels: str) -> list[str]:
    return [f"{each.subject}: {each.message}" for each in found if each.level in levels]


def arguments(world: World, *more: str) -> list[str]:
    given = [f"data.path={world.data}", f"model.policy={world.policy}", f"reward.model={world.reward}"]
    return ["doctor", "--no-environments", *given, f"run={world.data.parent / 'run'}", *more]


def test_a_run_on_this_machine(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(world)) == 0
    printed = capsys.readouterr().out
    assert "0 fault(s), 0 warning(s)" in printed and "ok      configuration: profile local" in printed
    assert not (world.data.parent / "run").exists()


def test_one_fault_is_enough_for_exit_status_1(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.policy / "model.safetensors").unlink()
    assert cli.main(arguments(world)) == 1
    printed = capsys.readouterr().out
    assert "fault   configuration: model.policy:" in printed and "1 fault(s)" in printed
    assert "hard links" in printed, "the rest is looked at all the same"


def test_without_run_models_and_data(tmp_path: Path) -> None:
    found = list(diagnose(build(Config, {"run": str(tmp_path / "run")}), environments=False))
    assert levels(found, "fault", "warning") == []
    assert levels(found, "note")[0].startswith("configuration: no data and model are named")


def test_a_profile_that_makes_no_sense_is_said_first(world: World) -> None:
    config = world.config(cluster={"kind": "slurm", "margin": 600, "jobs": {"time_minutes": 15}})
    [found] = diagnose(config)
    assert found.level == "fault" and "leave too little beside cluster.margin" in found.message


def test_where_there_is_no_slurm(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = list(diagnose(world.config(cluster={"kind": "slurm"}), environments=False))
    assert levels(found, "fault") == [
        "Slurm: there is no sbatch here: call this on a login node of the cluster, or cluster=local"
    ]


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> dict[str, Site]:
    """A Slurm that says what was captured; sbatch itself is asked on a real cluster only."""
    sites = {"site": captured.development()}
    monkeypatch.setattr(doctor, "read_site", lambda timeout: sites["site"])
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor, "_rehearsed", lambda config, jobs: iter(()))
    return sites


GOOD = {
    "kind": "slurm",
    "jobs": {"gpu_request": "--gres=gpu:{gpus}"},
    "trainer": {"partition": "gpu"},
    "worker": {"partition": "preemptible"},
    "preemption": "requeue",
    "grace": 10,
    "interface": "lo",
}


def slurm(world: World, **cluster: object) -> list:
    return list(diagnose(world.config(cluster=GOOD | cluster), environments=False))


def test_a_profile_that_fits(world: World, answering: dict[str, Site]) -> None:
    found = slurm(world)
    assert levels(found, "fault") == []
    assert all("a disk of this machine" in text for text in levels(found, "warning"))
    assert [text for text in levels(found, "note") if text.startswith("control: jobs submit jobs here")]
    assert "trainer request: gpu, QOS normal, 1 node(s) x 1 task(s), --gres=gpu:1, 1440 min" in "\n".join(
        levels(found, "ok")
    )


@pytest.mark.parametrize(
    ("cluster", "level", "words"),
    [
        ({"worker": {"partition": "nope"}}, "fault", "request: worker: there is no partition nope"),
        ({"preemption": "none"}, "warning", "preemption in preemptible: the profile says none, Slurm requeue"),
        ({"grace": 60}, "warning", "says 60 s until the kill, Slurm 10 s: set cluster.grace=10"),
        ({"jobs": {}}, "warning", "trainer request: no GPU is asked for: set cluster.jobs.gpu_request"),
        ({"interface": "lo,ib77"}, "warning", "interface: no ib77 on this machine, which has "),
    ],
)
def test_what_does_not_fit(world: World, answering: dict[str, Site], cluster: dict, level: str, words: str) -> None:
    assert words in "\n".join(levels(slurm(world, **cluster), level))


def test_who_may_submit_and_how_often_is_asked(world: World, answering: dict[str, Site]) -> None:
    answering["site"] = captured.campus()
    found = slurm(world, trainer={"partition": "gpu"}, worker={"partition": "gpu"}, preemption="none", grace=0)
    assert "control: jobs may only be submitted from login[1-4]" in "\n".join(levels(found, "warning"))
    config = world.config(cluster=GOOD | {"supervise": 3})
    assert "queries: Slurm would be asked every 3 s" in "\n".join(levels(list(diagnose(config, False)), "warning"))


def test_a_silent_controller_and_absent_accounting(world: World, answering: dict[str, Site]) -> None:
    answering["site"].config["AccountingStorageType"] = "accounting_storage/none"
    assert "accounting: it is off" in "\n".join(levels(slurm(world), "warning"))
    answering["site"] = Site()
    assert "Slurm: scontrol does not answer" in "\n".join(levels(slurm(world), "fault"))


def test_jobs_without_a_network_need_files(world: World, answering: dict[str, Site]) -> None:
    config = world.config(cluster=GOOD, data={"path": "organisation/pairs"})
    assert "offline: jobs cannot download organisation/pairs: metaapo prefetch" in "\n".join(
        levels(list(diagnose(config, False)), "warning")
    )
