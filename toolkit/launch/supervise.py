"""The control plane: which attempts a run needs, which have died, what is submitted again. The records are the truth.

Any host process may supervise, any number at once: every decision is a single-winner record, and only its winner acts.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

from toolkit.cluster import request, role_of
from toolkit.config import Config
from toolkit.errors import UserError
from toolkit.exchange import jobs, layout
from toolkit.exchange.readiness import trainer_has_work, workers_have_work
from toolkit.exchange.run import Run
from toolkit.launch import snapshot
from toolkit.launch.adapter import Adapter, Busy, Job, JobSpec, State
from toolkit.launch.attempts import Attempt, attempts, every_slot, known_slots, progress, slots
from toolkit.launch.deaths import CORNERED, bad_nodes, is_cornered, memory_words, verdict
from toolkit.launch.handover import keeper

LOST_BEATS = 20  # heartbeats missed after which a started attempt that the scheduler does not remember is given up
BUSY_PATIENCE = 600.0  # seconds, at most, between two submissions of a slot for which the scheduler had no room
UNSEEN = Job(State.UNKNOWN)
FATAL = {  # reasons for which a job is pending for ever
    "PartitionTimeLimit": "its time_minutes exceed the partition's limit",
    "PartitionNodeLimit": "it asks for more nodes than the partition gives to a job",
    "QOSMaxWallDurationPerJobLimit": "its time_minutes exceed the QOS's limit",
    "AssocMaxWallDurationPerJobLimit": "its time_minutes exceed your account's limit",
    "DependencyNeverSatisfied": "it waits for a job that cannot end any more",
    "BadConstraints": "no node has what it asks for",
    "InvalidAccount": "the account does not exist",
    "InvalidQOS": "the QOS does not exist",
    "AccountNotAllowed": "the account may not use the partition",
    "QOSNotAllowed": "the QOS may not be used in the partition",
}
PER_JOB = (
    "CpuPerJobLimit",
    "NodePerJobLimit",
    "MemPerJob",
    "MemoryPerJob",
    "GRESPerJob",
    "BillingPerJob",
    "LicensePerJob",
)
FATAL |= {
    f"{who}Max{what}": "it asks for more than the QOS or account gives to a job"
    for who in ("QOS", "Assoc")
    for what in PER_JOB
}


def start_patience(config: Config) -> float:
    """Seconds after which an attempt that neither started nor is known to the scheduler is given up.

    Longer than its submitter may still be waiting for the scheduler's answer.
    """
    return max(1.5 * config.cluster.supervise, config.cluster.query_timeout + 30.0)


class Supervisor:
    """Looks at a run's attempts again and again. Remembers those that are over: they cannot change.

    Args:
        attempt: who writes the records.
    """

    def __init__(self, root: Path, attempt: str, adapter: Adapter) -> None:
        self.root, self.attempt, self.adapter = root, attempt, adapter
        self.histories: dict[str, list[Attempt]] = {}
        self.jobs: dict[str, Job] = {}  # by attempt, as of the last look

    def supervise(self) -> None:
        """Look at every slot once, and do what is due.

        Raises:
            Unavailable: the scheduler does not answer; nothing was changed.
            UserError: the run cannot go on; it has been closed with that reason.
        """
        run = Run.open(self.root, self.attempt)
        incarnation = run.current_incarnation()
        assert incarnation is not None
        self._read(run)
        living = [attempt for history in self.histories.values() for attempt in history if not attempt.over]
        failed = [h[-1] for h in self.histories.values() if h and h[-1].outcome == "failed"]
        asked = living + failed
        since = min((attempt.intent.written for attempt in asked), default=time.time())
        self.jobs = self.adapter.look([attempt.id for attempt in asked], since) if asked else {}
        for attempt in living:
            self._examine(run, attempt, self.jobs[attempt.id])
        # A job of an attempt that was given up may have been accepted after all, as late as a controller stalls.
        self._kill(a for history in self.histories.values() for a in history if a.outcome == "voided")
        # Its other ranks wait for the one that failed.
        self._kill(attempt for attempt in failed if self.jobs[attempt.id].state is State.RUNNING)
        self._read(run)
        if run.closing(incarnation) is not None:
            _clear(run, self.adapter, [a for history in self.histories.values() for a in history if not a.over])
            return
        wanted = slots(run.config)
        self._dismiss(run, wanted)
        exclude = bad_nodes(self.histories.values(), incarnation, time.time())
        self._release(run, exclude)
        for slot in wanted:
            number = len(self.histories[slot])
            avoided = () if is_cornered(self.histories[slot], time.time()) else exclude
            if self._is_due(run, slot, incarnation):
                submit(run, self.adapter, slot, number, incarnation, exclude=avoided)
            elif (before := self._predecessor(run, slot)) is not None:
                submit(run, self.adapter, slot, number, incarnation, before, avoided)
        self._read(run)

    def _read(self, run: Run) -> None:
        for slot in every_slot(run):
            self.histories[slot] = attempts(run, slot, self.histories.get(slot, []))

    def _examine(self, run: Run, attempt: Attempt, job: Job) -> None:
        """Record the death of an attempt that the scheduler does not have any more and that left no word."""
        if attempt.start is None:
            self._examine_unstarted(run, attempt, job)
            return
        quiet = job.state is State.UNKNOWN or job.reason == "COMPLETING"
        gone = job.state is State.GONE or (quiet and self._is_lost(run, attempt))
        if not gone and self.adapter.same_machine:
            facts = attempt.start.attributes
            gone = jobs.is_this_host(facts) and not jobs.is_alive(facts)
        end = layout.job(attempt.slot, attempt.number, "end")
        if not gone or run.records.find(end) is not None:
            return
        if job.state is not State.GONE:
            self._kill([attempt])  # its first process is dead: the rest waits for nobody
        death = {"outcome": "died", "kind": job.kind, "message": job.message, "nodes": job.nodes}
        if job.kind in ("crash", "cancelled", "unknown") and (words := memory_words(run.root, attempt)):
            death |= {"kind": "resource", "message": f"{job.message}; its log says: {words}"}
        seconds = job.seconds if job.seconds is not None else time.time() - attempt.start.written
        death |= {"seconds": round(seconds, 1), "working_on": jobs.claims(run.root, attempt.slot, attempt.id)}
        run.records.publish(end, death)

    def _examine_unstarted(self, run: Run, attempt: Attempt, job: Job) -> None:
        if job.state is State.PENDING and job.reason in FATAL and run.closing(attempt.incarnation) is None:
            cornered = job.reason == "BadConstraints" and attempt.intent.attributes.get("exclude")
            if cornered:
                void(run, attempt, CORNERED, kind="withdrawn")
            else:
                void(run, attempt, f"pending for ever: {job.reason}")
            self.adapter.cancel([attempt.id], kill=True)
            if not cornered and job.reason != "DependencyNeverSatisfied":
                why = f"{attempt.slot} would never start: {FATAL[job.reason]} (Slurm: {job.reason}, job {job.id})."
                run.close("failed", f"{why} Mend the profile: metaapo resume {run.root} cluster.KEY=VALUE")
                raise UserError(why)
        if job.state in (State.GONE, State.UNKNOWN):
            known = job.id is not None and job.state is State.GONE  # not just not there yet
            age = time.time() - attempt.intent.written
            if known or age > start_patience(run.config) or run.closing(attempt.incarnation) is not None:
                void(run, attempt, job.message if known else "never started", kind=job.kind if known else "unknown")
                self.adapter.cancel([attempt.id], kill=True)

    def _is_lost(self, run: Run, attempt: Attempt) -> bool:
        """Whether an attempt that the scheduler does not remember has shown no life for long.

        Both times are the file server's, so no clocks are compared: that of the heartbeat (or start), and that of the last status.
        """
        assert attempt.start is not None
        beat = jobs.last_beat(run.root, attempt.slot)
        alive = beat is not None and beat[0] == attempt.id
        sign = run.root / "heartbeats" / f"{attempt.slot}.json" if alive else attempt.start.path
        try:
            silence = (run.root / "status.json").stat().st_mtime - sign.stat().st_mtime
        except OSError:
            return False
        return silence > LOST_BEATS * run.config.inference.heartbeat

    def _kill(self, doomed: Iterable[Attempt]) -> None:
        names = [attempt.id for attempt in doomed]
        if names:
            self.adapter.cancel(names, kill=True)

    def _pending(self, histories: Iterable[list[Attempt]]) -> list[Attempt]:
        return [
            attempt for history in histories for attempt in history if attempt.start is None and attempt.end is None
        ]

    def _dismiss(self, run: Run, wanted: Sequence[str]) -> None:
        """Attempts of slots that the configuration does not ask for any more save and leave."""
        surplus = [h for slot, h in self.histories.items() if slot not in wanted]
        withdraw_attempts(run, self.adapter, self._pending(surplus))
        running = [a.id for history in surplus for a in history if a.outcome == "running"]
        if running:
            self.adapter.cancel(running)

    def _release(self, run: Run, exclude: Sequence[str]) -> None:
        """Waiting attempts that avoid nodes which are not bad any more are withdrawn: others take their place."""
        waiting = self._pending(self.histories.values())
        stale = [a for a in waiting if not set(a.intent.attributes.get("exclude", ())) <= set(exclude)]
        if stale:
            withdraw_attempts(run, self.adapter, stale)
            self._read(run)

    def _is_due(self, run: Run, slot: str, incarnation: int) -> bool:
        """Whether a slot is to be submitted now. Closes the run if it must not be submitted any more."""
        history = self.histories[slot]
        if any(not attempt.over for attempt in history):
            return False
        ours = [attempt for attempt in history if attempt.incarnation == incarnation]
        reason = verdict(run, slot, ours, self.histories.values())
        if reason is not None:
            run.close("failed", reason)
            raise UserError(reason)
        met = [attempt for attempt in ours if not attempt.turned_away]
        return self._has_room(run, ours) and has_work(run, slot, met, incarnation)

    def _predecessor(self, run: Run, slot: str) -> str | None:
        """Id of the job behind which the keeper's successor is to be queued now, if it is not."""
        cluster, history = run.config.cluster, self.histories[slot]
        living = [attempt for attempt in history if not attempt.over]
        if self.adapter.same_machine or cluster.control != "job" or slot != keeper(run.config) or len(living) != 1:
            return None
        [last] = living
        running = last.start is not None and self.jobs.get(last.id, UNSEEN).state is State.RUNNING
        return str(last.start.attributes["job"]) if running and self._has_room(run, history) and last.start else None

    def _has_room(self, run: Run, history: Sequence[Attempt]) -> bool:
        """Whether the scheduler is likely to take a job now: after refusals it is asked less and less often."""
        room = self.adapter.room()
        refusals = 0
        while refusals < len(history) and history[-1 - refusals].turned_away:
            refusals += 1
        wait = min(BUSY_PATIENCE, run.config.cluster.supervise * 2**refusals) if refusals else 0.0
        return (room is None or room > 0) and (not refusals or time.time() - history[-1].intent.written > wait)


