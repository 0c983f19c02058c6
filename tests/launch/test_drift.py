"""An environment that somebody changes while a run is under way is noticed."""

from __future__ import annotations

from pathlib import Path

from toolkit.exchange.records import Manifest, Ref
from toolkit.launch.attempts import Attempt
from toolkit.launch.drift import changed_packages


def started(slot: str, number: int, written: float, **packages: str) -> Attempt:
    def record(name: str, **attributes: object) -> Manifest:
        return Manifest(Ref("jobs", name), 0, "a", (), attributes, Path(), written=written)

    return Attempt(slot, number, record("intent"), record("start", kind="started", packages=packages), None)


def test_a_package_in_two_versions_is_told_with_who_had_it_first() -> None:
    workers = [
        [
            started("worker-000", 0, 1.0, vllm="0.32.0", torch="2.13.0"),
            started("worker-000", 1, 5.0, vllm="0.33.0", torch="2.13.0"),
        ],
        [started("worker-001", 0, 2.0, vllm="0.32.0", torch="2.13.0")],
    ]
    [sentence] = changed_packages(workers)
    assert sentence.startswith(
        "the worker's environment changed during the run: vllm 0.32.0 (from worker-000 attempt 0), then 0.33.0 (from worker-000 attempt 1)"
    )


def test_roles_may_differ_and_attempts_may_not_have_started() -> None:
    waiting = Attempt("trainer", 1, started("trainer", 1, 3.0).intent, None, None)
    histories = [[started("trainer", 0, 1.0, torch="2.13.0"), waiting], [started("worker-000", 0, 1.0, torch="2.12.0")]]
    assert changed_packages(histories) == []
