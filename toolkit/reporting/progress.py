"""How far a run is, read from its records. What was seen before is not looked at again, so calling it often is cheap."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from toolkit.errors import UserError
from toolkit.exchange import layout, series
from toolkit.exchange.plan import Plan
from toolkit.exchange.records import Manifest, Ref
from toolkit.exchange.run import Run
from toolkit.reporting.evaluation import summarise

WINDOW = 64  # open shards looked at in one go; the workers' own window
FLAT = 1e-4  # a gate whose weights differ by less than this cannot tell pairs apart


@dataclass
class Reader:
    """Reads a run's records for people: one that is damaged or too new is left out and noted, never an error."""

    run: Run
    damage: dict[str, str] = field(default_factory=dict)  # what could not be read, by the record's name

    def find(self, ref: Ref) -> Manifest | None:
        try:
            return self.run.records.find(ref)
        except UserError as error:
            self.damage[str(ref)] = str(error)
            return None

    def table(self, ref: Ref) -> pa.Table | None:
        """The verified rows of a record; None where there is none, or it is damaged."""
        manifest = self.find(ref)
        try:
            return None if manifest is None else self.run.records.table(manifest)
        except UserError as error:
            self.damage[str(ref)] = str(error)
            return None


def rounds(reader: Reader, known: list[dict[str, Any]], newest: int | None, steps: int) -> list[dict[str, Any]]:
    """Where each round stands.

    Args:
        known: what this returned before (empty: look at everything).
        newest: the newest published policy; later rounds have not begun.
        steps: optimizer steps done.

    Returns:
        One JSON-able dict a round. ``pairs`` and ``shards`` are its size; ``scored``, ``requested``, ``sampled``, ``annotated``
        and ``trained`` count shards (one of which nothing is asked counts as sampled and annotated); ``decided`` counts the
        pairs that the gate has decided about, ``asked`` those it wants sampled; ``outcomes`` counts annotated pairs by
        outcome; ``flat`` tells whether the gate gave every pair of the first shard the same weight (None: not known).
    """
    plan = reader.run.plan
    found = []
    for index in range(plan.rounds):
        entry = copy.deepcopy(known[index]) if index < len(known) else _unseen(plan, index)
        entry["trained"] = trained_shards(plan, index, steps)
        if entry["gated"] and newest is not None and index <= newest:
            _look(reader, entry)
        found.append(entry)
    return found


def _unseen(plan: Plan, index: int) -> dict[str, Any]:
    return {
        "round": index,
        "gated": plan.gated[index],
        "pairs": plan.pairs_per_round[index],
        "shards": plan.shards(index),
        **dict.fromkeys(("scored", "requested", "sampled", "annotated", "trained", "decided", "asked"), 0),
        "outcomes": {},
        "flat": None,
        "settled": {"sampled": [0, []], "annotated": [0, []]},
    }


def _look(reader: Reader, entry: dict[str, Any]) -> None:
    """Bring a gated round's entry up to date. Scores and requests are published in order, the workers' records nearly so."""
    index, find = entry["round"], reader.find
    sampled, annotated = (Settled(*entry["settled"][stage]) for stage in ("sampled", "annotated"))
    scores = layout.policy_name(index)
    while entry["scored"] < entry["shards"] and find(layout.logprobs(scores, "offline", index, entry["scored"])):
        entry["scored"] += 1
    while entry["requested"] < entry["shards"] and (requests := find(layout.requests(index, entry["requested"]))):
        shard, asked = entry["requested"], int(requests.attributes["sampled"])
        if shard == 0:
            entry["flat"] = _is_flat(reader, layout.requests(index, 0))
        entry["requested"] += 1
        entry["decided"] += reader.run.plan.shard_rows(index, shard)
        entry["asked"] += asked
        if asked == 0:
            sampled.add(shard)
            annotated.add(shard)
    before = None
    while annotated.count != before:  # again as long as there is news: the window moves on
        before = annotated.count
        window = annotated.open(entry["requested"])[:WINDOW]
        stages = [of(index, shard) for shard in window for of in (layout.responses, layout.annotations)]
        there = series.present(reader.run.root, stages)
        for shard in window:
            ref, answered = layout.annotations(index, shard), layout.responses(index, shard)
            if ref in there and (manifest := find(ref)) is not None:
                for outcome, number in manifest.attributes.get("outcomes", {}).items():
                    entry["outcomes"][outcome] = entry["outcomes"].get(outcome, 0) + number
                annotated.add(shard)
                sampled.add(shard)  # a replay has the annotations alone
            elif shard not in sampled and answered in there and find(answered) is not None:
                sampled.add(shard)
    for stage, settled in (("sampled", sampled), ("annotated", annotated)):
        entry[stage] = settled.count
        entry["settled"][stage] = [settled.following, sorted(settled.ahead)]


