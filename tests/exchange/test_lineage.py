"""The one chain of checkpoints: parents, progress, fencing."""

from __future__ import annotations

import pytest

from toolkit.exchange import layout, lineage
from toolkit.exchange.lineage import Progress
from toolkit.exchange.records import Manifest, Records, Ref, Superseded
from toolkit.exchange.run import Run
from toolkit.exchange.verify import verify


def publish(records: Records, parent: Manifest | None, step: int, **consumed: str) -> Manifest:
    return lineage.publish(records, parent, Progress(step, 0, 0), consumed, 0, [], {"layout": "tp1"})


def train(records: Records, count: int) -> list[Manifest]:
    """That many checkpoints, one step each."""
    found: list[Manifest] = []
    for step in range(count):
        parent = found[-1] if found else None
        found.append(lineage.publish(records, parent, Progress(step + 1, 0, 0), {f"r{step}": "d"}, step, [], {}))
    return found


def condemn(run: Run, manifest: Manifest) -> None:
    run.records.condemn(manifest.path, manifest.ref, "damaged", "?", None)


def test_a_chain_of_checkpoints(run: Run) -> None:
    assert lineage.newest(run.records) is None and lineage.chain(run.records) == []
    first = publish(run.records, None, 3, b="2", a="1")
    second = publish(run.records, first, 5)
    third = publish(run.records, second, 9)
    assert lineage.chain(run.records) == [first, second, third]
    assert lineage.newest(run.records) == third
    assert [m.attributes["parent"] for m in (first, second, third)] == [None, first.digest, second.digest]
    assert [lineage.sequence(m) for m in (first, second, third)] == [0, 1, 2]
    assert lineage.progress(third) == Progress(step=9, round=0, boundary=0)
    assert list(first.attributes["consumed"].items()) == [("a", "1"), ("b", "2")]
    assert first.attributes["layout"] == "tp1"


def test_the_second_of_two_trainers_is_fenced(run: Run) -> None:
    parent = publish(run.records, None, 3)
    ahead, behind = Records(run.root, "ahead"), Records(run.root, "behind")
    winner = publish(ahead, parent, 5)
    following = publish(ahead, winner, 7)
    with pytest.raises(Superseded, match=r"checkpoint 2 .* published by attempt ahead.*\(behind\) is superseded"):
        publish(behind, parent, 6)
    assert lineage.chain(run.records) == [parent, winner, following]
    with pytest.raises(Superseded):
        publish(behind, None, 1)


def test_a_trainer_that_starts_afresh_goes_on_from_the_newest(run: Run) -> None:
    publish(Records(run.root, "dead"), publish(run.records, None, 3), 5)
    heir = Records(run.root, "heir")
    parent = lineage.newest(heir)
    assert parent is not None
    assert lineage.sequence(publish(heir, parent, 8)) == 2


def test_a_cancelled_trainer_may_still_save_but_not_once_the_run_went_on(run: Run) -> None:
    mine = Run.open(run.root, "mine", incarnation=0)
    Run.open(run.root, "cancel").close("cancelled", "by hand")
    with pytest.raises(Superseded):
        mine.records.publish(Ref("data", "more"), {})
    saved = lineage.publish(mine.records, None, Progress(3, 0, 0), {}, 0, [], {})
    assert saved.attempt == "mine"
    Run.open(run.root, "resume").reopen()
    with pytest.raises(Superseded, match="gone on to 1"):
        lineage.publish(mine.records, saved, Progress(5, 0, 0), {}, 3, [], {})


def test_where_the_lineage_stands_takes_a_look_at_its_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = train(run.records, 30)
    looked: list[Ref] = []
    find = Records.find
    monkeypatch.setattr(Records, "find", lambda self, ref: (looked.append(ref), find(self, ref))[1])
    assert lineage.newest(run.records) == made[-1]
    assert looked == [layout.checkpoint(30), layout.checkpoint(29)]


def test_without_its_newest_checkpoint_training_goes_back_to_the_one_before(run: Run) -> None:
    first, second, third = train(run.records, 3)
    condemn(run, third)
    assert lineage.newest(run.records) == second and lineage.chain(run.records) == [first, second]
    again = lineage.publish(run.records, second, Progress(3, 0, 0), {}, 2, [], {})
    assert again.generation == 1 and lineage.chain(run.records) == [first, second, again]
    with pytest.raises(Superseded):  # who still has the condemned one in memory
        lineage.publish(Records(run.root, "old"), third, Progress(4, 0, 0), {}, 3, [], {})


def test_a_condemned_checkpoint_hides_no_later_one(run: Run) -> None:
    made = train(run.records, 4)
    condemn(run, made[1])
    assert lineage.newest(run.records) == made[3] and lineage.chain(run.records) == made
    with pytest.raises(Superseded, match="checkpoint 3"):  # the hole is not filled by who starts from before it
        lineage.publish(Records(run.root, "late"), made[0], Progress(2, 0, 0), {}, 1, [], {})
    following = lineage.publish(run.records, made[3], Progress(5, 0, 0), {}, 4, [], {})
    assert lineage.chain(run.records) == [*made, following]
    assert [problem for problem in verify(run).problems if problem.startswith("checkpoints/")] == []


def test_who_goes_on_from_a_condemned_checkpoint_keeps_one_lineage(run: Run) -> None:
    """Two trainers race over a condemned newest checkpoint: one has it in memory, the other starts from the one before."""
    made = train(run.records, 3)
    condemn(run, made[2])
    ahead = lineage.publish(Records(run.root, "ahead"), made[2], Progress(4, 0, 0), {}, 3, [], {})
    assert lineage.chain(run.records) == [*made, ahead]
    # The other one had looked before that, and fills the hole: it leads nowhere.
    Records(run.root, "back").publish(layout.checkpoint(2), made[2].attributes)
    assert lineage.newest(run.records) == ahead and lineage.chain(run.records) == [*made, ahead]


@pytest.mark.parametrize("lost", ["damaged", "gone"])
def test_an_unreadable_manifest_leaves_a_gap_that_verify_names(run: Run, lost: str) -> None:
    made = train(run.records, 4)
    if lost == "damaged":
        made[1].path.write_text("{}")
        condemn(run, made[1])
    else:
        made[1].path.unlink()
    assert lineage.newest(run.records) == made[3] and lineage.chain(run.records) == [made[0], *made[2:]]
    problems = [problem for problem in verify(run).problems if problem.startswith("checkpoints/")]
    assert problems == [
        "checkpoints/000001: missing or not readable, so nothing proves what checkpoints/000002 was trained from"
    ]
