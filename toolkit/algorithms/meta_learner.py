"""The meta-learner h_φ: features s (N,) to weights w (N,), its state, and the pure update of that state.

h(s) = σ(W2 · tanh(W1·s + b1) + b2), 3·hidden + 1 parameters, fp32 on the CPU. MetaAPO, arXiv 2509.23371.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.algorithms import draws, features, weighting
from toolkit.algorithms.features import FeatureStatistics
from toolkit.algorithms.registry import check_integer, check_number
from toolkit.errors import UserError, unknown

BETAS = (0.9, 0.999)
GRADIENT_CLIP = 1.0

_CHOICES = {"init": ("constant", "random"), "feature": features.KINDS, "remainder": ("update", "discard")}
_GROUPS = ("parameters", "first_moments", "second_moments")


@dataclass(frozen=True)
class MetaSettings:
    """Settings of the meta-learner and of its updates. The defaults are those of the paper, arXiv 2509.23371, as far as it says.

    ``configs/method/`` names whole sets of them. Raises ``UserError`` for a bad value.
    """

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
    exploration: float = 0.0  # least probability of sampling a prompt, see gates.MetaGate

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


class MetaLearner(nn.Module):
    """h_φ. Parameters: ``input_weight``, ``input_bias``, ``output_weight`` ``(hidden,)`` and ``output_bias`` ``(1,)``, fp32.

    ``init="constant"``: weights 0.1, biases 0, the official code's; h(s) = σ(10·tanh(0.1·s)) at 100 units. All units
    then have the same gradient and stay equal (but for rounding): in effect four parameters, monotone in s.
    ``init="random"``: units that differ, from ``seed`` alone, with h(0) = 1/2 and the slope of σ there, so h ≈ σ.
    ``clamp``: w = clamp + (1 − 2·clamp)·σ(…), within [clamp, 1 − clamp]. A hard cut would have no gradient beyond its
    edge and never come back.
    """

    input_weight: nn.Parameter
    input_bias: nn.Parameter
    output_weight: nn.Parameter
    output_bias: nn.Parameter

    def __init__(self, init: str = "constant", hidden: int = 100, seed: int = 0, clamp: float = 0.0) -> None:
        super().__init__()
        self.clamp = clamp
        if init == "constant":
            values = {
                "input_weight": np.full(hidden, 0.1),
                "input_bias": np.zeros(hidden),
                "output_weight": np.full(hidden, 0.1),
                "output_bias": np.zeros(1),
            }
        elif init == "random":
            values = _random_parameters(hidden, seed)
        else:
            raise unknown("init", init, ("constant", "random"))
        for name, value in values.items():
            setattr(self, name, nn.Parameter(torch.tensor(value, dtype=torch.float32)))

    def forward(self, features: Tensor) -> Tensor:
        """Weights w ``(N,)`` in (0, 1) of features s ``(N,)``, in the dtype of the parameters."""
        # Element-wise and one sum per row: a matrix product would round a row differently in another batch, and would
        # be run in bf16 under autocast.
        units = torch.tanh(features.to(self.input_weight.dtype).unsqueeze(-1) * self.input_weight + self.input_bias)
        logits = (units * self.output_weight).sum(-1) + self.output_bias
        return self.clamp + (1 - 2 * self.clamp) * torch.sigmoid(logits)


@dataclass(frozen=True, eq=False)
class MetaLearnerState:
    """φ and all that its next update needs. Tensors are fp32 on the CPU and never changed in place.

    ``version`` counts boundaries, ``step`` Adam steps. ``statistics`` standardise the feature in the current round; set
    them with ``dataclasses.replace``, ``update`` carries them on.
    """

    version: int
    parameters: dict[str, Tensor]
    first_moments: dict[str, Tensor]
    second_moments: dict[str, Tensor]
    step: int
    statistics: FeatureStatistics | None
    settings: MetaSettings

    def learner(self) -> MetaLearner:
        """h_φ as a module of its own (a copy of the parameters)."""
        learner = MetaLearner(hidden=self.settings.hidden, clamp=self.settings.clamp)
        learner.load_state_dict(self.parameters)
        return learner

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state as a flat dict of tensors (for safetensors) and a dict of plain JSON values."""
        tensors = {f"{group}.{name}": value for group in _GROUPS for name, value in getattr(self, group).items()}
        statistics = None if self.statistics is None else asdict(self.statistics)
        return tensors, {
            "version": self.version,
            "step": self.step,
            "statistics": statistics,
            "settings": asdict(self.settings),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], values: dict[str, Any]) -> MetaLearnerState:
        """The inverse of ``to_tensors``. Raises ``UserError`` if names, shapes or dtypes are not those of the settings."""
        settings = MetaSettings(**values["settings"])
        expected, _ = initial_state(settings, seed=0).to_tensors()
        if _shapes(tensors) != _shapes(expected):
            raise UserError(
                f"expected a meta-learner of {_shapes(expected)}, got {_shapes(tensors)}; "
                "the record belongs to another version or other settings"
            )
        groups = {
            group: {
                name.removeprefix(f"{group}."): value for name, value in tensors.items() if name.startswith(f"{group}.")
            }
            for group in _GROUPS
        }
        statistics = None if values["statistics"] is None else FeatureStatistics(**values["statistics"])
        return cls(version=values["version"], step=values["step"], statistics=statistics, settings=settings, **groups)


