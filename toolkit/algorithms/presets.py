"""Settings of the meta-learner and of the loop around it, and the presets that name whole sets of them. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from toolkit.algorithms import features, references, weighting
from toolkit.algorithms.registry import check_integer, check_number
from toolkit.errors import UserError, unknown

_CHOICES = {
    "init": ("constant", "random"),
    "feature": features.KINDS,
    "remainder": ("update", "discard"),
    "missing": weighting.MISSING,
    "gate_reference": references.CHOICES,
    "loss_reference": references.CHOICES,
    "round_start_optimizer": ("keep", "reset"),
    "round_start_schedule": ("continue", "restart"),
    "warm_start": references.WARM_STARTS,
}


@dataclass(frozen=True)
class MetaSettings:
    """All that the presets differ in. The defaults are the preset ``paper``. Raises ``UserError`` for a bad value."""

    # the function h_φ
    init: str = "constant"  # of h's parameters: the official constant 0.1, or random around w = σ(s)
    hidden: int = 100  # tanh units
    clamp: float = 0.0  # keeps w within [clamp, 1 − clamp]
    feature: str = "log_sigmoid_beta"  # the kind of s, see features.KINDS

    # an update of φ
    learning_rate: float = 5e-3
    weight_decay: float = 1e-4  # on weights, not on biases
    epochs: int = 1  # passes over the meta batch
    minibatch: int | None = None  # rows of one Adam step; None: all rows of the meta batch

    # when φ is updated and used
    interval: int = 8  # policy steps between two boundaries (T_meta)
    remainder: str = "update"  # the rows after a round's last whole interval: a boundary of their own, or thrown away
    lag: int = 1  # the weight at boundary k uses version k − lag

    # the loop around it
    exploration: float = 0.0  # least probability of sampling a prompt, see gates.MetaGate
    missing: str = "offline_full"  # the loss of a pair without an online half, see weighting.MISSING
    gate_reference: str = "initial"
    loss_reference: str = "initial"
    round_start_optimizer: str = "keep"  # the policy's optimizer state at a round's start
    round_start_schedule: str = "continue"  # the learning-rate schedule at a round's start
    warm_start: str = "none"  # offline_round: round 0 trains offline, without gate

    def __post_init__(self) -> None:
        for name, valid in _CHOICES.items():
            if getattr(self, name) not in valid:
                raise unknown(name, getattr(self, name), valid)
        for name in ("hidden", "epochs", "interval"):
            check_integer(name, getattr(self, name), minimum=1)
        check_integer("lag", self.lag, minimum=0)
        if self.minibatch is not None:
            check_integer("minibatch", self.minibatch, minimum=1)
        check_number("clamp", self.clamp, "in [0, 0.5)", minimum=0, below=0.5)
        check_number("exploration", self.exploration, "in [0, 1)", minimum=0, below=1)
        check_number("learning_rate", self.learning_rate, "a number > 0", above=0)
        check_number("weight_decay", self.weight_decay, "a number >= 0", minimum=0)


PRESETS = {
    # arXiv 2509.23371, as far as it says
    "paper": MetaSettings(),
    # github.com/junming-yang/MetaAPO at 1b1b4c5 with its shipped scripts: its interval of 8 counts micro-batches per
    # rank, which is 16 policy steps at its micro-batch of 2
    "reference_code": MetaSettings(
        feature="log_sigmoid",
        interval=16,
        remainder="discard",
        lag=0,
        missing="drop",
        gate_reference="previous",
        loss_reference="previous",
        round_start_optimizer="reset",
        round_start_schedule="restart",
    ),
    # what we advise: units that can differ, a feature of known scale, many small steps instead of few large ones (at
    # 5e-3 they would drive w to 0 and 1 within a round), w kept off both ends, every prompt reachable
    "recommended": MetaSettings(
        init="random",
        clamp=0.02,
        feature="standardised",
        learning_rate=1e-3,
        minibatch=128,
        exploration=0.1,
        warm_start="offline_round",
    ),
}


def preset(name: str, **overrides: Any) -> MetaSettings:
    """The settings of a preset, some of them replaced.

    Raises ``UserError`` for an unknown preset or setting (the valid ones are listed) or a bad value.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    if surplus := sorted(set(overrides) - {field.name for field in fields(MetaSettings)}):
        valid = ", ".join(f"{field.name}={getattr(PRESETS[name], field.name)!r}" for field in fields(MetaSettings))
        raise UserError(f"preset {name!r} has no setting {', '.join(map(repr, surplus))}; its settings: {valid}")
    return replace(PRESETS[name], **overrides)
