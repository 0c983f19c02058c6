"""Deletion: announced by a record, after a grace period, and never of what is needed."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from tests.exchange.conftest import make_config, publish_pairs
from toolkit.exchange import filesystem, layout, lineage, retention
from toolkit.exchange.lineage import Progress
from toolkit.exchange.records import File, Manifest, Ref, check, decode
from toolkit.exchange.retention import Sweep, collect_garbage, is_deleted
from toolkit.exchange.run import Run
from toolkit.exchange.verify import manifests


class Grace:
    """The time that passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed = 0.0
        real = retention.time.time
        monkeypatch.setattr(retention.time, "time", lambda: real() + self.passed)


@pytest.fixture
def grace(monkeypatch: pytest.MonkeyPatch) -> Grace:
    return Grace(monkeypatch)


def staged(run: Run, ref: Ref) -> list[File]:
    """Two files in a directory of their own, as the ranks of a trainer leave them."""
    stage = run.records.stage(ref)
    entries = []
    for name in ("a.bin", "b.bin"):
        (stage / name).write_bytes(name.encode())
        entries.append(File(f"{stage.name}/{name}", 5, hashlib.sha256(name.encode()).hexdigest()))
    return entries


def train(run: Run, checkpoints: int = 0, policies: int = 0) -> None:
    parent: Manifest | None = None
    for number in range(checkpoints):
        files = staged(run, layout.checkpoint(number))
        parent = lineage.publish(run.records, parent, Progress(number, 0, 0), {}, 0, files, {})
    for version in range(policies):
        run.records.publish(layout.policy(version), {}, staged=staged(run, layout.policy(version)))


def evaluate(run: Run, *versions: int) -> None:
    for version in versions:
        run.records.publish(layout.evaluation(version), {})


def kept(run: Run, kind: str) -> list[int]:
    """Numbers of the checkpoints or policies whose files are all there."""
    return sorted(
        int(path.name.partition(".")[0])
        for path in (run.root / kind).iterdir()
        if path.is_dir() and len(list(path.iterdir())) == 2
    )


def directories(run: Run, kind: str) -> list[int]:
    return sorted(int(path.name.partition(".")[0]) for path in (run.root / kind).iterdir() if path.is_dir())


def test_nothing_is_removed_before_it_was_announced_for_the_grace_period(run: Run, grace: Grace) -> None:
    train(run, checkpoints=5)
    assert collect_garbage(run) == []
    assert kept(run, "checkpoints") == [0, 1, 2, 3, 4]
    assert [number for number in range(5) if is_deleted(run, layout.checkpoint(number))] == [0, 1, 2]
    grace.passed = run.config.retention.grace / 2
    assert collect_garbage(run) == [] and kept(run, "checkpoints") == [0, 1, 2, 3, 4]
    grace.passed = run.config.retention.grace
    assert sorted(collect_garbage(run)) == [f"checkpoints/00000{number}" for number in range(3)]
    assert directories(run, "checkpoints") == [3, 4]
    assert collect_garbage(run) == []
    assert [lineage.sequence(manifest) for manifest in lineage.chain(run.records)] == [0, 1, 2, 3, 4]


def test_the_record_is_there_before_the_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path, make_config(tmp_path, retention={"grace": 0.0, "checkpoints": 1}), "test")
    publish_pairs(run)
    train(run, checkpoints=3)
    announced = []
    real = retention._remove

    def remove(root: Path, directory: Path) -> bool:
        number = int(directory.name.partition(".")[0])
        announced.append(is_deleted(run, layout.checkpoint(number)))
        return real(root, directory)

    monkeypatch.setattr(retention, "_remove", remove)
    collect_garbage(run)
    assert announced == [True, True] and kept(run, "checkpoints") == [2]