def has_work(run: Run, slot: str, history: Sequence[Attempt], incarnation: int) -> bool:
    """Whether a slot without a living attempt has anything to do."""
    outcome = history[-1].outcome if history and history[-1].incarnation == incarnation else None
    if outcome == "starved":
        return trainer_has_work(run) if slot == "trainer" else workers_have_work(run)
    return not run.finished() if slot == "trainer" else outcome != "done"


def void(run: Run, attempt: Attempt, reason: str, kind: str = "unknown") -> None:
    """Give up an attempt that has not started: a job of it that starts after all ends at once."""
    word = {"kind": "voided", "reason": reason, "death": kind}
    run.records.publish(layout.job(attempt.slot, attempt.number, "start"), word)


def withdraw(run: Run, adapter: Adapter) -> None:
    """Take a closed run's pending attempts out of the queue, and ask the running ones to leave."""
    every = [attempt for slot in known_slots(run) for attempt in attempts(run, slot)]
    living = [attempt for attempt in every if not attempt.over]
    if living:
        adapter.look([attempt.id for attempt in living], min(attempt.intent.written for attempt in living))
    adapter.cancel([attempt.id for attempt in every if attempt.outcome == "voided"], kill=True)
    _clear(run, adapter, living)


def _clear(run: Run, adapter: Adapter, living: Sequence[Attempt]) -> None:
    """Withdraw what waits; ask what runs to save and leave, unless the run is finished: then it is about to."""
    withdraw_attempts(run, adapter, [attempt for attempt in living if attempt.start is None])
    closing = run.closing()
    running = [attempt.id for attempt in living if attempt.outcome == "running" and attempt.id != run.attempt]
    if running and closing is not None and closing.attributes["outcome"] != "finished":
        adapter.cancel(running)


