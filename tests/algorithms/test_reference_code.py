"""Preset ``metaapo_reference_code`` against the port of the official algorithm, step by step.

Why: a preset that claims to be the official code has to be it, formula by formula and in the order of things: which φ a
gate and a step read, what enters the buffer, when it is emptied. Both sides get the same log-probs; only theirs is
written from the official code's description and ours is made of the toolkit's public functions. Our batches hold their
missing pairs (masked), the official ones never see them, so equality also proves that a masked pair leaves no trace.
"""

from __future__ import annotations

import pytest
import torch

from tests.algorithms.official_port import LogProbs, OfficialRun, train_round
from tests.algorithms.presets import method, preset
from toolkit.algorithms import draws, features, gates, objectives, weighting
from toolkit.algorithms.meta_learner import MetaBatch, MetaLearnerState, initial_state, update
from toolkit.algorithms.objectives import PairLogProbs

BETA = 0.1
BATCH = 8
STEPS = 57  # a round's steps: three intervals of 16 and a remainder of 9
ROUNDS = 2


class OurRun:
    """The preset made of the toolkit's functions, as the trainer and the sidecar put them together."""

    def __init__(self) -> None:
        self.settings = preset("metaapo_reference_code")
        self.missing = method("metaapo_reference_code").missing_online
        self.objective = objectives.get("dpo", beta=BETA)
        self.state: MetaLearnerState = initial_state(self.settings, seed=0)
        self.rows: list[MetaBatch] = []
        self.steps_in_round = 0

    def feature(self, pairs: PairLogProbs) -> torch.Tensor:
        return features.feature(self.objective.margin(pairs), self.settings.feature, self.objective.beta)

    def gate(self, pairs: PairLogProbs, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w = gates.get("meta", exploration=self.settings.exploration).weights(self.feature(pairs), self.state)
        return w, torch.from_numpy(gates.decide(u, w))

    def policy_losses(self, offline: PairLogProbs, online: PairLogProbs, has_online: torch.Tensor):
        s = self.feature(offline)
        w = weighting.weights("meta", s, self.state.learner())
        loss_offline, loss_online = self.objective(offline), self.objective(online.masked(has_online))
        losses = weighting.meta_weighted_losses(w, loss_offline, loss_online, has_online, self.missing)
        self.rows.append(MetaBatch(s[has_online], loss_offline[has_online], loss_online[has_online]))
        return losses, w, weighting.contributing(has_online, self.missing)

    def after_step(self) -> None:
        self.steps_in_round += 1
        if self.steps_in_round % self.settings.interval == 0:
            columns = zip(*(vars(rows).values() for rows in self.rows), strict=True)
            self.state = update(self.state, MetaBatch(*map(torch.cat, columns)))
            self.rows.clear()

    def end_round(self) -> None:
        assert self.settings.remainder == "discard"
        self.rows.clear()
        self.steps_in_round = 0


def pair_log_probs(values: LogProbs) -> PairLogProbs:
    tokens = torch.full_like(values.chosen, 20)
    return PairLogProbs(*values, tokens, tokens)


def recorded(generator: torch.Generator, pairs: int, shift: float = 0.0) -> LogProbs:
    """Log-probs of the size of real ones: tens of nats, margins of a few."""
    reference = -60 + 8 * torch.randn(2, pairs, generator=generator)
    policy = reference + 2 * torch.randn(2, pairs, generator=generator) + torch.tensor([[shift], [0.0]])
    return LogProbs(*policy, *reference)


def assert_same_learner(ours: OurRun, official: OfficialRun) -> None:
    for name, value in official.parameters().items():
        torch.testing.assert_close(ours.state.parameters[name], value, rtol=1e-5, atol=1e-6)


def test_equals_the_official_algorithm_on_recorded_log_probs() -> None:
    generator = torch.Generator().manual_seed(1)
    ours, official = OurRun(), OfficialRun(BETA, interval=16)
    compared = 0
    for round_index in range(ROUNDS):
        pairs = BATCH * STEPS
        scores = recorded(generator, pairs)
        u = torch.from_numpy(draws.uniforms(0, round_index, [f"pair-{index}" for index in range(pairs)]))
        our_w, our_sampled = ours.gate(pair_log_probs(scores), u)
        official_w, official_sampled = official.gate(scores, u)
        torch.testing.assert_close(our_w, official_w, rtol=1e-5, atol=1e-6)
        assert torch.equal(our_sampled, official_sampled)
        assert 0.2 < our_sampled.float().mean() < 0.9

        for batch in torch.arange(pairs).split(BATCH):
            has_online = our_sampled[batch]
            offline = LogProbs(*(value.requires_grad_() for value in recorded(generator, BATCH)))
            online = LogProbs(*(value.requires_grad_() for value in recorded(generator, BATCH, shift=1.0)))
            if not has_online.any():
                ours.policy_losses(pair_log_probs(offline), pair_log_probs(online), has_online)
            else:
                losses, weights = official.policy_losses(offline.rows(has_online), online.rows(has_online))
                leaves = [*offline[:2], *online[:2]]
                official_gradients = torch.autograd.grad(losses.mean(), leaves)

                spoilt = LogProbs(*(value.where(has_online, torch.nan) for value in online))
                our_losses, our_weights, counted = ours.policy_losses(
                    pair_log_probs(offline), pair_log_probs(spoilt), has_online
                )
                torch.testing.assert_close(our_weights[has_online], weights, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(our_losses[has_online], losses, rtol=1e-5, atol=1e-6)
                assert not our_losses[~has_online].any()
                our_gradients = torch.autograd.grad(our_losses.sum() / counted.sum(), leaves)
                for mine, theirs in zip(our_gradients, official_gradients, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
                compared += 1
            ours.after_step()
            official.after_step()
            assert ours.state.version == official.updates
            assert_same_learner(ours, official)
        ours.end_round()
        official.end_round()
    assert compared >= 100
    assert official.updates == 6  # the remainders of 9 steps taught nothing
    assert (ours.state.parameters["input_weight"] - 0.1).abs().max() > 1e-3  # and the updates did


class ToyPolicy(torch.nn.Module):
    """A categorical policy over 12 responses to each of N prompts: the smallest with real, normalised log-probs."""

    def __init__(self, prompts: int, generator: torch.Generator) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(prompts, 12, generator=generator))

    def log_probs(self, prompts: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.logits[prompts % len(self.logits)], -1).gather(1, responses[:, None])[:, 0]


def test_drives_a_real_policy_to_the_same_weights() -> None:
    """With a policy in the loop an error in any step would be carried on: 60 steps, policies compared at each."""
    generator = torch.Generator().manual_seed(2)
    pairs = BATCH * 60
    responses = torch.stack([torch.randperm(12, generator=generator)[:4] for _ in range(pairs)])
    u = torch.from_numpy(draws.uniforms(5, 0, map(str, range(pairs))))
    policies = [ToyPolicy(16, torch.Generator().manual_seed(3)) for _ in range(2)]
    reference = ToyPolicy(16, torch.Generator().manual_seed(4))
    optimizers = [torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0) for policy in policies]

    def log_probs(policy: ToyPolicy, index: torch.Tensor) -> tuple[LogProbs, LogProbs]:
        def half(chosen: int, rejected: int) -> LogProbs:
            sides = responses[index, chosen], responses[index, rejected]
            with torch.no_grad():
                anchors = [reference.log_probs(index, side) for side in sides]
            return LogProbs(*(policy.log_probs(index, side) for side in sides), *anchors)

        return half(0, 1), half(2, 3)

    ours, official = OurRun(), OfficialRun(BETA, interval=16)
    everything = torch.arange(pairs)
    with torch.no_grad():
        scores, _ = log_probs(policies[0], everything)
    _, sampled = ours.gate(pair_log_probs(scores), u)
    assert torch.equal(sampled, official.gate(scores, u)[1])

    batches = everything.split(BATCH)
    theirs = train_round(official, batches, sampled, lambda index: log_probs(policies[1], index), optimizers[1])
    for batch, step in zip(batches, theirs, strict=False):
        offline, online = log_probs(policies[0], batch)
        losses, _, counted = ours.policy_losses(pair_log_probs(offline), pair_log_probs(online), sampled[batch])
        torch.testing.assert_close(losses[counted], step.losses, rtol=1e-4, atol=1e-5)
        optimizers[0].zero_grad()
        (losses.sum() / counted.sum()).backward()
        torch.nn.utils.clip_grad_norm_(policies[0].parameters(), 1.0)
        optimizers[0].step()
        ours.after_step()
        torch.testing.assert_close(policies[0].logits, policies[1].logits, rtol=1e-4, atol=1e-4)
        assert ours.state.version == official.updates
    assert official.updates == 3
    assert_same_learner(ours, official)


@pytest.mark.parametrize(
    ("setting", "value"), [("feature", "log_sigmoid_beta"), ("init", "random"), ("learning_rate", 1e-3)]
)
def test_another_setting_would_not_equal_it(setting: str, value: object) -> None:
    """The comparison sees a difference where there is one."""
    generator = torch.Generator().manual_seed(1)
    ours, official = OurRun(), OfficialRun(BETA, interval=16)
    ours.settings = preset("metaapo_reference_code", **{setting: value})
    ours.state = initial_state(ours.settings, seed=0)
    everything = torch.ones(BATCH, dtype=torch.bool)
    for _ in range(16):
        offline, online = recorded(generator, BATCH), recorded(generator, BATCH)
        ours.policy_losses(pair_log_probs(offline), pair_log_probs(online), everything)
        official.policy_losses(offline, online)
        ours.after_step()
        official.after_step()
    with pytest.raises(AssertionError):
        assert_same_learner(ours, official)
