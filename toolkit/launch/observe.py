"""What the control plane knows of a run, asked anew by somebody who changes nothing."""

from __future__ import annotations

import os
from typing import Any

from toolkit.errors import UserError
from toolkit.exchange import jobs
from toolkit.exchange.run import Run
from toolkit.launch.adapter import State, Unavailable, adapter
from toolkit.launch.attempts import Attempt, attempts, every_slot
from toolkit.launch.supervise import Supervisor
from toolkit.launch.tick import describe


def observe(run: Run, ask: bool = True) -> dict[str, Any]:
    """Read the attempts' records and, if this is the run's owner, ask the scheduler for their jobs. Nothing is recorded or sent.

    Args:
        ask: whether to ask the scheduler at all.

    Returns:
        What `toolkit.launch.tick.describe` does, and ``gone``: the slots whose attempts live on in the records alone;
        ``unanswered``: why the scheduler's part is missing, or None.
    """
    supervisor = Supervisor(run.root, run.attempt, adapter(run.config))
    supervisor.histories = {slot: attempts(run, slot) for slot in every_slot(run)}
    living = [attempt for history in supervisor.histories.values() for attempt in history if not attempt.over]
    unanswered = None
    if ask and living and run.root.stat().st_uid == os.getuid():
        try:
            since = min(attempt.intent.written for attempt in living)
            supervisor.jobs = supervisor.adapter.look([attempt.id for attempt in living], since)
        except (Unavailable, UserError) as error:
            unanswered = str(error)
    gone = [attempt.slot for attempt in living if _is_gone(supervisor, attempt)]
    return describe(supervisor) | {"gone": gone, "unanswered": unanswered}


def _is_gone(supervisor: Supervisor, attempt: Attempt) -> bool:
    job = supervisor.jobs.get(attempt.id)
    if job is None or job.state is not State.GONE:
        return False
    # processes of another machine are not seen from here
    return not supervisor.adapter.same_machine or (
        attempt.start is not None and jobs.is_this_host(attempt.start.attributes)
    )
