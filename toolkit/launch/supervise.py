"""The control plane: which attempts a run needs, which have died, what is submitted again. The records are the truth.

Any host process may call `supervise`, any number at once: every decision is a single-winner record, and only its winner acts.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any

from toolkit.config import Config
from toolkit.errors import UserError
from toolkit.exchange import hints, jobs, layout, lineage
from toolkit.exchange.readiness import trainer_has_work, workers_have_work
from toolkit.exchange.records import Manifest
from toolkit.exchange.run import Run
from toolkit.launch import snapshot
from toolkit.launch.adapter import Adapter, JobSpec, State

START_PATIENCE = 90.0  # seconds after which an attempt that neither started nor is known to the scheduler is given up


@dataclass(frozen=True)
class Attempt:
    """A slot's attempt and what is recorded of it."""

    slot: str
    number: int
    intent: Manifest
    start: Manifest | None
    end: Manifest | None

    @property
    def id(self) -> str:
        return str(self.intent.attributes["attempt"])

    @property
    def incarnation(self) -> int:
        return int(self.intent.attributes["incarnation"])

    @property
    def over(self) -> bool:
        return self.end is not None or (self.start is not None and self.start.attributes["kind"] == "voided")

    @property
    def outcome(self) -> str:
        """``pending``, ``running``, ``voided``, or what its end says."""
        if self.end is not None:
            return str(self.end.attributes["outcome"])
        if self.start is None:
            return "pending"
        return "running" if self.start.attributes["kind"] == "started" else "voided"

    @property
    def death(self) -> dict[str, Any] | None:
        """``kind``, ``message`` and where there was one ``error`` (its class) of an attempt that did not end well, else None."""
        if self.outcome == "voided":
            return {"kind": "never started", "message": "it left no word; its log may say more"}
        return self.end.attributes if self.end is not None and self.outcome in ("failed", "died") else None


def slots(config: Config) -> list[str]:
    """The roles that a run's configuration asks for, one slot a job."""
    found = ["trainer"]
    if config.replay_from is None and config.needs_workers:
        found += ["sidecar"] + [f"worker-{index:03d}" for index in range(config.inference.workers)]
    return found


def attempts(run: Run, slot: str) -> list[Attempt]:
    """All attempts of a slot, oldest first."""
    found: list[Attempt] = []
    while (intent := run.records.find(layout.job(slot, len(found), "intent"))) is not None:
        number = len(found)
        start = run.records.find(layout.job(slot, number, "start"))
        end = run.records.find(layout.job(slot, number, "end"))
        found.append(Attempt(slot, number, intent, start, end))
    return found


def newest_attempts(run: Run) -> list[Attempt]:
    """The newest attempt of every slot that has one."""
    return [history[-1] for slot in slots(run.config) if (history := attempts(run, slot))]


def supervise(run: Run, adapter: Adapter) -> list[Attempt]:
    """Look at every slot once, with one query to the scheduler, and do what is due.

    Returns:
        The newest attempt of every slot, as it stands afterwards.

    Raises:
        UserError: the run cannot go on; it has been closed with that reason.
    """
    incarnation = run.current_incarnation()
    assert incarnation is not None
    histories = {slot: attempts(run, slot) for slot in slots(run.config)}
    last = [history[-1] for history in histories.values() if history]
    asked = [attempt for attempt in last if not attempt.over or attempt.outcome == "failed"]
    states = adapter.states([attempt.id for attempt in asked])
    for attempt in asked:
        if not attempt.over:
            _bury(run, adapter, attempt, states[attempt.id])
        elif states[attempt.id] is State.RUNNING:
            adapter.cancel([attempt.id], kill=True)  # its other ranks wait for the one that failed
    closing = run.closing(incarnation)
    newest = []
    for slot, history in histories.items():
        history = attempts(run, slot) if history else []
        if closing is None and (not history or history[-1].over):
            verdict = due(run, slot, [a for a in history if a.incarnation == incarnation])
            if verdict is not None:
                run.close("failed", verdict)
                raise UserError(verdict)
            if _wanted(run, slot, history, incarnation):
                submit(run, adapter, slot, len(history), incarnation)
                history = attempts(run, slot)
        if history:
            newest.append(history[-1])
    return newest


