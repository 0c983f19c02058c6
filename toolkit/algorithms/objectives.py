"""Preference objectives: from the log-probs of B pairs to B losses (lower is better).

A new objective is one frozen dataclass and one line of ``OBJECTIVES``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from toolkit.algorithms.features import log_sigmoid
from toolkit.algorithms.registry import build, check_number

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PairLogProbs:
    """Log-probs of B pairs, every field ``(B,)``.

    ``chosen`` and ``rejected``: the policy's log-prob of the response in nats, summed over its tokens (end-of-turn
    included), fp32. ``reference_*``: the same under the reference, or None for an objective without one.
    ``*_tokens``: the number of tokens summed over.

    Raises ``ValueError`` unless all shapes are one ``(B,)``: broadcasting would mix pairs without a word.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def __post_init__(self) -> None:
        shapes = {name: tuple(value.shape) for name, value in vars(self).items() if value is not None}
        if self.chosen.dim() != 1 or len(set(shapes.values())) != 1:
            raise ValueError(f"expected every field of PairLogProbs to be of one shape (B,), got {shapes}")

    def masked(self, present: Tensor) -> PairLogProbs:
        """The same pairs with zeros where ``present`` ``(B,)`` bool is false.

        Whatever an absent pair's slots hold, even NaN, then reaches neither the losses nor a gradient.
        """
        return PairLogProbs(*(None if value is None else value.where(present, 0) for value in vars(self).values()))


class Objective(Protocol):
    """What ``get`` returns.

    ``beta`` scales the margin; ``zero_margin_loss`` is the loss of a pair whose policy equals the reference (Δ = 0), or
    None where the objective has no reference to equal.
    """

    needs_reference: ClassVar[bool]
    beta: float

    @property
    def zero_margin_loss(self) -> float | None: ...

    def margin(self, pairs: PairLogProbs) -> Tensor:
        """Unscaled margins ``(B,)``, from which the meta-learner's feature is made."""

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Losses ``(B,)`` in the dtype of ``pairs.chosen``."""


def get(name: str, **parameters: Any) -> Objective:
    """The objective ``name`` with its parameters.

    Raises ``UserError`` for an unknown name or parameter (the valid ones are listed) or a value out of range.
    """
    return build("objective", OBJECTIVES, name, parameters)


class _ReferenceObjective:
    """Objectives whose margin is Δ = (lp(chosen) − ref(chosen)) − (lp(rejected) − ref(rejected)), in nats."""

    needs_reference: ClassVar[bool] = True

    def log_ratios(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """log π/π_ref of chosen and rejected, each ``(B,)``."""
        if pairs.reference_chosen is None or pairs.reference_rejected is None:
            raise ValueError(f"objective {type(self).__name__} needs reference log-probs, got None")
        return pairs.chosen - pairs.reference_chosen, pairs.rejected - pairs.reference_rejected

    def margin(self, pairs: PairLogProbs) -> Tensor:
        chosen, rejected = self.log_ratios(pairs)
        return chosen - rejected


@dataclass(frozen=True)
class Dpo(_ReferenceObjective):
    """−(1−ε) log σ(βΔ) − ε log σ(−βΔ), ε = ``label_smoothing``.

    DPO, arXiv 2305.18290; with ε > 0 the conservative DPO of ericmitchell.ai/cdpo.pdf.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_number("dpo: beta", self.beta, "a number > 0", above=0)
        check_number("dpo: label_smoothing", self.label_smoothing, "in [0, 0.5)", minimum=0, below=0.5)

    @property
    def zero_margin_loss(self) -> float:
        return math.log(2)

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        x = self.beta * self.margin(pairs)
        return -(1 - self.label_smoothing) * log_sigmoid(x) - self.label_smoothing * log_sigmoid(-x)


@dataclass(frozen=True)
class IpoSum(_ReferenceObjective):
    """(Δ − 1/(2β))² of the summed log-probs, as equation 17 of IPO, arXiv 2310.12036 (β is its τ)."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_number("ipo: beta", self.beta, "a number > 0", above=0)

    @property
    def zero_margin_loss(self) -> float:
        return (1 / (2 * self.beta)) ** 2

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        return (self.margin(pairs) - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class Ipo(IpoSum):
    """IPO with each log-ratio divided by its own response's tokens, as in TRL, whose authors had it from IPO's.

    The same β asks for a far wider summed margin than in ``ipo_sum``. ``margin`` stays the summed Δ, so that the
    meta-learner's feature means the same under every objective with a reference.
    """

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        chosen, rejected = self.log_ratios(pairs)
        mean_margin = _token_mean(chosen, pairs.chosen_tokens) - _token_mean(rejected, pairs.rejected_tokens)
        return (mean_margin - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class SimPo:
    """−log σ(β(p̄(chosen) − p̄(rejected) − γ/β)), p̄ the log-prob per token. SimPO, arXiv 2405.14734. No reference.

    As in the official code the parameter is the ratio γ/β (TRL's ``simpo_gamma`` is γ itself), and it is part of
    ``margin``.
    """

    beta: float = 2.0
    gamma_beta_ratio: float = 0.25

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("simpo: beta", self.beta, "a number > 0", above=0)
        check_number("simpo: gamma_beta_ratio", self.gamma_beta_ratio, "a number >= 0", minimum=0)

    @property
    def zero_margin_loss(self) -> None:
        return None

    def margin(self, pairs: PairLogProbs) -> Tensor:
        chosen = _token_mean(pairs.chosen, pairs.chosen_tokens)
        rejected = _token_mean(pairs.rejected, pairs.rejected_tokens)
        return chosen - rejected - self.gamma_beta_ratio

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        return -log_sigmoid(self.beta * self.margin(pairs))


def _token_mean(log_probs: Tensor, tokens: Tensor) -> Tensor:
    # An absent pair has no tokens; 1 instead of 0 keeps its (masked) slot finite.
    return log_probs / tokens.clamp(min=1)


OBJECTIVES: dict[str, type] = {
    "dpo": Dpo,
    "ipo": Ipo,
    "ipo_sum": IpoSum,
    "simpo": SimPo,
}
