from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch

from toolkit.algorithms import features
from toolkit.algorithms.features import CLIP, VARIANCE_FLOOR, FeatureStatistics, feature, statistics
from toolkit.errors import UserError

MARGINS = torch.tensor([-30.0, 0.0, 3.0, 1e4, -1e4])


def test_kinds_of_feature() -> None:
    beta = 0.1
    expected = [-math.log1p(math.exp(-beta * margin)) for margin in (-30.0, 0.0, 3.0)]
    assert feature(MARGINS, "log_sigmoid_beta", beta)[:3].tolist() == pytest.approx(expected)
    assert feature(MARGINS, "log_sigmoid", beta)[:3].tolist() == pytest.approx(
        [-30.0, -math.log(2), -0.048587], abs=1e-5
    )
    stats = FeatureStatistics(mean=-1.0, std=2.0, count=9, variance=4.0)
    standardised = feature(MARGINS, "standardised", beta, stats)
    assert standardised[:3].tolist() == pytest.approx([(value + 1) / 2 for value in expected])
    assert standardised[4].item() == pytest.approx((CLIP + 1) / 2)
    for kind in features.KINDS:
        assert feature(MARGINS, kind, beta, stats).isfinite().all()


def test_statistics_are_of_clipped_scores_and_do_not_depend_on_their_order() -> None:
    scores = feature(50 * torch.randn(1000, generator=torch.Generator().manual_seed(0)), "log_sigmoid_beta", 0.1)
    scores[0] = -1e6
    stats = statistics(scores)
    clipped = scores.double().clamp(min=CLIP)
    assert (stats.count, stats.mean) == (1000, pytest.approx(clipped.mean().item()))
    assert stats.variance == pytest.approx(clipped.var(correction=0).item())
    assert stats.std == pytest.approx(stats.variance**0.5)
    assert statistics(scores.flip(0)) == stats
    assert FeatureStatistics(**json.loads(json.dumps(asdict(stats)))) == stats


def test_variance_is_floored_and_reported_as_measured() -> None:
    stats = statistics(torch.full((5,), -math.log(2)))
    assert stats.variance == 0
    assert stats.std == math.sqrt(VARIANCE_FLOOR)
    assert feature(torch.zeros(1), "standardised", 0.1, stats).item() == pytest.approx(0, abs=1e-5)


def test_errors() -> None:
    with pytest.raises(UserError, match="expected one of: log_sigmoid, log_sigmoid_beta, standardised"):
        feature(MARGINS, "raw", 0.1)
    with pytest.raises(ValueError, match="needs the statistics"):
        feature(MARGINS, "standardised", 0.1)
    with pytest.raises(UserError, match="got 2 scores, 1 of them NaN"):
        statistics(torch.tensor([-1.0, math.nan]))
    with pytest.raises(UserError, match="got 0 scores"):
        statistics(torch.zeros(0))
