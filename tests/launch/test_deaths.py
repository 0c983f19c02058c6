"""What follows from deaths: nodes to avoid, kinds that share a budget, words of logs."""

from __future__ import annotations

from pathlib import Path

from toolkit.exchange.records import Manifest, Ref
from toolkit.launch.attempts import Attempt
from toolkit.launch.deaths import AT_ONCE, CORNERED, MEMORY_OF_STRIKES, bad_nodes, by_kind, is_cornered, memory_words

NOW = 1_000_000.0


def record(name: str, written: float = NOW - 10, **attributes: object) -> Manifest:
    return Manifest(Ref("jobs/worker-000", name), 0, "a", (), attributes, Path(), written=written)


def attempt(number: int, node: str, written: float = NOW - 10, **end: object) -> Attempt:
    """An attempt on a node; without an ``end`` it runs."""
    intent = record("intent", attempt=f"a{number}", incarnation=0)
    start = record("start", kind="started", nodes=node)
    return Attempt("worker-000", number, intent, start, record("end", written, **end) if end else None)


FAILED = {"outcome": "died", "kind": "node", "message": "", "seconds": 900.0}
EARLY = {"outcome": "failed", "kind": "crash", "message": "", "seconds": AT_ONCE / 2}


def bad(*history: Attempt) -> tuple[str, ...]:
    return bad_nodes([history], 0, NOW)


def test_a_node_that_fails_twice_while_another_does_well_is_avoided() -> None:
    assert bad(attempt(0, "n1", **FAILED), attempt(1, "n1", **EARLY), attempt(2, "n2")) == ("n1",)


def test_once_may_be_chance() -> None:
    assert bad(attempt(0, "n1", **FAILED), attempt(1, "n2")) == ()


def test_what_fails_everywhere_is_not_the_nodes_fault() -> None:
    assert bad(*[attempt(number, f"n{number % 2}", **EARLY) for number in range(6)]) == ()
    assert bad(*[attempt(n, f"n{n % 2}", **FAILED) for n in range(4)], attempt(9, "n9")) == (), "few would be left"


def test_a_long_life_is_no_strike_and_an_old_one_is_forgotten() -> None:
    late = EARLY | {"seconds": 2 * AT_ONCE}
    assert bad(attempt(0, "n1", **late), attempt(1, "n1", **late), attempt(2, "n2")) == ()
    old = NOW - MEMORY_OF_STRIKES - 1
    assert bad(attempt(0, "n1", old, **FAILED), attempt(1, "n1", old, **FAILED), attempt(2, "n2")) == ()


def test_several_nodes_at_once_tell_nothing() -> None:
    assert bad(attempt(0, "n[1-2]", **FAILED), attempt(1, "n[1-2]", **FAILED), attempt(2, "n3")) == ()


def test_a_slot_that_found_no_other_node_avoids_none_for_an_hour() -> None:
    intent = record("intent", attempt="a", incarnation=0)
    voided = record("start", kind="voided", reason=CORNERED, death="withdrawn")
    history = [attempt(0, "n1", **FAILED), Attempt("worker-000", 1, intent, voided, None)]
    assert is_cornered(history, NOW) and not is_cornered(history, NOW + MEMORY_OF_STRIKES)
    assert not is_cornered(history[:1], NOW)


def test_deaths_are_counted_by_kind() -> None:
    saved = {"outcome": "saved"}
    assert by_kind([[attempt(0, "n", **FAILED), attempt(1, "n", **EARLY), attempt(2, "n", **saved)]]) == {
        "node": 1,
        "crash": 1,
    }


def test_the_logs_of_all_ranks_are_searched_for_lack_of_memory(tmp_path: Path) -> None:
    dead = attempt(3, "n1", **EARLY)
    folder = tmp_path / "logs/worker-000/0003-a3"
    folder.mkdir(parents=True)
    (folder / "7_0_log.out").write_text("all is well\n")
    assert memory_words(tmp_path, dead) == ""
    (folder / "7_1_log.out").write_text("x" * 50_000 + "\nslurmstepd: error: Exceeded job memory limit\nbye\n")
    assert memory_words(tmp_path, dead) == "slurmstepd: error: Exceeded job memory limit"
