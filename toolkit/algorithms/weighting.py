"""The weighted loss of a batch: w·L_off + (1−w)·L_on per pair, and the meta loss that teaches w.

Tensors of one batch, each ``(B,)``: ``weights`` w in [0, 1]; ``offline_losses`` and ``online_losses``, lower is better;
``has_online`` bool, whether the pair's prompt was sampled and gave a pair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from toolkit.algorithms.registry import check_number
from toolkit.errors import unknown

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("one", "zero", "constant", "fixed", "meta")

# What becomes of a pair without an online half: its offline loss with weight 1, with weight w, or nothing.
MISSING = ("offline_full", "offline_w", "drop")


def weights(
    kind: str,
    features: Tensor,
    learner: Callable[[Tensor], Tensor] | None = None,
    value: float | None = None,
) -> Tensor:
    """w_train ``(B,)`` of features s ``(B,)`` at the current policy, detached, in the dtype of ``features``.

    ``one``: 1 (offline only). ``zero``: 0 (online only). ``constant``: ``value``. ``fixed``: σ(s). ``meta``: h_φ(s) of
    ``learner``, a ``MetaLearner`` on the device of ``features``.

    Raises ``UserError`` for an unknown kind or a constant outside [0, 1], ``ValueError`` if the learner is missing.
    """
    features = features.detach()
    if kind == "one":
        return features.new_ones(features.shape)
    if kind == "zero":
        return features.new_zeros(features.shape)
    if kind == "constant":
        check_number("weight constant: value", value, "in [0, 1]", minimum=0, maximum=1)
        return features.new_full(features.shape, value)
    if kind == "fixed":
        return features.sigmoid()
    if kind != "meta":
        raise unknown("weight", kind, KINDS)
    if learner is None:
        raise ValueError("the meta weight needs the meta-learner, got None")
    return learner(features).detach()


def meta_weighted_losses(
    weights: Tensor,
    offline_losses: Tensor,
    online_losses: Tensor,
    has_online: Tensor,
    missing: str = "offline_full",
) -> Tensor:
    """Losses ``(B,)`` of the policy: w·L_off + (1−w)·L_on, w a constant (MetaAPO, arXiv 2509.23371, step 4).

    Pairs without an online half are treated as ``missing`` says; what stands in their online slots, even NaN, enters
    neither a value nor the gradient of ``online_losses`` (to keep it out of the log-probs' gradients too, mask them
    before the objective: ``PairLogProbs.masked``). A dropped pair has loss 0; divide the batch's sum by the number of
    ``contributing`` pairs, not by B.
    """
    w = weights.detach()
    mixed = w * offline_losses + (1 - w) * online_losses
    if missing == "offline_full":
        alone = offline_losses
    elif missing == "offline_w":
        alone = w * offline_losses
    elif missing == "drop":
        alone = offline_losses.new_zeros(offline_losses.shape)
    else:
        raise unknown("missing", missing, MISSING)
    return mixed.where(has_online, alone)


def contributing(has_online: Tensor, missing: str = "offline_full") -> Tensor:
    """Which pairs count in the batch's denominator: bool ``(B,)``."""
    if missing not in MISSING:
        raise unknown("missing", missing, MISSING)
    return has_online.clone() if missing == "drop" else has_online.new_ones(has_online.shape)


def meta_loss(weights: Tensor, offline_losses: Tensor, online_losses: Tensor) -> Tensor:
    """Meta losses ``(m,)`` of pairs that have both halves; only ``weights`` carry a gradient.

    Their mean is L_meta of MetaAPO, arXiv 2509.23371: its gradient is (1/m) Σ (L_off − L_on) ∇h_φ(s) (equation 7), so
    descent lowers w where the online pair has the smaller loss.
    """
    return weights * offline_losses.detach() + (1 - weights) * online_losses.detach()
