from __future__ import annotations

import pytest
import torch

from toolkit.algorithms.references import ema_update, resolve, validate
from toolkit.errors import UserError


def test_resolve() -> None:
    names = {
        choice: [resolve(choice, round_index) for round_index in (0, 1, 4)]
        for choice in ("initial", "previous", "behaviour", "ema")
    }
    assert names == {
        "initial": ["initial"] * 3,
        "previous": ["initial", "policy-0000", "policy-0003"],
        "behaviour": ["policy-0000", "policy-0001", "policy-0004"],
        "ema": ["ema"] * 3,
    }
    with pytest.raises(UserError, match="expected one of: behaviour, ema, initial, previous"):
        resolve("sft", 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ("initial", "initial", "meta", "none", 2),
        ("initial", "behaviour", "meta", "offline_round", 2),
        ("previous", "previous", "fixed", "none", 3),
        ("ema", "ema", "threshold", "offline_round", 2),
        ("behaviour", "behaviour", "all", "none", 1),  # a gate that reads no scores
        ("behaviour", "behaviour", "meta", "none", 2, False),  # an objective without reference
        ("initial", "initial", "meta", "none", 1, True, False),  # an initial reference that is another model
        ("previous", "previous", "meta", "none", 1, True, False),
    ],
)
def test_valid_references(arguments) -> None:
    validate(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("behaviour", "initial", "meta", "offline_round", 4),
            "itself in every round: gate reference 'behaviour'.*take another",
        ),
        (("behaviour", "initial", "fixed", "none", 2, True, False), "itself in every round"),
        (("initial", "initial", "meta", "none", 1), "itself in every round.*set rounds to 2 or more"),
        (("previous", "initial", "threshold", "none", 1), "itself in every round"),
        (("ema", "initial", "meta", "none", 1, True, False), "itself in every round"),
        (("initial", "initial", "meta", "offline_round", 1), "no round to act in"),
        (("sft", "initial", "meta", "none", 2), "unknown reference 'sft'"),
        (("initial", "sft", "none", "none", 2), "unknown reference 'sft'"),
        (("initial", "initial", "magic", "none", 2), "unknown gate 'magic'"),
        (("initial", "initial", "meta", "warm", 2), "unknown warm_start 'warm'"),
    ],
)
def test_refused_references(arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        validate(*arguments)


def test_ema_update() -> None:
    average, current = torch.tensor([0.2, 1.0]), torch.tensor([1.0, 1.0], dtype=torch.bfloat16)
    result = ema_update(average, current, decay=0.4)
    assert result.tolist() == pytest.approx([0.68, 1.0]) and result.dtype == torch.float32
    assert average.tolist() == pytest.approx([0.2, 1.0])
