"""Why a run does not go on: on sketches of runs, with logs as Slurm, torch and vLLM write them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.reporting.sketch import Sketch
from toolkit.exchange import hints, layout
from toolkit.launch import observe
from toolkit.launch.adapter import Job, State, Unavailable
from toolkit.reporting import logs
from toolkit.reporting.explain import explain, render

CRASH = {"outcome": "died", "kind": "crash", "message": "its job failed without a word of the role", "nodes": "n1"}
LOST = "[rank0]: RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:28082.\n"
NO_SPACE = """\
submitit INFO (2026-11-21 10:49:15,327) - Starting with JobEnvironment(job_id=12, hostname=n2, local_rank=1(2))
submitit ERROR (2026-11-21 10:51:15,327) - Submitted job triggered an exception
Traceback (most recent call last):
  File "/env/bin/x.py", line 7, in main
    step()
  File "/run/code/ab/toolkit/training/engine.py", line 99, in step
    loss.backward()
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB
"""


def explained(sketch: Sketch) -> dict[str, Any]:
    found = explain(sketch.reopen())
    assert json.loads(json.dumps(found)) == found
    shown(found)
    return found


def findings(sketch: Sketch) -> dict[str, dict[str, Any]]:
    return {finding["kind"]: finding for finding in explained(sketch)["findings"]}


def shown(found: dict[str, Any], width: int = 80) -> str:
    text = render(found, width).plain
    wrapped = [line.strip() for line in text.splitlines() if "/" not in line and not line.strip().startswith("|")]
    assert all(len(line) <= width for line in wrapped)
    return text


@dataclass
class Scheduler:
    """Knows what a test says of attempts."""

    jobs: dict[str, Job] = field(default_factory=dict)
    same_machine: bool = False
    asked: int = 0
    silent: bool = False

    def look(self, attempts: Collection[str], since: float) -> dict[str, Job]:
        self.asked += 1
        if self.silent:
            raise Unavailable("squeue did not answer within 60 s")
        return {attempt: self.jobs.get(attempt, Job(State.UNKNOWN)) for attempt in attempts}


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    made = Scheduler()
    monkeypatch.setattr(observe, "adapter", lambda config: made)
    return made


# ---------------------------------------------------------------------------------------------- runs that are over


def test_a_finished_and_a_cancelled_run_say_so(finished: Sketch, tmp_path: Path) -> None:
    found = explained(finished)
    assert found["outcome"] == "finished" and found["findings"] == [] and found["deaths"] == {"crash": 1}
    assert f"metaapo report {finished.root}" in shown(found, 200)
    other = Sketch(tmp_path / "other")
    other.run.close("cancelled", "metaapo cancel")
    assert f"metaapo resume {other.root}" in shown(explained(other), 200)


def test_a_failed_run_shows_its_reason_and_the_cause_on_another_rank(halfway: Sketch) -> None:
    for number in range(3):
        halfway.attempt("trainer", number, f"a{number}", CRASH)
        halfway.log("trainer", number, f"a{number}", 0, LOST, job=f"1{number}")
        halfway.log("trainer", number, f"a{number}", 1, NO_SPACE, job=f"1{number}")
    halfway.attempt("worker-000", 0, "w", {"outcome": "done"})
    halfway.run.close("failed", "trainer died 3 times without a record published in between")
    found = explained(halfway)
    [finding] = found["findings"]
    assert finding["kind"] == "GPU memory"
    assert [(entry["slot"], entry["number"]) for entry in finding["attempts"]] == [("trainer", n) for n in (2, 1, 0)]
    assert finding["attempts"][0]["nodes"] == "n1" and finding["attempts"][0]["job"] == "1"
    assert [line["line"] for line in finding["lines"]] == [6, 7, 8]
    assert finding["lines"][0]["file"] == "logs/trainer/0002-a2/12_1_log.out"
    assert f"metaapo resume {halfway.root}" in finding["advice"]
    text = shown(found)
    assert "trainer died 3 times" in text and "logs/trainer/0002-a2/12_1_log.out:6" in text
    assert re.search(r"trainer attempt 2, job 1 on n1, \d+ s ago; also trainer 1, trainer 0", shown(found, 200))


def test_a_refusal_is_its_own_explanation(halfway: Sketch) -> None:
    word = {"outcome": "failed", "kind": "refused", "error": "UserError", "message": "no such folder:\n  /models"}
    halfway.attempt("worker-000", 0, "w", word | {"rank": 0})
    halfway.log("worker-000", 0, "w", 0, "OSError: [Errno 28] No space left on device\n")  # told on the way out
    halfway.run.close("failed", "worker-000 stopped: no such folder: /models")
    [finding] = explained(halfway)["findings"]
    assert (finding["kind"], finding["meaning"]) == ("refused", "no such folder:\n  /models")


def test_a_refusal_of_one_rank_may_be_the_end_of_another(halfway: Sketch) -> None:
    word = {"outcome": "failed", "kind": "refused", "error": "UserError", "message": "rank 1 on n2 cannot reach rank 0"}
    halfway.attempt("trainer", 0, "a", word | {"rank": 1})
    halfway.log("trainer", 0, "a", 0, 'Traceback (most recent call last):\n  File "x"\nImportError: no libcuda.so.1\n')
    halfway.run.close("failed", "trainer stopped")
    assert list(findings(halfway)) == ["environment"]


def test_the_code_snapshot_speaks_in_the_log_of_an_attempt_that_never_started(halfway: Sketch) -> None:
    halfway.attempt("trainer", 0, "a", started=False)
    word = {"kind": "voided", "reason": "its job failed without a word of the role", "death": "crash"}
    halfway.run.records.publish(layout.job("trainer", 0, "start"), word)
    message = "toolkit.errors.UserError: this job was submitted with code 0a1b and runs 1122 from /home/x/toolkit."
    halfway.log("trainer", 0, "a", 0, f'Traceback (most recent call last):\n  File "x"\n{message}\n')
    finding = findings(halfway)["wrong code"]
    assert "PYTHONPATH" in finding["advice"] and finding["lines"][-1]["text"] == message


@pytest.mark.parametrize(
    ("kind", "expected"), [("preempted", "preempted"), ("time", "wall time"), ("node", "node failed")]
)
def test_what_the_scheduler_says_of_a_death_is_believed(halfway: Sketch, kind: str, expected: str) -> None:
    halfway.attempt("worker-000", 0, "w", {"outcome": "died", "kind": kind, "message": "as Slurm says"})
    halfway.log("worker-000", 0, "w", 0, NO_SPACE)  # how the end looked from inside
    assert expected in findings(halfway)


def test_a_cancelled_job_may_have_been_cancelled_for_its_memory(halfway: Sketch) -> None:
    cancelled = {"outcome": "died", "kind": "cancelled", "message": "somebody cancelled its job"}
    halfway.attempt("worker-000", 0, "w", cancelled)
    halfway.log("worker-000", 0, "w", 0, "srun: error: n1: task 0: Killed\n")
    assert [finding["lines"] for kind, finding in findings(halfway).items() if kind == "cancelled"] == [[]]
    halfway.log(
        "worker-000", 0, "w", 0, "slurmstepd-n1: error: Exceeded job memory limit\nsrun: error: n1: task 0: Killed\n"
    )
    assert "memory" in findings(halfway)


def test_an_unknown_death_shows_the_last_lines(halfway: Sketch) -> None:
    halfway.attempt("trainer", 0, "a", CRASH)
    halfway.log("trainer", 0, "a", 0, "".join(f"step {n}\n" for n in range(30)) + "\n\n")
    finding = findings(halfway)["unknown"]
    assert "It is not known why: its job failed without a word" in finding["meaning"]
    assert [line["text"] for line in finding["lines"]] == [f"step {n}" for n in range(20, 30)]
    assert finding["lines"][-1]["line"] == 30


def test_an_unknown_error_is_quoted_from_the_record_where_there_is_no_log(halfway: Sketch) -> None:
    word = {"outcome": "failed", "kind": "crash", "error": "KeyError", "message": "'shape'"}
    halfway.attempt("trainer", 0, "a", word)
    finding = findings(halfway)["unknown error"]
    assert "KeyError: 'shape'" in finding["meaning"] and finding["lines"] == []


def test_the_failed_setup_is_shown_beside_what_followed_from_it(halfway: Sketch) -> None:
    setup = "/var/spool/slurmd/job3/slurm_script: line 7: module: command not found\n"
    error = "Traceback (most recent call last):\n  File \"x\", line 1\nModuleNotFoundError: No module named 'torch'\n"
    halfway.attempt("trainer", 0, "a", CRASH)
    halfway.log("trainer", 0, "a", 0, setup + error)
    lines = findings(halfway)["environment"]["lines"]
    assert [line["line"] for line in lines] == [3, 4, 1]


def test_deaths_are_grouped_newest_first_and_few_logs_are_read(
    halfway: Sketch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        halfway.attempt("worker-000", number, f"w{number}", {"outcome": "died", "kind": "preempted", "message": "gone"})
        halfway.log("worker-000", number, f"w{number}", 0, "x\n")
    halfway.attempt("worker-000", 40, "living")
    halfway.attempt("trainer", 0, "a", CRASH | {"kind": "node"})
    read: list[Path] = []
    end = logs.end
    monkeypatch.setattr(logs, "end", lambda path: read.append(path) or end(path))
    found = findings(halfway)
    assert [entry["number"] for entry in found["preempted"]["attempts"]] == list(range(39, 34, -1))
    unseen = "35 older deaths were not looked at (worker, preempted). All of them:\nmetaapo logs"
    assert unseen in found["preempted"]["meaning"]
    assert found["preempted"]["since"] == "attempt 40 came after it: running"
    assert list(found)[-2:] == ["node failed", "preempted"]
    assert len(read) == 5
    assert f"metaapo logs {halfway.root} --list\n" in shown(explained(halfway))


def test_a_cause_is_claimed_only_of_what_was_looked_at(halfway: Sketch) -> None:
    for number in range(7):
        halfway.attempt("trainer", number, f"a{number}", CRASH)
        halfway.log("trainer", number, f"a{number}", 0, NO_SPACE if number > 1 else "something else\n")
    finding = findings(halfway)["GPU memory"]
    assert [entry["number"] for entry in finding["attempts"]] == [6, 5, 4, 3, 2]
    assert "2 older deaths were not looked at (trainer, crash)" in finding["meaning"]


def test_deaths_of_an_earlier_incarnation_are_over(halfway: Sketch) -> None:
    halfway.attempt("trainer", 0, "a", CRASH)
    halfway.run.close("failed", "x")
    halfway.run.reopen()
    assert "unknown" not in findings(halfway)


# ---------------------------------------------------------------------------------------------- open runs


def waits_for(sketch: Sketch) -> str:
    return findings(sketch)["waiting"]["meaning"]


def test_what_training_waits_for_and_who_should_make_it(sketch: Sketch) -> None:
    assert "The pairs are not prepared" in waits_for(sketch)
    sketch.pairs()
    assert "Policy 0 is not published" in waits_for(sketch)
    sketch.policy(0)
    assert "round 0, shard 0, which needs nothing of others" in waits_for(sketch)
    sketch.checkpoint(2, 1)
    assert "Policy 1 is not published" in waits_for(sketch)
    sketch.policy(1)
    assert "0 of 2 shards have them; no trainer was ever submitted" in waits_for(sketch)
    sketch.scores(1, 0)
    sketch.scores(1, 1)
    assert "round 1, shard 0: the gate has not decided about it; no sidecar" in waits_for(sketch)
    sketch.requests(1, 0, [True, True, False, False])
    sketch.attempt("worker-000", 0, "w", {"outcome": "starved"})
    found = findings(sketch)["waiting"]
    assert "round 1, shard 0: 2 prompts are asked, not sampled; worker-000 is out of work" in found["meaning"]
    assert f"metaapo tick {sketch.root}" in found["advice"]
    sketch.responses(1, 0, ["r1-0", "r1-1"])
    sketch.attempt("worker-000", 1, "v")
    assert "its responses are sampled, not judged; the worker runs" in waits_for(sketch)
    sketch.annotations(1, 0, {"r1-0": "pair", "r1-1": "tie"})
    assert "round 1, shard 0, for which all is there" in waits_for(sketch)


def test_what_is_left_when_training_is_over(halfway: Sketch) -> None:
    halfway.checkpoint(10, 3)
    halfway.policy(3)
    assert "the last version of the meta-learner is not published" in waits_for(halfway)
    boundaries = len(halfway.reopen().plan.boundaries)
    halfway.run.records.publish(layout.phi(boundaries), {})
    assert "policy 2 is not evaluated" in waits_for(halfway)


def test_a_role_that_runs_and_writes_nothing_may_hang(halfway: Sketch) -> None:
    halfway.attempt("worker-000", 0, "w")
    path = halfway.log("worker-000", 0, "w", 0, "sampling\n")
    assert "hangs" not in waits_for(halfway)
    import os

    os.utime(path, (time.time() - 7200, time.time() - 7200))
    assert "It has written nothing for 2 h 0 m" in waits_for(halfway)


def test_pending_jobs_with_reasons(halfway: Sketch, scheduler: Scheduler) -> None:
    for slot in ("worker-000", "worker-001", "sidecar", "trainer"):
        halfway.attempt(slot, 0, slot, started=False)
    scheduler.jobs = {slot: Job(State.PENDING, "7", "Priority") for slot in ("worker-000", "worker-001")}
    scheduler.jobs["sidecar"] = Job(State.PENDING, "8", "PartitionTimeLimit")
    scheduler.jobs["trainer"] = Job(State.PENDING, "9", "SomethingNew")
    found = explained(halfway)["findings"]
    by_kind = {(f["kind"], tuple(entry["slot"] for entry in f["attempts"])): f for f in found}
    assert "Jobs of higher priority" in by_kind["pending", ("worker-000", "worker-001")]["meaning"]
    assert by_kind["pending", ("trainer",)]["meaning"] == "SomethingNew."
    assert f"metaapo resume {halfway.root}" in by_kind["pending for ever", ("sidecar",)]["advice"]
    assert "worker-000 is in the queue: jobs of higher priority" in waits_for(halfway)
    assert scheduler.asked == 2, "once a call"


def test_a_job_that_never_was_and_one_that_would_pend_for_ever(halfway: Sketch) -> None:
    for number, reason in ((0, "never started"), (1, "pending for ever: PartitionTimeLimit")):
        halfway.attempt("trainer", number, f"a{number}", started=False)
        word = {"kind": "voided", "reason": reason, "death": "unknown"}
        halfway.run.records.publish(layout.job("trainer", number, "start"), word)
    halfway.run.close("failed", "trainer would never start")
    found = findings(halfway)
    assert list(found) == ["pending for ever", "never submitted"]
    assert "time_minutes exceed the partition's limit (PartitionTimeLimit)" in found["pending for ever"]["meaning"]


def test_a_scheduler_that_does_not_answer(halfway: Sketch, scheduler: Scheduler) -> None:
    halfway.attempt("trainer", 0, "a")
    scheduler.silent = True
    assert "squeue did not answer" in findings(halfway)["scheduler silent"]["meaning"]


def test_a_death_that_no_tick_has_seen(halfway: Sketch, scheduler: Scheduler) -> None:
    halfway.attempt("trainer", 0, "a")
    scheduler.jobs["a"] = Job(State.GONE, "1")
    found = findings(halfway)["dead, not yet noticed"]
    assert found["meaning"].startswith("trainer: ") and f"metaapo tick {halfway.root}" in found["advice"]


def test_nobody_ticks(halfway: Sketch) -> None:
    assert "Nobody has ticked it yet" in findings(halfway)["nobody keeps it going"]["meaning"]
    hints.set_status(halfway.root, {})
    assert "nobody keeps it going" not in findings(halfway)
    path = halfway.root / "status.json"
    path.write_text(json.dumps({"written": time.time() - 7200}))
    halfway.attempt("sidecar", 0, "s", {"outcome": "died", "kind": "preempted", "message": "m"})
    found = findings(halfway)["nobody keeps it going"]
    assert "2 h 0 m ago" in found["meaning"] and "sidecar's job does it while it runs; it is dead" in found["meaning"]
    assert found["advice"].endswith(f"\nmetaapo tick {halfway.root}")


def test_nodes_that_are_avoided(halfway: Sketch) -> None:
    for number in range(2):
        halfway.attempt("trainer", number, f"a{number}", CRASH | {"kind": "node", "nodes": "n7"})
    halfway.attempt("worker-000", 0, "w", CRASH | {"kind": "preempted"})  # on n1
    assert findings(halfway)["nodes avoided"]["meaning"].startswith("n7: ")


# ---------------------------------------------------------------------------------------------- damage


def condemn(sketch: Sketch, index: int, shard: int, must_equal: list[str] | None) -> str:
    ref = layout.annotations(index, shard)
    path = sketch.run.records.require(ref).path
    sketch.run.records.condemn(path, ref, "damaged", "cut short", must_equal)
    number = (
        sum(1 for _ in (sketch.root / "condemned").glob("*.g0.json")) if (sketch.root / "condemned").exists() else 0
    )
    sketch.run.records.publish(layout.condemned(number), {"record": str(ref), "detail": "cut short"})
    return str(ref)


def test_condemned_records_and_where_a_new_run_can_go_on(halfway: Sketch) -> None:
    from toolkit.exchange import lineage
    from toolkit.exchange.lineage import Progress

    consumed = str(layout.annotations(1, 0))
    halfway.parent = lineage.publish(halfway.run.records, halfway.parent, Progress(7, 2, 2), {consumed: "x"}, 6, [], {})
    condemn(halfway, 1, 0, ["x"])
    finding = findings(halfway)["damaged record"]
    assert f"{consumed}: cut short. Checkpoint 2 was trained with it" in finding["meaning"]
    assert "this run cannot go on. The newest checkpoint without it is number 1, at step 6; " in finding["advice"]
    [command] = [line for line in finding["advice"].splitlines() if line.startswith("metaapo launch run=NEW ")]
    folder = Path(command.split("model.policy=")[1].removesuffix(" ..."))
    assert folder.parent == halfway.root / "policies"


def test_condemned_records_that_nothing_consumed(halfway: Sketch) -> None:
    name = condemn(halfway, 1, 0, None)
    assert (
        findings(halfway)["damaged record"]["meaning"]
        == f"{name}: cut short. It is to be made again, and is not there yet."
    )
    halfway.annotations(1, 0, {"r1-0": "pair", "r1-1": "tie", "r1-3": "pair"})
    assert findings(halfway)["damaged record"]["meaning"] == f"Condemned, and made again since: {name}."
    (halfway.root / "reports").mkdir()
    (halfway.root / "reports" / "phi~000~000001.g0.json").write_text("{}")
    kinds = [f["meaning"] for f in explained(halfway)["findings"] if f["kind"] == "damaged record"]
    assert kinds[0].startswith("Reported as damaged, and not looked at yet: phi/000/000001.g0")


@pytest.mark.parametrize("event", ["intent", "start", "end"])
def test_a_damaged_record_of_a_job_is_what_it_finds(halfway: Sketch, event: str) -> None:
    halfway.attempt("trainer", 0, "a", CRASH)
    halfway.run.close("failed", "trainer died")
    path = halfway.run.records.require(layout.job("trainer", 0, event)).path
    path.write_text("garbage")
    found = explained(halfway)
    [finding] = found["findings"]
    assert finding["kind"] == "damaged record" and str(path) in finding["meaning"]
    assert finding["advice"] == f"metaapo tick {halfway.root}"
    assert (found["outcome"], found["reason"]) == ("failed", "trainer died")
