"""Records that are pure functions of other records: feature statistics, gate decisions, meta-learner versions.

Whoever needs one may publish it (normally the sidecar; the trainer when it has waited long enough): the content is the same, and
the first writer wins. `toolkit.exchange.verify` recomputes every one of them.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from toolkit.algorithms import draws, features, gates, meta_learner, objectives, references
from toolkit.algorithms.features import FeatureStatistics
from toolkit.algorithms.meta_learner import MetaBatch, MetaLearnerState, MetaSettings
from toolkit.algorithms.objectives import PairLogProbs
from toolkit.config import Config, MethodConfig
from toolkit.errors import UserError
from toolkit.exchange import layout, tables
from toolkit.exchange.records import Manifest
from toolkit.exchange.run import Run

# ------------------------------------------------------------------------------------------- names of weights


def initial_name(config: Config) -> str:
    """The weights name of the `initial` reference: the first policy, unless another model is configured."""
    other = config.model.reference is not None and config.model.reference != config.model.policy
    return "initial" if other else layout.policy_name(0)


def _reference_name(config: Config, choice: str, round_index: int) -> str:
    name = references.resolve(choice, round_index)
    return initial_name(config) if name == "initial" else name


def gate_reference(config: Config, round_index: int) -> str | None:
    """Weights name of the reference that the feature s is computed under in this round; None for a reference-free objective.

    A moving average is taken as it stands at the round's start.
    """
    if not objective(config.method).needs_reference:
        return None
    name = _reference_name(config, config.method.gate_reference, round_index)
    return f"ema-{round_index:04d}" if name == "ema" else name


def loss_reference(config: Config, round_index: int, shard: int) -> str | None:
    """Weights name of the reference that a shard's losses are computed under; a moving average moves at shard boundaries."""
    if not objective(config.method).needs_reference:
        return None
    name = _reference_name(config, config.method.loss_reference, round_index)
    return f"ema-{round_index:04d}-{shard:06d}" if name == "ema" else name


def objective(method: MethodConfig) -> objectives.Objective:
    return objectives.get(method.objective.name, **method.objective.parameters)


# ------------------------------------------------------------------------------------------- features


def column(table: pa.Table, name: str) -> torch.Tensor:
    """A numeric column as a tensor `(rows,)` of the column's dtype."""
    return torch.from_numpy(np.array(table[name].to_numpy()))


def _exact(table: pa.Table, name: str) -> torch.Tensor:
    return column(table, name).double()  # gate decisions must not hang on the width of a machine's vectors


def pair_logprobs(policy: pa.Table, reference: pa.Table | None) -> PairLogProbs:
    """The log-probs of a shard's pairs from their `tables.LOGPROBS` records, as float64 tensors `(pairs,)`."""
    if reference is not None and policy["pair_id"] != reference["pair_id"]:
        raise ValueError("the policy's and the reference's log-probs are not of the same pairs in the same order")
    return PairLogProbs(
        chosen=_exact(policy, "chosen"),
        rejected=_exact(policy, "rejected"),
        reference_chosen=None if reference is None else _exact(reference, "chosen"),
        reference_rejected=None if reference is None else _exact(reference, "rejected"),
        chosen_tokens=column(policy, "chosen_tokens"),
        rejected_tokens=column(policy, "rejected_tokens"),
    )


def _scores(run: Run, round_index: int, shard: int) -> tuple[Manifest, Manifest | None] | None:
    """The records of a shard's scores and of its gate reference's, when both are there."""
    policy = run.records.find(layout.logprobs(layout.policy_name(round_index), "offline", round_index, shard))
    if policy is None:
        return None
    name = gate_reference(run.config, round_index)
    if name is None:
        return policy, None
    reference = run.records.find(layout.logprobs(name, "offline", round_index, shard))
    return None if reference is None else (policy, reference)


def margins(run: Run, scores: tuple[Manifest, Manifest | None]) -> torch.Tensor:
    """Margins Δ `(pairs,)` of a shard under its gate reference."""
    policy, reference = scores
    pairs = pair_logprobs(run.records.table(policy), None if reference is None else run.records.table(reference))
    return objective(run.config.method).margin(pairs)


def needs_statistics(method: MethodConfig) -> bool:
    return method.meta.feature == "standardised"


def statistics(run: Run, round_index: int) -> FeatureStatistics | None:
    """The round's feature statistics, or None where the feature needs none.

    Raises:
        UserError: they are needed and not published yet.
    """
    if not needs_statistics(run.config.method):
        return None
    return FeatureStatistics(**run.records.require(layout.statistics(round_index)).attributes["statistics"])


def scored_statistics(run: Run, round_index: int) -> FeatureStatistics | None:
    """The round's feature statistics from its scores; None while one is missing."""
    found = []
    for shard in range(run.plan.shards(round_index)):
        scores = _scores(run, round_index, shard)
        if scores is None:
            return None
        found.append(margins(run, scores))
    beta = objective(run.config.method).beta
    return features.statistics(features.feature(torch.cat(found), "log_sigmoid_beta", beta))


def publish_statistics(run: Run, round_index: int) -> bool:
    """Publish the round's feature statistics if all its scores are there. True once the record exists."""
    ref = layout.statistics(round_index)
    if run.records.find(ref) is not None:
        return True
    if _scores(run, round_index, run.plan.shards(round_index) - 1) is None:
        return False  # the last to be published: till then the others need no look
    computed = scored_statistics(run, round_index)
    if computed is None:
        return False
    run.records.publish(ref, {"statistics": vars(computed)})
    return True


