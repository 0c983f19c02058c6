"""Reference choices: which weights the log-probs of a round are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.algorithms import gates
from toolkit.errors import UserError, unknown

if TYPE_CHECKING:
    from torch import Tensor

CHOICES = ("initial", "previous", "behaviour", "ema")
WARM_STARTS = ("none", "offline_round")


def resolve(choice: str, round_index: int) -> str:
    """The name of the weights that ``choice`` stands for in a round.

    ``initial``: the configured initial model. ``previous``: the policy that started the round before (in round 0 the
    initial model), as the official MetaAPO code. ``behaviour``: the policy that starts this round and samples for it
    (BPO, arXiv 2406.12168). ``ema``: the moving average of the policy.

    Returns ``initial``, ``ema`` or ``policy-<round, 4 digits>``. Raises ``UserError`` for an unknown choice.
    """
    if choice not in CHOICES:
        raise unknown("reference", choice, CHOICES)
    if choice == "behaviour":
        return f"policy-{round_index:04d}"
    if choice == "previous":
        return f"policy-{round_index - 1:04d}" if round_index > 0 else "initial"
    return choice


def validate(
    gate_reference: str,
    loss_reference: str,
    gate_kind: str,
    warm_start: str,
    rounds: int,
    needs_reference: bool = True,
    initial_is_policy: bool = True,
) -> None:
    """Refuse a gate that could not tell one pair from another in any round.

    Scores are taken before a round's first step. Where the gate reference equals the policy, every Δ is 0 and all
    scores are alike. ``rounds`` counts the warm-start round too. ``needs_reference`` is the objective's;
    ``initial_is_policy``: the initial reference is the model that the policy starts from.

    Raises ``UserError`` for that and for unknown names.
    """
    for choice in (gate_reference, loss_reference):
        if choice not in CHOICES:
            raise unknown("reference", choice, CHOICES)
    if warm_start not in WARM_STARTS:
        raise unknown("warm_start", warm_start, WARM_STARTS)
    if gate_kind not in gates.KINDS:
        raise unknown("gate", gate_kind, gates.KINDS)
    if not gates.KINDS[gate_kind].needs_scores:
        return
    gated = range(1 if warm_start == "offline_round" else 0, rounds)
    if not gated:
        raise UserError(
            f"gate {gate_kind!r} has no round to act in: rounds={rounds} and warm_start={warm_start}; "
            "set rounds to 2 or more, or gate=none"
        )
    starts_equal = initial_is_policy or gate_reference == "ema"  # the average starts as the policy
    equal = gate_reference == "behaviour" or (starts_equal and list(gated) == [0])
    if needs_reference and equal:
        remedy = (
            "take another gate reference (initial, previous, ema; the loss reference can stay)"
            if gate_reference == "behaviour"
            else "set rounds to 2 or more"
        )
        raise UserError(
            f"gate {gate_kind!r} compares the policy with itself in every round: gate reference "
            f"{gate_reference!r}, rounds={rounds}, so all scores would be equal; {remedy}"
        )


def ema_update(average: Tensor, current: Tensor, decay: float) -> Tensor:
    """decay · average + (1 − decay) · current, in the dtype of ``average``, as a new tensor of the same shape.

    Keep the average in fp32: in bf16 the small steps would be rounded away.
    """
    return average + (1 - decay) * (current.to(average.dtype) - average)
