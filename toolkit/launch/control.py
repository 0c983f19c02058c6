"""Launching, cancelling and resuming a run, and watching it from a terminal."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import config as configuration
from toolkit.config import Config
from toolkit.errors import UserError
from toolkit.exchange import hints, layout
from toolkit.exchange.run import Run
from toolkit.launch.adapter import Adapter, State, Unavailable, adapter
from toolkit.launch.attempts import Attempt, attempts, every_slot, slots
from toolkit.launch.preflight import preflight
from toolkit.launch.replay import finished_run, import_records
from toolkit.launch.supervise import has_work, submit
from toolkit.launch.tick import Tick
from toolkit.reporting import terminal

if TYPE_CHECKING:
    from rich.console import Console

CANCEL_PATIENCE = 180.0  # seconds that roles get to save and leave before they are killed


def create(config: Config) -> Run:
    """Check everything that can be checked before anything is spent, and make (or re-open) the run directory."""
    configuration.validate(config)
    preflight(config)
    source = None if config.replay_from is None else finished_run(Path(config.replay_from))
    run = Run.create(Path(config.run), config, "launch")
    closing = run.closing()
    if closing is not None:
        go_on = "report" if closing.attributes["outcome"] == "finished" else "resume"
        raise UserError(
            f"{run.root} holds this run already, and it is {closing.attributes['outcome']}: metaapo {go_on} {run.root}"
        )
    if source is not None:
        import_records(source, run)
    return run


def prepare(run: Run, console: Console) -> None:
    """Prepare the run's pairs here, if nobody did: mistakes in the data show before anything is spent.

    Raises:
        ImportError: the packages that it takes are not installed here.
    """
    if run.records.find(layout.PAIRS) is not None:
        return
    from rich.progress import Progress

    from toolkit.data.publish import prepare_run

    with Progress(*Progress.get_default_columns()[:1], "{task.completed} rows", console=console, transient=True) as bar:
        task = bar.add_task("preparing pairs", total=None)
        manifest = prepare_run(run, lambda rows: bar.update(task, completed=rows))
    counts = manifest.attributes["counts"]
    dropped = ", ".join(f"{number} {reason}" for reason, number in counts["dropped"].items()) or "none"
    console.print(
        f"prepared {counts['pairs']} pairs in rounds of {manifest.attributes['pairs_per_round']} and {counts['heldout']} held-out "
        f"prompts from {counts['rows']} rows; dropped: {dropped}",
        soft_wrap=True,
    )
    for note in manifest.attributes["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


def tick(run: Run) -> None:
    """Do once what keeps a run going.

    Raises:
        Unavailable: the scheduler does not answer; what the records alone decide is done.
    """
    ticking = Tick(run, adapter(run.config))
    try:
        ticking.supervise()
    except UserError:
        if run.closing() is not None:  # nobody may come after this: what was submitted before is withdrawn
            with contextlib.suppress(Unavailable):
                ticking.supervise()
        raise
    finally:
        ticking.advance()


def start(run: Run) -> list[str]:
    """Submit the roles and return; with ``cluster.control=chain`` all their attempts, each waiting for the one before.

    Returns:
        What did not go as wished, in words.
    """
    tick(run)
    return _chain(run) if run.config.cluster.chained else []


def _chain(run: Run) -> list[str]:
    """Queue links behind each slot's last living attempt, until there are as many as are wished for."""
    links, scheduler, incarnation = run.config.cluster.links, adapter(run.config), run.current_incarnation()
    assert incarnation is not None
    histories = {slot: attempts(run, slot) for slot in slots(run.config)}
    living = {slot: [attempt for attempt in history if not attempt.over] for slot, history in histories.items()}
    last = {slot: waiting[-1] for slot, waiting in living.items() if waiting}
    since = min((attempt.intent.written for attempt in last.values()), default=0.0)
    found = scheduler.look([attempt.id for attempt in last.values()], since) if last else {}
    notes = []
    for slot, history in histories.items():
        if slot not in last and not has_work(run, slot, history, incarnation):
            continue
        before = found[last[slot].id].id if slot in last else None
        for link in range(len(living[slot]), links):
            if before is None or scheduler.room() == 0:
                notes.append(
                    f"{slot}: {link} of {links} links are queued; Slurm did not take more now. Later: metaapo resume {run.root}"
                )
                break
            before = submit(run, scheduler, slot, len(history) + link - len(living[slot]), incarnation, after=before)
    return notes


