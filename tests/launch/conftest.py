"""A scheduler in memory, folders that pass for models, and a package whose roles do what a test tells them."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.exchange.conftest import make_config, publish_pairs, run
from toolkit.config import Config
from toolkit.errors import UserError
from toolkit.exchange import layout
from toolkit.exchange.run import Run
from toolkit.launch import snapshot
from toolkit.launch.adapter import Job, JobSpec, State
from toolkit.launch.preflight import preflight

__all__ = ["make_config", "publish_pairs", "run"]


SHAPE = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "hidden_size": 64,
}


SHAPES: dict[str, tuple[int, ...]] = {"a": (10, 3), "b": (5,), "c": ()}


def model_folder(path: Path, architecture: str = "LlamaForCausalLM", **description: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": [architecture], **SHAPE, **description}))
    save_file({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}, path / "model.safetensors")
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return path


class World:
    """Data and models that pass."""

    def __init__(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        self.data = path / "pairs.jsonl"
        self.data.touch()
        self.policy = model_folder(path / "policy")
        self.reward = model_folder(path / "reward", "LlamaForSequenceClassification")

    def config(self, **groups: Any) -> Config:
        given = {
            "data": {"path": str(self.data)},
            "model": {"policy": str(self.policy)},
            "reward": {"model": str(self.reward)},
        }
        for group, keys in groups.items():
            given[group] = given.get(group, {}) | keys
        return make_config(self.data.parent / "run", **given)

    def refused(self, message: str, **groups: Any) -> None:
        with pytest.raises(UserError, match=message):
            preflight(self.config(**groups))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@dataclass
class MemoryAdapter:
    """The scheduler's side: jobs are what a test says they are."""

    jobs: dict[str, State] = field(default_factory=dict)
    same_machine: bool = True
    submitted: list[JobSpec] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    words: dict[str, dict[str, str]] = field(default_factory=dict)  # what else it says of a job

    def submit(self, job: JobSpec) -> str:
        assert job.attempt not in self.jobs, "submitted twice"
        self.jobs[job.attempt] = State.PENDING
        self.submitted.append(job)
        return str(len(self.submitted))

    def look(self, attempts: Collection[str], since: float = 0.0) -> dict[str, Job]:
        return {name: Job(self.jobs.get(name, State.GONE), **self.words.get(name, {})) for name in attempts}

    def room(self) -> int | None:
        return None

    def cancel(self, attempts: Collection[str], kill: bool = False) -> None:
        self.killed += attempts if kill else []

    # What jobs do.

    def newest(self, slot: str) -> JobSpec:
        return [job for job in self.submitted if job.slot == slot][-1]

    def start(self, run: Run, slot: str, **facts: str) -> JobSpec:
        """The newest job of a slot starts on a node far away."""
        job = self.newest(slot)
        facts |= {"kind": "started", "job": job.attempt, "host": "n1", "boot_id": "b", "pid": 1, "process_start": "1"}
        manifest, _ = Run.open(run.root, job.attempt).records.publish(layout.job(slot, job.number, "start"), facts)
        self.jobs[job.attempt] = State.RUNNING if manifest.attempt == job.attempt else State.GONE
        return job

    def end(self, run: Run, slot: str, **word: object) -> None:
        """The newest job of a slot runs and ends; without a ``word`` it is killed."""
        job = self.start(run, slot)
        if word:
            Run.open(run.root, job.attempt).records.publish(layout.job(slot, job.number, "end"), word)
        self.jobs[job.attempt] = State.GONE


@pytest.fixture
def scheduler() -> MemoryAdapter:
    return MemoryAdapter()


@pytest.fixture(scope="session")
def _package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = tmp_path_factory.mktemp("payload") / "toolkit"
    shutil.copytree(snapshot.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.yaml"))
    return package


@pytest.fixture
def payload(_package: Path, monkeypatch: pytest.MonkeyPatch):
    """Give every role another body; the jobs of the test run this copy of the package from their snapshot."""
    monkeypatch.setattr(snapshot, "PACKAGE", _package)

    def define(body: str) -> None:
        text = "import os, signal, subprocess, sys, time\nfrom toolkit.errors import UserError\nfrom toolkit.exchange import layout\n\n\n"
        text += "def main(run, slot, number, rank, size, stop):\n" + textwrap.indent(textwrap.dedent(body), "    ")
        for role in ("training", "inference", "sidecar"):
            (_package / role / "role.py").write_text(text)

    return define
