"""The one chain of checkpoints: parents, progress, fencing."""

from __future__ import annotations

import pytest

from toolkit.exchange import lineage
from toolkit.exchange.lineage import Progress
from toolkit.exchange.records import Manifest, Records, Ref, Superseded
from toolkit.exchange.run import Run


def publish(records: Records, parent: Manifest | None, step: int, **consumed: str) -> Manifest:
    return lineage.publish(records, parent, Progress(step, 0, 0), consumed, 0, [], {"layout": "tp1"})


def test_a_chain_of_checkpoints(run: Run) -> None:
    assert lineage.newest(run.records) is None and lineage.chain(run.records) == []
    first = publish(run.records, None, 3, b="2", a="1")
    second = publish(run.records, first, 5)
    third = publish(run.records, second, 9)
    assert lineage.chain(run.records) == [first, second, third]
    assert lineage.newest(run.records) == lineage.newest(run.records, start=1) == third
    assert lineage.newest(run.records, start=7) is None
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
    with pytest.raises(Superseded, match=r"checkpoint 1 .* published by attempt ahead.*\(behind\) is superseded"):
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
