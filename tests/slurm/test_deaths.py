"""Jobs that are preempted, killed, paused, starved or lost, on a real Slurm. The numbers are those of docs/reliability.md."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from devcluster import DevCluster

from tests.slurm.runs import HELD, PAYLOAD, PayloadRun, environment_of, processes_of
from toolkit.exchange import jobs, layout, lineage
from toolkit.exchange.run import Run

Make = Callable[..., PayloadRun]


def preempt(run: PayloadRun, slot: str, number: int = 0) -> str:
    """A job of a higher partition takes the node of an attempt that has all of its CPUs. Returns its id."""
    run.job(slot, number)
    return take(run, str(run.started(slot, number)["nodes"]))


def take(run: PayloadRun, node: str) -> str:
    """A job of a higher partition takes a whole node. Returns its id."""
    command = ["sbatch", "--parsable", "--partition=high", f"--nodelist={node}", "--exclusive", "--output=/dev/null"]
    return run.cluster.run(*command, "--wrap=sleep 8").stdout.strip()


def end(run: PayloadRun, slot: str, number: int = 0) -> dict[str, Any]:
    """How an attempt ended, waited for."""
    run.until(lambda: run.attempts(slot)[number].over, f"the end of {slot} attempt {number}")
    attempt = run.attempts(slot)[number]
    assert attempt.end is not None, attempt.outcome
    return dict(attempt.end.attributes)


# ------------------------------------------------------------------------------------------ preemption and wall time


@pytest.mark.parametrize("partition", ["preemptible", "preemptible_cancel", "nograce"])
def test_12_13_14_preempted(make: Make, undisturbed: str, partition: str) -> None:
    """Requeued, cancelled, or killed without grace: all the same to us, another attempt, and no failure of ours."""
    run = make(
        step=1.5,
        cluster={
            "trainer": {"partition": partition, "cpus_per_task": 4},
            "worker": {"partition": "cpu"},
            "budgets": {"crash": 1},
        },
        inference={"workers": 1},
    )
    run.tick()
    run.until(lambda: run.steps() >= 2, "a checkpoint")
    preempt(run, "trainer")
    found = end(run, "trainer")
    run.set_pace(0.1)
    assert found["outcome"] == "saved" or (found["outcome"], found["kind"]) == ("died", "preempted"), found
    run.assert_sound(undisturbed)
    assert run.outcomes("trainer")[-1] == "done" and len(run.attempts("trainer")) == 2
    logs = {path.parent.name for path in run.root.glob("logs/trainer/*/*_log.out")}
    assert len(logs) == 2, "each attempt has a log of its own"


@pytest.mark.parametrize("partition", ["preemptible", "preemptible_cancel"])
def test_12_13_preempted_while_it_starts(make: Make, undisturbed: str, tmp_path: Path, partition: str) -> None:
    """Slurm's warning comes before the role has handlers: it is lost, and does not kill."""
    slow = tmp_path / "python"
    slow.write_text(f'#!/bin/bash\nmkdir {tmp_path}/first && sleep 40\nexec {PAYLOAD} "$@"\n')
    slow.chmod(0o755)
    worker = {"partition": partition, "cpus_per_task": 3, "python": str(slow)}
    run = make(cluster={"worker": worker, "budgets": {"crash": 1}}, inference={"workers": 1})
    run.tick()
    run.until((tmp_path / "first").exists, "the worker to start")
    name = f"metaapo-{run.attempts('worker-000')[0].id}"
    [node] = [job["nodes"] for job in run.cluster.jobs() if job["name"] == name]
    take(run, node)
    run.until(lambda: run.attempts("worker-000")[0].over, "the end of the worker")
    death = run.attempts("worker-000")[0].death
    assert death is not None and death["kind"] == "preempted", death
    run.assert_sound(undisturbed, accounting=False)


def test_12_preempted_workers_come_back(make: Make, undisturbed: str) -> None:
    # A node for each: else its neighbour stays, and the other job waits.
    run = make(step=1.5, cluster={"worker": {"partition": "preemptible", "cpus_per_task": 4}, "budgets": {"crash": 1}})
    both = ("worker-000", "worker-001")
    run.tick()
    for slot in both:
        preempt(run, slot)
    found = [end(run, slot)["outcome"] for slot in both]
    assert set(found) <= {"saved", "died"}
    run.set_pace(HELD)
    for slot in both:
        run.job(slot, 1)
    run.set_pace(0.1)
    run.assert_sound(undisturbed)
    assert [run.outcomes(slot)[1] for slot in both] == ["done", "done"]


