"""One shard as the trainer consumes it: everything recorded about its pairs in one table, and its optimizer batches."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from toolkit.exchange import derive, layout
from toolkit.exchange.records import Manifest, Ref
from toolkit.exchange.run import Run
from toolkit.training.losses import BatchConstants
from toolkit.training.microbatches import MASKED, Pair, PairBatch


def _found(run: Run, ref: Ref) -> Manifest:
    """A record that was there when this shard was waited for.

    Raises:
        RuntimeError: it is not: it was condemned just now. No refusal, for the next attempt waits until it is made again.
    """
    manifest = run.records.find(ref)
    if manifest is None:
        raise RuntimeError(f"record {ref} was condemned after it was waited for; the next attempt waits for another")
    return manifest


def _annotations(run: Run, round_index: int, shard: int) -> Manifest | None:
    """The annotations of a shard; None if none were asked for."""
    asked = _found(run, layout.requests(round_index, shard)).attributes["sampled"] > 0
    return _found(run, layout.annotations(round_index, shard)) if asked else None


def online_rows(run: Run, round_index: int, shard: int) -> pa.Table:
    """The pairs of a shard that have an online half: ``pair_id``, ``prompt_ids``, and both responses' ids, in order."""
    pairs = run.pairs(round_index, shard).select(["pair_id", "prompt_ids"])
    manifest = _annotations(run, round_index, shard)
    found = {}
    if manifest is not None:
        found = {row["pair_id"]: row for row in run.records.table(manifest).to_pylist() if row["outcome"] == "pair"}
    kept = pairs.filter(pa.array([pair_id in found for pair_id in pairs["pair_id"].to_pylist()], pa.bool_()))
    order = kept["pair_id"].to_pylist()
    for side in ("chosen", "rejected"):
        ids = pa.array([found[pair_id][f"{side}_ids"] for pair_id in order], pa.list_(pa.int32()))
        kept = kept.append_column(f"online_{side}_ids", ids)
    return kept


def assemble(run: Run, round_index: int, shard: int) -> tuple[pa.Table, dict[str, str]]:
    """Everything recorded about a shard's pairs, one row a pair, and the records it came from with their digests.

    Columns: ``pair_id, prompt_ids, chosen_ids, rejected_ids, online_chosen_ids, online_rejected_ids`` (null without an online
    half), ``w_gate``, and log-probs ``<set>_<side>`` for the sets ``score`` (the policy at the round's start), ``reference``
    and ``reference_online`` (loss reference), ``gate`` (gate reference), 0 where there is none.
    """
    consumed: dict[str, str] = {}

    def read(manifest: Manifest) -> pa.Table:
        consumed[str(manifest.ref)] = manifest.digest
        return run.records.table(manifest)

    def logprobs(name: str, half: str) -> pa.Table:
        return read(_found(run, layout.logprobs(name, half, round_index, shard)))

    config, gated = run.config, run.plan.gated[round_index]
    pairs = run.pairs(round_index, shard)
    ids = pairs["pair_id"].to_pylist()
    table = pairs.select(["pair_id", "prompt_ids", "chosen_ids", "rejected_ids"])
    zeros = np.zeros(len(ids), np.float32)

    def add(table: pa.Table, prefix: str, values: pa.Table | None) -> pa.Table:
        for side in ("chosen", "rejected"):
            column = zeros if values is None else values[side]
            table = table.append_column(
                f"{prefix}_{side}", pa.array(column, pa.float32()) if values is None else column
            )
        return table

    loss_name = derive.loss_reference(config, round_index, shard)
    gate_name = derive.gate_reference(config, round_index) if gated else None
    table = add(table, "score", logprobs(layout.policy_name(round_index), "offline") if gated or shard == 0 else None)
    table = add(table, "reference", logprobs(loss_name, "offline") if loss_name else None)
    table = add(table, "gate", logprobs(gate_name, "offline") if gate_name else None)

    online = online_rows(run, round_index, shard) if gated else None
    position = {pair_id: row for row, pair_id in enumerate(online["pair_id"].to_pylist())} if online is not None else {}
    for side in ("chosen", "rejected"):
        values = online[f"online_{side}_ids"].to_pylist() if online is not None else []
        aligned = [values[position[pair_id]] if pair_id in position else None for pair_id in ids]
        table = table.append_column(f"online_{side}_ids", pa.array(aligned, pa.list_(pa.int32())))
    scored = logprobs(loss_name, "online") if position and loss_name else None
    for side in ("chosen", "rejected"):
        filled = zeros.copy()
        if scored is not None:
            rows = dict(zip(scored["pair_id"].to_pylist(), scored[side].to_pylist(), strict=True))
            filled = np.array([rows.get(pair_id, 0.0) for pair_id in ids], np.float32)
        table = table.append_column(f"reference_online_{side}", pa.array(filled))
    w_gate = zeros
    if gated:
        w_gate = read(_found(run, layout.requests(round_index, shard)))["w_gate"].to_numpy()
        annotations = _annotations(run, round_index, shard)
        if annotations is not None:
            consumed[str(annotations.ref)] = annotations.digest
    return table.append_column("w_gate", pa.array(w_gate, pa.float32())), consumed


def batch(table: pa.Table, start: int, stop: int, size: int) -> tuple[PairBatch, BatchConstants]:
    """Rows ``start:stop`` of an assembled shard as an optimizer batch of ``size`` pairs, filled up with masked items."""
    rows = table.slice(start, stop - start)
    real = stop - start

    def tokens(name: str) -> list[np.ndarray | None]:
        return [None if ids is None else np.asarray(ids, np.int32) for ids in rows[name].to_pylist()]

    prompts = tokens("prompt_ids")
    sides = [tokens(name) for name in ("chosen_ids", "rejected_ids", "online_chosen_ids", "online_rejected_ids")]
    pairs = [
        Pair(len(prompt), tuple(None if ids is None else np.concatenate([prompt, ids]) for ids in responses))
        for prompt, *responses in zip(prompts, *sides, strict=True)
        if prompt is not None
    ]
    pairs += [MASKED] * (size - real)

    def padded(values: np.ndarray) -> torch.Tensor:
        out = np.zeros((size, *values.shape[1:]), values.dtype)
        out[:real] = values
        return torch.from_numpy(out)

    def columns(*names: str) -> torch.Tensor:
        return padded(np.stack([rows[name].to_numpy() for name in names], axis=1))

    lengths = np.array([[0 if ids is None else len(ids) for ids in side] for side in sides], np.int64).T
    constants = BatchConstants(
        tokens=padded(lengths.reshape(real, 4)),
        loss_reference=columns(
            "reference_chosen", "reference_rejected", "reference_online_chosen", "reference_online_rejected"
        ),
        gate_reference=columns("gate_chosen", "gate_rejected"),
        has_online=padded(np.array([ids is not None for ids in sides[2]], np.bool_)),
        real=padded(np.ones(real, np.bool_)),
    )
    return PairBatch(tuple(pairs)), constants