# ------------------------------------------------------------------------------------------- requests


def request_table(run: Run, round_index: int, shard: int) -> pa.Table:
    """The gate's decisions about a shard (`tables.REQUESTS`), from recorded scores.

    Raises:
        UserError: the scores are not published.
    """
    scores = _scores(run, round_index, shard)
    if scores is None:
        raise UserError(f"round {round_index}, shard {shard}: its scores are not published, so no decision follows")
    method, ids = run.config.method, run.records.table(scores[0])["pair_id"].to_pylist()
    gate = gates.get(method.gate.kind, **run.config.gate_parameters)
    stats = statistics(run, round_index)
    s = features.feature(margins(run, scores), method.meta.feature, objective(method).beta, stats)
    state = phi_state(run, run.plan.version_before_round(round_index)) if gate.needs_learner else None
    w_gate = gate.weights(s, state)
    u = draws.uniforms(run.config.seed, round_index, ids)
    sampled = gates.decide(u, w_gate)
    columns = {"pair_id": ids, "s": s.float().numpy(), "u": u, "w_gate": w_gate.numpy(), "sampled": sampled}
    return tables.conform(pa.table(columns), tables.REQUESTS)


def publish_requests(run: Run, round_index: int, shard: int) -> bool:
    """Publish a shard's gate decisions if what they follow from is there. True once the record exists."""
    ref = layout.requests(round_index, shard)
    if run.records.find(ref) is not None:
        return True
    version = run.plan.version_before_round(round_index)
    if _scores(run, round_index, shard) is None or (
        run.config.learns and run.records.find(layout.phi(version)) is None
    ):
        return False
    if needs_statistics(run.config.method) and run.records.find(layout.statistics(round_index)) is None:
        return False
    table = request_table(run, round_index, shard)
    attributes = {
        "round": round_index,
        "shard": shard,
        "phi": version,
        "sampled": int(np.sum(table["sampled"].to_numpy())),
    }
    run.records.publish(ref, attributes, table=table)
    return True


# ------------------------------------------------------------------------------------------- the meta-learner


def meta_settings(method: MethodConfig) -> MetaSettings:
    meta = method.meta
    return MetaSettings(
        init=meta.init,
        learning_rate=meta.learning_rate,
        weight_decay=meta.weight_decay,
        epochs=meta.epochs,
        minibatch=meta.minibatch,
        clamp=meta.clamp,
        feature=meta.feature,
        interval=meta.interval,
        remainder=meta.remainder,
        lag=meta.lag,
        exploration=meta.exploration,
    )


def phi_state(run: Run, version: int) -> MetaLearnerState:
    """The published meta-learner of this version."""
    manifest = run.records.require(layout.phi(version))
    data = run.records.verified(manifest, manifest.file(".safetensors")).read_bytes()
    return MetaLearnerState.from_tensors(load_tensors(data), json.loads(manifest.attributes["state"]))


def meta_rows(table: pa.Table) -> MetaBatch:
    """The rows of a meta batch (`tables.META_BATCH`)."""
    return MetaBatch(
        features=column(table, "s"),
        offline_losses=column(table, "loss_offline"),
        online_losses=column(table, "loss_online"),
    )


def next_phi(run: Run, version: int) -> MetaLearnerState | None:
    """The meta-learner of this version, computed from the one before and its meta batch; None while one is missing."""
    if version == 0:
        return meta_learner.initial_state(meta_settings(run.config.method), run.config.seed)
    batch = run.records.find(layout.meta_batch(version))
    if batch is None or run.records.find(layout.phi(version - 1)) is None:
        return None
    return meta_learner.update(phi_state(run, version - 1), meta_rows(run.records.table(batch)))


def publish_phi(run: Run, version: int) -> bool:
    """Publish a meta-learner version if what it follows from is there. True once the record exists."""
    ref = layout.phi(version)
    if run.records.find(ref) is not None:
        return True
    state = next_phi(run, version)
    if state is None:
        return False
    if version > 0 and needs_statistics(run.config.method):
        learned_in = run.plan.boundaries[version - 1].round
        if not publish_statistics(run, learned_in):  # they were condemned, and so were scores
            return False
    contents, description = state.to_tensors()
    run.records.publish(ref, phi_attributes(run, version, description), blobs={".safetensors": save_tensors(contents)})
    return True


def phi_attributes(run: Run, version: int, description: dict[str, Any]) -> dict[str, Any]:
    """The state's description as text (its floats keep every bit), and the feature statistics it was learned under."""
    attributes: dict[str, Any] = {"version": version, "state": json.dumps(description, sort_keys=True)}
    if version > 0 and needs_statistics(run.config.method):
        boundary = run.plan.boundaries[version - 1]
        attributes["statistics"] = run.records.require(layout.statistics(boundary.round)).attributes["statistics"]
    return attributes


def publish_phis(run: Run, last: int) -> None:
    """Publish all versions up to ``last`` that can be made now."""
    first = last
    while first > 0 and run.records.find(layout.phi(first - 1)) is None:
        first -= 1
    for version in range(first, last + 1):
        publish_phi(run, version)
