"""Policies loaded from a disk of the node's own are verified there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from toolkit.exchange import filesystem, layout
from toolkit.exchange.records import Corrupt, File, Manifest, Records
from toolkit.inference import staging
from toolkit.inference.staging import STAGING, policy_folder, tidied

SLOT = "worker-000"
FILES = {"model.safetensors": b"weights", "config.json": b"{}"}


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "run", "me")


def publish(records: Records, version: int) -> Manifest:
    directory = records.stage(layout.policy(version))
    entries = []
    for name, data in FILES.items():
        content = data + bytes([version])
        filesystem.write(directory / name, content)
        entries.append(File(f"{directory.name}/{name}", len(content), hashlib.sha256(content).hexdigest()))
    return records.publish(layout.policy(version), {}, staged=entries)[0]


def test_without_staging_a_policy_is_loaded_in_place(records: Records) -> None:
    manifest = publish(records, 0)
    assert policy_folder(records, manifest, SLOT) == (manifest.directory / manifest.files[0].path).parent


def test_the_copy_is_loaded_and_replaces_the_one_before(
    records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STAGING, str(tmp_path / "disk"))
    for version in (0, 1):
        folder = policy_folder(records, publish(records, version), SLOT)
        assert folder.is_relative_to(tmp_path / "disk")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            name: data + bytes([version]) for name, data in FILES.items()
        }
    assert len(list((tmp_path / "disk").iterdir())) == 1


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"weightsX"), lambda path: path.unlink()])
def test_a_damaged_policy_is_not_loaded(records: Records, tmp_path: Path, monkeypatch, damage) -> None:
    monkeypatch.setenv(STAGING, str(tmp_path / "disk"))
    manifest = publish(records, 0)
    damage(manifest.directory / manifest.files[0].path)
    with pytest.raises(Corrupt):
        policy_folder(records, manifest, SLOT)


def test_a_disk_that_lies_or_is_not_there_is_named_and_is_no_refusal(
    records: Records, tmp_path: Path, monkeypatch
) -> None:
    """A UserError would end the run, and another node's disk may do."""
    manifest = publish(records, 0)
    (tmp_path / "file").touch()
    monkeypatch.setenv(STAGING, str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match=r"cannot stage policies/0000 .*cluster\.staging"):
        policy_folder(records, manifest, SLOT)
    monkeypatch.setenv(STAGING, str(tmp_path / "disk"))
    monkeypatch.setattr(staging.shutil, "copyfile", lambda source, copy: copy.write_bytes(b"else"))
    with pytest.raises(RuntimeError, match="is the disk of this node broken"):
        policy_folder(records, manifest, SLOT)


def test_nothing_is_left_on_the_disk_but_what_others_use(records: Records, tmp_path: Path, monkeypatch) -> None:
    disk = tmp_path / "disk"
    monkeypatch.setenv(STAGING, str(disk))
    manifest = publish(records, 0)
    killed = policy_folder(Records(records.root, "killed"), manifest, SLOT)
    others = {
        policy_folder(records, manifest, "worker-001"),
        policy_folder(Records(tmp_path / "another run", "me"), manifest, SLOT),
    }
    with pytest.raises(ZeroDivisionError), tidied(records, SLOT):
        assert not killed.exists()
        own = policy_folder(records, manifest, SLOT)
        successors = policy_folder(Records(records.root, "successor"), manifest, SLOT)
        assert own.exists()
        raise ZeroDivisionError
    assert set(disk.iterdir()) == others | {successors}
    monkeypatch.delenv(STAGING)
    with tidied(records, SLOT):
        pass
