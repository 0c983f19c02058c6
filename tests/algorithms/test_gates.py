from __future__ import annotations

import math

import pytest
import torch

from tests.algorithms.presets import preset
from toolkit.algorithms import draws, gates
from toolkit.algorithms.meta_learner import initial_state
from toolkit.errors import UserError

SCORES = torch.tensor([-40.0, -2.0, -math.log(2), -1e-3, 0.0])
U = draws.uniforms(0, 0, map(str, range(20_000)))


def test_none_and_all_leave_nothing_to_chance() -> None:
    ends = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    assert not gates.decide(ends, gates.get("none").weights(SCORES[:2])).any()
    assert gates.decide(ends, gates.get("all").weights(SCORES[:2])).all()


def test_a_draw_equal_to_the_weight_does_not_sample() -> None:
    assert gates.decide(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), torch.full((3,), 0.5)).tolist() == [
        False,
        False,
        True,
    ]


def test_random_samples_at_its_rate() -> None:
    w = gates.get("random", probability=0.3).weights(torch.full((len(U),), math.nan))
    assert gates.decide(U, w).mean() == pytest.approx(0.3, abs=0.015)
    assert not gates.decide(U, gates.get("random", probability=0).weights(torch.zeros(len(U)))).any()
    assert gates.decide(U, gates.get("random", probability=1).weights(torch.zeros(len(U)))).all()


def test_fixed_threshold_and_meta() -> None:
    assert gates.get("fixed").weights(SCORES).tolist() == pytest.approx(SCORES.sigmoid().tolist())
    assert gates.get("threshold", threshold=-2.0).weights(SCORES).tolist() == [0, 1, 1, 1, 1]
    state = initial_state(preset("metaapo_paper"), seed=0)
    w = gates.get("meta").weights(SCORES, state)
    assert w.dtype == torch.float32 and not w.requires_grad
    assert w.tolist() == pytest.approx((10 * torch.tanh(0.1 * SCORES)).sigmoid().tolist())
    explored = gates.get("meta", exploration=0.6).weights(SCORES, state)
    assert explored.tolist() == pytest.approx(w.clamp(max=0.4).tolist())


def test_a_decision_depends_on_its_pair_alone() -> None:
    """Whatever the batch and the threads: a shard recomputed by anyone gives the same requests."""
    state = initial_state(preset("metaapo"), seed=1)
    scores = torch.randn(1003, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = gates.get("meta").weights(scores, state)
    assert torch.equal(whole, torch.cat([gates.get("meta").weights(part, state) for part in scores.split(7)]))


def test_needs() -> None:
    assert {kind for kind, gate in gates.KINDS.items() if gate.needs_scores} == {"fixed", "threshold", "meta"}
    assert {kind for kind, gate in gates.KINDS.items() if gate.needs_learner} == {"meta"}


def test_errors() -> None:
    with pytest.raises(UserError, match="expected one of: all, fixed, meta, none, random, threshold"):
        gates.get("maybe")
    with pytest.raises(UserError, match=r"no parameter 'p'; its parameters: probability \(required\)"):
        gates.get("random", p=0.5)
    with pytest.raises(UserError, match="needs the parameter 'threshold'"):
        gates.get("threshold")
    for kind, parameters in [
        ("random", {"probability": 1.1}),
        ("meta", {"exploration": 1}),
        ("threshold", {"threshold": math.nan}),
    ]:
        with pytest.raises(UserError, match="must be"):
            gates.get(kind, **parameters)
    with pytest.raises(UserError, match="1 NaN among 2"):
        gates.get("fixed").weights(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match="state of the meta-learner"):
        gates.get("meta").weights(SCORES)
    with pytest.raises(ValueError, match="as many draws as weights"):
        gates.decide(U[:2], SCORES)
