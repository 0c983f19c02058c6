from __future__ import annotations

import math

import numpy as np

from toolkit.algorithms import draws


def test_golden_values() -> None:
    """A run's decisions are recorded and recomputed for years: these numbers never change."""
    assert draws.uniform(0, 0, "a") == 0.11066044945190423
    assert draws.uniform(17, 3, "é/1") == 0.8588165738281958
    assert draws.sample_seed(0, 0, "a", 0) == 1674854432
    assert draws.permutation(0, ["a", "b", "c", "d", "e"]) == [2, 4, 1, 0, 3]


def test_uniforms_are_uniform_and_strictly_inside() -> None:
    u = draws.uniforms(3, 1, (f"p{index}" for index in range(20_000)))
    assert u.dtype == np.float64 and u.shape == (20_000,)
    assert (u > 0).all() and (u < 1).all()
    # Kolmogorov-Smirnov at a level of one in a million
    distance = np.abs(np.sort(u) - (np.arange(len(u)) + 0.5) / len(u)).max()
    assert distance < 2.7 / math.sqrt(len(u))
    assert len(set(u)) == len(u)


def test_the_ends_of_the_hash_stay_inside(monkeypatch) -> None:
    for value in (0, 2**64 - 1):
        monkeypatch.setattr(draws, "_hash", lambda *_, value=value: value)
        assert 0 < draws.uniform(0, 0, "") < 1


def test_every_coordinate_counts() -> None:
    numbers = {
        draws.uniform(seed, round_index, pair)
        for seed in (1, 11, -1)
        for round_index in (1, 11)
        for pair in ("1", "11", "1:1")
    }
    assert len(numbers) == 18
    assert draws.uniforms(1, 2, ["b", "a"]).tolist() == [draws.uniform(1, 2, "b"), draws.uniform(1, 2, "a")]


def test_sample_seeds_fit_31_bits_and_differ() -> None:
    seeds = [draws.sample_seed(0, 0, f"p{pair}", sample) for pair in range(200) for sample in range(8)]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert max(seeds) > 2**30
    assert len(set(seeds)) >= len(seeds) - 1


def test_permutation() -> None:
    keys = [f"k{index}" for index in range(500)]
    order = draws.permutation(7, keys)
    assert sorted(order) == list(range(500))
    assert order != draws.permutation(8, keys)
    subset = [keys[index] for index in range(0, 500, 3)]
    ordered_subset = [subset[index] for index in draws.permutation(7, subset)]
    assert ordered_subset == [keys[index] for index in order if keys[index] in set(subset)]
    assert draws.permutation(7, ["same", "same"]) == [0, 1]
