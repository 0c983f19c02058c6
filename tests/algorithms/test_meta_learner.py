from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from tests.algorithms.presets import preset
from toolkit.algorithms.features import FeatureStatistics
from toolkit.algorithms.meta_learner import MetaBatch, MetaLearner, MetaLearnerState, initial_state, update
from toolkit.errors import UserError


def batch(rows: int, seed: int = 0) -> MetaBatch:
    """Online better (lower loss) where s < 0, offline where s > 0."""
    generator = torch.Generator().manual_seed(seed)
    s = 4 * torch.rand(rows, generator=generator) - 2
    return MetaBatch(s, 2 - s, 2 + 0.1 * torch.randn(rows, generator=generator))


def same(one: MetaLearnerState, other: MetaLearnerState) -> bool:
    (tensors, values), (others, other_values) = one.to_tensors(), other.to_tensors()
    return values == other_values and all(torch.equal(value, others[name]) for name, value in tensors.items())


def test_constant_init_is_the_official_function() -> None:
    table = {0: 0.500, -0.693: 0.334, -1: 0.270, -2: 0.122, -3: 0.052, -5: 0.010, -math.inf: 4.5e-5}
    weights = MetaLearner("constant")(torch.tensor(list(table)))
    assert weights.shape == (len(table),)
    assert weights.tolist() == pytest.approx(list(table.values()), abs=6e-4)
    assert weights[-1].item() == pytest.approx(4.5e-5, rel=0.01)
    assert sum(parameter.numel() for parameter in MetaLearner().parameters()) == 301


