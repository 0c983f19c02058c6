"""Responses to a shard's requested prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from toolkit.algorithms.draws import sample_seed
from toolkit.exchange.tables import RESPONSES
from toolkit.inference.engine import PolicyEngine, Rejected
from toolkit.inference.settings import SamplingSettings

Decode = Callable[[Sequence[int]], str]  # text of token ids, special tokens left out


def sample_shard(
    requests: pa.Table,
    pairs: pa.Table,
    engine: PolicyEngine,
    settings: SamplingSettings,
    seed: int,
    round_index: int,
    stop_token_ids: Sequence[int],
    decode: Decode,
) -> pa.Table:
    """K responses of the engine's policy to each prompt that the gate asked for.

    Args:
        requests: ``REQUESTS`` of a shard; rows with ``sampled`` are answered, in their order.
        pairs: ``PAIRS`` of the shard.
        seed: the run's; each response has its own seed, made of it, the round, the pair and the sample's number.

    Returns:
        ``RESPONSES``: K rows a prompt, or one with ``finish_reason`` "rejected" and no log-prob or seed.
    """
    prompts = dict(zip(pairs["pair_id"].to_pylist(), pairs["prompt_ids"].to_pylist(), strict=True))
    pair_ids = requests.filter(pc.field("sampled"))["pair_id"].to_pylist()
    seeds = [[sample_seed(seed, round_index, pair_id, k) for k in range(settings.samples)] for pair_id in pair_ids]
    answers = engine.sample([prompts[pair_id] for pair_id in pair_ids], seeds, settings, stop_token_ids)
    rows: list[dict[str, object]] = []
    for pair_id, own_seeds, answer in zip(pair_ids, seeds, answers, strict=True):
        if isinstance(answer, Rejected):
            rows.append(
                {"pair_id": pair_id, "sample": 0, "token_ids": [], "text": answer.reason, "finish_reason": "rejected"}
            )
            continue
        rows += [
            {
                "pair_id": pair_id,
                "sample": number,
                "token_ids": response.token_ids,
                "text": decode(response.token_ids),
                "finish_reason": response.finish_reason,
                "logprob": response.logprob,
                "seed": own_seed,
            }
            for number, (response, own_seed) in enumerate(zip(answer, own_seeds, strict=True))
        ]
    return pa.Table.from_pylist(rows, schema=RESPONSES)
