"""Rewards of a shard's responses, and the online pair that they make."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence

import pyarrow as pa

from toolkit.algorithms.pairing import best_worst
from toolkit.data.formats import Message
from toolkit.errors import UserError
from toolkit.exchange.tables import ANNOTATIONS
from toolkit.inference.engine import RewardEngine

log = logging.getLogger(__name__)

Render = Callable[[Sequence[Message], str], list[int]]  # the reward model's token ids of a conversation and its answer


def annotate_shard(
    responses: pa.Table, pairs: pa.Table, reward: RewardEngine, render: Render, allow_truncated: bool = False
) -> pa.Table:
    """Judge every response and pick each prompt's best and worst.

    Args:
        responses: ``RESPONSES`` of a shard, the rows of a pair together and in the order of ``sample``.
        pairs: ``PAIRS`` of the shard.
        allow_truncated: whether a response cut at the length limit may enter a pair.

    Returns:
        ``ANNOTATIONS``: one row a requested pair, in the order of ``responses``. Chosen and rejected are the sampled ids.
    """
    prompts = dict(zip(pairs["pair_id"].to_pylist(), pairs["prompt"].to_pylist(), strict=True))
    sampled = responses.to_pylist()
    answered = [row for row in sampled if row["finish_reason"] != "rejected"]
    rewards = iter(judge(reward, render, ((prompts[row["pair_id"]], row["text"]) for row in answered)))
    rows = []
    for pair_id, group in itertools.groupby(sampled, key=lambda row: row["pair_id"]):
        own = list(group)
        if own[0]["finish_reason"] == "rejected":
            rows.append({"pair_id": pair_id, "outcome": "prompt_rejected", "rewards": []})
        else:
            rows.append(_annotation(pair_id, own, list(itertools.islice(rewards, len(own))), allow_truncated))
    return pa.Table.from_pylist(rows, schema=ANNOTATIONS)


def judge(reward: RewardEngine, render: Render, answers: Iterable[tuple[Sequence[Message], str]]) -> list[float]:
    """The reward of each (messages, response text); NaN where the reward model or its template cannot take it."""
    rendered = [_render(render, messages, text) for messages, text in answers]
    scores = iter(reward.score([ids for ids in rendered if ids is not None]))
    return [math.nan if ids is None else next(scores) for ids in rendered]


def _render(render: Render, messages: Sequence[Message], text: str) -> list[int] | None:
    try:
        return render(messages, text)
    except UserError as error:  # a template that does not know a role, for one, refuses this conversation and no other
        log.warning("a conversation has no reward: %s", error)
        return None


def _annotation(pair_id: str, responses: list[dict], rewards: list[float], allow_truncated: bool) -> dict[str, object]:
    token_ids = [row["token_ids"] for row in responses]
    truncated = [row["finish_reason"] == "length" for row in responses]
    outcome = best_worst(rewards, truncated, token_ids, allow_truncated)
    row: dict[str, object] = {"pair_id": pair_id, "outcome": outcome.outcome, "rewards": rewards}
    for side, index in (("chosen", outcome.chosen), ("rejected", outcome.rejected)):
        if index is not None:
            row |= {f"{side}_sample": index, f"{side}_ids": token_ids[index], f"{side}_reward": rewards[index]}
    return row
