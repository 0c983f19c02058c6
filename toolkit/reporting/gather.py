"""The numbers behind the report's plots and the texts it shows, read from a run's records. Bounded, however large the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from toolkit.errors import UserError
from toolkit.exchange import layout
from toolkit.exchange.run import Run
from toolkit.reporting.progress import Reader

SHARDS = 64  # shards of a round that are read, evenly spread
BATCHES = 200  # meta batches that are read, evenly spread
VERSIONS = 10  # meta-learner versions that are drawn, evenly spread, the first and the last among them


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``range(count)``, evenly spread, the first and the last among them."""
    return sorted({round(value) for value in np.linspace(0, count - 1, min(count, most))}) if count else []


def gate_values(reader: Reader, rounds: Sequence[dict[str, Any]]) -> dict[str, dict[int, np.ndarray]]:
    """``s`` and ``w_gate`` of the pairs of each round whose gate has decided, float arrays ``(pairs,)`` by round."""
    found: dict[str, dict[int, np.ndarray]] = {"s": {}, "w_gate": {}}
    for entry in rounds:
        index = entry["round"]
        shards = spread(reader.run.plan.shards(index), SHARDS) if entry["sampled_fraction"] is not None else []
        read = [reader.table(layout.requests(index, shard)) for shard in shards]
        kept = [table for table in read if table is not None]
        for name in found if kept else ():
            found[name][index] = np.concatenate([table[name].to_numpy() for table in kept])
    return found


def meta_rows(reader: Reader) -> dict[str, np.ndarray]:
    """``w_gate`` and ``gain`` = ℓ_on − ℓ_off (scores: minus the losses) of the meta batches' rows, float arrays ``(rows,)``."""
    boundaries = reader.run.plan.boundaries
    read = [reader.table(layout.meta_batch(boundaries[index].version)) for index in spread(len(boundaries), BATCHES)]
    kept = [table for table in read if table is not None and table.num_rows]
    if not kept:
        return {"w_gate": np.zeros(0), "gain": np.zeros(0)}
    return {
        "w_gate": np.concatenate([table["w_gate"].to_numpy() for table in kept]),
        "gain": np.concatenate([table["loss_offline"].to_numpy() - table["loss_online"].to_numpy() for table in kept]),
    }


