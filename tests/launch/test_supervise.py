"""Who is submitted when, and when a run gives up; several supervisors side by side."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace

import pytest

from tests.exchange.conftest import answers, script
from tests.launch.conftest import MemoryAdapter, make_config, publish_pairs
from toolkit.cluster import JobRequest
from toolkit.errors import UserError
from toolkit.exchange import layout, lineage
from toolkit.exchange.lineage import Progress
from toolkit.exchange.records import Records
from toolkit.exchange.run import Run
from toolkit.launch import supervise as module
from toolkit.launch.adapter import JobSpec, State
from toolkit.launch.attempts import Attempt, attempts, current, progress, slots
from toolkit.launch.supervise import Supervisor

SLOTS = ["trainer", "sidecar", "worker-000"]


def submitted(scheduler: MemoryAdapter) -> Counter[str]:
    return Counter(job.slot for job in scheduler.submitted)


def outcomes(run: Run, slot: str) -> list[str]:
    return [attempt.outcome for attempt in attempts(run, slot)]


def advance(run: Run) -> None:
    """The run gets on: one more checkpoint."""
    parent = lineage.newest(run.records)
    number = 0 if parent is None else lineage.sequence(parent) + 1
    lineage.publish(run.records, parent, Progress(number, 0, 0), {}, 0, [], {})


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch):
    """Let the patience with attempts that do not start run out."""
    return lambda: monkeypatch.setattr(module, "start_patience", lambda config: -1.0)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({}, SLOTS),
        ({"inference": {"workers": 2}}, [*SLOTS, "worker-001"]),
        ({"method": {"gate": {"kind": "none"}}, "reward": {"model": None}}, ["trainer"]),
        ({"method": {"gate": {"kind": "none"}}}, SLOTS),  # a reward model evaluates the policies
        ({"replay_from": "other"}, ["trainer"]),
    ],
)
def test_the_configuration_decides_which_roles_exist(tmp_path, groups: dict, expected: list[str]) -> None:
    assert slots(make_config(tmp_path, **groups)) == expected


# ---------------------------------------------------------------------------------------------- submission


def supervise(run: Run, scheduler: MemoryAdapter) -> list[Attempt]:
    """What a process does that has just come and knows nothing. Returns what then stands for each slot."""
    supervisor = Supervisor(run.root, run.attempt, scheduler)
    supervisor.supervise()
    return [current(history) for history in supervisor.histories.values() if history]


def test_every_role_is_submitted_once(run: Run, scheduler: MemoryAdapter) -> None:
    newest = supervise(run, scheduler)
    assert [attempt.slot for attempt in newest] == SLOTS
    assert {attempt.outcome for attempt in newest} == {"pending"}
    for _ in range(3):
        supervise(run, scheduler)
    assert submitted(scheduler) == dict.fromkeys(SLOTS, 1)
    for slot in SLOTS:
        scheduler.start(run, slot)
    assert {attempt.outcome for attempt in supervise(run, scheduler)} == {"running"}
    assert submitted(scheduler) == dict.fromkeys(SLOTS, 1)


def test_a_job_is_described_for_the_scheduler(tmp_path, scheduler: MemoryAdapter) -> None:
    groups = {
        "trainer": {"tensor": 2, "pipeline": 3},
        "cluster": {
            "jobs": {"time_minutes": 7, "environment": {"A": "b"}},
            "trainer": {"python": "/envs/trainer/bin/python"},
        },
    }
    run = Run.create(tmp_path, make_config(tmp_path, **groups), "test")
    publish_pairs(run)
    supervise(run, scheduler)
    trainer, worker = scheduler.newest("trainer"), scheduler.newest("worker-000")
    assert (trainer.tasks, trainer.request.python, trainer.request.time_minutes) == (6, "/envs/trainer/bin/python", 7)
    assert (worker.tasks, worker.request.environment, worker.number, worker.root) == (1, {"A": "b"}, 0, tmp_path)
    assert (worker.code / "toolkit" / "cli.py").is_file() and worker.code.is_relative_to(tmp_path)
    intent = attempts(run, "trainer")[0].intent.attributes
    assert intent["attempt"] == trainer.attempt and intent["code"] == trainer.code.name
    assert (intent["incarnation"], intent["operations"], intent["progress"]) == (0, 0, [-1, -1, 0])


def test_a_dead_client_leaves_an_attempt_that_is_given_up(run: Run, scheduler: MemoryAdapter, patience) -> None:
    """It wrote the intent and died before it submitted: nobody else submits that attempt; the next one is."""

    class Dies(MemoryAdapter):
        def submit(self, job: JobSpec) -> str:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise(run, Dies())
    supervise(run, scheduler)
    assert submitted(scheduler) == {"sidecar": 1, "worker-000": 1}, "the trainer may still come"
    patience()
    supervise(run, scheduler)
    assert outcomes(run, "trainer") == ["voided", "pending"]
    assert submitted(scheduler)["trainer"] == 1


@pytest.mark.parametrize("state", [State.GONE, State.UNKNOWN])
def test_an_attempt_that_was_given_up_does_not_start(
    run: Run, scheduler: MemoryAdapter, patience, state: State
) -> None:
    supervise(run, scheduler)
    job = scheduler.newest("trainer")
    scheduler.jobs[job.attempt] = state  # so the scheduler says, which has forgotten it
    patience()
    supervise(run, scheduler)
    assert outcomes(run, "trainer") == ["voided", "pending"]
    start = run.records.require(layout.job("trainer", 0, "start"))
    late, won = Run.open(run.root, job.attempt).records.publish(start.ref, {"kind": "started", "job": "1"})
    assert not won and late.attributes["kind"] == "voided"


@pytest.mark.parametrize("state", [State.PENDING, State.RUNNING])
def test_patience_is_only_lost_with_what_is_known_to_be_gone(
    run: Run, scheduler: MemoryAdapter, patience, state: State
) -> None:
    patience()
    supervise(run, scheduler)
    for slot in SLOTS:
        scheduler.jobs[scheduler.newest(slot).attempt] = state
    supervise(run, scheduler)
    assert submitted(scheduler) == dict.fromkeys(SLOTS, 1)
    scheduler.start(run, "trainer")
    scheduler.jobs[scheduler.newest("trainer").attempt] = state
    supervise(run, scheduler)
    assert submitted(scheduler) == dict.fromkeys(SLOTS, 1)


# ---------------------------------------------------------------------------------------------- deaths


def test_a_dead_job_is_buried_and_submitted_again(run: Run, scheduler: MemoryAdapter) -> None:
    supervise(run, scheduler)
    scheduler.end(run, "worker-000")
    newest = {attempt.slot: attempt for attempt in supervise(run, scheduler)}
    assert outcomes(run, "worker-000") == ["died", "pending"]
    assert newest["worker-000"].number == 1
    assert submitted(scheduler) == {"trainer": 1, "sidecar": 1, "worker-000": 2}
    end = attempts(run, "worker-000")[0].end
    assert end is not None and end.attributes["kind"] == "crash"


@pytest.mark.parametrize(("silence", "over"), [(1.0, False), (1e6, True)])
def test_a_job_that_slurm_cannot_end_is_given_up_when_it_shows_no_life(
    run: Run, scheduler: MemoryAdapter, silence: float, over: bool
) -> None:
    supervise(run, scheduler)
    job = scheduler.start(run, "worker-000")
    scheduler.words[job.attempt] = {"reason": "COMPLETING", "kind": "node", "message": "Slurm cannot end its processes"}
    start = attempts(run, "worker-000")[0].start
    assert start is not None
    status = run.root / "status.json"
    status.touch()
    os.utime(status, (start.written + silence,) * 2)
    supervise(run, scheduler)
    assert outcomes(run, "worker-000") == (["died", "pending"] if over else ["running"])
    if over:
        assert attempts(run, "worker-000")[0].death["kind"] == "node"


def test_the_patience_with_a_submission_is_longer_than_sbatchs(run: Run) -> None:
    cluster = replace(run.config.cluster, supervise=10.0, query_timeout=300.0)
    assert module.start_patience(replace(run.config, cluster=cluster)) > 300.0


def test_the_word_of_the_dead_stands(run: Run, scheduler: MemoryAdapter) -> None:
    supervise(run, scheduler)
    scheduler.end(run, "trainer", outcome="saved")
    supervise(run, scheduler)
    assert outcomes(run, "trainer") == ["saved", "pending"]


def test_a_job_whose_first_process_died_is_killed_as_a_whole(run: Run, scheduler: MemoryAdapter) -> None:
    supervise(run, scheduler)
    job = scheduler.newest("trainer")
    from toolkit.exchange import jobs

    facts = {"kind": "started", "job": "1", **jobs.this_process(), "process_start": "1"}  # of this host, and gone
    Run.open(run.root, job.attempt).records.publish(layout.job("trainer", 0, "start"), facts)
    scheduler.jobs[job.attempt] = State.RUNNING  # its other processes
    supervise(run, scheduler)
    assert scheduler.killed == [job.attempt]
    assert outcomes(run, "trainer") == ["died", "pending"]


@pytest.mark.parametrize(
    ("slot", "outcome", "again"),
    [
        ("worker-000", "saved", True),
        ("worker-000", "done", False),
        ("trainer", "superseded", True),
        ("trainer", "done", True),  # its last policy was condemned since
    ],
)
def test_what_ended_is_submitted_again_while_it_has_something_to_do(
    run: Run, scheduler: MemoryAdapter, slot: str, outcome: str, again: bool
) -> None:
    supervise(run, scheduler)
    scheduler.end(run, slot, outcome=outcome)
    supervise(run, scheduler)
    assert submitted(scheduler)[slot] == 1 + again


def test_a_starved_role_comes_back_when_there_is_work(run: Run, scheduler: MemoryAdapter) -> None:
    supervise(run, scheduler)
    scheduler.end(run, "worker-000", outcome="starved")
    supervise(run, scheduler)
    assert submitted(scheduler)["worker-000"] == 1
    run.records.publish(layout.policy(0), {})  # to be evaluated
    supervise(run, scheduler)
    assert submitted(scheduler)["worker-000"] == 2
    advance(run)  # round 0 is trained as far as the lineage says, and its policy is there
    scheduler.end(run, "trainer", outcome="starved")
    supervise(run, scheduler)
    assert submitted(scheduler)["trainer"] == 2, "there are scores to compute"


def test_a_trainer_of_a_finished_run_has_nothing_to_do(run: Run, scheduler: MemoryAdapter) -> None:
    for version in range(4):
        run.records.publish(layout.policy(version), {})
    supervise(run, scheduler)
    assert submitted(scheduler) == {"sidecar": 1, "worker-000": 1}


# ---------------------------------------------------------------------------------------------- giving up


def test_a_refusal_stops_the_run_at_once(run: Run, scheduler: MemoryAdapter) -> None:
    supervise(run, scheduler)
    scheduler.end(run, "worker-000", outcome="failed", kind="refused", error="UserError", message="no such folder: x")
    with pytest.raises(UserError, match=r"worker-000 stopped: no such folder: x"):
        supervise(run, scheduler)
    closing = run.closing()
    assert closing is not None and closing.attributes["outcome"] == "failed"
    assert "no such folder" in closing.attributes["reason"]
    supervise(run, scheduler)
    assert submitted(scheduler) == dict.fromkeys(SLOTS, 1)


CRASH = {"outcome": "failed", "kind": "crash", "error": "RuntimeError", "message": "boom"}


def die(run: Run, scheduler: MemoryAdapter, times: int, slot: str = "trainer", **word: object) -> None:
    for _ in range(times):
        supervise(run, scheduler)
        scheduler.end(run, slot, **word)


def test_deaths_without_progress_have_a_budget(run: Run, scheduler: MemoryAdapter) -> None:
    budget = run.config.cluster.budgets.crash
    die(run, scheduler, budget - 1, **CRASH)
    die(run, scheduler, 1)
    with pytest.raises(UserError) as error:
        supervise(run, scheduler)
    text = str(error.value)
    assert f"trainer died {budget} times without a record published in between" in text
    assert f"{budget} x crash" in text
    assert "its process is gone" in text and "metaapo explain" in text and "metaapo resume" in text
    assert "None" not in text
    assert submitted(scheduler)["trainer"] == budget
    assert run.closing().attributes["reason"] == text


def test_progress_restores_the_budget(run: Run, scheduler: MemoryAdapter) -> None:
    budget = run.config.cluster.budgets.crash
    for _ in range(3):
        die(run, scheduler, budget - 1, **CRASH)
        advance(run)
    assert run.closing() is None
    supervise(run, scheduler)
    assert submitted(scheduler)["trainer"] == 3 * (budget - 1) + 1


def test_attempts_that_end_well_are_no_deaths(run: Run, scheduler: MemoryAdapter) -> None:
    """Many deaths, each with progress after it, and then a long preemption storm."""
    budget = run.config.cluster.budgets.crash
    for _ in range(budget):
        die(run, scheduler, 1, **CRASH)
        advance(run)
    die(run, scheduler, budget + 1, outcome="saved")
    supervise(run, scheduler)
    assert run.closing() is None


def test_deaths_among_attempts_that_end_well_are_counted(run: Run, scheduler: MemoryAdapter) -> None:
    for _ in range(run.config.cluster.budgets.crash - 1):
        die(run, scheduler, 1, **CRASH)
        die(run, scheduler, 1, outcome="saved")
    die(run, scheduler, 1, **CRASH)
    with pytest.raises(UserError, match="without a record published"):
        supervise(run, scheduler)


def test_attempts_that_never_start_have_a_budget_too(run: Run, scheduler: MemoryAdapter, patience) -> None:
    """A job that dies before it can leave a word: a broken environment, another package in front."""
    patience()
    with pytest.raises(UserError, match="never started"):
        for _ in range(2 * run.config.cluster.budgets.unknown):
            supervise(run, scheduler)
            scheduler.jobs[scheduler.newest("trainer").attempt] = State.GONE
    assert submitted(scheduler)["trainer"] == run.config.cluster.budgets.unknown


def test_a_job_that_cannot_be_submitted_stops_the_run(run: Run) -> None:
    class Refuses(MemoryAdapter):
        def submit(self, job: JobSpec) -> str:
            raise UserError("no such interpreter")

    with pytest.raises(UserError, match="no such interpreter"):
        supervise(run, Refuses())
    closing = run.closing()
    assert closing is not None and "no such interpreter" in closing.attributes["reason"]


@pytest.mark.parametrize("reason", ["PartitionTimeLimit", "QOSMaxGRESPerJob", "AssocMaxNodePerJobLimit"])
def test_a_job_that_waits_for_ever_stops_the_run(run: Run, scheduler: MemoryAdapter, reason: str) -> None:
    supervise(run, scheduler)
    waits = scheduler.newest("worker-000").attempt
    scheduler.words[waits] = {"reason": reason}
    with pytest.raises(UserError, match=f"worker-000 would never start: .*{reason}"):
        supervise(run, scheduler)
    assert waits in scheduler.killed


class Cornered(MemoryAdapter):
    """Has one node for workers, which is bad; the sidecar does well on another."""

    pends = False  # instead of being refused

    def submit(self, job: JobSpec) -> str:
        if job.exclude and job.slot == "worker-000" and not self.pends:
            raise UserError("Requested node configuration is not available")
        found = super().submit(job)
        if job.exclude and job.slot == "worker-000":
            self.words[job.attempt] = {"reason": "BadConstraints"}
        return found


@pytest.mark.parametrize("pends", [False, True])
def test_a_role_without_another_node_takes_the_bad_one(run: Run, pends: bool) -> None:
    scheduler = Cornered()
    scheduler.pends = pends
    supervise(run, scheduler)
    scheduler.start(run, "sidecar", nodes="good")
    for _ in range(2):
        scheduler.end(run, "worker-000", nodes="bad", **CRASH, seconds=1.0)
        supervise(run, scheduler)
    for _ in range(2):
        supervise(run, scheduler)
    assert outcomes(run, "worker-000") == ["failed", "failed", "voided", "pending"] and run.closing() is None
    assert attempts(run, "worker-000")[2].intent.attributes["exclude"] == ["bad"]
    assert scheduler.newest("worker-000").exclude == ()


def test_progress_is_the_newest_checkpoint_policy_and_shard(run: Run) -> None:
    from toolkit.exchange import hints

    assert progress(run) == [-1, -1, 0]
    advance(run)
    advance(run)
    run.records.publish(layout.policy(0), {})
    hints.set_frontier(run.root, {"done": 3})
    assert progress(run) == [1, 0, 3]


# ---------------------------------------------------------------------------------------------- incarnations


def test_a_cancelled_run_is_not_resurrected(run: Run, scheduler: MemoryAdapter, patience) -> None:
    supervise(run, scheduler)
    scheduler.start(run, "trainer")
    run.close("cancelled", "by hand")
    patience()
    for slot in SLOTS:
        scheduler.jobs[scheduler.newest(slot).attempt] = State.GONE
    newest = supervise(run, scheduler)
    assert {attempt.slot: attempt.outcome for attempt in newest} == {
        "trainer": "died",
        "sidecar": "voided",
        "worker-000": "voided",
    }
    supervise(run, scheduler)
    assert submitted(scheduler) == dict.fromkeys(SLOTS, 1)


def test_a_run_cancelled_between_intent_and_submission_submits_nothing(
    run: Run, scheduler: MemoryAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Records.publish

    def publish(self, ref, *arguments, **named):
        done = real(self, ref, *arguments, **named)
        if ref.name.endswith("intent"):
            run.close("cancelled", "at the worst moment")
        return done

    monkeypatch.setattr(Records, "publish", publish)
    supervise(run, scheduler)
    assert not scheduler.submitted
    assert outcomes(run, "trainer") == ["pending"]


def test_resume_opens_the_next_incarnation_and_starts_afresh(run: Run, scheduler: MemoryAdapter) -> None:
    supervise(run, scheduler)
    scheduler.end(run, "trainer", outcome="failed", kind="refused", error="UserError", message="no")
    scheduler.end(run, "worker-000", outcome="done")
    with pytest.raises(UserError):
        supervise(run, scheduler)
    scheduler.jobs[scheduler.newest("sidecar").attempt] = State.GONE  # cancelled before it could start
    assert run.reopen() == 1
    supervise(run, scheduler)
    assert submitted(scheduler) == dict.fromkeys(SLOTS, 2), "nothing of the incarnation before holds it up"
    assert [attempt.incarnation for attempt in attempts(run, "trainer")] == [0, 1]
    job = scheduler.newest("trainer")
    Run.open(run.root, job.attempt, incarnation=1).records.publish(layout.phi(0), {})


def test_the_budget_is_of_one_incarnation(run: Run, scheduler: MemoryAdapter) -> None:
    budget = run.config.cluster.budgets.crash
    die(run, scheduler, budget, **CRASH)
    with pytest.raises(UserError):
        supervise(run, scheduler)
    run.reopen()
    die(run, scheduler, budget - 1, **CRASH)
    supervise(run, scheduler)
    assert run.closing() is None


def test_new_operations_hold_for_the_next_attempt(run: Run, scheduler: MemoryAdapter) -> None:
    supervise(run, scheduler)
    run.set_operations(replace(run.config, cluster=replace(run.config.cluster, jobs=JobRequest(time_minutes=99))))
    scheduler.end(run, "trainer", outcome="saved")
    supervise(run, scheduler)
    assert scheduler.newest("trainer").request.time_minutes == 99
    assert attempts(run, "trainer")[1].intent.attributes["operations"] == 1


# ---------------------------------------------------------------------------------------------- side by side

# A supervisor in a process of its own. Every job it submits starts and dies at once.
SUPERVISOR = """
import json, sys, time
from pathlib import Path
from toolkit.errors import UserError
from toolkit.exchange import layout
from toolkit.exchange.run import Run
from toolkit.launch.adapter import Job, State
from toolkit.launch.supervise import Supervisor