def test_11_wall_time(make: Make, undisturbed: str) -> None:
    """The trainer saves before its wall time ends, by its own clock; a worker that hangs is killed by Slurm."""
    run = make(
        step=3.0,
        cluster={"trainer": {"time_minutes": 1}, "worker": {"time_minutes": 1}, "margin": 12.0},
        inference={"workers": 1},
        trainer={"checkpoint_steps": 100},
    )
    run.plan_fault("worker-000", "hang responses")
    run.tick()
    found = end(run, "trainer")
    assert found["outcome"] == "saved" and found["seconds"] < 58, found
    run.set_pace(0.1)
    run.until(lambda: any(attempt.death for attempt in run.attempts("worker-000")), "Slurm to kill the worker")
    [death] = [attempt.death for attempt in run.attempts("worker-000") if attempt.death]
    assert death["kind"] == "time" and "wall time" in death["message"], death
    run.assert_sound(undisturbed)


def test_21_a_process_that_ignores_signals(make: Make) -> None:
    run = make(step=1.0)
    run.plan_fault("trainer", "deaf step-2.")
    run.tick()
    run.until(lambda: not (run.faults / "trainer").exists(), "the trainer to be deaf")
    run.plan_fault("trainer", "hang step-")
    run.until(lambda: not (run.faults / "trainer").exists(), "the trainer to hang")
    assert "none left" in run.metaapo("cancel", str(run.root), "--patience", "3")
    assert not run.in_queue()
    states = run.cluster.run("sinfo", "--noheader", "--Node", "--partition=cpu", "--format=%T").stdout.split()
    assert set(states) <= {"idle", "mixed", "allocated"}, states
    assert "clean" in run.metaapo("verify", str(run.root))


# ------------------------------------------------------------------------------------------ nodes


def test_16_a_node_dies(new_cluster: Callable[..., DevCluster], make: Make, undisturbed: str) -> None:
    private = new_cluster(nodes=3, SlurmdTimeout=5, MessageTimeout=3)
    run = make(on=private, step=3.0, cluster={"worker": {"cpus_per_task": 3}, "budgets": {"crash": 1}})
    run.tick()
    run.job("worker-000")
    run.job("sidecar")
    run.until(lambda: run.steps() >= 2, "training")
    node = str(run.started("worker-000")["nodes"])
    others = [slot for slot in ("trainer", "sidecar") if run.started(slot)["nodes"] == node]
    private.crash_node(node)
    run.until(lambda: len(run.attempts("worker-000")) == 2, "the worker's next attempt")
    death = run.attempts("worker-000")[0].death
    assert death is not None and death["kind"] == "node", death
    assert run.started("worker-000", 1) is None or run.started("worker-000", 1)["nodes"] != node
    for slot in {"trainer", "sidecar"} - set(others):
        assert run.outcomes(slot)[0] == "running", "other roles go on"
    private.start_node(node)
    run.set_pace(0.1)
    run.assert_sound(undisturbed)


def test_16_a_node_that_fails_again_is_avoided(
    new_cluster: Callable[..., DevCluster], make: Make, undisturbed: str
) -> None:
    private = new_cluster(nodes=3, SlurmdTimeout=5, MessageTimeout=3)
    good, bad, spare = private.nodes
    private.set_node(spare, "drain")
    full = {"options": [f"--nodelist={good}"], "cpus_per_task": 2}
    run = make(
        on=private,
        step=1.5,
        cluster={"trainer": full, "sidecar": full, "worker": {"cpus_per_task": 3}},
        inference={"workers": 1},
    )
    run.tick()
    for number in range(2):
        run.job("worker-000", number)
        assert run.started("worker-000", number)["nodes"] == bad
        private.crash_node(bad)
        assert end(run, "worker-000", number)["kind"] == "node"
        private.start_node(bad)
    run.until(lambda: len(run.attempts("worker-000")) == 3, "a third attempt")
    assert f"--exclude={bad}" in next(run.root.glob("logs/worker-000/0002-*/job.sh")).read_text()
    run.tick()
    status = json.loads(run.metaapo("status", str(run.root), "--json"))
    assert status["avoided"] == [bad] and status["deaths"]["node"] == 2
    private.set_node(spare, "resume")
    run.set_pace(0.1)
    run.assert_sound(undisturbed)
    assert run.started("worker-000", 2)["nodes"] == spare


