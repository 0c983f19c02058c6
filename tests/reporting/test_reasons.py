"""Slurm's reasons, as squeue prints them, in words."""

from __future__ import annotations

import pytest

from toolkit.launch.supervise import FATAL
from toolkit.reporting.reasons import in_words


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Priority", "jobs of higher priority"),
        ("None", "has not looked at it yet"),
        ("Dependency", "the job before it"),
        ("ReqNodeNotAvail,_UnavailableNodes:n[1-2]", "down, drained or reserved"),
        ("Nodes_required_for_job_are_DOWN,_DRAINED_or_reserved", "down, drained or reserved"),
        ("QOSMaxJobsPerUserLimit", "as many jobs run"),
        ("AssocMaxJobsLimit", "as many jobs run"),
        ("QOSMaxSubmitJobPerUserLimit", "in the queue"),
        ("AssocGrpCPUMinutesLimit", "hours that the QOS or account has left"),
        ("QOSMaxGRESPerJob", "more than the QOS or account gives to a job"),
        ("AssocMaxNodePerJobLimit", "more than the QOS or account gives to a job"),
        ("QOSGrpGRES", "allows at a time"),
        ("QOSMaxCpuPerUserLimit", "allows at a time"),
        ("JobHeldUser", "scontrol release"),
        ("launch failed requeued held", "scontrol release"),
        ("BeginTime", "two minutes"),
    ],
)
def test_common_reasons(reason: str, words: str) -> None:
    found = in_words(reason)
    assert words in found and found.endswith(f"({reason})")


def test_reasons_that_last_for_ever_have_the_words_of_the_supervisor() -> None:
    for reason, words in FATAL.items():
        assert in_words(reason) == f"{words} ({reason})"


def test_an_unknown_reason_stays_as_it_is() -> None:
    assert in_words("BurstBufferStageIn") == "BurstBufferStageIn"
