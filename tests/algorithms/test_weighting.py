from __future__ import annotations

import math

import pytest
import torch

from toolkit.algorithms import objectives, weighting
from toolkit.algorithms.meta_learner import MetaLearner
from toolkit.algorithms.objectives import PairLogProbs
from toolkit.errors import UserError


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def dpo_pairs(margins: torch.Tensor) -> PairLogProbs:
    zero = torch.zeros_like(margins)
    return PairLogProbs(margins, zero, zero, zero, zero + 1, zero + 1)


YES = torch.tensor([True])


def test_mix_oracle() -> None:
    """βΔ = 0.3 offline, −0.1 online, w = 0.4, worked out by hand: loss, dL/dw and the policy's gradient."""
    dpo = objectives.get("dpo", beta=0.1)
    offline_margin, online_margin, w = leaf(3.0), leaf(-1.0), leaf(0.4)
    offline, online = dpo(dpo_pairs(offline_margin)), dpo(dpo_pairs(online_margin))
    loss = weighting.meta_weighted_losses(w, offline, online, YES)
    assert loss.item() == pytest.approx(0.668380, abs=1e-6)
    assert torch.autograd.grad(loss, offline_margin, retain_graph=True)[0].item() == pytest.approx(-0.017022, abs=1e-6)
    assert (
        torch.autograd.grad(loss, w, allow_unused=True, retain_graph=True)[0] is None
    )  # w is a constant to the policy
    meta = weighting.meta_loss(w, offline, online)
    assert meta.item() == loss.item()
    assert torch.autograd.grad(meta, [w, offline_margin], allow_unused=True) == (
        pytest.approx(-0.190042, abs=1e-6),
        None,
    )


def test_equals_plain_dpo_where_it_must() -> None:
    generator = torch.Generator().manual_seed(0)
    offline, online = (torch.rand(64, generator=generator) for _ in range(2))
    w = torch.rand(64, generator=generator)
    some, none = torch.rand(64, generator=generator) < 0.5, torch.zeros(64, dtype=torch.bool)
    assert torch.equal(weighting.meta_weighted_losses(torch.ones(64), offline, online, some), offline)
    assert torch.equal(weighting.meta_weighted_losses(w, offline, online, none), offline)
    copied = weighting.meta_weighted_losses(w, offline, offline, some)
    torch.testing.assert_close(copied, offline, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("missing", "alone"), [("offline_full", 0.5), ("offline_w", 0.2), ("drop", 0.0)])
def test_missing_online_half(missing: str, alone: float) -> None:
    has_online = torch.tensor([True, False])
    losses = weighting.meta_weighted_losses(leaf(0.4, 0.4), leaf(0.5, 0.5), leaf(1.0, 1.0), has_online, missing)
    assert losses.tolist() == pytest.approx([0.4 * 0.5 + 0.6 * 1.0, alone])
    assert weighting.contributing(has_online, missing).tolist() == [True, missing != "drop"]


@pytest.mark.parametrize("missing", weighting.MISSING)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_an_absent_online_half_poisons_nothing(missing: str, poison: float) -> None:
    has_online = torch.tensor([True, False, True, False])
    offline, online = leaf(0.5, 0.6, 0.7, 0.8), leaf(0.1, poison, 0.3, poison)
    losses = weighting.meta_weighted_losses(torch.full((4,), 0.25), offline, online, has_online, missing)
    assert losses.isfinite().all()
    gradients = torch.autograd.grad(losses.sum(), [offline, online])
    assert gradients[1].tolist() == [0.75, 0, 0.75, 0]
    alone = {"offline_full": 1.0, "offline_w": 0.25, "drop": 0.0}[missing]
    assert gradients[0].tolist() == [0.25, alone, 0.25, alone]

    # and through an objective, whose derivative at the poison is itself poison
    margins = leaf(1.0, poison, 3.0, poison)
    online = objectives.get("dpo")(dpo_pairs(margins).masked(has_online))
    losses = weighting.meta_weighted_losses(torch.full((4,), 0.25), offline, online, has_online, missing)
    (gradient,) = torch.autograd.grad(losses.sum(), margins)
    assert gradient.isfinite().all() and gradient[1] == gradient[3] == 0 and gradient[0] < 0


def test_kinds_of_weight() -> None:
    s = torch.tensor([-2.0, 0.0], requires_grad=True)
    learner = MetaLearner("random", seed=1)
    expected = {
        "one": [1, 1],
        "zero": [0, 0],
        "constant": [0.3, 0.3],
        "fixed": s.sigmoid().tolist(),
        "meta": learner(s).tolist(),
    }
    assert set(expected) == set(weighting.KINDS)
    for kind, values in expected.items():
        w = weighting.weights(kind, s, learner, **({"value": 0.3} if kind == "constant" else {}))
        assert w.tolist() == pytest.approx(values) and w.dtype == s.dtype and not w.requires_grad


def test_gradient_of_the_meta_loss_equals_equation_7_and_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    s = -torch.rand(16, generator=generator, dtype=torch.float64)
    offline, online = (torch.rand(16, generator=generator, dtype=torch.float64) for _ in range(2))
    learner = MetaLearner("random", hidden=8, seed=2).double()
    parameters = list(learner.parameters())

    def meta() -> torch.Tensor:
        return weighting.meta_loss(learner(s), offline, online).mean()

    gradients = torch.autograd.grad(meta(), parameters)
    equation_7 = torch.autograd.grad(((offline - online) * learner(s)).mean(), parameters)
    for parameter, gradient, expected in zip(parameters, gradients, equation_7, strict=True):
        torch.testing.assert_close(gradient, expected)
        for index in range(parameter.numel()):
            with torch.no_grad():
                parameter[index] += 1e-6
                above = meta()
                parameter[index] -= 2e-6
                below = meta()
                parameter[index] += 1e-6
            assert ((above - below) / 2e-6).item() == pytest.approx(gradient[index].item(), abs=1e-8)


def test_errors() -> None:
    s, yes = torch.zeros(1), torch.tensor([True])
    with pytest.raises(UserError, match="expected one of: constant, fixed, meta, one, zero"):
        weighting.weights("two", s)
    with pytest.raises(UserError, match=r"in \[0, 1\], got None"):
        weighting.weights("constant", s)
    with pytest.raises(ValueError, match="needs the meta-learner"):
        weighting.weights("meta", s)
    for call in (
        lambda: weighting.meta_weighted_losses(s, s, s, yes, "ignore"),
        lambda: weighting.contributing(yes, "ignore"),
    ):
        with pytest.raises(UserError, match="expected one of: drop, offline_full, offline_w"):
            call()