def test_17_split_brain(new_cluster: Callable[..., DevCluster], make: Make, undisturbed: str) -> None:
    """Slurm takes a node for dead whose processes live on: two trainers write, one wins each checkpoint, the other stops."""
    private = new_cluster(nodes=3, SlurmdTimeout=5, MessageTimeout=3)
    run = make(on=private, step=3.0, cluster={"trainer": {"cpus_per_task": 3}})
    run.tick()
    run.until(lambda: run.steps() >= 2, "a checkpoint")
    old = run.attempts("trainer")[0]
    private.kill_slurmd(str(run.started("trainer")["nodes"]))
    run.until(lambda: run.started("trainer", 1) is not None, "a second trainer")
    assert processes_of(old.id), "the first one lives on"
    run.set_pace(0.2)
    run.until(lambda: not processes_of(old.id), "the old one to stop")
    run.assert_sound(undisturbed, accounting=False)
    fenced = "superseded" in run.outcomes("trainer")
    assert fenced or lineage.chain(Run.open(run.root).records)[-1].attempt != old.id, "one of the two had to stop"


# ------------------------------------------------------------------------------------------ processes


def test_19_one_rank_dies(make: Make, undisturbed: str) -> None:
    run = make(step=1.0, trainer={"data": 2})
    run.tick()
    job = run.job("trainer")
    assert run.cluster.run("squeue", "-h", "-j", job, "-o", "%D").stdout.strip() == "2", "one rank on each of two nodes"
    run.until(lambda: run.steps() >= 2, "a checkpoint")
    first = run.attempts("trainer")[0]
    other = [pid for pid in processes_of(first.id) if b"SLURM_PROCID=1" in environment_of(pid).split(b"\0")]
    os.kill(other[0], signal.SIGKILL)
    run.until(
        lambda: not processes_of(first.id), "the whole step to end", 50
    )  # at once: srun alone would wait for 60 s
    run.set_pace(0.1)
    run.assert_sound(undisturbed)
    assert len(run.attempts("trainer")) == 2
    logs = sorted(path.name.split("_")[1] for path in run.root.glob(f"logs/trainer/0000-{first.id}/*_log.out"))
    assert logs == ["0", "1"], "each rank has a log"


def test_22_out_of_memory(make: Make) -> None:
    """Bounded: it would only happen again."""
    run = make(cluster={"budgets": {"resource": 2}}, inference={"workers": 1})
    run.plan_fault("worker-000", "memory responses always")
    run.tick()
    run.until(lambda: Run.open(run.root).closing(), "the run to be stopped")
    closing = Run.open(run.root).closing()
    assert closing is not None and "memory limit" in closing.attributes["reason"], closing.attributes
    assert {attempt.death["kind"] for attempt in run.attempts("worker-000")} == {"resource"}
    assert len(run.attempts("worker-000")) <= 3
    assert "memory" in run.metaapo("explain", str(run.root))
    run.until(lambda: not run.in_queue(), "the other roles to leave")


def test_a_shard_that_kills_is_named(make: Make) -> None:
    run = make(step=0.2)
    for slot in ("worker-000", "worker-001"):
        run.plan_fault(slot, "raise responses/000/000001 always")
    run.tick()
    run.until(lambda: Run.open(run.root).closing(), "the run to be stopped")
    reason = Run.open(run.root).closing().attributes["reason"]
    # The limit is 3; the other worker may be dying on the same shard while a tick counts.
    count = re.search(r"(\d+) attempts died while they worked on rounds/001/responses/000/000001 ", reason)
    assert count is not None and int(count[1]) >= 3, reason
    assert "its pairs: r1-4, r1-5" in reason and "planned failure" in reason


def test_23_workers_that_never_start(make: Make, undisturbed: str) -> None:
    """The trainer waits for a bounded time, frees its node, and comes back when its next shard is ready."""
    run = make(cluster={"worker": {"options": ["--begin=now+1hour"]}}, trainer={"idle_exit": 3.0})
    run.tick()
    assert end(run, "trainer")["outcome"] == "starved"
    waiting = [run.queued(slot) for slot in ("worker-000", "worker-001")]
    run.until(lambda: {job["reason"] for job in run.cluster.jobs() if job["id"] in waiting} == {"BeginTime"}, "to wait")
    run.tick()
    run.tick()
    assert len(run.attempts("trainer")) == 1, "it is not started again in vain"
    status = json.loads(run.metaapo("status", str(run.root), "--refresh", "--json"))
    assert {job["slot"]: job["reason"] for job in status["jobs"]}["worker-000"] == "BeginTime"
    for job in waiting:
        run.cluster.run("scontrol", "update", f"jobid={job}", "starttime=now")
    run.assert_sound(undisturbed)
    assert run.outcomes("trainer")[-1] == "done"


