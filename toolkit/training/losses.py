"""From a micro-batch's log-probs to its per-pair losses: objective, feature, weight, and the missing online half."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toolkit.algorithms import features, weighting
from toolkit.algorithms.features import FeatureStatistics
from toolkit.algorithms.meta_learner import MetaLearner
from toolkit.algorithms.objectives import Objective, PairLogProbs


@dataclass(frozen=True)
class BatchConstants:
    """What the loss needs of a global batch beside the policy's log-probs; all tensors `(B,)`, log-probs fp32 sums.

    ``tokens``: `(B, 4)` response tokens in the order offline chosen, offline rejected, online chosen, online rejected.
    ``loss_reference``: `(B, 4)` under the loss reference. ``gate_reference``: `(B, 2)` of the offline half under the gate
    reference. ``real``: False for the masked items that fill a short batch.
    """

    tokens: Tensor
    loss_reference: Tensor
    gate_reference: Tensor
    has_online: Tensor
    real: Tensor


@dataclass(frozen=True)
class PairLoss:
    """The loss of one optimizer step.

    Args:
        online: whether the round is gated; in an offline round every pair counts with its offline loss alone.
        weight: kind and parameters of the weight w_train.
        missing: what becomes of a pair without an online half.
        learner: the meta-learner whose weights this step uses (None unless ``weight`` is ``meta``).
    """

    objective: Objective
    feature: str
    statistics: FeatureStatistics | None
    online: bool
    weight: str
    weight_parameters: Mapping[str, float]
    missing: str
    learner: MetaLearner | None
    constants: BatchConstants

    @property
    def contributing(self) -> Tensor:
        """`(B,)` bool: the pairs whose loss counts."""
        counts = self.constants.real
        if self.online:
            counts = counts & weighting.contributing(self.constants.has_online, self.missing)
        return counts

    def __call__(self, logprobs: Tensor, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of some of the batch's pairs.

        Args:
            logprobs: `(n, 4)` fp32, the policy's summed response log-probs (0 where a sequence is absent).
            positions: `(n,)` int64, which pairs of the global batch these are.

        Returns:
            Losses `(n,)`, 0 for a pair that does not count, and what is kept of each pair: the feature ``s``, the weight ``w``,
            the losses of both halves.
        """
        device = logprobs.device
        take = positions.cpu()
        tokens, reference = self.constants.tokens[take].to(device), self.constants.loss_reference[take].to(device)
        gate_reference, has_online = (
            self.constants.gate_reference[take].to(device),
            self.constants.has_online[take].to(device),
        )

        def half(first: int) -> PairLogProbs:
            chosen, rejected = slice(first, first + 1), slice(first + 1, first + 2)
            return PairLogProbs(
                *(values[:, side].squeeze(1) for values in (logprobs, reference) for side in (chosen, rejected)),
                *(tokens[:, side].squeeze(1) for side in (chosen, rejected)),
            )

        offline = self.objective(half(0))
        online = self.objective(half(2).masked(has_online))
        losses, s, w = offline, torch.zeros_like(offline), torch.ones_like(offline)
        if self.online:
            s = self._feature(half(0), gate_reference).to(device)
            w = weighting.weights(self.weight, s.cpu(), self.learner, **self.weight_parameters).to(device)
            losses = weighting.meta_weighted_losses(w, offline, online, has_online, self.missing)
        counts = self.contributing[take].to(device)
        losses = torch.where(counts, losses, torch.zeros_like(losses))
        kept = {"s": s, "w": w, "loss": losses, "loss_offline": offline, "loss_online": online}
        return losses, {name: value.detach() for name, value in kept.items()}

    @torch.no_grad()
    def _feature(self, offline: PairLogProbs, gate_reference: Tensor) -> Tensor:
        """The feature s `(n,)` at the current policy, under the gate reference."""
        pairs = replace(offline, reference_chosen=gate_reference[:, 0], reference_rejected=gate_reference[:, 1])
        return features.feature(self.objective.margin(pairs), self.feature, self.objective.beta, self.statistics)
