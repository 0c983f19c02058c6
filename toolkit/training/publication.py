"""Checkpoints and policies as records: written by all ranks, published by rank 0, restored only when every byte is verified."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from toolkit.exchange import filesystem, layout, lineage, tables
from toolkit.exchange.lineage import Progress
from toolkit.exchange.records import File, Manifest, Ref
from toolkit.exchange.run import Run
from toolkit.training.control import Control
from toolkit.training.engine import PolicyEngine

META_ROWS = "meta_rows.parquet"
PROBES = 4


@contextlib.contextmanager
def staged(run: Run, control: Control, ref: Ref, private: bool = False) -> Iterator[Path]:
    """A new directory of this attempt beside the record, to be filled in this block; removed if that fails. Collective."""
    directory = Path(control.lead(lambda: str(run.records.stage(ref, private))))
    try:
        yield directory
    except BaseException:
        if control.leads:  # else the disk that was too full for it stays full
            shutil.rmtree(directory, ignore_errors=True)
        raise


def seal(control: Control, directory: Path) -> list[File]:
    """Sync and digest all files below a staged directory, shared out over the ranks. Collective.

    Returns:
        The entries, paths relative to the record's directory, on every rank.
    """
    names = sorted({name for seen in control.gather(_names(directory)) for name in seen})
    mine = {}
    for name in names[control.rank :: control.size]:
        path = directory / name
        filesystem.sync_file(path)
        mine[name] = (path.stat().st_size, filesystem.digest(path))
    filesystem.sync_directory(directory)
    found = {name: value for part in control.gather(mine) for name, value in part.items()}
    return [File(f"{directory.name}/{name}", *found[name]) for name in names]


def _names(directory: Path) -> list[str]:
    return [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]


def publish_checkpoint(
    run: Run,
    engine: PolicyEngine,
    control: Control,
    parent: Manifest | None,
    number: int,
    at: Progress,
    first_step: int,
    consumed: Mapping[str, str],
    meta_rows: pa.Table,
    average: Mapping[str, Tensor] | None,
) -> Manifest | None:
    """Save everything training needs to go on, bit for bit, and publish it as the parent's one successor. Collective.

    Args:
        parent: rank 0's parent (None elsewhere, and for the first).
        number: the sequence number to take, the parent's plus one.

    Returns:
        The manifest on rank 0, None elsewhere.

    Raises:
        Superseded: on rank 0 (the others get an error naming it), when another trainer has published this sequence number.
    """
    with staged(run, control, layout.checkpoint(number), private=True) as directory:
        engine.save(directory, average)
        control.lead(lambda: filesystem.write(directory / META_ROWS, tables.to_parquet(meta_rows)))
        files = seal(control, directory)
    published: list[Manifest] = []
    extra = {"layout": engine.layout.describe(), "ema": average is not None, **run.provenance}

    def publish() -> None:
        published.append(lineage.publish(run.records, parent, at, consumed, first_step, files, extra))

    control.lead(publish)
    return published[0] if control.leads else None


def checkpoint_folder(run: Run, manifest: Manifest) -> Path:
    """The directory of a checkpoint whose every byte was verified."""
    paths = [run.records.verified(manifest, entry) for entry in manifest.files]
    return next(path for path in paths if path.name == META_ROWS).parent


def publish_policy(run: Run, engine: PolicyEngine, control: Control, version: int, checkpoint: Manifest | None) -> None:
    """Export the policy in the engine as a Hugging Face folder and publish it. Collective.

    Args:
        checkpoint: rank 0's checkpoint that holds these weights; None for policy 0, which comes from the configured model.

    Raises:
        UserError: a weight is not finite (nothing is published).
    """
    ref = layout.policy(version)
    with staged(run, control, ref) as directory:
        engine.export(directory)
        files = seal(control, directory)
    probes = _probes(run, engine, control)

    def publish() -> None:
        source = {"checkpoint": checkpoint.digest} if checkpoint is not None else {"model": run.config.model.policy}
        attributes: dict[str, Any] = {
            "version": version,
            "source": source,
            "dtype": run.config.model.dtype,
            "weights_digest": hashlib.sha256(json.dumps(sorted(entry.digest for entry in files)).encode()).hexdigest(),
            "probes": probes,
            **run.provenance,
        }
        run.records.publish(ref, attributes, staged=files)

    control.lead(publish)


def _probes(run: Run, engine: PolicyEngine, control: Control) -> list[dict[str, Any]]:
    """A few responses of the data with their log-probs under the engine's weights: what a worker proves its load by."""

    def chosen() -> list[list[list[int]]]:
        pairs = run.pairs(0, 0)
        rows = zip(pairs["prompt_ids"].to_pylist(), pairs["chosen_ids"].to_pylist(), strict=True)
        return middling([list(row) for row in rows], run.config.inference.max_model_len)

    rows = control.lead(chosen)
    scored = engine.score([np.asarray(p + r, np.int32) for p, r in rows], [len(p) for p, _ in rows])
    return [
        {"prompt_ids": prompt, "response_ids": response, "logprob": float(value)}
        for (prompt, response), value in zip(rows, scored, strict=True)
    ]


def middling(rows: list[list[list[int]]], context: int) -> list[list[list[int]]]:
    """The (prompt ids, response ids) of median length among those that an engine with this context can take.

    Rounding errors grow with the root of a response's length, the difference between two policies with the length itself; so the
    shortest responses would tell least, and the longest cost most.
    """
    ordered = sorted(rows, key=lambda row: (len(row[0]) + len(row[1]), row))
    fitting = [row for row in ordered if len(row[0]) + len(row[1]) < context] or ordered
    start = max(0, (len(fitting) - PROBES) // 2)
    return fitting[start : start + PROBES]