@pytest.mark.parametrize("dies", ["inside-the-first", "after-the-first"])
def test_a_removal_that_was_interrupted_is_ended_later(
    run: Run, grace: Grace, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    train(run, checkpoints=6)
    collect_garbage(run)
    grace.passed = 1e6
    real, removed = retention.shutil.rmtree, []

    def remove(path: Path, ignore_errors: bool) -> None:
        if dies == "inside-the-first":
            next(Path(path).iterdir()).unlink()
        if dies == "inside-the-first" or removed:
            raise KeyboardInterrupt
        real(path)
        removed.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(retention.shutil, "rmtree", remove)
        with pytest.raises(KeyboardInterrupt):
            collect_garbage(run)
    assert len(kept(run, "checkpoints")) == 5
    collect_garbage(run)
    assert directories(run, "checkpoints") == [4, 5]


def test_the_policies_that_are_needed_stay(run: Run, grace: Grace) -> None:
    train(run, policies=7)
    evaluate(run, *range(7))
    collect_garbage(run)
    grace.passed = 1e6
    collect_garbage(run)
    assert directories(run, "policies") == [0, 5, 6], "the first (a reference), and the newest two"
    assert run.newest_policy() == 6


def test_a_policy_waits_for_its_evaluation(run: Run, grace: Grace) -> None:
    train(run, policies=7)
    evaluate(run, 0, 1, 3, 4)
    collect_garbage(run)
    grace.passed = 1e6
    collect_garbage(run)
    assert directories(run, "policies") == [0, 2, 5, 6]
    evaluate(run, 2)
    collect_garbage(run)
    grace.passed = 2e6
    collect_garbage(run)
    assert directories(run, "policies") == [0, 5, 6]


@pytest.mark.parametrize("policies", [0, 1])
def test_the_newest_two_policies_stay_however_few_are_asked_for(tmp_path: Path, policies: int, grace: Grace) -> None:
    """A round that has begun scores under the policy before, where `previous` is the reference."""
    groups = {"retention": {"policies": policies}, "inference": {"does": ["sample", "annotate"]}}
    run = Run.create(tmp_path, make_config(tmp_path, **groups), "test")
    publish_pairs(run)
    train(run, policies=5)
    collect_garbage(run)
    grace.passed = 1e6
    collect_garbage(run)
    assert directories(run, "policies") == [0, 3, 4], "nobody evaluates here, so nothing waits for it"


def test_what_dead_and_beaten_attempts_left_is_removed(run: Run, grace: Grace) -> None:
    train(run, checkpoints=1, policies=1)
    left = []
    for attempt in ("dead", "beaten"):
        other = Run.open(run.root, attempt)
        for ref in (layout.checkpoint(0), layout.checkpoint(1), layout.policy(0)):
            staged(other, ref)
            left.append(other.records.stage(ref))
    (run.root / "checkpoints" / "foreign").mkdir()
    collect_garbage(run)
    grace.passed = run.config.retention.grace / 2
    assert collect_garbage(run) == [] and all(directory.is_dir() for directory in left)
    grace.passed = run.config.retention.grace
    removed = collect_garbage(run)
    assert len(removed) == 8 and all(name.startswith(("checkpoints/000000.", "policies/0000.")) for name in removed)
    assert kept(run, "policies") == [0]
    assert (run.root / "checkpoints" / "foreign").is_dir()
    staying = sorted(path.name for path in (run.root / "checkpoints").iterdir() if path.is_dir())
    assert len([name for name in staying if name.startswith("000001.")]) == 4, (
        "checkpoint 1 may still become one of these"
    )
    assert len([name for name in staying if name.startswith("000000.")]) == 1
    check(lineage.chain(run.records)[0], lineage.chain(run.records)[0].files[0])
    train_on = lineage.publish(run.records, lineage.newest(run.records), Progress(1, 0, 0), {}, 0, [], {})
    assert collect_garbage(run) == [], f"{train_on.ref} has no files: nothing tells whose directory is whose"


def trainer(run: Run, number: int) -> Run:
    """The run as a trainer's next attempt sees it, which has started."""
    attempt = f"attempt{number}"
    run.records.publish(layout.job("trainer", number, "intent"), {"attempt": attempt})
    run.records.publish(layout.job("trainer", number, "start"), {"kind": "started"})
    return Run.open(run.root, attempt)


def test_what_an_attempt_staged_goes_once_it_is_over(run: Run, grace: Grace) -> None:
    """Else killed saves of one number would pile up at full size until somebody took the number."""
    first = trainer(run, 0)
    left = [first.records.stage(ref) for ref in (layout.checkpoint(0), layout.policy(0))]
    collect_garbage(run)
    grace.passed = 1e6
    assert collect_garbage(run) == [] and all(path.is_dir() for path in left), "it may still publish"
    second = trainer(run, 1)
    mine = second.records.stage(layout.checkpoint(0))
    collect_garbage(run)
    grace.passed = 2e6
    assert len(collect_garbage(run)) == 2 and not any(path.exists() for path in left)
    assert mine.is_dir()
    run.records.publish(layout.job("trainer", 1, "end"), {"outcome": "died"})
    collect_garbage(run)
    grace.passed = 3e6
    collect_garbage(run)
    assert not mine.exists()


def test_what_cannot_be_removed_now_is_removed_later(run: Run, grace: Grace, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS a file that is still open keeps its directory from going."""
    train(run, checkpoints=4)
    collect_garbage(run)
    grace.passed = 1e6

    def busy(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(retention.os, "rmdir", busy)
        assert collect_garbage(run) == []
    assert len(collect_garbage(run)) == 2 and directories(run, "checkpoints") == [2, 3]


def test_a_file_that_cannot_be_swept_stops_nobody(run: Run, grace: Grace, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.root / ".status.json.0123456789ab").touch()
    grace.passed = 1e6

    def stale(self: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(filesystem.Path, "unlink", stale)
        assert swept(run) == []
    assert swept(run) == [".status.json.0123456789ab"]


def test_a_condemned_checkpoint_holds_up_nothing(run: Run, grace: Grace) -> None:
    train(run, checkpoints=6)
    for number in (2, 4):
        manifest = run.records.require(layout.checkpoint(number))
        run.records.condemn(manifest.path, manifest.ref, "damaged", "?", None)
    collect_garbage(run)
    grace.passed = 1e6
    removed = collect_garbage(run)
    assert directories(run, "checkpoints") == [3, 4, 5], "two whole ones stay, and what is between them"
    assert len(removed) == 3 and removed[2].startswith("checkpoints/000002."), "nobody's directory any more"


def test_nothing_is_removed_before_the_pairs_are_there(tmp_path: Path, grace: Grace) -> None:
    run = Run.create(tmp_path, make_config(tmp_path), "test")
    assert collect_garbage(run) == []


def test_nothing_outside_the_run_is_removed(run: Run, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (run.root / "link").symlink_to(outside)
    with pytest.raises(ValueError, match="not inside the run"):
        retention._remove(run.root, run.root / "link")
    assert outside.is_dir()


# ------------------------------------------------------------------------------------- what killed writers left


def killed(run: Run, monkeypatch: pytest.MonkeyPatch, ref: Ref, attempt: str) -> None:
    """An attempt that is killed when its data and the private copy of its manifest are written."""

    def link(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(filesystem.os, "link", link)
        patch.setattr(filesystem.Path, "unlink", lambda self: None)
        Run.open(run.root, attempt).records.publish(ref, {}, blobs={".parquet": b"a", ".txt": b"b"})


def swept(run: Run) -> list[str]:
    """What one process removes that looks at everything."""
    sweep, found = Sweep(run), []
    for _ in range(20):
        found += sweep.step()
    return sorted(str(path.relative_to(run.root)) for path in found)


def assert_whole(run: Run) -> None:
    for path in manifests(run.root):
        manifest = decode(path, path.read_bytes())
        for entry in manifest.files:
            check(manifest, entry)


def test_files_that_no_record_can_name_any_more_are_removed(
    run: Run, grace: Grace, monkeypatch: pytest.MonkeyPatch
) -> None:
    won, open_, again = layout.responses(1, 0), layout.responses(1, 1), layout.requests(1, 0)
    for ref in (won, open_, again):
        for attempt in ("dead", "dying"):
            killed(run, monkeypatch, ref, attempt)
    for ref in (won, again):
        run.records.publish(ref, {}, blobs={".parquet": b"a"})
    condemned = run.records.require(again)
    run.records.condemn(condemned.path, again, "damaged", "?", None)
    killed(run, monkeypatch, again, "dead")  # generation 1
    grace.passed = run.config.retention.grace / 2
    assert swept(run) == []
    grace.passed = run.config.retention.grace + 10
    removed = swept(run)
    private = [name for name in removed if Path(name).name.startswith(".")]
    assert len(private) == 7, "one for each that was killed"
    data = sorted(Path(name).name.partition(".d")[0] + Path(name).suffix for name in set(removed) - set(private))
    assert data == ["000000.g0.parquet"] * 4 + ["000000.g0.txt"] * 4, "generation 1 and shard 1 may still be published"
    assert_whole(run)
    assert run.records.publish(open_, {}, blobs={".parquet": b"a"})[1]
    assert run.records.publish(again, {}, blobs={".parquet": b"a"})[0].generation == 1
    assert len(swept(run)) == 6
    assert_whole(run)
    assert swept(run) == []


def test_what_a_killed_preparation_left_is_removed(
    tmp_path: Path, grace: Grace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(tmp_path, make_config(tmp_path), "test")
    killed(run, monkeypatch, layout.PAIRS, "dead")
    publish_pairs(run)
    (tmp_path / ".status.json.0123456789ab").touch()
    grace.passed = 1e6
    assert len(swept(run)) == 4
    assert_whole(run)


def test_nothing_else_is_swept(run: Run, grace: Grace) -> None:
    """Foreign files, staged directories, logs and snapshots, and what is named like garbage there."""
    train(run, checkpoints=1, policies=1)
    for name in ("code/abc", "logs/trainer", "metrics", "rounds/000/requests/000"):
        (run.root / name).mkdir(parents=True, exist_ok=True)
    for directory in ("code/abc", "logs/trainer", "metrics"):
        (run.root / directory / ".x.0123456789ab").touch()
    foreign = ["notes.txt", ".nfs0123456789abcdef", "000000.g0.json.orig", "000000.g0.abc.parquet", ".gitignore"]
    for name in foreign:
        (run.root / "rounds/000/requests/000" / name).touch()
    stage = run.records.stage(layout.checkpoint(1))
    (stage / ".metadata.0123456789ab").touch()
    grace.passed = 1e6
    before = set(run.root.rglob("*"))
    assert swept(run) == [] and set(run.root.rglob("*")) == before


def test_a_sweep_looks_at_few_directories_at_a_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(0, 60 * layout.BUCKET, layout.BUCKET):
        run.records.publish(layout.requests(1, shard), {})
    looked: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(retention.os, "scandir", lambda path: (looked.append(str(path)), scandir(path))[1])
    sweep = Sweep(run)
    sweep.step()
    assert len(looked) <= retention.SWEPT + 1
    for _ in range(12):
        sweep.step()
    assert len({path for path in looked if "requests/" in path}) == 60, "all of them in the end"