@dataclass(frozen=True, eq=False)
class MetaBatch:
    """The rows gathered since the last boundary, each field ``(m,)``, in the order of steps and of pairs within a step.

    Only pairs with both halves. ``features``: s at the policy of the row's step; losses of the same step.
    """

    features: Tensor
    offline_losses: Tensor
    online_losses: Tensor

    def __post_init__(self) -> None:
        shapes = {name: tuple(value.shape) for name, value in vars(self).items()}
        if self.features.dim() != 1 or len(set(shapes.values())) != 1:
            raise ValueError(f"expected every field of MetaBatch to be of one shape (m,), got {shapes}")


def initial_state(settings: MetaSettings, seed: int) -> MetaLearnerState:
    """φ version 0: fresh parameters, no moments. ``seed`` matters for the random init only."""
    learner = MetaLearner(settings.init, settings.hidden, seed, settings.clamp)
    parameters = _detached(learner)
    # Two sets of zeros: safetensors refuses tensors that share memory.
    first, second = ({name: torch.zeros_like(value) for name, value in parameters.items()} for _ in range(2))
    return MetaLearnerState(0, parameters, first, second, 0, None, settings)


def update(state: MetaLearnerState, batch: MetaBatch) -> MetaLearnerState:
    """The next version of φ: AdamW on the mean meta loss of ``batch``, gradient norm clipped. Pure.

    An empty batch gives the next version with the same parameters. The result is the same, bit for bit, wherever this
    is called on one kind of CPU: it depends on neither the number of threads nor a global random state.

    Raises ``UserError`` if a row is not finite.
    """
    following = replace(state, version=state.version + 1)
    features, offline, online = (value.detach().to("cpu", torch.float32) for value in vars(batch).values())
    if len(features) == 0:
        return following
    if bad := (~torch.stack([features, offline, online]).isfinite().all(0)).nonzero().flatten().tolist():
        raise UserError(
            f"expected finite features and losses in the meta batch of version {following.version}, "
            f"got others in rows {bad[:8]} of {len(features)}; look at the policy's losses before it"
        )
    with _one_thread(), torch.enable_grad():
        learner = state.learner()
        optimizer = _optimizer(learner, state)
        for epoch in range(state.settings.epochs):
            for rows in _minibatches(len(features), state.settings.minibatch, following.version, epoch):
                optimizer.zero_grad()
                weighting.meta_loss(learner(features[rows]), offline[rows], online[rows]).mean().backward()
                nn.utils.clip_grad_norm_(learner.parameters(), GRADIENT_CLIP)
                optimizer.step()
    moments = {name: optimizer.state[parameter] for name, parameter in learner.named_parameters()}
    return replace(
        following,
        parameters=_detached(learner),
        first_moments={name: moment["exp_avg"] for name, moment in moments.items()},
        second_moments={name: moment["exp_avg_sq"] for name, moment in moments.items()},
        step=int(moments["output_bias"]["step"]),
    )


def _random_parameters(hidden: int, seed: int) -> dict[str, np.ndarray]:
    # Around the official 0.1, computed in float64 by numpy's own generator: torch's draws differ between kinds of CPU.
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, (3, hidden))
    input_weight, input_bias, output_weight = 0.1 * (1 + noise[0]), noise[1], 0.1 * (1 + noise[2])
    # h is σ(g): scale and shift so that g(0) = 0 and g'(0) = 1.
    output_weight = output_weight / (output_weight * input_weight * (1 - np.tanh(input_bias) ** 2)).sum()
    output_bias = -(output_weight * np.tanh(input_bias)).sum(keepdims=True)
    return {
        "input_weight": input_weight,
        "input_bias": input_bias,
        "output_weight": output_weight,
        "output_bias": output_bias,
    }


def _optimizer(learner: MetaLearner, state: MetaLearnerState) -> torch.optim.AdamW:
    """AdamW over ``learner`` that continues from the moments of ``state``."""
    settings = state.settings
    decayed = {"params": [learner.input_weight, learner.output_weight], "weight_decay": settings.weight_decay}
    biases = {"params": [learner.input_bias, learner.output_bias], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed, biases], lr=settings.learning_rate, betas=BETAS, foreach=False)
    for name, parameter in learner.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(state.step)),
            "exp_avg": state.first_moments[name].clone(),
            "exp_avg_sq": state.second_moments[name].clone(),
        }
    return optimizer


def _minibatches(rows: int, size: int | None, version: int, epoch: int) -> Iterator[list[int] | slice]:
    if size is None or size >= rows:
        yield slice(None)
        return
    order = draws.permutation(version, [f"{epoch}:{row}" for row in range(rows)])
    for start in range(0, rows, size):
        yield order[start : start + size]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch's CPU operations on one thread: sums over rows are split by thread, and rounding with them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _detached(learner: MetaLearner) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.named_parameters()}


def _shapes(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {
        name: f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" for name, value in sorted(tensors.items())
    }
