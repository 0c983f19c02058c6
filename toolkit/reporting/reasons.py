"""Why a job is pending, in plain words."""

from __future__ import annotations

import re

from toolkit.launch.supervise import FATAL

LIMITED = "(?:QOS|Assoc)"
WORDS = (  # the beginning of Slurm's reason -> what it means; the first that fits
    ("None", "Slurm has not looked at it yet"),
    ("Priority", "jobs of higher priority are ahead of it"),
    ("Resources", "the nodes that it needs are busy"),
    ("Dependency", "it waits for the end of the job before it"),
    ("BeginTime", "Slurm starts it later: after a requeue, in about two minutes"),
    ("ReqNodeNotAvail|Nodes.required", "nodes that it needs are down, drained or reserved"),
    ("Reservation", "its reservation has not begun, or is over"),
    ("Licenses", "the licenses that it asks for are in use"),
    ("Partition(?:Down|Inactive)", "its partition starts no jobs now"),
    ("JobHeldUser", "you hold it; scontrol release lets it go"),
    ("JobHeldAdmin", "an administrator holds it: ask the site"),
    ("launch.failed|JobHoldMaxRequeue", "Slurm holds it after starts that failed; scontrol release lets it go"),
    (f"{LIMITED}(?:Max|Grp)Submit", "you have as many jobs in the queue as the QOS or account allows"),
    (f"{LIMITED}(?:Max|Grp)Jobs", "as many jobs run as the QOS or account allows"),
    (f"{LIMITED}(?:Max|Grp)\\w*Minutes", "the hours that the QOS or account has left are too few for it"),
    (f"{LIMITED}Max\\w*Per(?:Job|Node)", "it asks for more than the QOS or account gives to a job"),
    (f"{LIMITED}(?:Max|Grp)", "running jobs use all that the QOS or account allows at a time"),
    ("QOSMin", "it asks for less than the QOS demands"),
)


def in_words(reason: str) -> str:
    """What a scheduler's reason means, with the reason itself; one that is not known stays as it is."""
    words = FATAL.get(reason) or next((words for pattern, words in WORDS if re.match(pattern, reason)), None)
    return reason if words is None else f"{words} ({reason})"
