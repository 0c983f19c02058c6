"""Launching, cancelling, resuming and following a run."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.launch.conftest import MemoryAdapter, World, make_config, publish_pairs
from toolkit.cluster import JobRequest
from toolkit.errors import UserError
from toolkit.exchange.run import Run
from toolkit.launch import control
from toolkit.launch.adapter import JobSpec, State, Unavailable
from toolkit.launch.attempts import attempts
from toolkit.launch.local import processes
from toolkit.launch.rehearsal import dry_run


class Obedient(MemoryAdapter):
    """Jobs that leave when they are asked to (``deaf``: only when they are killed), and start at once."""

    def __init__(self, root: Path, deaf: bool = False) -> None:
        super().__init__()
        self.root, self.deaf, self.asked = root, deaf, []

    def submit(self, job: JobSpec) -> str:
        number = super().submit(job)
        self.start(Run.open(self.root), job.slot)
        return number

    def cancel(self, attempts, kill: bool = False) -> None:
        super().cancel(attempts, kill)
        self.asked += [attempt for attempt in attempts if not kill]
        if kill or not self.deaf:
            self.jobs |= dict.fromkeys(attempts, State.GONE)


@pytest.fixture
def scheduler(run: Run, monkeypatch: pytest.MonkeyPatch) -> Obedient:
    found = Obedient(run.root)
    monkeypatch.setattr(control, "adapter", lambda config: found)
    return found


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration whose models are never looked at."""
    monkeypatch.setattr(control, "preflight", lambda config: None)


# ---------------------------------------------------------------------------------------------- cancel


def test_cancel_closes_the_run_and_leaves_no_job(run: Run, scheduler: Obedient) -> None:
    control.start(run)
    assert control.cancel(run) == 3
    assert run.closing().attributes["outcome"] == "cancelled"
    assert sorted(scheduler.asked) == sorted(job.attempt for job in scheduler.submitted) and not scheduler.killed
    assert control.living(run, control.adapter(run.config)) == []
    assert control.cancel(run) == 0, "again"
    control.tick(run)
    assert len(scheduler.submitted) == 3, "a later tick resurrects nothing"


