"""Running numbers: where a series stands, whatever happened to its middle."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.exchange import layout, series
from toolkit.exchange.records import Records


def make(tmp_path: Path, *numbers: int, of: series.Series = layout.policy) -> Records:
    records = Records(tmp_path, "test")
    for number in numbers:
        records.publish(of(number), {"number": number}, blobs={".bin": b"x"})
    return records


def newest(records: Records, of: series.Series = layout.policy) -> int | None:
    found = series.newest(records, of)
    return None if found is None else series.number(found)


def condemn(records: Records, number: int) -> None:
    manifest = records.require(layout.policy(number))
    records.condemn(manifest.path, manifest.ref, "damaged", "?", None)


def test_an_empty_series(tmp_path: Path) -> None:
    assert newest(make(tmp_path)) is None
    (tmp_path / "policies").mkdir()
    assert newest(Records(tmp_path, "test")) is None and series.numbers(tmp_path, layout.policy) == []


def test_holes_hide_nothing(tmp_path: Path) -> None:
    records = make(tmp_path, *range(5))
    condemn(records, 2)
    (tmp_path / "policies" / "0001.g0.json").unlink()
    assert newest(records) == 4
    condemn(records, 4)
    assert newest(records) == 3
    make(tmp_path, 4)
    assert newest(records) == 4 and series.newest(records, layout.policy).generation == 1
    found = [series.number(manifest) for manifest in series.valid(records.find, tmp_path, layout.policy)]
    assert found == [4, 3, 0]


def test_only_records_of_the_series_count(tmp_path: Path) -> None:
    records = make(tmp_path, 0, 1, of=layout.opened)
    make(tmp_path, 0, 1, 2, of=layout.closed)
    for name in (".002.opened.g0.json.0123456789ab", "003.opened.g0.tombstone.json", "004.opened.json", ".nfs0005"):
        (tmp_path / "control" / name).touch()
    assert newest(records, layout.opened) == 1 and newest(records, layout.closed) == 2
    attempts = make(tmp_path, 0, 11, of=lambda number: layout.job("worker-000", number, "intent"))
    assert newest(attempts, lambda number: layout.job("worker-000", number, "intent")) == 11


def test_a_listing_may_be_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS may show an old listing of a directory; names that are asked for are found all the same."""
    records = make(tmp_path, *range(6))
    monkeypatch.setattr(series, "numbers", lambda *_: [2, 1, 0])
    assert newest(records) == 5
    monkeypatch.setattr(series, "numbers", lambda *_: [])
    assert newest(records) == 5


def test_which_of_many_are_there_takes_one_listing_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = make(tmp_path, 0, 3, layout.BUCKET, of=lambda shard: layout.requests(1, shard))
    make(tmp_path, 4, of=lambda shard: layout.responses(1, shard))
    wanted = [of(1, shard) for shard in range(2 * layout.BUCKET) for of in (layout.requests, layout.annotations)]
    listed: list[Path] = []
    iterdir = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: (listed.append(self), iterdir(self))[1])
    expected = {layout.requests(1, shard) for shard in (0, 3, layout.BUCKET)}
    assert series.present(records.root, wanted) == expected
    assert len(listed) == 4
