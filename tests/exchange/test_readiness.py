"""What each role waits for."""

from __future__ import annotations

import pytest

from toolkit.exchange import layout, lineage
from toolkit.exchange.lineage import Progress
from toolkit.exchange.readiness import shard_is_ready, trainer_has_work, workers_have_work
from toolkit.exchange.records import Ref
from toolkit.exchange.run import Run


def policies(run: Run, *versions: int) -> None:
    for version in versions:
        run.records.publish(layout.policy(version), {})


def evaluate(run: Run, *versions: int) -> None:
    for version in versions:
        run.records.publish(layout.evaluation(version), {})


def decide(run: Run, index: int, shard: int, asked: int) -> None:
    run.records.publish(layout.requests(index, shard), {"sampled": asked})


def annotate(run: Run, index: int, shard: int) -> None:
    run.records.publish(layout.annotations(index, shard), {})


def checkpoint(run: Run, step: int, index: int) -> None:
    lineage.publish(run.records, lineage.newest(run.records), Progress(step, index, 0), {}, 0, [], {})


def condemn(run: Run, ref: Ref) -> None:
    manifest = run.records.require(ref)
    run.records.condemn(manifest.path, ref, "damaged", "?", None)


def test_a_shard_waits_for_its_decision_and_then_for_what_was_asked(run: Run) -> None:
    assert shard_is_ready(run, 0, 0), "the warm-start round asks for nothing"
    assert not shard_is_ready(run, 1, 0)
    decide(run, 1, 0, asked=0)
    assert shard_is_ready(run, 1, 0)
    decide(run, 1, 1, asked=2)
    assert not shard_is_ready(run, 1, 1)
    annotate(run, 1, 1)
    assert shard_is_ready(run, 1, 1)


def test_a_trainer_has_work_until_it_would_wait_for_others(run: Run) -> None:
    assert trainer_has_work(run), "to start"
    policies(run, 0)
    first = run.plan.first_step
    checkpoint(run, first[1], 1)
    assert trainer_has_work(run), "policy 1 is to be published"
    policies(run, 1)
    assert trainer_has_work(run), "scores are to be computed"
    for shard in (0, 1):
        run.records.publish(layout.logprobs("policy-0001", "offline", 1, shard), {})
    assert trainer_has_work(run), "nobody decides: a trainer that has waited for it does so itself"
    decide(run, 1, 0, asked=1)
    annotate(run, 1, 1)
    assert not trainer_has_work(run), "shard 0 comes first"
    annotate(run, 1, 0)
    assert trainer_has_work(run)
    checkpoint(run, first[1] + 2, 1)
    assert trainer_has_work(run), "shard 1 is not decided"
    decide(run, 1, 1, asked=1)
    assert trainer_has_work(run)
    checkpoint(run, first[3], 3)
    assert trainer_has_work(run), "the last policy is to be published"
    policies(run, 2, 3)
    assert not trainer_has_work(run)


@pytest.mark.parametrize("name", ["policy-0001", "policy-0000"])
def test_scores_that_were_condemned_are_a_trainers_work(run: Run, name: str) -> None:
    """A reference's too, and any shard's: nothing is decided without them, and only a trainer makes them again."""
    policies(run, 0, 1)
    checkpoint(run, run.plan.first_step[1], 1)
    for weights in ("policy-0000", "policy-0001"):
        for shard in (0, 1):
            run.records.publish(layout.logprobs(weights, "offline", 1, shard), {})
    condemn(run, layout.logprobs(name, "offline", 1, 1))
    assert trainer_has_work(run)


def test_pairs_that_were_condemned_are_a_trainers_work(run: Run) -> None:
    policies(run, 0)
    checkpoint(run, 1, 0)
    condemn(run, layout.PAIRS)
    assert trainer_has_work(Run.open(run.root))


def test_policies_that_are_gone_are_not_evaluated(run: Run) -> None:
    policies(run, 0, 1, 2)
    evaluate(run, 1)
    condemn(run, layout.evaluation(1))
    condemn(run, layout.policy(0))
    assert run.unevaluated() == [1, 2]
    run.records.publish(layout.deletion(str(layout.policy(1))), {})
    assert run.unevaluated() == [2] and workers_have_work(run)
    evaluate(run, 2)
    assert run.unevaluated() == [] and not workers_have_work(run)


def test_workers_have_work_while_anything_is_asked_of_them(run: Run) -> None:
    assert not workers_have_work(run)
    policies(run, 0)
    assert workers_have_work(run), "policy 0 is to be evaluated"
    evaluate(run, 0)
    assert not workers_have_work(run)
    policies(run, 1)
    evaluate(run, 1)
    decide(run, 1, 1, asked=0)
    assert not workers_have_work(run)
    decide(run, 1, 0, asked=1)
    assert workers_have_work(run)
    annotate(run, 1, 0)
    assert not workers_have_work(run)
    policies(run, 2, 3)
    assert workers_have_work(run), "the last policy is to be evaluated"
    evaluate(run, 3)
    assert workers_have_work(run), "policy 2 still is"
    evaluate(run, 2)
    assert not workers_have_work(run)


def test_nobody_waits_for_evaluations_that_nobody_makes(tmp_path) -> None:
    from tests.exchange.conftest import make_config, publish_pairs

    run = Run.create(tmp_path, make_config(tmp_path, inference={"does": ["sample", "annotate"]}), "test")
    publish_pairs(run)
    policies(run, 0)
    assert not workers_have_work(run)


@pytest.mark.parametrize("policy", [None, 0])
def test_before_the_pairs_are_there(tmp_path, policy: int | None) -> None:
    from tests.exchange.conftest import make_config

    run = Run.create(tmp_path, make_config(tmp_path), "test")
    if policy is not None:
        policies(run, policy)
    assert trainer_has_work(run) and not workers_have_work(run)