def test_cancel_kills_what_does_not_leave(run: Run, scheduler: Obedient, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler.deaf = True
    monkeypatch.setattr(control, "CANCEL_PATIENCE", 2.0)
    control.start(run)
    assert control.cancel(run) == 3
    assert sorted(scheduler.killed) == sorted(job.attempt for job in scheduler.submitted)
    assert len(scheduler.asked) >= 3, "they were asked first"


def test_cancel_says_so_if_something_cannot_be_killed(
    run: Run, scheduler: Obedient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "cancel", lambda attempts, kill=False: None)
    monkeypatch.setattr(control, "CANCEL_PATIENCE", -61.0)
    control.start(run)
    with pytest.raises(UserError, match=r"3 attempt\(s\) of .* do not end although they were killed"):
        control.cancel(run)
    assert run.closing() is not None


# ---------------------------------------------------------------------------------------------- start


def test_a_role_that_is_refused_takes_the_others_out_of_the_queue(
    run: Run, scheduler: Obedient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A detached launch ticks once: nobody may come after it."""

    def submit(job: JobSpec) -> str:
        if job.slot == "worker-000":
            raise UserError("Slurm refused worker-000")
        return MemoryAdapter.submit(scheduler, job)

    monkeypatch.setattr(scheduler, "submit", submit)
    with pytest.raises(UserError, match="refused worker-000"):
        control.start(run)
    assert len(scheduler.submitted) == 2 and set(scheduler.jobs.values()) == {State.GONE}
    assert [attempts(run, slot)[0].outcome for slot in ("trainer", "sidecar")] == ["voided", "voided"]


# ---------------------------------------------------------------------------------------------- a chain


def test_a_chain_for_which_there_is_little_room(run: Run, scheduler: Obedient) -> None:
    cluster = replace(run.config.cluster, kind="slurm", control="chain", links=3)
    run.set_operations(replace(run.config, cluster=cluster))
    scheduler.room = lambda: 2 - len(scheduler.submitted)
    notes = control.start(run)
    assert [job.slot for job in scheduler.submitted] == ["trainer", "sidecar"]
    assert [note.partition(";")[0] for note in notes] == [
        "trainer: 1 of 3 links are queued",
        "sidecar: 1 of 3 links are queued",
        "worker-000: 0 of 3 links are queued",
    ]
    assert all(note.endswith(f"Later: metaapo resume {run.root}") for note in notes)


# ---------------------------------------------------------------------------------------------- umask


@pytest.fixture
def umask() -> Iterator[None]:
    """One that is not the run's; the test's own is put back."""
    before = os.umask(0o002)
    yield
    os.umask(before)


def modes(root: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("login", [0o077, 0o000])
def test_what_a_command_writes_has_the_modes_of_the_run(tmp_path: Path, umask: None, login: int) -> None:
    offline = {"gate": {"kind": "none"}, "weight": {"kind": "one"}}
    groups = {"method": offline, "reward": {"model": None}, "cluster": {"umask": "027"}}
    run = Run.create(tmp_path / "run", make_config(tmp_path / "run", **groups), "launch")
    publish_pairs(run)
    for command in (lambda: control.cancel(run), lambda: control.tick(run)):
        os.umask(login)
        command()
        assert modes(run.root) == {0o640}


def test_resume_may_change_the_modes(run: Run, scheduler: Obedient, quiet: None, umask: None) -> None:
    run.close("cancelled", "by hand")
    before = {path for path in run.root.rglob("*") if path.is_file()}
    control.resume(run, replace(run.config, cluster=replace(run.config.cluster, umask="027")))
    new = {path for path in run.root.rglob("*") if path.is_file()} - before
    assert new and {path.stat().st_mode & 0o777 for path in new} == {0o640}


# ---------------------------------------------------------------------------------------------- resume


def test_resume_waits_for_the_old_jobs_and_opens_the_next_incarnation(
    run: Run, scheduler: Obedient, quiet: None
) -> None:
    control.start(run)
    run.close("failed", "because")
    changed = replace(run.config, cluster=replace(run.config.cluster, jobs=JobRequest(time_minutes=7)))
    assert control.resume(run, changed) == 1
    assert control.living(run, control.adapter(run.config)) == [] and scheduler.asked
    assert run.operations_version() == 1
    control.tick(Run.open(run.root))
    assert [job.number for job in scheduler.submitted] == [0, 0, 0, 1, 1, 1]
    assert scheduler.submitted[-1].request.time_minutes == 7


def test_resume_of_a_run_that_goes_on_lets_it_go_on(run: Run, scheduler: Obedient, quiet: None) -> None:
    control.start(run)
    assert control.resume(run, run.config) == 0
    assert len(control.living(run, control.adapter(run.config))) == 3 and not scheduler.asked


def test_a_finished_run_is_not_resumed(run: Run, scheduler: Obedient, quiet: None) -> None:
    run.finish()
    with pytest.raises(UserError, match=r"is finished; there is nothing to resume\. .*metaapo report"):
        control.resume(run, run.config)
    assert run.current_incarnation() == 0


def test_a_resume_that_is_refused_changes_nothing(run: Run, scheduler: Obedient) -> None:
    run.close("cancelled", "by hand")
    with pytest.raises(UserError, match=r"data\.path"):  # what the run was made of is not there any more
        control.resume(run, replace(run.config, cluster=replace(run.config.cluster, jobs=JobRequest(time_minutes=7))))
    assert run.current_incarnation() == 0 and run.operations_version() == 0


# ---------------------------------------------------------------------------------------------- create and follow


def test_create_makes_nothing_of_a_configuration_that_is_refused(world: World) -> None:
    with pytest.raises(UserError, match="does not divide"):
        control.create(world.config(trainer={"tensor": 3}))
    assert not (world.data.parent / "run").exists()
    run = control.create(world.config())
    assert run.attempt == "launch" and control.create(world.config()).root == run.root
    with pytest.raises(UserError, match=r"holds another run(.|\n)*or remove this one, which holds no data yet$"):
        control.create(world.config(method={"rounds": 1}))
    publish_pairs(run)
    with pytest.raises(UserError, match=r"holds another run(.|\n)*or continue that run with: metaapo resume"):
        control.create(world.config(method={"rounds": 1}))


@pytest.mark.parametrize(("outcome", "advice"), [("finished", "metaapo report"), ("cancelled", "metaapo resume")])
def test_a_run_that_is_over_is_not_launched_again(world: World, outcome: str, advice: str) -> None:
    control.create(world.config()).close(outcome, "")
    with pytest.raises(UserError, match=f"{outcome}: {advice}"):
        control.create(world.config())


def test_a_dry_run_says_what_would_be_and_writes_nothing(world: World) -> None:
    console = Console(file=io.StringIO(), width=400)
    dry_run(world.config(inference={"workers": 2}, trainer={"tensor": 2}), console)
    text = console.file.getvalue()
    for words in ("trainer: 2 process", "sidecar: 1", "worker-001: 1", "M parameters", str(world.data.parent / "run")):
        assert words in text
    assert not (world.data.parent / "run").exists()


def follow(run: Run) -> tuple[str, list[dict]]:
    shown: list[dict] = []
    return control.follow(run, shown.append, every=0.01), shown


def test_follow_shows_the_run_until_it_is_closed(run: Run, scheduler: Obedient) -> None:
    run.set_operations(replace(run.config, cluster=replace(run.config.cluster, supervise=0.02)))
    shown: list[dict] = []

    def show(status: dict) -> None:
        shown.append(status)
        if len(shown) == 3:
            run.close("cancelled", "from elsewhere")

    assert control.follow(run, show, every=0.01) == "cancelled"
    assert len(shown) == 4, "and how it ended"
    assert [job["slot"] for job in shown[0]["jobs"]] == ["trainer", "sidecar", "worker-000"]
    assert shown[-1]["outcome"] == "cancelled" and control.living(run, control.adapter(run.config)) == []
    assert {job["outcome"] for job in shown[-1]["jobs"]} == {"died"}, "how they ended, not how they were"


def test_follow_tells_why_a_run_failed(run: Run, scheduler: Obedient) -> None:
    run.set_operations(replace(run.config, cluster=replace(run.config.cluster, supervise=0.02)))
    control.start(run)
    scheduler.end(run, "trainer", outcome="failed", kind="refused", error="UserError", message="no such folder")
    outcome, shown = follow(run)
    assert outcome == "failed" and "no such folder" in shown[-1]["reason"]
    assert control.living(run, control.adapter(run.config)) == []


def test_a_finished_run_is_finished_though_the_scheduler_is_silent(
    run: Run, scheduler: Obedient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(run: Run, patience: float) -> None:
        raise Unavailable("squeue did not answer")

    monkeypatch.setattr(control, "wait_for_roles", silent)
    run.finish()
    assert follow(run)[0] == "finished"


# ---------------------------------------------------------------------------------------------- for real


def test_a_whole_run_of_real_processes(tmp_path: Path, payload) -> None:
    """Launch, supervision, records, status and end, with a payload that publishes policies instead of training them."""
    payload("""
        from toolkit.exchange import lineage
        for version in range(run.plan.rounds + 1):
            if run.records.find(layout.policy(version)) is None:
                run.records.publish(layout.policy(version), {"version": version})
                if number == version < 2:
                    os.kill(os.getpid(), signal.SIGKILL)  # two attempts die on the way
        run.finish()
        return "done"
    """)
    offline = {"gate": {"kind": "none"}, "weight": {"kind": "one"}, "rounds": 3, "warm_start": "none"}
    groups = {"method": offline, "reward": {"model": None}, "cluster": {"supervise": 0.1}}
    run = Run.create(tmp_path / "run", make_config(tmp_path / "run", **groups), "launch")
    publish_pairs(run, (4, 4, 4))
    outcome, shown = follow(run)
    assert outcome == "finished"
    assert [attempt.outcome for attempt in attempts(run, "trainer")] == ["died", "died", "done"]
    assert run.newest_policy() == 3 and shown[-1]["outcome"] == "finished"
    ids = [attempt.id for attempt in attempts(run, "trainer")]
    assert not any(processes(ids).values())