def withdraw_attempts(run: Run, adapter: Adapter, pending: Sequence[Attempt]) -> None:
    for attempt in pending:
        void(run, attempt, "withdrawn", kind="withdrawn")
    if pending:
        adapter.cancel([attempt.id for attempt in pending])


def submit(
    run: Run,
    adapter: Adapter,
    slot: str,
    number: int,
    incarnation: int,
    after: str | None = None,
    exclude: Sequence[str] = (),
) -> str | None:
    """Publish the intent of an attempt and, if this call won it, submit the job, once.

    Args:
        after: id of a job whose end it waits for.
        exclude: nodes that it must not run on.

    Returns:
        The scheduler's id; None if the job is another's, was turned away, or its fate is unclear.
    """
    attempt = uuid.uuid4().hex[:12]
    code = snapshot.take(run.root)
    job = specification(run.config, run.root, slot, number, attempt, code, after, exclude)
    attributes = {
        "attempt": attempt,
        "slot": slot,
        "number": number,
        "incarnation": incarnation,
        "operations": run.operations_version(),
        "code": code,
        "progress": progress(run),
        "exclude": list(exclude),
        # those of a machine of one's own are not billed
        "gpus": 0 if adapter.same_machine else job.nodes * job.gpus_per_node,
    }
    intent, won = run.records.publish(layout.job(slot, number, "intent"), attributes)
    if not won or run.closing(incarnation) is not None:
        return None
    try:
        found = adapter.submit(job)
    except Busy as error:
        void(run, Attempt(slot, number, intent, None, None), f"no room: {error}", kind="busy")
        return None
    except UserError as error:  # it would be refused again
        if exclude:  # but perhaps only because of the nodes that it avoids
            void(run, Attempt(slot, number, intent, None, None), CORNERED, kind="withdrawn")
            return None
        run.close("failed", str(error))
        raise
    except Exception as error:  # it may have been accepted: the next look at the scheduler tells
        print(f"submission of {slot} unclear: {error}")
        return None
    if run.closing(incarnation) is not None:  # closed just now: whoever closed it may not have seen this job
        adapter.cancel([attempt], kill=True)
    return found


def specification(
    config: Config,
    root: Path,
    slot: str,
    number: int,
    attempt: str,
    code: str,
    after: str | None = None,
    exclude: Sequence[str] = (),
) -> JobSpec:
    """What an attempt of a slot asks for."""
    role, trainer, local = role_of(slot), config.trainer, config.cluster.kind == "local"
    ranks = trainer.tensor * trainer.pipeline * trainer.data if role == "trainer" else 1
    per_node = ranks if local else min(ranks, config.cluster.ranks_per_node)
    gpus = {"trainer": per_node, "worker": config.inference.tensor_parallel, "sidecar": 0}[role]
    wish = request(config.cluster, role)
    return JobSpec(
        root=root,
        slot=slot,
        number=number,
        attempt=attempt,
        code=snapshot.directory(root, code),
        nodes=ranks // per_node,
        tasks_per_node=per_node,
        gpus_per_node=gpus if wish.gpu_request is not None or local else 0,
        request=wish,
        margin=config.cluster.margin,
        after=after,
        exclude=tuple(exclude),
    )
