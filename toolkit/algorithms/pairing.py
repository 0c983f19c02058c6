"""From the K rewarded responses to one prompt to its online pair: the best against the worst."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What became of a prompt's responses. ``chosen`` and ``rejected`` are indices of responses if there is a pair.

    ``outcome``: ``pair``; ``tie`` (the best is no better than the worst, or is the same text); ``all_truncated`` (fewer
    than two responses ended by themselves); ``reward_failed`` (of those, fewer than two have a finite reward).
    """

    outcome: str
    chosen: int | None = None
    rejected: int | None = None


def best_worst(
    rewards: Sequence[float],
    truncated: Sequence[bool],
    token_ids: Sequence[Sequence[int]],
    allow_truncated: bool = False,
) -> Outcome:
    """The pair (first response of the highest reward, first of the lowest) among K ≥ 2 responses, or why there is none.

    ``truncated``: whether the response was cut at the length limit; such a response is no candidate unless
    ``allow_truncated``. ``token_ids``: the response's tokens. Raises ``ValueError`` unless all three have one length ≥ 2.
    """
    if not len(rewards) == len(truncated) == len(token_ids) >= 2:
        raise ValueError(
            "expected rewards, truncated and token_ids of one length >= 2, "
            f"got {len(rewards)}, {len(truncated)}, {len(token_ids)}"
        )
    finished = [index for index, cut in enumerate(truncated) if allow_truncated or not cut]
    if len(finished) < 2:
        return Outcome("all_truncated")
    eligible = [index for index in finished if math.isfinite(rewards[index])]
    if len(eligible) < 2:
        return Outcome("reward_failed")
    # max and min return the first of equals.
    chosen = max(eligible, key=lambda index: rewards[index])
    rejected = min(eligible, key=lambda index: rewards[index])
    if rewards[chosen] == rewards[rejected] or list(token_ids[chosen]) == list(token_ids[rejected]):
        return Outcome("tie")
    return Outcome("pair", chosen, rejected)
