from __future__ import annotations

import math

import pytest
import torch

from toolkit.algorithms import objectives
from toolkit.algorithms.objectives import PairLogProbs
from toolkit.errors import UserError

ALL = [("dpo", {}), ("dpo", {"label_smoothing": 0.1}), ("ipo", {}), ("ipo_sum", {}), ("simpo", {})]


def pairs(
    chosen=-12.0, rejected=-20.0, reference_chosen=-14.0, reference_rejected=-19.0, tokens=(4, 5), count=1
) -> PairLogProbs:
    """One pair, by default the fixture with Δ = 3, repeated ``count`` times, in float64 with gradients for the policy."""
    policy = [torch.full((count,), value, dtype=torch.float64, requires_grad=True) for value in (chosen, rejected)]
    reference = [torch.full((count,), value, dtype=torch.float64) for value in (reference_chosen, reference_rejected)]
    return PairLogProbs(*policy, *reference, *(torch.full((count,), value) for value in tokens))


@pytest.mark.parametrize(
    ("name", "parameters", "loss", "chosen_gradient", "rejected_gradient"),
    [
        # losses and gradients of the fixture worked out by hand from the papers' formulas
        ("dpo", {}, 0.554355, -0.042556, 0.042556),
        ("dpo", {"label_smoothing": 0.1}, 0.584355, -0.032556, 0.032556),
        ("ipo_sum", {}, 4.0, -4.0, 4.0),
        ("ipo", {}, 18.49, -2.15, 1.72),
        ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.5}, 0.313262, -0.134471, 0.107577),
    ],
)
def test_loss_and_gradient_of_the_fixture(name, parameters, loss, chosen_gradient, rejected_gradient) -> None:
    batch = pairs()
    value = objectives.get(name, **parameters)(batch)
    assert value.shape == (1,)
    assert value.item() == pytest.approx(loss, abs=1e-6)
    gradients = torch.autograd.grad(value.sum(), (batch.chosen, batch.rejected))
    assert [gradient.item() for gradient in gradients] == pytest.approx([chosen_gradient, rejected_gradient], abs=1e-6)


@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_gradients_equal_finite_differences(name, parameters) -> None:
    objective = objectives.get(name, **parameters)
    generator = torch.Generator().manual_seed(0)
    values = [(-20 + 5 * torch.randn(6, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    reference = [-20 + 5 * torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2)]
    tokens = [torch.randint(3, 30, (6,), generator=generator) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *policy: objective(PairLogProbs(*policy, *reference, *tokens)), values)


@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_zero_margin_loss_is_the_loss_of_policy_equal_reference(name, parameters) -> None:
    objective = objectives.get(name, **parameters)
    if objective.zero_margin_loss is None:
        assert not objective.needs_reference
        return
    equal = pairs(reference_chosen=-12.0, reference_rejected=-20.0)
    assert objective.margin(equal).item() == 0
    assert objective(equal).item() == pytest.approx(objective.zero_margin_loss, rel=1e-12)
    if name == "dpo":
        assert objective.zero_margin_loss == math.log(2)


def test_margins_are_unscaled_sums_except_without_reference() -> None:
    assert [objectives.get(name).margin(pairs()).item() for name in ("dpo", "ipo", "ipo_sum")] == pytest.approx(
        [3, 3, 3]
    )
    # means −3 and −4, less γ/β
    assert objectives.get("simpo", beta=2.5, gamma_beta_ratio=0.24).margin(pairs()).item() == pytest.approx(1 - 0.24)


def test_simpo_ignores_the_reference() -> None:
    batch = pairs()
    without = PairLogProbs(batch.chosen, batch.rejected, None, None, batch.chosen_tokens, batch.rejected_tokens)
    objective = objectives.get("simpo")
    assert torch.equal(objective(without), objective(batch))
    with pytest.raises(ValueError, match="needs reference log-probs"):
        objectives.get("dpo")(without)


@pytest.mark.parametrize(("name", "parameters"), ALL)
@pytest.mark.parametrize("margin", [1e4, -1e4])
@pytest.mark.parametrize("tokens", [(1, 1), (0, 0)])
def test_extreme_margins_are_finite_in_single_precision(name, parameters, margin, tokens) -> None:
    zero = torch.zeros(1)
    chosen = torch.full((1,), margin, requires_grad=True)
    loss = objectives.get(name, **parameters)(
        PairLogProbs(chosen, zero, zero, zero, *map(torch.tensor, ([tokens[0]], [tokens[1]])))
    )
    (gradient,) = torch.autograd.grad(loss.sum(), chosen)
    assert loss.isfinite().all() and gradient.isfinite().all()
    if margin < 0:
        assert gradient.item() < 0


@pytest.mark.parametrize("name", ["dpo", "ipo_sum"])
def test_depends_on_the_margin_alone(name) -> None:
    """Swapping the sides negates Δ, and a constant added to policy and reference changes nothing."""
    objective = objectives.get(name)
    moved = objective(pairs(chosen=-12.0 - 7, reference_chosen=-14.0 - 7))
    assert moved.item() == pytest.approx(objective(pairs()).item())
    swapped = pairs(chosen=-20.0, rejected=-12.0, reference_chosen=-19.0, reference_rejected=-14.0)
    assert objective.margin(swapped).item() == -objective.margin(pairs()).item()
    if name == "dpo":
        assert objective(swapped).item() == pytest.approx(objective(pairs()).item() + 0.3)  # −log σ(−x) = −log σ(x) + x


def test_masked_pairs_leave_no_trace() -> None:
    batch = pairs(count=2)
    present = torch.tensor([True, False])
    spoilt = PairLogProbs(
        batch.chosen.where(present, torch.nan),
        batch.rejected.where(present, -torch.inf),
        batch.reference_chosen,
        batch.reference_rejected.where(present, torch.nan),
        batch.chosen_tokens.where(present, 0),
        batch.rejected_tokens.where(present, 0),
    )
    loss = objectives.get("ipo")(spoilt.masked(present))
    assert loss.isfinite().all()
    (gradient,) = torch.autograd.grad(loss[0], batch.chosen)
    assert gradient.tolist() == pytest.approx([-2.15, 0.0])


def test_names_and_errors() -> None:
    with pytest.raises(UserError, match="unknown objective 'dop'; expected one of: dpo, ipo, ipo_sum, simpo"):
        objectives.get("dop")
    with pytest.raises(UserError, match=r"no parameter 'gamma'; its parameters: beta=2.0, gamma_beta_ratio=0.25"):
        objectives.get("simpo", gamma=1.0)
    for name, parameters in [
        ("dpo", {"beta": 0}),
        ("dpo", {"label_smoothing": 0.5}),
        ("dpo", {"beta": "0.1"}),
        ("dpo", {"beta": math.nan}),
        ("ipo", {"beta": -1.0}),
        ("simpo", {"gamma_beta_ratio": -0.1}),
    ]:
        with pytest.raises(UserError, match="must be"):
            objectives.get(name, **parameters)


def test_shapes_that_would_broadcast_are_refused() -> None:
    column = torch.zeros(3)
    with pytest.raises(ValueError, match="one shape"):
        PairLogProbs(column, column, column[:, None], column, column, column)
