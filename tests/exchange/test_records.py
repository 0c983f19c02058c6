"""The single-winner record: publishing, reading, generations; damage and foreign files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from tests.exchange.conftest import make_config
from toolkit.errors import UserError
from toolkit.exchange import filesystem, layout, tables
from toolkit.exchange.records import Corrupt, File, Manifest, Records, Superseded, check, decode
from toolkit.exchange.run import Run

REF = layout.requests(1, 0)


def rows(*sampled: bool) -> pa.Table:
    count = len(sampled)
    columns = {"pair_id": [f"p{i}" for i in range(count)], "sampled": list(sampled)}
    return tables.conform(pa.table(columns | dict.fromkeys(("s", "u", "w_gate"), [0.5] * count)), tables.REQUESTS)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path, "writer")


@pytest.fixture
def published(records: Records) -> Manifest:
    manifest, won = records.publish(REF, {"shard": 0}, table=rows(True, False), blobs={".bin": b"blob"})
    assert won
    return manifest


def reader(manifest: Manifest) -> Records:
    """Another process's view, which has verified nothing yet."""
    return Records(manifest.directory.parents[3], "reader")


# ---------------------------------------------------------------------------------------------- publish and find


def test_what_is_published_is_found(published: Manifest) -> None:
    found = reader(published).require(REF)
    assert found == published and found.digest == published.digest
    assert (found.attempt, found.generation, found.attributes) == ("writer", 0, {"shard": 0})
    assert found.file(".parquet").rows == 2
    assert reader(published).table(found) == rows(True, False)
    assert reader(published).verified(found, found.file(".bin")).read_bytes() == b"blob"
    with pytest.raises(UserError, match=r"no file '\.json'.*it has .*\.bin"):
        found.file(".json")


def test_what_is_not_published_is_not_found(records: Records) -> None:
    assert records.find(REF) is None
    with pytest.raises(UserError, match=rf"{REF} is not published.*metaapo verify"):
        records.require(REF)


def test_the_first_writer_wins_and_the_second_gets_its_record(records: Records, published: Manifest) -> None:
    other = Records(records.root, "other")
    found, won = other.publish(REF, {"shard": 99}, table=rows(False))
    assert not won and found.attempt == "writer" and found.attributes == {"shard": 0}


