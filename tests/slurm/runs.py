"""Runs on a development cluster: real Slurm, records, sidecar and control plane around the payload in payload.py."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from devcluster import DevCluster, DevClusterError

from tests.exchange.conftest import make_config, publish_pairs
from tests.launch.conftest import World
from toolkit.exchange import layout, lineage
from toolkit.exchange.run import Run
from toolkit.launch.attempts import Attempt, attempts, known_slots
from toolkit.launch.batch import job_name
from toolkit.launch.local import processes

ROOT = Path(__file__).parents[2]
PAYLOAD = f"{sys.executable} -u {Path(__file__).with_name('payload.py')}"
PAIRS = (4, 16, 16)  # a warm-start round of one shard and two gated rounds of four; two pairs a step
PATIENCE = 600.0  # seconds that anything may take on a busy machine
LEFT_QUEUE = 300.0  # seconds in which the last job must have left it
HELD = 600.0  # a pace at which a run stands still, and its workers have nothing to do, until the test sets another


class PayloadRun:
    """A run directory with its pairs, and a profile for the development cluster. ``groups`` change keys of the configuration."""

    def __init__(self, on: DevCluster, root: Path, *, step: float = 0.05, **groups: dict[str, Any]) -> None:
        self.cluster, self.root = on, root
        values: dict[str, dict[str, Any]] = {
            "method": {"meta": {"interval": 3, "feature": "log_sigmoid_beta"}, "sampling": {"samples": 3}},
            "trainer": {"checkpoint_steps": 2, "poll": 0.2, "meta_wait": 60.0},
            "inference": {"workers": 2, "does": ["sample", "annotate"], "heartbeat": 0.5, "poll": 0.2},
            "sidecar": {"poll": 0.2},
            "cluster": {
                "kind": "slurm",
                "name": "dev",
                "jobs": {
                    "partition": "cpu",
                    "time_minutes": 60,
                    "cpus_per_task": 1,
                    "memory": "--mem=500M",
                    "python": sys.executable,
                    "environment": {"OMP_NUM_THREADS": "1"},
                },
                "trainer": {"python": PAYLOAD},
                "worker": {"python": PAYLOAD},
                "margin": 5.0,
                "interface": "lo",
                "ranks_per_node": 1,
                "query_timeout": 20.0,
                "supervise": 1.0,
            },
        }
        for group, keys in groups.items():
            for key, value in keys.items():
                both = isinstance(value, dict) and isinstance(values[group].get(key), dict)
                values[group][key] = values[group][key] | value if both else value
        self.faults = root.with_suffix(".faults")
        self.faults.mkdir(parents=True)
        (self.faults / "pace").write_text(str(step))
        world = World(root.parent / f"{root.name}.world")
        values["data"] = {"path": str(world.data)}
        values["model"] = {"policy": str(world.policy)}
        values["reward"] = {"model": str(world.reward)} if values["method"].get("gate") is None else {"model": None}
        self.run = Run.create(root, make_config(root, seed=5, **values), "test")
        publish_pairs(self.run, PAIRS)

    # ------------------------------------------------------------------------------------------ doing

    def metaapo(self, *arguments: str, code: int | None = 0, path: Path | None = None) -> str:
        """The command line as on a login node; returns what it printed. ``path`` is put before PATH."""
        env = self.cluster.env | {"OMP_NUM_THREADS": "1"}
        if path is not None:
            env["PATH"] = f"{path}:{env['PATH']}"
        done = subprocess.run(
            [sys.executable, "-m", "toolkit.cli", *arguments],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        said = done.stdout + done.stderr
        assert code is None or done.returncode == code, (
            f"metaapo {' '.join(arguments)} exited {done.returncode}: {said}"
        )
        return said

    def in_background(self, *arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
        """The command line, left running on a login node, and the file that it writes to."""
        output = self.root.with_suffix(".out")
        with output.open("wb") as file:
            command = [sys.executable, "-m", "toolkit.cli", *arguments]
            env = self.cluster.env | {"OMP_NUM_THREADS": "1"}
            started = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
        return started, output

    def tick(self, code: int | None = 0, path: Path | None = None) -> str:
        return self.metaapo("tick", str(self.root), code=code, path=path)

    def plan_fault(self, slot: str, words: str) -> None:
        (self.faults / slot).write_text(words)

    def set_pace(self, seconds: float) -> None:
        """Of the work under way too."""
        (self.faults / "pace").write_text(str(seconds))

    def kill(self, slot: str, number: int = 0) -> None:
        """kill -9 of an attempt's processes. (``scancel --signal=KILL`` ends the job, whose role gets TERM and saves.)"""
        for pid in processes_of(self.attempts(slot)[number].id):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # ------------------------------------------------------------------------------------------ looking

    def attempts(self, slot: str) -> list[Attempt]:
        return attempts(Run.open(self.root), slot)

    def every_attempt(self) -> list[Attempt]:
        run = Run.open(self.root)
        return [attempt for slot in known_slots(run) for attempt in attempts(run, slot)]

    def started(self, slot: str, number: int = 0) -> dict[str, Any] | None:
        """The facts of an attempt's start, once it has started."""
        manifest = self.run.records.find(layout.job(slot, number, "start"))
        return None if manifest is None else manifest.attributes

    def queued(self, slot: str, number: int = 0) -> str:
        """Slurm's id of an attempt's job once Slurm has it: the intent is there before sbatch has answered."""
        found: list[str] = []

        def is_there() -> bool:
            names = {job_name(attempt.id) for attempt in self.attempts(slot) if attempt.number == number}
            found[:] = [job["id"] for job in self.cluster.jobs() if job["name"] in names]
            return bool(found)

        self.until(is_there, f"{slot} attempt {number} to be in the queue")
        return found[0]

    def job(self, slot: str, number: int = 0) -> str:
        """Slurm's id of an attempt's job once it has started."""
        self.until(lambda: self.started(slot, number), f"{slot} attempt {number} to start")
        facts = self.started(slot, number)
        assert facts is not None and facts["kind"] == "started", facts
        return str(facts["job"])

    def outcomes(self, slot: str) -> list[str]:
        return [attempt.outcome for attempt in self.attempts(slot)]

    def steps(self) -> int:
        """Optimizer steps that are in a checkpoint."""
        newest = lineage.newest(Run.open(self.root).records)
        return 0 if newest is None else lineage.progress(newest).step

    def until(self, true: Callable[[], object], what: str = "", timeout: float = PATIENCE) -> None:
        deadline = time.monotonic() + timeout
        while not true():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {timeout:.0f} s in vain for {what or true}: {self.story()}")
            time.sleep(0.1)

    def story(self) -> str:
        """What happened, for the message of a failure."""
        lines = [f"closed: {closing.attributes}" if (closing := Run.open(self.root).closing()) else "open"]
        for attempt in self.every_attempt():
            lines.append(f"{attempt.slot} {attempt.number} {attempt.id} {attempt.outcome} {attempt.death or ''}")
        with contextlib.suppress(DevClusterError, subprocess.TimeoutExpired):  # its controller may be away
            lines += [str(job) for job in self.cluster.jobs()]
        for log in sorted(self.root.glob("logs/*/*/*_log.out")):
            lines.append(f"--- {log.relative_to(self.root)}: " + log.read_text(errors="replace")[-600:])
        return "\n".join(lines)

    def names(self) -> set[str]:
        return {job_name(attempt.id) for attempt in self.every_attempt()}

    def in_queue(self) -> list[str]:
        """This run's jobs that Slurm has not ended."""
        ours, alive = self.names(), ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")
        return [job["id"] for job in self.cluster.jobs() if job["name"] in ours and job["state"] in alive]

    # ------------------------------------------------------------------------------------------ the end

    def finish(self, timeout: float = 900.0) -> None:
        """Wait until the run is closed and its jobs are gone."""
        self.until(lambda: Run.open(self.root).closing(), "the end of the run", timeout)
        closing = Run.open(self.root).closing()
        assert closing is not None and closing.attributes["outcome"] == "finished", self.story()
        self.until(lambda: not self.in_queue(), "the last job to leave", LEFT_QUEUE)

    def weights(self) -> str:
        """The final policy's weights."""
        return str(self.run.records.require(layout.policy(self.run.plan.rounds)).attributes["weights"])

    def assert_sound(self, weights: str | None = None, accounting: bool = True) -> None:
        """Finished; verify is clean; one lineage; no job is left; Slurm's accounting knows exactly our attempts."""
        self.finish()
        assert "clean" in self.metaapo("verify", str(self.root))
        if weights is not None:
            assert self.weights() == weights, "the disturbed run learned something else than the undisturbed one"
        if accounting:
            self.until(self._accounts, "accounting to agree with the attempts", 120)

    def _accounts(self) -> bool:
        ours = self.names()
        rows = [row for row in self.cluster.sacct("JobIDRaw", "JobName", "State") if row["JobName"] in ours]
        started = {
            (job_name(attempt.id), str(attempt.start.attributes["job"]))
            for attempt in self.every_attempt()
            if attempt.start is not None and attempt.start.attributes["kind"] == "started"
        }
        known = {(row["JobName"], row["JobIDRaw"]) for row in rows}
        over = all(row["State"].split()[0] not in ("PENDING", "RUNNING") for row in rows)
        return started <= known and len({name for name, _ in known}) == len(known) and over


def shim(folder: Path, program: str, text: str) -> Path:
    """A folder with a script in place of one of Slurm's commands; ``$REAL`` in it is the real one. For PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    real = shutil.which(program)
    path = folder / program
    path.write_text(f"#!/bin/bash\nREAL={real}\n{text}\n")
    path.chmod(0o755)
    return folder


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def processes_of(attempt: str) -> list[int]:
    """Processes of an attempt on this machine."""
    return processes([attempt])[attempt]
