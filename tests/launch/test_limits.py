"""Requests that sbatch takes and Slurm never runs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.launch import captured
from tests.launch.conftest import World
from toolkit.config import Config
from toolkit.launch.limits import check_limits
from toolkit.launch.rehearsal import planned_jobs
from toolkit.launch.site import Site, parse_site

GPU = {"gpu_request": "--gres=gpu:{gpus}", "time_minutes": 60}


def config(world: World, workers: int = 1, layout: dict[str, int] | None = None, **cluster: Any) -> Config:
    """On Slurm, nodes of two ranks; the values of ``cluster`` win."""
    profile = {"kind": "slurm", "ranks_per_node": 2, "margin": 10, "jobs": GPU} | cluster
    return world.config(cluster=profile, inference={"workers": workers}, trainer=layout or {})


def problems(made: Config, site: Site) -> list[str]:
    return check_limits(made, planned_jobs(made), site)


def one(found: list[str], *words: str) -> None:
    assert len(found) == 1, found
    for word in words:
        assert word in found[0], found[0]


def placed(**keys: Any) -> dict[str, Any]:
    return {"jobs": GPU | keys}


def test_what_is_in_order_passes(world: World) -> None:
    assert problems(config(world, 3, {"tensor": 2, "data": 2}), captured.development()) == []
    campus = placed(partition="gpu", gpu_request="--gres=gpu:a100:{gpus}", constraint="a100&nvlink", qos="scavenger")
    assert problems(config(world, 3, **campus), captured.campus()) == []
    whole = config(world, 3, {"data": 4}, jobs={"gpu_request": "", "time_minutes": 60}, submit_limit=50)
    assert problems(whole, captured.national()) == []


def test_what_does_not_answer_is_not_checked(world: World) -> None:
    anywhere = placed(partition="nowhere", qos="none", account="x", time_minutes=10**6, constraint="y")
    assert problems(config(world, 100, **anywhere), Site()) == []


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        (
            {"worker": {"partition": "nope"}},
            ["worker: there is no partition nope: set cluster.worker.partition to one of: cpu, gpu"],
        ),
        (
            {"worker": {"partition": "short"}},
            ["worker: cluster.worker.time_minutes=60 is over the limit of partition short (MaxTime): set it to 3"],
        ),
        ({"worker": {"partition": "gpu,short", "time_minutes": 60}}, []),
        ({"worker": {"partition": "nope,short"}}, ["there is no partition nope", "over the limit of partition short"]),
        (
            {"sidecar": {"qos": "few"}},
            ["cluster.sidecar.time_minutes=60 is over the limit of QOS few (MaxWall): set it to 3"],
        ),
        ({"sidecar": {"qos": "best"}}, ["there is no QOS best: set cluster.sidecar.qos to one of: few, normal"]),
        (
            {"trainer": {"account": "rich"}},
            ["you have no account rich: set cluster.trainer.account to one of: dev, root"],
        ),
        ({"trainer": {"time_minutes": 2161}}, ["your account dev (MaxWall): set it to 2160 at most"]),
        ({"worker": {"constraint": "a100"}}, ["no node of partition cpu has the feature a100, nor any other"]),
        (
            {"worker": {"gpu_request": "--gres=gpu:a100:{gpus}"}},
            [
                "worker: asks for 1 GPUs of type a100 on a node; nodes of partition cpu have 2: set cluster.worker.partition"
            ],
        ),
        ({"worker": {"gpu_request": "--gpus-per-node={gpus}"}}, []),
    ],
)
def test_on_the_development_cluster(world: World, cluster: dict[str, Any], words: list[str]) -> None:
    found = problems(config(world, **cluster), captured.development())
    assert len(found) == len(words), found
    for sentence, word in zip(found, words, strict=True):
        assert word in sentence


def test_gpus_and_nodes_of_the_trainer(world: World) -> None:
    site = captured.development()
    one(
        problems(config(world, layout={"data": 4}, ranks_per_node=4), site),
        "trainer: asks for 4 GPUs on a node; nodes of partition cpu have 2",
        "cluster.ranks_per_node",
    )
    one(
        problems(config(world, layout={"data": 10}), site),
        "trainer: asks for 5 nodes; partition cpu gives 4 (TotalNodes)",
    )
    few = {"trainer": {"qos": "few", "time_minutes": 3}}
    one(problems(config(world, layout={"data": 2}, **few), site), "asks for 2 GPUs; QOS few gives a job 1 (MaxTRES)")
    found = problems(config(world, layout={"data": 6}, **few), site)
    assert "asks for 3 nodes; QOS few gives a user 2 (MaxTRESPU)" in found[1]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"partition": "owners", "gpu_request": ""},
            ["is for accounts rich_lab, not for lab", "is for groups rich, not for students"],
        ),
        (
            {"partition": "old", "gpu_request": ""},
            ["is DRAIN", "is not for accounts lab", "is for qos long, not for normal"],
        ),
        ({"partition": "gpu-dev", "account": "teaching", "time_minutes": 300}, ["MaxWall", "MaxTime"]),
        ({"partition": "gpu", "qos": "long"}, ["your account lab may not use QOS long", "--"]),
        (
            {"partition": "gpu", "gpu_request": "--gres=gpu:h100:{gpus}"},
            ["nodes of partition gpu have 2 v100 or 4 a100"],
        ),
        ({"partition": "gpu-dev", "gpu_request": "--gres=gpu:3g.20gb:{gpus}"}, []),
        ({"partition": "gpu", "constraint": "a100&h100"}, ["has the feature h100; its nodes have a100, nvlink, v100"]),
        ({"partition": "gpu", "constraint": "[a100|h100]*2"}, []),
        ({"partition": "normal", "gpu_request": "--gres=gpu:{gpus}"}, ["nodes of partition normal have none"]),
    ],
)
def test_on_a_campus(world: World, keys: dict[str, Any], words: list[str]) -> None:
    found = [
        sentence
        for sentence in problems(config(world, **placed(**keys)), captured.campus())
        if sentence.startswith("worker")
    ]
    words = [word for word in words if word != "--"]
    assert len(found) == len(words), found
    for sentence, word in zip(found, words, strict=True):
        assert word in sentence


def test_the_qos_of_a_partition_counts(world: World) -> None:
    large = config(world, layout={"data": 20}, ranks_per_node=4, **placed(partition="gpu"))
    one(problems(large, captured.campus()), "asks for 20 GPUs; partition gpu's QOS gpu_part gives a job 16 (MaxTRES)")


def test_an_account_where_one_is_needed(world: World) -> None:
    found = problems(config(world, **placed(partition="gpu")), captured.campus(account=""))
    assert found[0] == "trainer: the site wants an account: set cluster.trainer.account to one of: lab, teaching"


def test_no_partition_where_none_is_the_default(world: World) -> None:
    site = parse_site("ClusterName = x\n", "PartitionName=a Default=NO State=UP MaxTime=UNLIMITED\n")
    found = problems(config(world), site)
    assert found[0] == "trainer: no partition is named and there is no default one: set cluster.trainer.partition to a"


def test_more_jobs_than_may_be_queued(world: World) -> None:
    """The trainer, the sidecar with its successor, five workers: eight; the account may have seven."""
    site = captured.development()
    one(
        problems(config(world, 5), site),
        "this run has 8 jobs in the queue; your account dev lets you have 7",
        "submit_limit=7",
    )
    assert problems(config(world, 5, submit_limit=7), site) == []
    assert problems(config(world, 4), site) == []
    assert problems(config(world, 5, control="login"), site) == []
    one(problems(config(world, 2, control="chain", links=2, submit_limit=7), site), "has 8 jobs", "cluster.links")
    few = {"jobs": {**GPU, "time_minutes": 3, "gpu_request": ""}, "worker": {"qos": "few"}}
    one(problems(config(world, 5, control="login", **few), site), "5 jobs in the queue; QOS few lets you have 4")


@pytest.mark.parametrize(
    ("constraint", "lacking"),
    [
        ("80gb&2080ti", ""),
        ("GPU_MEM:80GB", ""),
        ("[80gb*2&2080ti*4]", ""),
        ("(80gb)", ""),
        ("80gb&2090ti", "2090ti"),
        ("GPU_MEM:40GB", "GPU_MEM:40GB"),
    ],
)
def test_features_are_whole_words(world: World, constraint: str, lacking: str) -> None:
    site = parse_site(
        "ClusterName = x\n",
        "PartitionName=a Default=YES State=UP MaxTime=UNLIMITED TotalNodes=9\n",
        "a|gpu:2|64|1024000|80gb,2080ti,GPU_MEM:80GB|9\n",
    )
    found = problems(config(world, worker={"constraint": constraint}), site)
    assert bool(found) == bool(lacking), found
    if lacking:
        one(found, f"has the feature {lacking}; its nodes have 2080ti, 80gb, GPU_MEM:80GB")


def test_names_that_a_sites_own_plugin_may_know(world: World) -> None:
    """Where requests are rewritten before Slurm sees them, a QOS or account that Slurm does not know is no fault."""
    unknown = placed(qos="debug", account="m4242_g")
    site = captured.development()
    assert len(problems(config(world, **unknown), site)) == 6, "three roles, two names each"
    site.config["JobSubmitPlugins"] = "lua"
    assert problems(config(world, **unknown), site) == []


def test_limits_that_are_not_enforced_are_none(world: World) -> None:
    site = captured.development()
    site.config["AccountingStorageEnforce"] = "none"
    assert problems(config(world, 50, sidecar={"qos": "few"}), site) == []