def test_random_init_is_near_sigma_and_from_its_seed_alone() -> None:
    s = torch.linspace(-4, 4, 81, requires_grad=True)
    before = torch.get_rng_state()
    learners = [MetaLearner("random", seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(before, torch.get_rng_state())
    for learner in learners:
        assert (learner(s) - s.sigmoid()).abs().max() < 0.02
    assert learners[0](s).tolist() == learners[1](s).tolist() != learners[2](s).tolist()
    origin = torch.zeros(1, requires_grad=True)
    w = learners[0](origin)
    assert w.item() == pytest.approx(0.5, abs=1e-6)
    assert torch.autograd.grad(w, origin)[0].item() == pytest.approx(0.25, abs=1e-6)


def test_clamp_bounds_the_weight_and_keeps_a_gradient() -> None:
    s = torch.tensor([-1e4, 0.0, 1e4])
    assert MetaLearner(clamp=0.1)(s).tolist() == pytest.approx([0.1, 0.5, 0.9], abs=1e-4)
    learner = MetaLearner(clamp=0.1)
    learner(torch.tensor([-6.0])).sum().backward()
    assert learner.output_bias.grad.item() > 1e-4


@pytest.mark.parametrize("init", ["constant", "random"])
def test_units_stay_equal_after_constant_init_and_differ_after_random(init: str) -> None:
    state = initial_state(preset("metaapo_paper", init=init), seed=0)
    for step in range(15):
        state = update(state, batch(64, step))
    start = initial_state(state.settings, seed=0).parameters
    for name in ("input_weight", "input_bias", "output_weight"):
        moved = state.parameters[name] - start[name]
        assert moved.abs().max() > 1e-3
        spread = (moved.max() - moved.min()).item()
        # Not exactly 0: torch sums the columns of a vector's width and those left over in different orders.
        assert spread < 1e-7 if init == "constant" else spread > 1e-3


def test_update_goes_where_the_loss_is_lower() -> None:
    state = initial_state(preset("metaapo"), seed=0)
    probe = torch.tensor([-1.5, 1.5])
    before = state.learner()(probe)
    for step in range(10):
        state = update(state, batch(256, step))
    after = state.learner()(probe)
    assert after[0] < before[0] and after[1] > before[1]
    assert (state.version, state.step) == (10, 20)  # 256 rows are two minibatches


def test_one_step_over_all_rows_equals_adamw_by_hand() -> None:
    """First step of Adam: each parameter moves by lr·g/(|g| + ε'), weights after their decay."""
    settings = preset("metaapo_paper", init="random", weight_decay=0.1)
    state, rows = initial_state(settings, seed=0), batch(32)
    learner = state.learner()
    loss = (learner(rows.features) * (rows.offline_losses - rows.online_losses)).mean()
    gradients = dict(zip(state.parameters, torch.autograd.grad(loss, list(learner.parameters())), strict=True))
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    following = update(state, rows)
    assert following.step == 1
    for name, old in state.parameters.items():
        gradient = gradients[name] / max(1.0, norm.item())
        decay = settings.learning_rate * settings.weight_decay if name.endswith("weight") else 0.0
        expected = old * (1 - decay) - settings.learning_rate * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(following.parameters[name], expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(following.first_moments[name], 0.1 * gradient, rtol=1e-4, atol=1e-8)


def test_gradients_are_clipped() -> None:
    rows = batch(32)
    huge = MetaBatch(rows.features, 1e4 * rows.offline_losses, rows.online_losses)
    moments = update(initial_state(preset("metaapo_paper"), seed=0), huge).first_moments.values()
    assert torch.cat([moment.flatten() for moment in moments]).norm().item() == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("name", ["metaapo_paper", "metaapo"])
def test_update_is_pure_and_bit_deterministic(name: str) -> None:
    state = initial_state(preset(name, init="random"), seed=5)
    tensors, values = state.to_tensors()
    kept = MetaLearnerState.from_tensors({key: value.clone() for key, value in tensors.items()}, values)
    big = batch(100_000, 2)  # so many that two threads would split the sums
    one = update(state, big)
    assert same(state, kept)  # its argument is untouched
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.manual_seed(99)
        with torch.no_grad():
            other = update(state, big)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert same(one, other)
    assert not same(one, update(state, batch(4000, 3)))


def test_empty_batch_makes_the_next_version_of_the_same_function() -> None:
    state = update(initial_state(preset("metaapo_paper"), seed=0), batch(8))
    following = update(state, batch(0))
    assert following.version == state.version + 1
    assert same(replace(following, version=state.version), state)


def test_minibatches_cover_every_row_once_an_epoch() -> None:
    state = initial_state(preset("metaapo", minibatch=50, epochs=3), seed=0)
    assert update(state, batch(120)).step == 9  # 50 + 50 + 20 rows, three times
    reordered = update(state, batch(120)).parameters["input_weight"]
    plain = update(replace(state, settings=preset("metaapo", minibatch=None, epochs=3)), batch(120))
    assert plain.step == 3
    assert not torch.equal(reordered, plain.parameters["input_weight"])


def test_state_survives_storage_bit_for_bit() -> None:
    stats = FeatureStatistics(mean=-0.1, std=1 / 3, count=7, variance=1 / 9)
    state = replace(update(initial_state(preset("metaapo"), seed=2), batch(200)), statistics=stats)
    for each in (initial_state(preset("metaapo_paper"), seed=0), state):
        tensors, values = each.to_tensors()
        read = MetaLearnerState.from_tensors(load(save(tensors)), json.loads(json.dumps(values)))
        assert same(read, each) and read.statistics == each.statistics and read.settings == each.settings
        assert same(update(read, batch(64)), update(each, batch(64)))


def test_errors() -> None:
    state = initial_state(preset("metaapo_paper"), seed=0)
    rows = batch(4)
    rows.online_losses[2] = math.nan
    with pytest.raises(UserError, match=r"version 1, got others in rows \[2\] of 4"):
        update(state, rows)
    with pytest.raises(ValueError, match="one shape"):
        MetaBatch(torch.zeros(3), torch.zeros(3), torch.zeros(2))
    tensors, values = state.to_tensors()
    del tensors["parameters.input_bias"]
    with pytest.raises(UserError, match="expected a meta-learner of"):
        MetaLearnerState.from_tensors(tensors, values)
    with pytest.raises(UserError, match="expected one of: constant, random"):
        MetaLearner("zeros")