root, who = Path(sys.argv[1]), sys.argv[2]
submitted = []

class Adapter:
    def submit(self, job):
        submitted.append([job.slot, job.number, job.attempt])
        facts = {"kind": "started", "job": "1", "host": "n1", "boot_id": "b", "pid": 1, "process_start": "1"}
        Run.open(root, job.attempt).records.publish(layout.job(job.slot, job.number, "start"), facts)
        return "1"
    same_machine = False
    def look(self, attempts, since):
        return dict.fromkeys(attempts, Job(State.GONE))
    def room(self):
        return None
    def cancel(self, attempts, kill=False):
        pass

run = Run.open(root, who)
try:
    supervisor = Supervisor(root, who, Adapter())
    for _ in range(100):
        supervisor.supervise()
except UserError as error:
    reason = str(error)
while run.closing() is None:
    time.sleep(0.001)
print(json.dumps({"submitted": submitted, "reason": run.closing().attributes["reason"]}))
"""


def test_supervisors_side_by_side_act_once_per_decision(run: Run) -> None:
    found = [json.loads(told) for told in answers([script(SUPERVISOR, run.root, f"s{i}") for i in range(3)])]
    submitted = [tuple(job) for supervisor in found for job in supervisor["submitted"]]
    assert len({supervisor["reason"] for supervisor in found}) == 1
    numbers = Counter((slot, number) for slot, number, _ in submitted)
    assert set(numbers.values()) == {1}, "an attempt was submitted twice"
    recorded = {(slot, a.number, a.id) for slot in SLOTS for a in attempts(run, slot)}
    assert set(submitted) <= recorded
    assert max(Counter(slot for slot, _, _ in submitted).values()) == run.config.cluster.budgets.crash
    assert len(recorded - set(submitted)) <= 2, "at most those whose submission the end of the run prevented"
