"""Damaged records: readers report them, the tick looks for itself, condemns, and they are made again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.exchange.conftest import make_config
from toolkit.errors import UserError
from toolkit.exchange import layout, lineage, reports, retention
from toolkit.exchange.lineage import Progress
from toolkit.exchange.records import Corrupt, File, Manifest, Ref
from toolkit.exchange.reports import Condemnations, condemn_reported, report
from toolkit.exchange.run import Run

REF = layout.annotations(1, 0)


def make(run: Run, ref: Ref = REF, content: bytes = b"annotations") -> Manifest:
    return run.records.publish(ref, {"round": 1}, blobs={".bin": content})[0]


def damage(manifest: Manifest) -> None:
    path = manifest.directory / manifest.files[0].path
    path.write_bytes(b"X" + path.read_bytes()[1:])


def meet(run: Run, ref: Ref = REF) -> Corrupt:
    """What a job does that meets a damaged record."""
    reader = Run.open(run.root, "reader")
    with pytest.raises(Corrupt) as error:
        manifest = reader.records.require(ref)
        reader.records.verified(manifest, manifest.files[0])
    report(reader, error.value)
    return error.value


def consume(run: Run, manifest: Manifest) -> None:
    lineage.publish(run.records, None, Progress(1, 1, 0), {str(manifest.ref): manifest.digest}, 0, [], {})


def notes(run: Run) -> list[str]:
    return sorted(path.name for path in (run.root / "reports").iterdir())


def test_a_damaged_record_is_reported_condemned_and_made_again(run: Run) -> None:
    assert condemn_reported(run) == []
    damage(make(run))
    meet(run)
    assert run.records.find(REF) is not None, "a report condemns nothing"
    (line,) = condemn_reported(run)
    assert line.startswith(f"{REF}: its file") and "digest" in line
    assert notes(run) == [] and condemn_reported(run) == []
    assert run.records.find(REF) is None
    again = make(run, content=b"other annotations")
    assert again.generation == 1 and Run.open(run.root).records.require(REF) == again


def test_those_who_remember_records_are_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(make(run))
    before = Condemnations(run)
    meet(run)
    assert not before.news()
    condemn_reported(run)
    assert before.news() and not before.news()
    assert not Condemnations(run).news(), "who comes later remembers nothing"
    # A tick that dies between the tombstone and the announcement: the next one announces.
    again = make(run)
    damage(again)
    meet(run)
    with monkeypatch.context() as patch:
        patch.setattr(reports, "_announce", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            condemn_reported(run)
    assert not before.news()
    condemn_reported(run)
    assert before.news()


def test_many_readers_leave_one_note(run: Run) -> None:
    damage(make(run))
    meet(run)
    meet(run)
    assert len(notes(run)) == 1
    assert len(condemn_reported(run)) == 1


def test_a_damaged_manifest_is_condemned_too(run: Run) -> None:
    manifest = make(run)
    manifest.path.write_bytes(manifest.path.read_bytes()[:-5])
    meet(run)
    assert len(condemn_reported(run)) == 1
    assert make(run).generation == 1


def test_a_copy_of_another_record_is_condemned(run: Run) -> None:
    manifest = make(run)
    other = layout.annotations(1, 1)
    (manifest.directory / f"{other.name}.g0.json").write_bytes(manifest.path.read_bytes())
    meet(run, other)
    assert len(condemn_reported(run)) == 1
    assert run.records.find(REF) == manifest and make(run, other).generation == 1


def test_the_tick_looks_for_itself(run: Run) -> None:
    manifest = make(run)
    report(run, Corrupt(manifest.path, "a bad cable, once"))
    assert condemn_reported(run) == []
    assert notes(run) == [] and run.records.find(REF) == manifest


def test_a_consumed_record_comes_back_only_with_the_same_bytes(run: Run) -> None:
    manifest = make(run)
    consume(run, manifest)
    damage(manifest)
    meet(run)
    condemn_reported(run)
    with pytest.raises(UserError, match="other bytes"):
        make(run, content=b"other annotations")
    again = make(run)
    assert again.generation == 1
    damage(again)
    meet(run)
    condemn_reported(run)
    with pytest.raises(UserError, match="other bytes"):
        make(run, content=b"other annotations")
    assert make(run).generation == 2


def test_a_consumed_record_whose_manifest_is_damaged_cannot_be_proven_equal(run: Run) -> None:
    manifest = make(run)
    consume(run, manifest)
    manifest.path.write_bytes(b"{}")
    meet(run)
    condemn_reported(run)
    with pytest.raises(UserError, match="other bytes"):
        make(run)


@pytest.mark.parametrize(
    ("ref", "made"),
    [
        (layout.PAIRS, layout.policy(0)),
        (layout.policy(1), layout.evaluation(1)),
        (layout.policy(1), layout.responses(1, 300)),
        (layout.logprobs("policy-0000", "offline", 1, 3), layout.requests(1, 3)),
        (layout.logprobs("policy-0001", "offline", 1, 3), layout.statistics(1)),
        (layout.annotations(1, 3), layout.logprobs("policy-0000", "online", 1, 3)),
    ],
)
@pytest.mark.parametrize("is_there", [True, False])
def test_what_others_were_made_from_comes_back_only_with_the_same_bytes(
    tmp_path: Path, ref: Ref, made: Ref, is_there: bool
) -> None:
    run = Run.create(tmp_path, make_config(tmp_path), "test")
    damage(make(run, ref))
    for shard in (2, 4):  # of others
        make(run, layout.requests(1, shard))
        make(run, layout.logprobs("policy-0000", "online", 1, shard))
    make(run, layout.responses(2, 3))
    if is_there:
        make(run, made)
    meet(run, ref)
    condemn_reported(run)
    if is_there:
        with pytest.raises(UserError, match="other bytes"):
            make(run, ref, b"other content")
        assert make(run, ref).generation == 1
    else:
        assert make(run, ref, b"other content").generation == 1


def checkpoints(run: Run, count: int) -> list[Manifest]:
    """Checkpoints, the first of which consumed `REF`."""
    first = make(run)
    consume(run, first)
    for number in range(1, count):
        parent = lineage.newest(run.records)
        lineage.publish(run.records, parent, Progress(number + 1, 1, 0), {}, number, [], {})
    return lineage.chain(run.records)


def test_a_damaged_manifest_of_the_newest_checkpoint_is_condemned(run: Run) -> None:
    first, second = checkpoints(run, 2)
    second.path.write_bytes(second.path.read_bytes()[:-5])
    meet(run, second.ref)
    assert len(condemn_reported(run)) == 1
    assert lineage.newest(run.records) == first


def test_damage_in_the_way_of_a_judgement_comes_first(run: Run) -> None:
    """What is to become of a record is written in the newest checkpoint, which is damaged too: nobody had met it yet."""
    first, second = checkpoints(run, 2)
    damage(run.records.require(REF))
    second.path.write_bytes(b"{}")
    meet(run)
    assert condemn_reported(run) == [] and len(notes(run)) == 2
    assert [line.partition(":")[0] for line in condemn_reported(run)] == [str(second.ref), str(REF)]
    assert notes(run) == [] and lineage.newest(run.records) == first
    with pytest.raises(UserError, match="other bytes"):
        make(run, content=b"other annotations")


def test_two_ticks_condemn_once(run: Run) -> None:
    damage(make(run))
    meet(run)
    note = run.root / "reports" / notes(run)[0]
    kept = note.read_bytes()
    condemn_reported(Run.open(run.root, "tick-1"))
    note.write_bytes(kept)
    assert condemn_reported(Run.open(run.root, "tick-2")) == []
    assert make(run).generation == 1


def test_a_late_report_does_not_condemn_the_record_made_again(run: Run) -> None:
    damage(make(run))
    error = meet(run)
    condemn_reported(run)
    again = make(run)
    report(run, error)
    assert condemn_reported(run) == []
    assert run.records.find(REF) == again


def test_files_that_retention_removed_are_no_damage(run: Run) -> None:
    """Else a reader that slept too long would take a policy out of the run's history."""
    run.set_operations(replace(run.config, retention=replace(run.config.retention, grace=0.0)))
    for version in range(5):
        stage = run.records.stage(layout.policy(version))
        (stage / "weights").write_bytes(b"0")
        run.records.publish(layout.policy(version), {}, staged=[staged(stage.name)])
        run.records.publish(layout.evaluation(version), {})
    assert str(layout.policy(1)) in retention.collect_garbage(run)
    meet(run, layout.policy(1))
    assert condemn_reported(run) == []
    assert run.newest_policy() == 4 and notes(run) == []


def staged(directory: str) -> File:
    return File(f"{directory}/weights", 1, hashlib.sha256(b"0").hexdigest())


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "7", json.dumps({"manifest": 7})])
def test_foreign_notes_are_ignored(run: Run, content: str) -> None:
    damage(make(run))
    meet(run)
    (run.root / "reports" / "0.json").write_text(content)
    assert len(condemn_reported(run)) == 1