def test_a_writer_that_loses_at_the_last_moment_leaves_garbage_and_no_error(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Records(records.root, "other")
    # When the guard is asked, `records` has looked and found nothing; then the other publishes.
    records._guard = lambda farewell: other.publish(REF, {"by": "other"}, blobs={".bin": b"theirs"}) and None
    found, won = records.publish(REF, {"by": "writer"}, blobs={".bin": b"mine"})
    assert not won and found.attributes == {"by": "other"}
    assert reader(found).verified(found, found.file(".bin")).read_bytes() == b"theirs"


def test_the_digest_names_the_whole_record(records: Records) -> None:
    first, _ = records.publish(layout.phi(1), {"version": 1})
    second, _ = records.publish(layout.phi(2), {"version": 1})
    assert first.digest != second.digest
    body = json.loads(first.path.read_bytes())
    claimed = body.pop("digest")
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    assert claimed == first.digest == hashlib.sha256(canonical).hexdigest()


def test_staged_files_are_of_the_record(records: Records) -> None:
    ref = layout.checkpoint(0)
    stage = records.stage(ref)
    assert stage != records.stage(ref), "two attempts at one record must not share a directory"
    (stage / "weights").write_bytes(b"0123")
    entry = File(f"{stage.name}/weights", 4, hashlib.sha256(b"0123").hexdigest())
    manifest, _ = records.publish(ref, {}, staged=[entry])
    assert records.verified(manifest, manifest.file("weights")) == stage / "weights"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_json_is_refused_before_anything_has_the_name(records: Records, value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.publish(REF, {"loss": value})
    assert records.find(REF) is None


# ---------------------------------------------------------------------------------------------- damage


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_of_a_data_file_is_found(published: Manifest) -> None:
    entry = published.file(".parquet")
    path = published.directory / entry.path
    for offset in range(0, entry.bytes, max(1, entry.bytes // 40)):
        flip(path, offset)
        with pytest.raises(Corrupt, match="digest") as error:
            reader(published).table(published)
        assert str(published.path) in str(error.value) and "metaapo verify" in str(error.value)
        flip(path, offset)
    assert reader(published).table(published) == rows(True, False)


def test_every_flipped_bit_of_a_manifest_is_found(published: Manifest) -> None:
    data = published.path.read_bytes()
    for offset in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[offset] ^= 1 << bit
            with pytest.raises(UserError, match=str(published.path)) as error:
                decode(published.path, bytes(flipped))
            # the digit of the version may have become that of a newer one
            assert isinstance(error.value, Corrupt) or "newer version" in str(error.value)
    flip(published.path, len(data) // 2)
    with pytest.raises(Corrupt, match="metaapo verify"):
        reader(published).find(REF)


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_truncated_file_is_found(published: Manifest, kept: int) -> None:
    path = published.directory / published.file(".parquet").path
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(Corrupt, match=r"bytes, expected"):
        reader(published).table(published)
    published.path.write_bytes(published.path.read_bytes()[:kept])
    with pytest.raises(Corrupt, match="manifest"):
        reader(published).find(REF)


def test_a_missing_file_is_found(published: Manifest) -> None:
    (published.directory / published.file(".parquet").path).unlink()
    with pytest.raises(Corrupt, match=r"\.parquet is missing") as error:
        reader(published).table(published)
    assert str(published.path) in str(error.value)


def test_a_file_is_verified_once_per_process(published: Manifest) -> None:
    one = reader(published)
    one.table(published)
    flip(published.directory / published.file(".parquet").path, 10)
    one.verified(published, published.file(".parquet"))  # known
    with pytest.raises(Corrupt):
        check(published, published.file(".parquet"))


@pytest.mark.parametrize("content", ["[]", "{}", "null", "7", '{"schema_version": 1}', '{"schema_version": "one"}'])
def test_what_is_json_but_no_manifest_is_damage(published: Manifest, content: str) -> None:
    published.path.write_text(content + "\n")
    with pytest.raises(Corrupt):
        reader(published).find(REF)


def test_a_record_of_a_newer_version_is_no_damage_but_refused(published: Manifest) -> None:
    body = json.loads(published.path.read_bytes()) | {"schema_version": 2, "shape_of_the_future": True}
    published.path.write_text(json.dumps(body))
    with pytest.raises(UserError, match="newer version of the toolkit: schema 2") as error:
        reader(published).find(REF)
    assert not isinstance(error.value, Corrupt), "the tick would condemn it"


def test_a_winner_copied_under_another_name_is_not_that_record(published: Manifest) -> None:
    other = layout.requests(1, 1)
    shutil.copy(published.path, published.directory / f"{other.name}.g0.json")
    with pytest.raises(Corrupt, match=str(REF)):
        reader(published).find(other)
    elsewhere = layout.requests(2, 0)
    directory = reader(published).root / elsewhere.directory
    shutil.copytree(published.directory, directory)
    with pytest.raises(Corrupt, match=str(REF)):
        reader(published).find(elsewhere)


def test_foreign_files_are_ignored(records: Records, published: Manifest) -> None:
    for name in (".nfs0001", "000000.g0.json~", "000000.g0.json.swp", "000001.g0", "README", "000000.g1.json.tmp"):
        (published.directory / name).write_text("not ours")
    (published.directory / "000002.g0.parquet").mkdir()
    assert reader(published).find(REF) == published
    assert records.find(layout.requests(1, 1)) is None
    assert records.publish(layout.requests(1, 2), {}, table=rows(True))[1]


# ---------------------------------------------------------------------------------------------- generations


def condemn(records: Records, manifest: Manifest, must_equal: list[str] | None = None) -> None:
    records.condemn(manifest.path, manifest.ref, "damaged", "its digest", must_equal)


def test_the_valid_record_is_the_lowest_generation_without_tombstone(records: Records, published: Manifest) -> None:
    condemn(records, published)
    assert reader(published).find(REF) is None
    second, won = records.publish(REF, {"again": 1}, table=rows(True, True))
    assert won and second.generation == 1
    assert reader(published).require(REF) == second
    condemn(records, second)
    third, won = Records(records.root, "third").publish(REF, {"again": 2})
    assert won and third.generation == 2
    assert reader(published).require(REF) == third


def test_a_tombstone_says_why_and_stands(records: Records, published: Manifest) -> None:
    condemn(records, published)
    path = published.path.with_name("000000.g0.tombstone.json")
    first = decode(path, path.read_bytes())
    assert first.attributes == {"reason": "damaged", "seen": "its digest", "must_equal": None}
    Records(records.root, "other").condemn(published.path, REF, "later", "?", [])
    assert decode(path, path.read_bytes()) == first


def test_a_consumed_record_is_made_again_only_to_the_same_bytes(records: Records, published: Manifest) -> None:
    condemn(records, published, [entry.digest for entry in published.files])
    with pytest.raises(UserError, match=r"other bytes.*metaapo launch"):
        records.publish(REF, {}, table=rows(True, True), blobs={".bin": b"blob"})
    assert records.find(REF) is None
    again, won = records.publish(REF, {}, table=rows(True, False), blobs={".bin": b"blob"})
    assert won and again.generation == 1


def test_a_block_that_cannot_be_read_is_damage(published: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(path: Path) -> str:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(filesystem, "digest", digest)
    code = errno.EIO
    with pytest.raises(Corrupt, match="cannot be read: Input/output error"):
        check(published, published.files[0])
    code = errno.EACCES
    with pytest.raises(PermissionError):
        check(published, published.files[0])


# ---------------------------------------------------------------------------------------------- who may publish


def test_an_attempt_of_a_closed_incarnation_publishes_nothing(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", make_config(tmp_path / "run"), "launch")
    job = Run.open(run.root, "job", incarnation=0)
    job.records.publish(layout.phi(0), {})
    run.close("cancelled", "by hand")
    with pytest.raises(Superseded, match=r"incarnation 0, which is over \(cancelled: by hand\)"):
        job.records.publish(layout.phi(1), {}, blobs={".bin": b"late"})
    assert job.records.find(layout.phi(1)) is None
    assert not list((run.root / "phi").rglob("*.bin"))
    assert job.records.publish(layout.phi(0), {})[1] is False, "what is there may still be asked for"
    assert run.reopen() == 1
    with pytest.raises(Superseded):
        job.records.publish(layout.phi(1), {})
    assert Run.open(run.root, "next", incarnation=1).records.publish(layout.phi(1), {})[1]