def sampled_rewards(reader: Reader, rounds: Sequence[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Mean rewards of the responses sampled in each round: of each prompt's ``best``, of ``all``, of each prompt's ``worst``."""
    found: dict[int, dict[str, float]] = {}
    for entry in rounds:
        index = entry["round"]
        read = [
            reader.table(layout.annotations(index, shard)) for shard in spread(reader.run.plan.shards(index), SHARDS)
        ]
        prompts = [
            known
            for table in read
            if table is not None
            for rewards in table["rewards"].to_pylist()
            if (known := [value for value in rewards if finite(value) is not None])
        ]
        if prompts:
            found[index] = {
                "best": float(np.mean([max(rewards) for rewards in prompts])),
                "all": float(np.mean([value for rewards in prompts for value in rewards])),
                "worst": float(np.mean([min(rewards) for rewards in prompts])),
            }
    return found


def learner_curves(reader: Reader, s: np.ndarray) -> dict[int, np.ndarray]:
    """Weights w ``(points,)`` of features ``s`` ``(points,)`` by meta-learner version.

    Raises:
        ImportError: torch is not installed here.
    """
    import torch

    from toolkit.exchange import derive

    run, published = reader.run, 0
    while published <= len(run.plan.boundaries) and reader.find(layout.phi(published)) is not None:
        published += 1
    found: dict[int, np.ndarray] = {}
    for version in spread(published, VERSIONS):
        try:
            state = derive.phi_state(run, version)
        except UserError as error:
            reader.damage[str(layout.phi(version))] = str(error)
            continue
        with torch.no_grad():
            found[version] = state.learner()(torch.from_numpy(s.astype(np.float32))).numpy()
    return found


# ------------------------------------------------------------------------------------------------------ texts


def sampled_pairs(reader: Reader, round_index: int, most: int) -> list[dict[str, Any]]:
    """The first ``most`` pairs of a round that have an online half, in the order of training.

    Returns:
        Each with ``prompt`` (messages), ``w_gate``, ``s``, and ``offline`` and ``online``, which hold ``chosen`` and
        ``rejected``: {``text``, ``reward``, ``finish_reason``} (None: not known), and ``rewards`` of all responses.
    """
    found: list[dict[str, Any]] = []
    for shard in range(min(reader.run.plan.shards(round_index), SHARDS)):
        annotations = reader.table(layout.annotations(round_index, shard))
        requests = reader.table(layout.requests(round_index, shard))
        if annotations is None or requests is None:
            continue
        pairs = {row["pair_id"]: row for row in _pairs(reader, round_index, shard)}
        gate = {row["pair_id"]: row for row in requests.to_pylist()}
        responses = reader.table(layout.responses(round_index, shard))  # a replay has none
        said = {(row["pair_id"], row["sample"]): row for row in (responses.to_pylist() if responses else [])}
        for row in annotations.to_pylist():
            key = row["pair_id"]
            if row["outcome"] == "pair" and key in pairs and key in gate:
                found.append(_sampled_pair(row, pairs[key], gate[key], said))
            if len(found) == most:
                return found
    return found


def _pairs(reader: Reader, round_index: int, shard: int) -> list[dict[str, Any]]:
    try:
        return reader.run.pairs(round_index, shard).to_pylist()
    except UserError as error:
        reader.damage[str(layout.PAIRS)] = str(error)
        return []


def _sampled_pair(
    annotation: dict[str, Any], pair: dict[str, Any], gate: dict[str, Any], said: dict[tuple[str, int], dict[str, Any]]
) -> dict[str, Any]:
    online: dict[str, Any] = {"rewards": [finite(value) for value in annotation["rewards"]]}
    for side in ("chosen", "rejected"):
        response = said.get((annotation["pair_id"], annotation[f"{side}_sample"]), {})
        online[side] = {
            "text": response.get("text"),
            "reward": finite(annotation[f"{side}_reward"]),
            "finish_reason": response.get("finish_reason"),
        }
    return {
        "pair_id": annotation["pair_id"],
        "prompt": pair["prompt"],
        "w_gate": gate["w_gate"],
        "s": gate["s"],
        "offline": {
            side: {"text": pair[side], "reward": None, "finish_reason": None} for side in ("chosen", "rejected")
        },
        "online": online,
    }


def before_and_after(reader: Reader, version: int, most: int) -> list[dict[str, Any]]:
    """Some held-out prompts with the initial policy's response and that of policy ``version``.

    Returns:
        Each with ``prompt`` (messages), and ``initial`` and ``final``: rows of `toolkit.exchange.tables.EVALUATION`.
    """
    initial, final = reader.table(layout.evaluation(0)), reader.table(layout.evaluation(version))
    if initial is None or final is None:
        return []
    before, after = ({row["prompt_id"]: row for row in table.to_pylist()} for table in (initial, final))
    prompts = [row for row in _heldout(reader.run, reader) if row["prompt_id"] in before and row["prompt_id"] in after]
    chosen = [prompts[index] for index in spread(len(prompts), most)]
    return [
        {"prompt": row["prompt"], "initial": before[row["prompt_id"]], "final": after[row["prompt_id"]]}
        for row in chosen
    ]


def _heldout(run: Run, reader: Reader) -> list[dict[str, Any]]:
    try:
        return run.heldout().to_pylist()
    except UserError as error:
        reader.damage[str(layout.PAIRS)] = str(error)
        return []


def finite(value: float | None) -> float | None:
    """A number, or None for one that is not finite."""
    return value if value is not None and math.isfinite(value) else None
