"""A run directory: its identity, operations, incarnations, plan, and typed access to its records."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from toolkit import config as configuration
from toolkit.config import Config
from toolkit.errors import UserError
from toolkit.exchange import layout, series, tables
from toolkit.exchange.plan import Plan
from toolkit.exchange.records import Closed, Manifest, Records, Superseded


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaf values of nested JSON values."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each dotted key in which two configurations differ."""
    a, b = dict(flatten(old)), dict(flatten(new))
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)
    ]


class Run:
    """One run as one attempt sees it. Use `Run.create` or `Run.open`."""

    def __init__(self, root: Path, attempt: str, incarnation: int | None) -> None:
        self.root = root
        self.incarnation = incarnation
        self.records = Records(root, attempt, self._guard)

    @property
    def attempt(self) -> str:
        return self.records.attempt

    # ---------------------------------------------------------------- making and opening

    @classmethod
    def create(cls, root: Path, config: Config, attempt: str) -> Run:
        """Make the run directory, or re-open one that already holds this very run.

        Raises:
            UserError: the directory holds something else, or a run with another identity (the differing keys are named).
        """
        configuration.validate(config)
        if root.exists() and not root.is_dir():
            raise UserError(f"{root} is not a directory. Choose another one: run=DIR")
        unfinished = f".{layout.IDENTITY.name}."  # what a launch leaves that died before this was a run
        known = root.exists() and any(not path.name.startswith(unfinished) for path in root.iterdir())
        if known and not any(root.glob(f"{layout.IDENTITY.name}.g*.json")):
            raise UserError(f"{root} is not empty and holds no run. Choose another directory: run=DIR")
        os.umask(int(config.cluster.umask, 8))  # of all that this process writes from here on
        root.mkdir(parents=True, exist_ok=True)
        run = cls(root, attempt, None)
        manifest, _ = run.records.publish(layout.IDENTITY, configuration.identity(config))
        different = differences(manifest.attributes, configuration.identity(config))
        if different:
            begun = run.records.find(layout.PAIRS) is not None or (root / "jobs").exists()
            raise UserError(
                f"{root} already holds another run; its identity differs in:\n  " + "\n  ".join(different) + "\n"
                "Choose another directory (run=DIR), or "
                + (
                    f"continue that run with: metaapo resume {root}"
                    if begun
                    else "remove this one, which holds no data yet"
                )
            )
        run.set_operations(config)
        if run.current_incarnation() is None:
            run.records.publish(layout.opened(0), {})
        return cls.open(root, attempt)

    @classmethod
    def open(cls, root: Path, attempt: str = "reader", incarnation: int | None = None) -> Run:
        """Open an existing run.

        Args:
            incarnation: the incarnation this attempt belongs to; it publishes only while that is the current, open one.

        Raises:
            UserError: no run there, or one this user may not read.
        """
        try:
            run = cls(Path(root), attempt, incarnation)
            if run.records.find(layout.IDENTITY) is None:
                raise UserError(f"{root} holds no run (no identity record). `metaapo launch run={root} ...` makes one.")
        except PermissionError as error:
            raise UserError(
                f"{root} is not readable for this user ({error.strerror}); its owner can share it: cluster.umask"
            ) from error
        return run

    def require_owner(self) -> None:
        """Raise UserError unless this user made the run: others may read a shared run, only its owner acts for it.

        The run's umask is this process's from here on.
        """
        owner = self.root.stat().st_uid
        if owner != os.getuid():
            raise UserError(
                f"{self.root} belongs to user {owner}, you are {os.getuid()}: only its owner keeps a run going or stops it"
            )
        os.umask(int(self.config.cluster.umask, 8))

    # ---------------------------------------------------------------- configuration

    @cached_property
    def config(self) -> Config:
        """Identity and the newest operations.

        Raises:
            UserError: another version of the toolkit made this run, with keys that this one does not know.
        """
        identity = self.records.require(layout.IDENTITY).attributes
        version = self.operations_version()
        operations = self.records.require(layout.operations(version)).attributes if version is not None else {}
        try:
            return configuration.build(Config, identity | operations)
        except UserError as error:
            copies = sorted(self.root.glob("code/[0-9a-f]*"), key=lambda path: path.stat().st_mtime)
            own = (
                f"PYTHONSAFEPATH=1 PYTHONPATH={copies[-1].absolute()} python -m toolkit.cli COMMAND ..."
                if copies
                else "none is there"
            )
            raise UserError(
                f"{self.root} was made by another version of the toolkit: {error}. The run's own copy of that one reads it: {own}"
            ) from error

    def operations_version(self) -> int | None:
        """The newest version of the operations half."""
        return self._newest(layout.operations)

    def _newest(self, of: series.Series) -> int | None:
        manifest = series.newest(self.records, of)
        return None if manifest is None else series.number(manifest)

    def set_operations(self, config: Config) -> None:
        """Append a version of the operations half, if it differs from the newest."""
        wanted = configuration.operations(config)
        version = self.operations_version()
        if version is None or differences(self.records.require(layout.operations(version)).attributes, wanted):
            self.records.publish(layout.operations(0 if version is None else version + 1), wanted)
            self.__dict__.pop("config", None)

    # ---------------------------------------------------------------- incarnations

    def current_incarnation(self) -> int | None:
        """The newest opened incarnation."""
        return self._newest(layout.opened)

    def closing(self, incarnation: int | None = None) -> Manifest | None:
        """The record that closed an incarnation (default: the newest), or None while it is open.

        Its attributes: ``outcome`` (finished, cancelled, failed) and ``reason``.
        """
        number = self.current_incarnation() if incarnation is None else incarnation
        return self.records.find(layout.closed(number)) if number is not None else None

    def close(self, outcome: str, reason: str) -> Manifest:
        """Close the current incarnation: every job of it stops at its next look, and publishes nothing more."""
        number = self.current_incarnation()
        assert number is not None
        writer = Records(self.root, self.attempt)
        return writer.publish(layout.closed(number), {"outcome": outcome, "reason": reason})[0]

    def reopen(self) -> int:
        """Open the next incarnation, if the newest is closed."""
        number = self.current_incarnation()
        assert number is not None
        if self.closing(number) is not None:
            number += 1
            Records(self.root, self.attempt).publish(layout.opened(number), {})
        return number

    def _guard(self, farewell: bool) -> None:
        """An attempt acts while its incarnation is open; a farewell (a checkpoint and what belongs to it, on the way out) while no later one is."""
        if farewell:
            newest = self.current_incarnation()
            if self.incarnation is not None and newest != self.incarnation:
                raise Superseded(
                    f"this attempt belongs to incarnation {self.incarnation}; the run has gone on to {newest}"
                )
            return
        if self.incarnation is not None and (closing := self.closing(self.incarnation)) is not None:
            raise Closed(
                f"this attempt belongs to incarnation {self.incarnation}, which is over "
                f"({closing.attributes['outcome']}: {closing.attributes['reason']}); nothing more is published for it"
            )

    # ---------------------------------------------------------------- data

    @cached_property
    def pairs_manifest(self) -> Manifest:
        return self.records.require(layout.PAIRS)

    @cached_property
    def plan(self) -> Plan:
        """The run's shape (needs the prepared pairs)."""
        method = self.config.method
        return Plan(
            pairs_per_round=tuple(self.pairs_manifest.attributes["pairs_per_round"]),
            gated=self.config.gated,
            shard_size=method.shard_size,
            global_batch=method.global_batch,
            epochs=method.epochs,
            meta_interval=method.meta.interval,
            meta_remainder=method.meta.remainder == "update",
            learns=self.config.learns,
        )

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What travels with every record made of these pairs: digests of the tokenizer and the chat template."""
        return {"digests": self.pairs_manifest.attributes["digests"]}

    def pairs(self, round_index: int, shard: int) -> pa.Table:
        """The prepared pairs of a shard (`tables.PAIRS`), verified."""
        entry = self.pairs_manifest.file(f".round-{round_index:03d}.parquet")
        return tables.read_parquet(self.records.verified(self.pairs_manifest, entry), shard)

    def heldout(self) -> pa.Table:
        """The held-out prompts (`tables.HELDOUT`), verified."""
        entry = self.pairs_manifest.file(".heldout.parquet")
        return tables.read_parquet(self.records.verified(self.pairs_manifest, entry))

    # ---------------------------------------------------------------- progress

    def newest_policy(self) -> int | None:
        """The newest published policy version."""
        return self._newest(layout.policy)

    def finished(self) -> bool:
        """Whether training is over: the last policy is published."""
        return (
            self.records.find(layout.PAIRS) is not None
            and self.records.find(layout.policy(self.plan.rounds)) is not None
        )

    def unevaluated(self) -> list[int]:
        """Versions of the policies that workers are still to evaluate: those that were condemned or removed are not among them."""
        newest, find = self.newest_policy(), self.records.find
        if newest is None or not self.config.evaluates:
            return []
        missing = [version for version in range(newest + 1) if find(layout.evaluation(version)) is None]
        refs = {version: layout.policy(version) for version in missing}
        return [v for v, ref in refs.items() if find(ref) is not None and find(layout.deletion(str(ref))) is None]

    def is_complete(self) -> bool:
        """Whether the last policy is published, the last meta-learner learned, and, where workers evaluate, every policy evaluated."""
        if not self.finished():
            return False
        if self.config.learns and self.records.find(layout.phi(len(self.plan.boundaries))) is None:
            return False
        return not self.unevaluated()

    def finish(self) -> None:
        """Close a complete run."""
        self.close("finished", "every round is trained and every policy evaluated")


def resolved(config: Config, base: Path) -> Config:
    """``config`` as jobs started elsewhere need it: local paths absolute, this interpreter named. Hub ids stay as they are."""

    def absolute(path: str | None) -> str | None:
        if not path or (not (base / Path(path).expanduser()).exists() and not path.startswith((".", "/", "~"))):
            return path
        return str((base / Path(path).expanduser()).resolve())

    replace = dataclasses.replace
    return replace(
        config,
        data=replace(config.data, path=absolute(config.data.path) or ""),
        model=replace(
            config.model, policy=absolute(config.model.policy) or "", reference=absolute(config.model.reference)
        ),
        reward=replace(config.reward, model=absolute(config.reward.model)),
        evaluation=replace(
            config.evaluation,
            reward=absolute(config.evaluation.reward),
            metrics={name: replace(m, file=absolute(m.file) or "") for name, m in config.evaluation.metrics.items()},
        ),
        cluster=replace(
            config.cluster,
            jobs=replace(config.cluster.jobs, python=config.cluster.jobs.python or shlex.quote(sys.executable)),
        ),
        run=str((base / Path(config.run).expanduser()).absolute()),
        replay_from=absolute(config.replay_from),
    )
