"""The feature s that the meta-learner reads: one number per pair, made from its unscaled margin under the gate reference.

torch is imported on first use, so that a launcher without torch can check a configuration's names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.errors import UserError, unknown

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("log_sigmoid_beta", "log_sigmoid", "standardised")

# A few pairs far off must not set the scale for all others: −10 is a margin of about −100 nats at β = 0.1.
CLIP = -10.0
# Scores that hardly differ (a policy close to its reference) would be blown up into noise by their own deviation.
VARIANCE_FLOOR = 0.01


@dataclass(frozen=True)
class FeatureStatistics:
    """Statistics of a round's clipped log σ(βΔ). ``dataclasses.asdict`` gives plain JSON, read back by the constructor.

    ``variance`` is the population variance as measured (0 tells of a gate that cannot tell pairs apart); ``std`` is
    the square root of the floored variance, which the feature is divided by.
    """

    mean: float
    std: float
    count: int
    variance: float


def log_sigmoid(x: Tensor) -> Tensor:
    """log σ(x), any shape and float dtype; finite for finite x, with the exact gradient σ(−x)."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def feature(margin: Tensor, kind: str, beta: float, statistics: FeatureStatistics | None = None) -> Tensor:
    """Features s ``(N,)`` of unscaled margins Δ ``(N,)`` in nats, in the dtype of ``margin``.

    ``log_sigmoid_beta``: log σ(βΔ), the DPO score of the MetaAPO paper (arXiv 2509.23371). ``log_sigmoid``: log σ(Δ),
    what the official code computes for DPO and IPO. ``standardised``: (clip(log σ(βΔ)) − mean) / std with the round's ``statistics``.
    Pass float64 margins for a gate: its decisions then do not hang on the width of the machine's vectors.

    Raises ``UserError`` for an unknown kind and ``ValueError`` if ``standardised`` has no statistics.
    """
    if kind == "log_sigmoid_beta":
        return log_sigmoid(beta * margin)
    if kind == "log_sigmoid":
        return log_sigmoid(margin)
    if kind != "standardised":
        raise unknown("feature", kind, KINDS)
    if statistics is None:
        raise ValueError("the standardised feature needs the statistics of the round's scores, got None")
    return (log_sigmoid(beta * margin).clamp(min=CLIP) - statistics.mean) / statistics.std


def statistics(features: Tensor) -> FeatureStatistics:
    """Statistics of log σ(βΔ) ``(N,)`` over a round's scores, in float64 and independent of their order.

    Raises ``UserError`` if there are no scores or one of them is NaN.
    """
    values = features.detach().double().clamp(min=CLIP).tolist()
    if not values or any(map(math.isnan, values)):
        raise UserError(
            f"statistics need at least one score and no NaN, got {len(values)} scores, "
            f"{sum(map(math.isnan, values))} of them NaN; look at the log-probs of the round's score records"
        )
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    return FeatureStatistics(mean, math.sqrt(max(variance, VARIANCE_FLOOR)), len(values), variance)
