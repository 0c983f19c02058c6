"""What people are told of a run on a real cluster: why jobs are pending, what attempts died of, with Slurm's own lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.slurm.runs import PayloadRun


def explained(run: PayloadRun) -> dict[str, dict]:
    """The findings of `metaapo explain` by kind."""
    return {
        finding["kind"]: finding for finding in json.loads(run.metaapo("explain", str(run.root), "--json"))["findings"]
    }


def test_pending_jobs_are_shown_with_slurms_reason_in_words(make: Callable[..., PayloadRun]) -> None:
    run = make(cluster={"jobs": {"options": ["--begin=now+1hour"]}})
    run.tick()
    run.until(lambda: "BeginTime" in run.metaapo("status", str(run.root), "--refresh"), "the reason")
    status = json.loads(run.metaapo("status", str(run.root), "--refresh", "--json"))
    trainer = next(job for job in status["jobs"] if job["slot"] == "trainer")
    assert (trainer["outcome"], trainer["reason"]) == ("pending", "BeginTime")
    assert trainer["waits_for"] == "Slurm starts it later: after a requeue, in about two minutes (BeginTime)"
    assert trainer["job"] in run.in_queue()
    found = explained(run)
    assert [entry["slot"] for entry in found["pending"]["attempts"]] == [
        "trainer",
        "sidecar",
        "worker-000",
        "worker-001",
    ]
    assert "Policy 0 is not published; trainer is in the queue" in found["waiting"]["meaning"]


def test_a_program_that_is_not_there_is_found_in_the_log_of_an_attempt_that_never_started(
    make: Callable[..., PayloadRun],
) -> None:
    run = make(cluster={"trainer": {"python": "/no/such/python"}, "budgets": {"crash": 2, "unknown": 2}})

    def closed() -> bool:
        run.tick(code=None)
        return run.run.closing(0) is not None

    run.until(closed, "the run to be given up")
    found = explained(run)["program not found"]
    assert {(entry["slot"], entry["number"]) for entry in found["attempts"]} == {("trainer", 0), ("trainer", 1)}
    assert "/no/such/python: " in found["lines"][0]["text"]
    assert "cluster.trainer.python=" in found["advice"]
    assert found["lines"][0]["file"] in run.metaapo("logs", str(run.root), "trainer", "--list")
    assert "deaths 2 crash" in run.metaapo("status", str(run.root), "--refresh")


def test_the_signal_that_ended_a_rank_is_told(make: Callable[..., PayloadRun]) -> None:
    run = make(step=3.0)
    run.tick()
    run.cluster.run("scancel", "--signal=11", run.job("worker-000"))
    run.until(lambda: "died" in run.outcomes("worker-000"), "the death to be seen")
    found = explained(run)["crash in native code"]
    assert found["attempts"][0]["slot"] == "worker-000" and "Segmentation fault" in found["lines"][0]["text"]