def _bury(run: Run, adapter: Adapter, attempt: Attempt, state: State) -> None:
    """Record the death of an attempt that the scheduler does not have any more and that left no word."""
    age = time.time() - attempt.intent.written
    if attempt.start is None:
        if state is State.GONE and (age > START_PATIENCE or run.closing(attempt.incarnation) is not None):
            run.records.publish(
                layout.job(attempt.slot, attempt.number, "start"), {"kind": "voided", "reason": "never started"}
            )
        return
    facts = attempt.start.attributes
    main_is_gone = state is State.GONE or (jobs.is_this_host(facts) and not jobs.is_alive(facts))
    if not main_is_gone or run.records.find(layout.job(attempt.slot, attempt.number, "end")) is not None:
        return
    if state is not State.GONE:
        adapter.cancel([attempt.id], kill=True)  # its first process is dead: the rest waits for nobody
    death = {"outcome": "died", "kind": "crash", "message": "its process is gone and left no word"}
    Run.open(run.root, run.attempt).records.publish(layout.job(attempt.slot, attempt.number, "end"), death)


def due(run: Run, slot: str, history: list[Attempt]) -> str | None:
    """Why this slot must not be submitted again, or None.

    A refusal (a UserError: the input or the configuration is wrong) stops at once; deaths without progress between them have a
    budget.
    """
    end = history[-1].death if history else None
    if end is not None and end["kind"] == "refused":
        return f"{slot} stopped: {end['message']}"
    mark = progress(run)
    deaths = [a.death for a in history if a.death is not None and a.intent.attributes["progress"] == mark]
    if len(deaths) < run.config.cluster.attempts:
        return None
    kinds = Counter(death["kind"] for death in deaths)
    last = ": ".join(deaths[-1][key] for key in ("error", "message") if key in deaths[-1])
    return (
        f"{slot} died {len(deaths)} times without a record published in between "
        f"({', '.join(f'{count} x {kind}' for kind, count in kinds.items())}); the last: {last}. "
        f"Logs: {run.root}/logs/{slot}. Then: metaapo resume {run.root}"
    )


def progress(run: Run) -> list[int]:
    """A mark that moves whenever the run gets on: newest checkpoint, newest policy, shards done by the workers (a hint)."""
    newest = lineage.newest(run.records)
    policy = run.newest_policy()
    return [
        -1 if newest is None else lineage.sequence(newest),
        -1 if policy is None else policy,
        int(hints.frontier(run.root).get("done", 0)),
    ]


def _wanted(run: Run, slot: str, history: list[Attempt], incarnation: int) -> bool:
    """Whether a slot without a living attempt has anything to do."""
    outcome = history[-1].outcome if history and history[-1].incarnation == incarnation else None
    if outcome == "starved":
        return trainer_has_work(run) if slot == "trainer" else workers_have_work(run)
    return not run.finished() if slot == "trainer" else outcome != "done"


def submit(run: Run, adapter: Adapter, slot: str, number: int, incarnation: int) -> None:
    """Publish the intent of an attempt and, if this call won it, submit the job, once."""
    config = run.config
    code = snapshot.take(run.root)
    attempt = uuid.uuid4().hex[:12]
    attributes = {
        "attempt": attempt,
        "slot": slot,
        "number": number,
        "incarnation": incarnation,
        "operations": run.operations_version(),
        "code": code,
        "progress": progress(run),
    }
    _, won = run.records.publish(layout.job(slot, number, "intent"), attributes)
    if won and run.closing(incarnation) is None:
        role = {"trainer": config.trainer, "sidecar": config.sidecar}.get(slot, config.inference)
        trainer = config.trainer
        job = JobSpec(
            root=run.root,
            slot=slot,
            number=number,
            attempt=attempt,
            code=snapshot.directory(run.root, code),
            tasks=trainer.tensor * trainer.pipeline * trainer.data if slot == "trainer" else 1,
            python=role.python or sys.executable,
            time_minutes=config.cluster.time_minutes,
            environment=config.cluster.environment,
        )
        try:
            adapter.submit(job)
        except UserError as error:  # it would be refused again
            run.close("failed", str(error))
            raise


def describe(newest: list[Attempt]) -> list[dict[str, Any]]:
    """The attempts as JSON, for the status."""
    return [
        {
            "slot": attempt.slot,
            "number": attempt.number,
            "attempt": attempt.id,
            "outcome": attempt.outcome,
            "message": (attempt.end.attributes.get("message") if attempt.end is not None else None),
        }
        for attempt in newest
    ]