def test_25_the_sidecar_is_cancelled_again_and_again(make: Make, undisturbed: str) -> None:
    run = make(step=5.0)
    run.tick()
    for number in range(3):
        job = run.job("sidecar", number)
        run.queued("sidecar", number + 1)  # its successor
        if number % 2:
            run.kill("sidecar", number)
        else:
            run.cluster.run("scancel", job)
    run.set_pace(0.1)
    run.assert_sound(undisturbed)
    assert run.outcomes("trainer") == ["done"], "the others went on"
    assert len(run.attempts("sidecar")) >= 4


def test_43_a_paused_writer_wakes_up_too_late(make: Make, undisturbed: str) -> None:
    run = make(step=1.0)
    run.plan_fault("worker-000", "pause responses")
    run.tick()
    run.until(lambda: not (run.faults / "worker-000").exists(), "the worker to be paused inside a shard")
    paused = run.attempts("worker-000")[0].id
    [work] = jobs.claims(run.root, "worker-000", paused)
    _, index, *_, shard = work.split("/")
    responses = layout.responses(int(index), int(shard))
    run.until(lambda: run.run.records.find(responses), "the other worker to do its shard")
    assert run.run.records.require(responses).attempt == run.attempts("worker-001")[0].id
    for pid in processes_of(paused):
        os.kill(pid, signal.SIGCONT)
    run.until(lambda: jobs.claims(run.root, "worker-000", paused) != [work], "the late one to be done with it")
    run.set_pace(0.1)
    run.assert_sound(undisturbed)


def test_46_a_damaged_checkpoint_falls_back(make: Make, undisturbed: str) -> None:
    run = make(step=0.4)
    run.tick()
    run.until(lambda: run.steps() >= 6, "some checkpoints")
    run.kill("trainer")
    run.until(lambda: not processes_of(run.attempts("trainer")[0].id), "its death")
    newest = lineage.newest(Run.open(run.root).records)
    assert newest is not None
    [entry] = newest.files
    path = newest.directory / entry.path
    path.write_bytes(b"torn" + path.read_bytes()[4:])
    run.assert_sound(undisturbed)
    assert run.run.records.require(newest.ref).generation == 1, "it was condemned and made again"


# ------------------------------------------------------------------------------------------ people


def test_32_cancel_at_any_moment(make: Make, undisturbed: str) -> None:
    """While its jobs wait, while they run, twice; a later tick brings nothing back; resume goes on to the same weights."""
    run = make(step=0.5, cluster={"jobs": {"options": ["--begin=now+1hour"]}})
    run.tick()
    assert "4 attempt(s) stopped, none left" in run.metaapo("cancel", str(run.root))
    assert not run.in_queue() and "0 attempt(s) stopped" in run.metaapo("cancel", str(run.root))
    run.tick()
    assert not run.in_queue()
    run.metaapo("resume", str(run.root), "cluster.jobs.options=[]")
    run.until(lambda: run.steps() >= 4, "training")
    run.set_pace(2.0)
    assert "none left" in run.metaapo("cancel", str(run.root))
    assert not run.in_queue() and run.outcomes("trainer")[-1] in ("saved", "superseded")
    run.tick()
    assert not run.in_queue()
    assert "clean" in run.metaapo("verify", str(run.root))
    run.set_pace(0.1)
    run.metaapo("resume", str(run.root))
    run.assert_sound(undisturbed)
    assert Run.open(run.root).current_incarnation() == 2


def test_32_cancel_without_a_controller(new_cluster: Callable[..., DevCluster], make: Make) -> None:
    private = new_cluster(nodes=2, MessageTimeout=3)  # jobs that end meanwhile say so again after some of it
    run = make(on=private, step=1.5)
    run.tick()
    run.until(lambda: run.steps() >= 2, "training")
    private.kill_controller()
    assert "does not answer" in run.metaapo("cancel", str(run.root), code=75)
    run.until(lambda: run.attempts("trainer")[0].end is not None, "the trainer to leave by itself")
    private.start_controller()
    assert "none left" in run.metaapo("cancel", str(run.root))
    assert not run.in_queue()


def test_workers_may_become_more_and_fewer(make: Make, undisturbed: str) -> None:
    run = make(step=HELD, inference={"workers": 1})
    run.tick()
    run.job("worker-000")
    run.metaapo("resume", str(run.root), "inference.workers=3", "--detach")
    run.job("worker-002")
    run.metaapo("resume", str(run.root), "inference.workers=1", "--detach")
    run.until(lambda: run.attempts("worker-002")[0].over, "the surplus to leave")
    assert run.outcomes("worker-002") == ["saved"]
    run.set_pace(0.1)
    run.assert_sound(undisturbed)
