"""Log-probs as records: scores of the policy, of references, of both halves of the pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from toolkit.exchange import layout, tables
from toolkit.exchange.run import Run
from toolkit.training.control import Control
from toolkit.training.engine import PolicyEngine
from toolkit.training.weights import WeightsStore

# For each half, the columns of its responses in a table of pairs.
COLUMNS = {"offline": ("chosen_ids", "rejected_ids"), "online": ("online_chosen_ids", "online_rejected_ids")}


def logprob_table(engine: PolicyEngine, pairs: pa.Table, half: str) -> pa.Table:
    """Log-probs of one half of ``pairs`` (`tables.LOGPROBS`) under the weights in the engine. Collective.

    Args:
        pairs: columns ``pair_id``, ``prompt_ids`` and the half's response ids; only rows that have that half.
    """
    prompts = [np.asarray(ids, np.int32) for ids in pairs["prompt_ids"].to_pylist()]
    sides = [[np.asarray(ids, np.int32) for ids in pairs[name].to_pylist()] for name in COLUMNS[half]]
    sequences = [np.concatenate(parts) for side in sides for parts in zip(prompts, side, strict=True)]
    lengths = [len(prompt) for prompt in prompts]
    sums = engine.score(sequences, lengths * 2) if sequences else np.zeros(0, np.float32)
    columns = {
        "pair_id": pairs["pair_id"],
        "chosen": sums[: len(prompts)],
        "rejected": sums[len(prompts) :],
        "chosen_tokens": np.array([len(ids) for ids in sides[0]], np.int32),
        "rejected_tokens": np.array([len(ids) for ids in sides[1]], np.int32),
    }
    return tables.conform(pa.table(columns), tables.LOGPROBS)


def publish_missing(
    run: Run,
    engine: PolicyEngine,
    control: Control,
    store: WeightsStore,
    name: str,
    half: str,
    round_index: int,
    shards: Sequence[int],
    pairs_of: Callable[[int], pa.Table],
    current: str | None,
) -> int:
    """Publish the log-probs of those shards that lack them under the weights ``name``, with one swap of weights. Collective.

    Args:
        pairs_of: rank 0's rows of a shard (those that have this half).
        current: the name of the weights that the engine holds, if they have one.

    Returns:
        How many were missing.

    Raises:
        Stopped: between two shards; what is done is published.
    """

    def refs() -> list[int]:
        return [s for s in shards if run.records.find(layout.logprobs(name, half, round_index, s)) is None]

    missing = control.lead(refs)
    if not missing:
        return 0
    with store.loaded(name, current):
        for shard in missing:
            control.check_stop()
            pairs = control.lead_table(partial(pairs_of, shard))
            scored = logprob_table(engine, pairs, half)

            def publish(shard: int = shard, scored: pa.Table = scored) -> None:
                attributes = {"weights": name, "half": half, "round": round_index, "shard": shard, **run.provenance}
                run.records.publish(layout.logprobs(name, half, round_index, shard), attributes, table=scored)

            control.lead(publish)
    return len(missing)
