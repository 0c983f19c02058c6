"""Create-once names, durable writes, digests; on a full disk too."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.exchange.conftest import answer, answers, script
from toolkit.errors import UserError
from toolkit.exchange import filesystem

RACE = """
import json, sys, time
from pathlib import Path
from toolkit.exchange.filesystem import create_once
directory, who, names = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
(directory / f"ready-{who}").touch()
while len(list(directory.glob("ready-*"))) < 8:
    time.sleep(0.001)
won = [n for n in range(names) if create_once(directory / str(n), f"{who}:{n}:".encode() * 2000)]
print(json.dumps(won))
"""


def test_each_name_has_exactly_one_winner_and_whole_content(tmp_path: Path) -> None:
    names = 60
    racers = {who: script(RACE, tmp_path, who, names) for who in "abcdefgh"}
    won = {who: json.loads(told) for who, told in zip(racers, answers([*racers.values()]), strict=True)}
    assert Counter(name for found in won.values() for name in found) == dict.fromkeys(range(names), 1)
    for who, found in won.items():
        for name in found:
            assert (tmp_path / str(name)).read_bytes() == f"{who}:{name}:".encode() * 2000
    assert not list(tmp_path.glob(".*")), "a writer left its private file"


def test_a_taken_name_is_never_overwritten(tmp_path: Path) -> None:
    assert filesystem.create_once(tmp_path / "name", b"first")
    assert not filesystem.create_once(tmp_path / "name", b"second")
    assert (tmp_path / "name").read_bytes() == b"first"
    with pytest.raises(FileExistsError):
        filesystem.write(tmp_path / "name", b"third")
    assert (tmp_path / "name").read_bytes() == b"first"


@pytest.mark.parametrize("code", [errno.EIO, errno.EEXIST, errno.ENOENT, errno.EPERM, errno.ESTALE])
def test_a_link_whose_reply_was_lost_is_won(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    real = os.link

    def link(source: Path, target: Path) -> None:
        real(source, target)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    assert filesystem.create_once(tmp_path / "name", b"mine")
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


@pytest.mark.parametrize("code", [errno.EIO, errno.EPERM])
def test_a_failed_link_is_lost_where_another_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def link(source: Path, target: Path) -> None:
        target.write_bytes(b"theirs")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    assert not filesystem.create_once(tmp_path / "name", b"mine")


def failing_link(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_filesystem_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    failing_link(monkeypatch, code)
    with pytest.raises(UserError, match="refuses hard links"):
        filesystem.create_once(tmp_path / "name", b"mine")
    assert not list(tmp_path.iterdir())


def test_an_error_of_link_that_is_no_loss_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_link(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        filesystem.create_once(tmp_path / "name", b"mine")
    assert not list(tmp_path.iterdir())


def test_replace_gives_a_reader_the_old_or_the_new_content(tmp_path: Path) -> None:
    filesystem.replace(tmp_path / "hint", b"old")
    with (tmp_path / "hint").open("rb") as reader:
        filesystem.replace(tmp_path / "hint", b"new")
        assert reader.read() == b"old"
    assert (tmp_path / "hint").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["hint"]


def test_refresh_tells_whether_the_directory_exists(tmp_path: Path) -> None:
    assert filesystem.refresh(tmp_path)
    assert not filesystem.refresh(tmp_path / "absent")


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1000, 1234])
def test_the_tree_digest_is_the_hash_of_the_chunks_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(filesystem, "CHUNK", 100)
    data = bytes(index * 7 % 256 for index in range(size))
    (tmp_path / "file").write_bytes(data)
    hashes = [hashlib.sha256(data[start : start + 100]).digest() for start in range(0, size, 100)]
    expected = hashlib.sha256(b"".join(hashes)).hexdigest() if size > 100 else hashlib.sha256(data).hexdigest()
    assert filesystem.digest(tmp_path / "file") == expected


# ---------------------------------------------------------------------------------------------- a full disk

# Runs on a filesystem of its own, mounted where no other process sees it. What it prints is what happened.
FULL_DISK = """
import json, os, sys
from pathlib import Path
from toolkit.errors import UserError
from toolkit.exchange import filesystem, layout
from toolkit.exchange.records import Records, check

root, free, blob, free_inodes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
records, ref = Records(root, "writer"), layout.phi(1)
(root / ref.directory).mkdir(parents=True)
filesystem.write(root / "earlier", b"earlier")

def fill():
    status = os.statvfs(root)
    if free:
        with (root / "filler").open("wb") as file:
            file.write(bytes(status.f_bavail * status.f_frsize - free))
    for index in range(status.f_ffree - free_inodes if free_inodes else 0):
        (root / f"filler-{index}").touch()

def attempt():
    try:
        records.publish(ref, {"version": 1}, blobs={".bin": b"x" * blob})
    except UserError as error:
        return str(error)
    return "published"

fill()
found = {"error": attempt(), "visible": records.find(ref) is not None}
found["links"] = sorted(path.name for path in (root / ref.directory).glob("*.json"))
found["private"] = sorted(path.name for path in (root / ref.directory).glob(".*"))
for path in root.glob("filler*"):
    path.unlink()
found["again"] = attempt()
manifest = records.require(ref)
for entry in manifest.files:
    check(manifest, entry)
found["earlier"] = (root / "earlier").read_bytes().decode()
print(json.dumps(found))
"""
MOUNT = (
    "unshare",
    "--map-root-user",
    "--mount",
    "sh",
    "-c",
    'mount -t tmpfs -o "$1" tmpfs "$2" && shift 2 && exec "$@"',
)


def on_small_filesystem(directory: Path, options: str, *arguments: object) -> dict:
    """`FULL_DISK` on a tmpfs with these mount options."""
    directory.mkdir()
    probe = subprocess.run([*MOUNT, "sh", options, str(directory), "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no small filesystem can be mounted here: {probe.stderr.strip()}")
    prefix = (*MOUNT, "sh", options, str(directory))
    return json.loads(answer(script(FULL_DISK, directory, *arguments, prefix=prefix)))


@pytest.mark.parametrize(
    ("options", "free", "blob", "free_inodes"),
    [
        pytest.param("size=1m", 64 * 1024, 256 * 1024, 0, id="space-for-the-data"),
        pytest.param("size=1m", 64 * 1024, 64 * 1024, 0, id="space-for-the-manifest"),
        pytest.param("size=1m,nr_inodes=40", 0, 100, 1, id="inodes-for-the-manifest"),
        pytest.param("size=1m,nr_inodes=40", 0, 100, 2, id="inodes-for-the-name"),
    ],
)
def test_a_full_disk_publishes_nothing_and_works_again_once_there_is_space(
    tmp_path: Path, options: str, free: int, blob: int, free_inodes: int
) -> None:
    found = on_small_filesystem(tmp_path / "small", options, free, blob, free_inodes)
    assert "No space left on device" in found["error"]
    assert "Nothing was published" in found["error"]
    assert "metaapo resume" in found["error"]
    assert not found["visible"] and not found["links"] and not found["private"]
    assert found["again"] == "published"
    assert found["earlier"] == "earlier"