def follow(run: Run, show: Callable[[dict], None], every: float = 1.0) -> str:
    """Keep a run going from this process until it is closed, showing its status.

    Returns:
        The outcome: finished, failed or cancelled.
    """
    ticking = Tick(run, adapter(run.config))
    supervised = -1e9
    while True:
        if time.monotonic() - supervised >= run.config.cluster.supervise:
            _supervise(ticking)
            supervised = time.monotonic()
        ticking.advance()
        show(hints.status(run.root))
        closing = run.closing()
        if closing is not None:
            with contextlib.suppress(Unavailable):
                wait_for_roles(run, CANCEL_PATIENCE)
            _supervise(ticking)
            ticking.advance()
            show(hints.status(run.root))
            return str(closing.attributes["outcome"])
        time.sleep(every)


def _supervise(ticking: Tick) -> None:
    with contextlib.suppress(Unavailable):  # asked again at the next turn
        try:
            ticking.supervise()
        except UserError:
            if ticking.run.closing() is None:
                raise
            # the run is closed with the reason, which is shown


def follow_live(run: Run, console: Console) -> str:
    """`follow` with a live table on a terminal, or a line now and then elsewhere."""
    if not console.is_terminal:
        seen = [""]

        def line(found: dict) -> None:
            text = terminal.line(found)
            if text != seen[0]:
                seen[0] = text
                console.print(text, soft_wrap=True)

        return follow(run, line)
    from rich.live import Live

    with Live(console=console, refresh_per_second=4) as live:
        return follow(run, lambda found: live.update(terminal.render(found, 0.0)))


def living(run: Run, scheduler: Adapter) -> list[str]:
    """Ids of this run's attempts that may still have processes or wait in a queue.

    Raises:
        Unavailable: the scheduler does not answer.
    """
    every = [attempt for slot in every_slot(run) for attempt in _recent(attempts(run, slot))]
    if not every:
        return []
    found = scheduler.look([a.id for a in every], min(a.intent.written for a in every))
    return [name for name, job in found.items() if job.state in (State.PENDING, State.RUNNING)]


def _recent(history: list[Attempt]) -> list[Attempt]:
    """Attempts that are not over, those given up, whose job may come late, and the last two, of which ranks may be left."""
    return [a for a in history if not a.over or a.outcome == "voided" or a.number >= len(history) - 2]


def wait_for_roles(run: Run, patience: float) -> None:
    """Wait until no attempt of the run is left; those that do not leave in time are killed."""
    scheduler, deadline, pause = adapter(run.config), time.monotonic() + patience, 0.5
    while left := living(run, scheduler):
        scheduler.cancel(left, kill=time.monotonic() > deadline)
        if time.monotonic() > deadline + 60:
            raise UserError(
                f"{len(left)} attempt(s) of {run.root} do not end although they were killed: {', '.join(left)}"
            )
        time.sleep(pause)
        if run.config.cluster.kind != "local":
            pause = min(10.0, 1.5 * pause)  # politely


def cancel(run: Run, patience: float | None = None) -> int:
    """Close the incarnation, stop its jobs (they save first), and prove that none is left.

    Args:
        patience: seconds that the roles get to save and leave before they are killed.

    Returns:
        How many attempts were living.

    Raises:
        Unavailable: the run is closed, so its jobs leave by themselves, but the scheduler does not say whether any is left.
    """
    run.require_owner()
    if run.closing() is None:
        run.close("cancelled", "metaapo cancel")
    found = len(living(run, adapter(run.config)))
    wait_for_roles(run, CANCEL_PATIENCE if patience is None else patience)
    ticking = Tick(run, adapter(run.config))  # records how they ended, and shows it
    ticking.supervise()
    ticking.advance()
    return found


def resume(run: Run, config: Config) -> int:
    """Open the next incarnation with possibly changed operations. Returns its number.

    Raises:
        UserError: the run is finished.
    """
    run.require_owner()
    preflight(config)
    closing = run.closing()
    if closing is not None and closing.attributes["outcome"] == "finished":
        raise UserError(f"{run.root} is finished; there is nothing to resume. `metaapo report {run.root}` shows it.")
    if closing is not None:
        wait_for_roles(run, CANCEL_PATIENCE)
    os.umask(int(config.cluster.umask, 8))  # which may be among what changes
    run.set_operations(config)
    return run.reopen()
