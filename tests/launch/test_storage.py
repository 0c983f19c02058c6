"""Filesystems, as `metaapo doctor` tries them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tests.launch.conftest import World
from toolkit.config import Config
from toolkit.exchange import filesystem
from toolkit.launch import storage
from toolkit.launch.finding import Finding
from toolkit.launch.storage import check_storage, mount, nearest, probe_directory


def checked(config: Config) -> list[Finding]:
    with probe_directory(Path(config.run)) as probe:
        return list(check_storage(config, probe))


def bad(config: Config) -> list[tuple[str, str]]:
    return [(found.level, found.message) for found in checked(config) if found.level in ("fault", "warning")]


def test_this_filesystem_is_in_order_and_left_as_it_was(world: World, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = checked(world.config())
    assert {each.level for each in found} == {"ok"}, found
    assert "hard links" in found[0].message and "seen after" in found[1].message and "GiB free" in found[2].message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_of_the_login_node_is_none_for_a_cluster(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "mount", lambda path: ("xfs", {}))
    assert bad(world.config()) == []
    [(level, message)] = bad(world.config(cluster={"kind": "slurm"}))
    assert level == "warning" and "xfs: a disk of this machine" in message


def test_a_filesystem_without_hard_links(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    [(level, message)] = bad(world.config())
    assert level == "fault" and "refuses hard links" in message


def test_a_filesystem_that_gives_a_name_twice(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite(path: Path, data: bytes) -> bool:
        path.write_bytes(data)
        return True

    monkeypatch.setattr(filesystem, "create_once", overwrite)
    [(level, message)] = bad(world.config())
    assert level == "fault" and "could be given again" in message


@pytest.mark.parametrize(
    ("options", "lag", "level", "words"),
    [
        ({}, 0, "warning", "it may take 60 s (nfs4): keep method.meta.lag at 1 or more"),
        ({}, 1, "note", "it may take 60 s (nfs4): method.meta.lag covers it"),
        ({"acdirmax": "30"}, 0, "warning", "it may take 30 s"),
        ({"noac": ""}, 0, "ok", "promises no delay"),
        ({"lookupcache": "none"}, 0, "ok", "promises no delay"),
    ],
)
def test_nfs_keeps_names(
    world: World, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], lag: int, level: str, words: str
) -> None:
    monkeypatch.setattr(storage, "mount", lambda path: ("nfs4", options))
    found = checked(world.config(method={"meta": {"lag": lag}}))[1]
    assert found.level == level and words in found.message


def test_room(world: World) -> None:
    [(level, message)] = bad(world.config(retention={"checkpoints": 10**12}))
    assert level == "fault" and "GiB free; a run takes up to" in message and "retention.checkpoints" in message
    assert "no model is read" in checked(world.config(model={"policy": "/nowhere"}))[2].message


def test_the_estimate_is_that_of_a_dry_run(world: World) -> None:
    from toolkit.launch.estimate import estimate
    from toolkit.launch.rehearsal import planned_jobs

    describe(world.policy / "model.safetensors", 10**9)
    config = world.config()
    assert f"at most {storage.kept(config) / 2**30:.2f} GiB at a time" in "\n".join(
        estimate(config, planned_jobs(config))
    )


def describe(file: Path, count: int) -> None:
    """A file of so many parameters, which takes no space."""
    text = b'{"a": {"shape": [%d], "data_offsets": [0, %d]}}' % (count, 4 * count)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, file.stat().st_size + 4 * count)


def test_where_nothing_can_be_written(world: World) -> None:
    with probe_directory(Path("/proc/run")) as probe:
        assert probe is None
        [found] = check_storage(world.config(), probe)
    assert found.level == "fault" and "cannot be written to" in found.message


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another group")
def test_a_group_that_is_not_the_directorys(world: World, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"umask": "027"}
    assert bad(world.config(cluster=shared)) == []
    os.chown(tmp_path, -1, 54321)
    [(level, message)] = bad(world.config(cluster=shared))
    assert level == "warning" and f"chmod g+s {tmp_path}" in message
    assert bad(world.config()) == [], "a private run needs no group"
    tmp_path.chmod(0o2755)
    assert bad(world.config(cluster=shared)) == []


def test_a_clock_that_goes_wrong(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_skew", lambda probe: -90.0)
    [(level, message)] = bad(world.config())
    assert level == "warning" and "by -90 s" in message


def test_mounts_are_found() -> None:
    assert mount(Path("/proc/self"))[0] == "proc"
    assert nearest(Path("/proc/self/no/such/thing")).name == "self"
