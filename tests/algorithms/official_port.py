"""A single-process port of the official MetaAPO code, the oracle of the preset ``metaapo_reference_code``.

What github.com/junming-yang/MetaAPO (1b1b4c5) computes, in plain torch and without our package: one learner of constant
init, its feature log σ(Δ) without β, the gate u > h, pairs that were not sampled dropped, the learner's weight read again
at the current policy, one AdamW step over the whole buffer every ``interval`` policy steps, the rest of a round thrown away.

It takes log-probs wherever they come from: recorded arrays, or tensors that carry the gradient of a real policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LogProbs(NamedTuple):
    """Summed log-probs of B pairs, each ``(B,)``."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor

    def rows(self, index: Tensor) -> LogProbs:
        return LogProbs(*(value[index] for value in self))

    @property
    def logits(self) -> Tensor:
        return (self.chosen - self.rejected) - (self.reference_chosen - self.reference_rejected)


class OfficialLearner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(1, 100), nn.Linear(100, 1)
        for layer in (self.fc1, self.fc2):
            nn.init.constant_(layer.weight, 0.1)
            nn.init.zeros_(layer.bias)

    def forward(self, score: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(torch.tanh(self.fc1(score.unsqueeze(-1))))).squeeze(-1)


class OfficialRun:
    """The official algorithm's state over a run: learner, its optimizer, the buffer, the count of policy steps."""

    def __init__(self, beta: float = 0.1, interval: int = 16, label_smoothing: float = 0.0) -> None:
        self.beta, self.interval, self.label_smoothing = beta, interval, label_smoothing
        self.learner = OfficialLearner()
        groups = [
            {"params": [self.learner.fc1.weight, self.learner.fc2.weight], "weight_decay": 1e-4},
            {"params": [self.learner.fc1.bias, self.learner.fc2.bias], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=5e-3, betas=(0.9, 0.999))
        self.buffer: list[tuple[Tensor, Tensor]] = []
        self.steps_in_round = 0
        self.updates = 0

    def gate(self, scores: LogProbs, u: Tensor) -> tuple[Tensor, Tensor]:
        """w and whether to sample, each ``(N,)``, of a round's pairs scored by the policy that starts it."""
        with torch.no_grad():
            w = self.learner(F.logsigmoid(scores.logits))
        return w, u > w

    def policy_losses(self, offline: LogProbs, online: LogProbs) -> tuple[Tensor, Tensor]:
        """Losses and weights ``(n,)`` of a batch's n sampled pairs. Enters them into the buffer."""
        with torch.no_grad():
            w = self.learner(F.logsigmoid(offline.logits))
        self.buffer.append((offline.logits.detach(), online.logits.detach()))
        return w * self._base(offline.logits) + (1 - w) * self._base(online.logits), w

    def after_step(self) -> bool:
        """To be called after every policy step. Whether the learner was updated."""
        self.steps_in_round += 1
        if self.steps_in_round % self.interval:
            return False
        self._meta_step()
        return True

    def end_round(self) -> None:
        """A round is a process of its own: rows since its last update are lost and the count starts again."""
        self.buffer.clear()
        self.steps_in_round = 0

    def parameters(self) -> dict[str, Tensor]:
        """The learner's parameters under our names."""
        fc1, fc2 = self.learner.fc1, self.learner.fc2
        return {
            "input_weight": fc1.weight.detach().flatten(),
            "input_bias": fc1.bias.detach(),
            "output_weight": fc2.weight.detach().flatten(),
            "output_bias": fc2.bias.detach(),
        }

    def _meta_step(self) -> None:
        offline, online = (torch.cat(column) for column in zip(*self.buffer, strict=True))
        # The official code averages gradients over chunks of equal size: the mean over all rows.
        w = self.learner(F.logsigmoid(offline))
        loss = (w * self._base(offline) + (1 - w) * self._base(online)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        self.optimizer.step()
        self.buffer.clear()
        self.updates += 1

    def _base(self, logits: Tensor) -> Tensor:
        x = self.beta * logits
        return -(1 - self.label_smoothing) * F.logsigmoid(x) - self.label_smoothing * F.logsigmoid(-x)


@dataclass(frozen=True)
class Step:
    """One policy step. ``losses`` and ``weights`` are of the batch's sampled pairs, in its order."""

    losses: Tensor
    weights: Tensor
    updated: bool


def train_round(
    run: OfficialRun,
    batches: Iterable[Tensor],
    sampled: Tensor,
    log_probs: Callable[[Tensor], tuple[LogProbs, LogProbs]],
    optimizer: torch.optim.Optimizer,
    clip: float = 1.0,
) -> Iterator[Step]:
    """One round of a real policy, step by step.

    ``batches``: indices of each step's pairs; ``sampled`` ``(N,)``: which pairs have an online half (the others are
    dropped from their batch); ``log_probs(indices)``: offline and online log-probs at the current policy.
    """
    for batch in batches:
        kept = batch[sampled[batch]]
        losses, weights = torch.zeros(0), torch.zeros(0)
        if len(kept):
            losses, weights = run.policy_losses(*log_probs(kept))
            optimizer.zero_grad()
            losses.mean().backward()
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
            optimizer.step()
        yield Step(losses.detach(), weights, run.after_step())
    run.end_round()