class Settled:
    """The shards that a stage is done with: all below ``following``, and those ``ahead``."""

    def __init__(self, following: int, ahead: list[int]) -> None:
        self.following, self.ahead = following, set(ahead)

    def __contains__(self, shard: int) -> bool:
        return shard < self.following or shard in self.ahead

    @property
    def count(self) -> int:
        return self.following + len(self.ahead)

    def add(self, shard: int) -> None:
        if shard not in self:
            self.ahead.add(shard)
        while self.following in self.ahead:
            self.ahead.remove(self.following)
            self.following += 1

    def open(self, end: int) -> list[int]:
        """Shards below ``end`` that it is not done with."""
        return [shard for shard in range(self.following, end) if shard not in self.ahead]


def _is_flat(reader: Reader, ref: Ref) -> bool | None:
    """Whether a gate that goes by the pairs gave all pairs of a shard the same weight. None if that tells nothing."""
    if reader.run.config.method.gate.kind not in ("fixed", "threshold", "meta"):
        return None
    table = reader.table(ref)
    if table is None or table.num_rows < 2:
        return None
    column = "s" if reader.run.config.method.gate.kind == "threshold" else "w_gate"  # a threshold's weights are 0 and 1
    return bool(np.ptp(table[column].to_numpy()) < FLAT)


def trained_shards(plan: Plan, index: int, steps: int) -> int:
    """Shards of a round whose last pass is done after ``steps`` optimizer steps of the run."""
    in_round = plan.first_step[index + 1] - plan.first_step[index]
    done = min(max(steps - plan.first_step[index], 0), in_round)
    if done == in_round:
        return plan.shards(index)
    last_pass = done - in_round // plan.epochs * (plan.epochs - 1)
    return max(last_pass, 0) // -(-plan.shard_size // plan.global_batch)


def newest_policy(reader: Reader) -> int | None:
    """The newest published policy version."""
    manifest = next(series.valid(reader.find, reader.run.root, layout.policy), None)
    return None if manifest is None else series.number(manifest)


def newest_checkpoint(reader: Reader) -> Manifest | None:
    """The newest checkpoint."""
    return next(series.valid(reader.find, reader.run.root, layout.checkpoint), None)


def evaluations(reader: Reader, known: list[dict[str, Any]], newest: int | None) -> list[dict[str, Any]]:
    """What each evaluated policy's evaluation comes to: ``version``, and what `toolkit.reporting.evaluation.summarise` returns.

    Args:
        known: what this returned before.
        newest: the newest published policy.
    """
    initial_ref = layout.evaluation(0)
    found = {entry["version"]: entry for entry in known if entry["compared_with_initial"]}
    for version in range(newest + 1 if newest is not None else 0):
        if version in found or (table := reader.table(layout.evaluation(version))) is None:
            continue
        initial = table if version == 0 else reader.table(initial_ref)
        against = initial if initial is not None else table.slice(0, 0)
        found[version] = {
            "version": version,
            "compared_with_initial": initial is not None,
            **summarise(table, against),
        }
    return [found[version] for version in sorted(found)]


def annotations(samples: int, gated: list[dict[str, Any]]) -> dict[str, Any]:
    """What the gate saved so far: responses ``made`` and judged, ``of`` those that sampling every decided pair would take.

    Args:
        samples: responses a prompt (K).
        gated: the gated rounds, from `rounds`.
    """
    answered = sum(n for entry in gated for outcome, n in entry["outcomes"].items() if outcome != "prompt_rejected")
    decided, asked = sum(entry["decided"] for entry in gated), sum(entry["asked"] for entry in gated)
    saved = 1 - asked / decided if decided else None
    return {"made": samples * answered, "of": samples * decided, "saved_fraction": saved}
