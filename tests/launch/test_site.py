"""What Slurm prints, read."""

from __future__ import annotations

import pytest

from tests.launch import captured
from toolkit.launch.site import Site, amount, ask, gpus_asked, gpus_of, minutes, read_site, seconds


def test_the_development_cluster_is_read() -> None:
    site = captured.development()
    assert site.config["ClusterName"] == "dev" and site.default_partition == "cpu" and not site.routes
    assert set(site.partitions) == {"cpu", "gpu", "short", "high", "preemptible", "nograce"}
    [nodes] = site.in_partition("gpu")
    assert (nodes.gpus, nodes.cores, nodes.memory, nodes.features, nodes.count) == ({"": 2}, 4, 16000, frozenset(), 4)
    assert [row["Account"] for row in site.associations] == ["dev", "root"] and site.account == "dev"
    assert site.qos["few"]["MaxSubmitPU"] == "4"
    assert all(site.enforces(what) for what in ("associations", "limits", "qos"))


def test_a_campus_is_read() -> None:
    site = captured.campus()
    assert {row["Account"] for row in site.associations} == {"lab", "teaching"}, "another cluster's are left out"
    assert [nodes.gpus for nodes in site.in_partition("gpu")] == [{"a100": 4}, {"v100": 2}]
    assert site.in_partition("normal")[1].memory == 512000
    assert "nvlink" in site.in_partition("gpu")[0].features
    assert captured.national().routes


@pytest.mark.parametrize(
    ("site", "partition", "qos", "found"),
    [
        (captured.development(), "preemptible", "normal", ("requeue", 10)),
        (captured.development(), "nograce", "normal", ("cancel", 0)),
        (captured.development(), "gpu", "normal", ("none", 0)),
        (captured.development(), "high", None, ("none", 0)),
        (captured.campus(), "gpu", "normal", ("none", 0)),
        (captured.campus(), "gpu", "scavenger", ("cancel", 120)),
        (captured.national(), "batch", None, ("none", 0)),
    ],
)
def test_preemption_is_a_matter_of_partitions_or_of_qos(
    site: Site, partition: str, qos: str | None, found: tuple[str, float]
) -> None:
    assert site.preemption(partition, qos) == found


@pytest.mark.parametrize(
    ("gres", "found"),
    [
        ("(null)", {}),
        ("gpu:2", {"": 2}),
        ("gpu:a100:4(S:0-1)", {"a100": 4}),
        ("gpu:3g.39gb:1", {"3g.39gb": 1}),
        ("gpu:a100:4(S:0,1),gpu:3g.20gb:2(S:0),nvme:1", {"a100": 4, "3g.20gb": 2}),
        ("shard:8,gpu:8(IDX:0-7)", {"": 8}),
    ],
)
def test_gpus_of_a_node(gres: str, found: dict[str, int]) -> None:
    assert gpus_of(gres) == found


@pytest.mark.parametrize(
    ("request_", "found"),
    [
        ("--gres=gpu:4", ("", 4)),
        ("--gres=gpu:a100:4", ("a100", 4)),
        ("--gres=nvme:1,gpu:3g.39gb:2", ("3g.39gb", 2)),
        ("--gpus-per-node=4", ("", 4)),
        ("--gpus-per-node=h100:4", ("h100", 4)),
        ("--exclusive", None),
    ],
)
def test_gpus_of_a_request(request_: str, found: tuple[str, int] | None) -> None:
    assert gpus_asked(request_) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("UNLIMITED", None),
        ("", None),
        ("00:03:00", 3),
        ("1-00:00:00", 1440),
        ("7-12", 10800),
        ("90", 90),
        ("90:30", 90.5),
        ("2-00:30", 2910),
    ],
)
def test_times(text: str, found: float | None) -> None:
    assert minutes(text) == found


def test_grace_times_and_amounts() -> None:
    assert (seconds("10"), seconds("00:02:00"), seconds("0")) == (10, 120, 0)
    assert (amount("cpu=64,gres/gpu=8", "gres/gpu"), amount("", "node"), amount("gres/gpu:a100=4", "gres/gpu")) == (
        8,
        None,
        None,
    )


def test_what_is_not_there_or_slow_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(["metaapo-no-such-command"], 5) == "" and ask(["false"], 5) == "" and ask(["sleep", "9"], 0.1) == ""
    monkeypatch.setenv("PATH", "")
    assert read_site(1) == Site()
