"""Gates: which prompts of a round to sample from the policy. A prompt is sampled iff u > w.

w is the gate's weight of the pair, u its draw (``draws.uniform``, strictly inside (0, 1)): it is sampled with probability 1 − w.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from toolkit.algorithms.registry import build, check_number
from toolkit.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import Tensor

    from toolkit.algorithms.meta_learner import MetaLearnerState


@dataclass(frozen=True)
class Gate:
    """A gate. ``needs_scores``: it reads the features (others only their number); ``needs_learner``: it reads φ."""

    needs_scores: ClassVar[bool] = False
    needs_learner: ClassVar[bool] = False

    def weights(self, features: Tensor, state: MetaLearnerState | None = None) -> Tensor:
        """w_gate ``(N,)`` float32 of features s ``(N,)``, ``state`` being φ where the gate needs it.

        Computed in float64 and rounded once: how many pairs are computed together and how wide the machine's vectors
        are moves only the last bits of a float64, which rounding removes. Pass float64 features to have that from end
        to end.

        Raises ``UserError`` for a NaN feature, ``ValueError`` if φ is needed and missing.
        """
        exact = features.detach().double()
        if self.needs_scores and (count := int(exact.isnan().sum())):
            raise UserError(
                f"the gate got {count} NaN among {len(exact)} scores, expected finite ones; "
                "look at the log-probs of the round's score records"
            )
        if self.needs_learner and state is None:
            raise ValueError("the meta gate needs the state of the meta-learner, got None")
        return self._weights(exact, state).detach().float()

    def _weights(self, features: Tensor, state: MetaLearnerState | None) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class NoneGate(Gate):
    """w = 1: samples nothing. Offline training."""

    def _weights(self, features: Tensor, state: MetaLearnerState | None) -> Tensor:
        return features.new_ones(features.shape)


@dataclass(frozen=True)
class AllGate(Gate):
    """w = 0: samples every prompt. Online training."""

    def _weights(self, features: Tensor, state: MetaLearnerState | None) -> Tensor:
        return features.new_zeros(features.shape)


@dataclass(frozen=True)
class RandomGate(Gate):
    """Samples with the same ``probability`` everywhere: the baseline of equal budget is the mean of another's 1 − w."""

    probability: float

    def __post_init__(self) -> None:
        check_number("gate random: probability", self.probability, "in [0, 1]", minimum=0, maximum=1)

    def _weights(self, features: Tensor, state: MetaLearnerState | None) -> Tensor:
        return features.new_full(features.shape, 1 - self.probability)


@dataclass(frozen=True)
class FixedGate(Gate):
    """w = σ(s): the gate of MetaAPO without a learner."""

    needs_scores: ClassVar[bool] = True

    def _weights(self, features: Tensor, state: MetaLearnerState | None) -> Tensor:
        return features.sigmoid()


@dataclass(frozen=True)
class ThresholdGate(Gate):
    """Samples exactly where s < ``threshold``."""

    threshold: float

    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("gate threshold: threshold", self.threshold, "a number")

    def _weights(self, features: Tensor, state: MetaLearnerState | None) -> Tensor:
        return (features >= self.threshold).double()


@dataclass(frozen=True)
class MetaGate(Gate):
    """w = min(h_φ(s), 1 − ``exploration``): MetaAPO's gate, arXiv 2509.23371.

    The learner sees only what the gate lets through; with ``exploration`` > 0 every prompt has at least that chance of
    being sampled, so that it can also be corrected where w is high.
    """

    exploration: float = 0.0

    needs_scores: ClassVar[bool] = True
    needs_learner: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("gate meta: exploration", self.exploration, "in [0, 1)", minimum=0, below=1)

    def _weights(self, features: Tensor, state: MetaLearnerState | None) -> Tensor:
        return state.learner().double()(features).clamp(max=1 - self.exploration)


KINDS: dict[str, type[Gate]] = {
    "none": NoneGate,
    "all": AllGate,
    "random": RandomGate,
    "fixed": FixedGate,
    "threshold": ThresholdGate,
    "meta": MetaGate,
}


def get(kind: str, **parameters: Any) -> Gate:
    """The gate ``kind`` with its parameters.

    Raises ``UserError`` for an unknown kind or parameter (the valid ones are listed) or a value out of range.
    """
    return build("gate", KINDS, kind, parameters)


def decide(uniforms: ArrayLike, weights: ArrayLike) -> np.ndarray:
    """Which prompts to sample: bool ``(N,)``, true iff u > w, of draws u float64 ``(N,)`` and weights w float32 ``(N,)``.

    Takes arrays or CPU tensors. Raises ``ValueError`` if the shapes differ.
    """
    u, w = np.asarray(uniforms, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if u.shape != w.shape:
        raise ValueError(f"expected as many draws as weights, got {list(u.shape)} and {list(w.shape)}")
    return u > w
