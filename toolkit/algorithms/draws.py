"""Random numbers as pure functions of what they are for: the same on every machine, in any order, after any restart.

Every number is a BLAKE2b hash of its purpose and its coordinates. Needs no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np


def uniform(seed: int, round_index: int, pair_id: str) -> float:
    """The gate's draw u of a pair: one of the 2⁵² midpoints (2k+1)/2⁵³, so strictly inside (0, 1) and exact in float64."""
    # The lowest of the 53 bits is set: an odd numerator is the midpoint of a cell of width 2⁻⁵².
    return (_hash(b"gate", f"{seed}:{round_index}:{pair_id}") >> 11 | 1) / 2**53


def uniforms(seed: int, round_index: int, pair_ids: Iterable[str]) -> np.ndarray:
    """``uniform`` of each pair: float64 ``(N,)``."""
    return np.array([uniform(seed, round_index, pair_id) for pair_id in pair_ids], dtype=np.float64)


def sample_seed(seed: int, round_index: int, pair_id: str, sample: int) -> int:
    """The sampling seed of response number ``sample`` to a pair's prompt: 31 bits, as vLLM takes them."""
    return _hash(b"sample", f"{seed}:{round_index}:{sample}:{pair_id}") >> 33


def permutation(seed: int, keys: Sequence[str]) -> list[int]:
    """A seeded order of ``keys``, as indices. The relative order of two keys does not depend on which others there are.

    Equal keys keep their order.
    """
    return sorted(range(len(keys)), key=lambda index: _hash(b"order", f"{seed}:{keys[index]}"))


def _hash(purpose: bytes, coordinates: str) -> int:
    digest = hashlib.blake2b(coordinates.encode(), digest_size=8, person=purpose).digest()
    return int.from_bytes(digest, "big")
