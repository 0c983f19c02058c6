"""What the sidecar derives: equal to an independent recomputation, whoever derives it, however often it is killed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file

from tests.exchange.conftest import answer, script
from tests.sidecar.conftest import METHODS, SHARDS, Trainer, logprob_columns, make_run
from toolkit.algorithms import meta_learner
from toolkit.algorithms.meta_learner import MetaBatch, MetaSettings
from toolkit.exchange import hints, layout, reports, tables
from toolkit.exchange.records import Corrupt, Records
from toolkit.exchange.run import Run
from toolkit.sidecar.pending import Pending


def pending(trainer: Trainer) -> Pending:
    return Pending(Run.open(trainer.run.root, "sidecar"))


def requests(trainer: Trainer, round_index: int) -> pa.Table | None:
    """The decisions about a round, or None while one of its shards has none."""
    records = Run.open(trainer.run.root).records
    found = [records.find(layout.requests(round_index, shard)) for shard in SHARDS]
    return None if None in found else pa.concat_tables([records.table(manifest) for manifest in found])


def state_of(trainer: Trainer, version: int) -> dict[str, np.ndarray]:
    manifest = trainer.run.records.require(layout.phi(version))
    return load_file(manifest.directory / manifest.file(".safetensors").path)


# ---------------------------------------------------------------------------------------------- gate decisions


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def expected_requests(trainer: Trainer, round_index: int, method: str, version: int) -> dict[str, np.ndarray]:
    """The round's decisions in plain numpy."""
    count = trainer.run.plan.pairs_per_round[round_index]
    policy = {
        k: v.astype(np.float64) for k, v in logprob_columns(f"policy-{round_index:04d}", round_index, count).items()
    }
    first = {k: v.astype(np.float64) for k, v in logprob_columns("policy-0000", round_index, count).items()}
    if method == "simpo":
        margin = policy["chosen"] / policy["chosen_tokens"] - policy["rejected"] / policy["rejected_tokens"] - 0.25
        s = np.log(sigmoid(margin))
        w = sigmoid(s)
    else:
        margin = (policy["chosen"] - first["chosen"]) - (policy["rejected"] - first["rejected"])
        s = np.log(sigmoid(0.1 * margin))
        if method in ("recommended", "random"):  # standardised is the default
            clipped = np.maximum(s, -10)
            s = (clipped - clipped.mean()) / np.sqrt(max(clipped.var(), 0.01))
        if method == "random":
            w = np.full(count, 0.5)
        elif method == "threshold":
            w = (s >= -0.7).astype(float)
        else:
            phi = {k.removeprefix("parameters."): v.astype(np.float64) for k, v in state_of(trainer, version).items()}
            units = np.tanh(np.outer(s, phi["input_weight"]) + phi["input_bias"])
            w = sigmoid(units @ phi["output_weight"] + phi["output_bias"])
            if method == "recommended":
                w = np.minimum(0.02 + 0.96 * w, 0.9)
    ids = [f"r{round_index}-{position}" for position in range(count)]
    draws = [hashlib.blake2b(f"11:{round_index}:{i}".encode(), digest_size=8, person=b"gate").digest() for i in ids]
    u = np.array([(int.from_bytes(draw, "big") >> 11 | 1) / 2**53 for draw in draws])
    return {"pair_id": ids, "s": s, "u": u, "w_gate": w, "sampled": u > w}


@pytest.mark.parametrize("method", METHODS)
def test_decisions_are_those_of_an_independent_recomputation(tmp_path: Path, method: str) -> None:
    trainer = make_run(tmp_path / "run", method)
    versions = {1: 0, 2: len([b for b in trainer.run.plan.boundaries if b.round == 1])}
    sidecar, decided = pending(trainer), []
    for round_index in (1, 2):
        trainer.policy(*range(round_index + 1))
        trainer.score(round_index, *SHARDS)
        for version in range(versions[round_index]):
            trainer.meta_batch(version + 1, rows=5)
        while sidecar.turn():
            pass
        found = requests(trainer, round_index)
        expected = expected_requests(trainer, round_index, method, versions[round_index])
        assert found["pair_id"].to_pylist() == expected["pair_id"]
        assert found["u"].to_pylist() == expected["u"].tolist()
        np.testing.assert_allclose(found["s"], expected["s"], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found["w_gate"], expected["w_gate"], rtol=1e-6, atol=1e-6)
        assert found["sampled"].to_pylist() == expected["sampled"].tolist()
        decided += expected["sampled"].tolist()
        for shard in SHARDS:
            attributes = trainer.run.records.require(layout.requests(round_index, shard)).attributes
            assert attributes["phi"] == (versions[round_index] if trainer.run.config.learns else 0)
            assert attributes["sampled"] == sum(found["sampled"].to_pylist()[shard * 4 : shard * 4 + 4])
    assert set(decided) == {True, False}, "the example shows nothing"


def test_a_round_without_gate_is_not_decided(trainer: Trainer) -> None:
    trainer.policy(0)
    trainer.score(0, 0)
    sidecar = pending(trainer)
    while sidecar.turn():
        pass
    assert not (trainer.run.root / "rounds/000/requests").exists()


def test_nothing_is_decided_before_all_it_follows_from_is_there(trainer: Trainer) -> None:
    def turns() -> None:
        while sidecar.turn():
            pass

    sidecar = pending(trainer)
    assert sidecar.turn(), "version 0 of the meta-learner follows from the configuration"
    assert not sidecar.turn()
    trainer.score(1, 0, 1)
    assert not sidecar.turn(), "round 1 has not begun"
    trainer.policy(0, 1)
    assert sidecar.turn() and requests(trainer, 1) is not None
    trainer.policy(2)
    trainer.score(2, 0)
    trainer.score(2, 1, weights=("policy-0002",))
    for version in (1, 2):
        trainer.meta_batch(version, rows=1)
    turns()
    assert trainer.run.records.find(layout.statistics(2)) is None, "a shard has no reference score"
    trainer.score(2, 1, weights=("policy-0000",))
    turns()
    assert requests(trainer, 2) is not None


def test_scores_are_read_once_all_are_there(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every look while a round is being scored: that would be quadratic in its shards."""
    trainer.policy(0, 1)
    trainer.score(1, *SHARDS[:-1])
    read: list[str] = []
    table = Records.table
    monkeypatch.setattr(
        Records,
        "table",
        lambda self, manifest, *rest: (read.append(str(manifest.ref)), table(self, manifest, *rest))[1],
    )
    sidecar = pending(trainer)
    while sidecar.turn():
        pass
    assert read == []
    trainer.score(1, SHARDS[-1])
    assert sidecar.turn() and requests(trainer, 1) is not None and read != []


def test_a_feature_without_statistics_is_decided_shard_by_shard(tmp_path: Path) -> None:
    trainer = make_run(tmp_path / "run", "paper")
    trainer.policy(0, 1)
    trainer.score(1, 1)
    sidecar = pending(trainer)
    assert sidecar.turn()
    find = trainer.run.records.find
    assert find(layout.requests(1, 0)) is None and find(layout.requests(1, 1)) is not None


def test_a_gate_waits_for_the_meta_learner_of_the_rounds_before(trainer: Trainer) -> None:
    trainer.policy(0, 1, 2)
    trainer.score(2, *SHARDS)
    sidecar = pending(trainer)
    needed = trainer.run.plan.version_before_round(2)
    assert needed == 2
    trainer.meta_batch(1, rows=2)
    while sidecar.turn():
        pass
    assert trainer.run.records.find(layout.requests(2, 0)) is None
    trainer.meta_batch(2, rows=0)
    trainer.score(1, *SHARDS)  # the statistics that the boundaries of round 1 were learned under
    while sidecar.turn():
        pass
    assert trainer.run.records.require(layout.requests(2, 0)).attributes["phi"] == 2


# ---------------------------------------------------------------------------------------------- meta-learner


def test_versions_are_the_updates_of_the_meta_batches(tmp_path: Path) -> None:
    trainer = make_run(tmp_path / "run", "paper")
    sidecar = pending(trainer)
    settings = MetaSettings(interval=2)
    expected = meta_learner.initial_state(settings, 11)
    count = len(trainer.run.plan.boundaries)
    for version in range(count + 1):
        if version:
            batch = trainer.meta_batch(version, rows=version - 1)  # the first is empty
            names = ("s", "loss_offline", "loss_online")
            expected = meta_learner.update(expected, MetaBatch(*(torch.from_numpy(batch[name]) for name in names)))
        while sidecar.turn():
            pass
        tensors = state_of(trainer, version)
        assert tensors.keys() == expected.to_tensors()[0].keys()
        for name, value in expected.to_tensors()[0].items():
            assert np.array_equal(tensors[name], value.numpy()), (version, name)
        state = json.loads(trainer.run.records.require(layout.phi(version)).attributes["state"])
        assert (state["version"], state["step"]) == (version, expected.step)
        assert trainer.run.records.find(layout.phi(version + 1)) is None
    assert count == 4


# ---------------------------------------------------------------------------------------------- the frontier


def annotate(trainer: Trainer, round_index: int, shard: int) -> None:
    empty = tables.ANNOTATIONS.empty_table()
    trainer.run.records.publish(layout.annotations(round_index, shard), {"n": shard}, table=empty)


def respond(trainer: Trainer, round_index: int, shard: int) -> None:
    trainer.run.records.publish(layout.responses(round_index, shard), {}, table=tables.RESPONSES.empty_table())


def test_the_frontier_tells_where_the_shards_stand(tmp_path: Path) -> None:
    trainer = make_run(tmp_path / "run", "random")
    trainer.policy(0, 1)
    trainer.score(1, *SHARDS)
    sidecar = pending(trainer)

    def frontier(*turns: Pending) -> dict:
        for one in turns or (sidecar,):
            one.turn()
        return hints.frontier(trainer.run.root)

    assert frontier() == {"round": 1, "sample": [0, 1], "annotate": [], "done": 0}
    respond(trainer, 1, 1)
    assert frontier() == {"round": 1, "sample": [0], "annotate": [1], "done": 0}
    respond(trainer, 1, 0)
    annotate(trainer, 1, 1)
    assert frontier() == {"round": 1, "sample": [], "annotate": [0], "done": 1}
    assert frontier(pending(trainer)) == {"round": 1, "sample": [], "annotate": [0], "done": 1}, (
        "another one sees the same"
    )
    annotate(trainer, 1, 0)
    assert frontier() == {"round": 1, "sample": [], "annotate": [], "done": 2}
    trainer.policy(2)
    trainer.score(2, *SHARDS)
    assert frontier() == frontier(pending(trainer)) == {"round": 2, "sample": [0, 1], "annotate": [], "done": 0}


def condemn(trainer: Trainer, ref: layout.Ref) -> None:
    manifest = trainer.run.records.require(ref)
    path = manifest.directory / manifest.files[0].path
    path.write_bytes(path.read_bytes()[:-1])
    reports.report(trainer.run, Corrupt(manifest.path, "cut"))
    assert len(reports.condemn_reported(trainer.run)) == 1


def test_what_was_condemned_is_made_again(tmp_path: Path) -> None:
    trainer = make_run(tmp_path / "run", "recommended")
    trainer.policy(0, 1)
    trainer.score(1, *SHARDS)
    sidecar = pending(trainer)
    while sidecar.turn():
        pass
    before = requests(trainer, 1)
    for ref in (layout.requests(1, 1), layout.phi(0)):
        condemn(trainer, ref)
        assert trainer.run.records.find(ref) is None
        while sidecar.turn():
            pass
        assert trainer.run.records.require(ref).generation == 1
    assert requests(trainer, 1) == before
    asked = [shard for shard in SHARDS if any(before["sampled"].to_pylist()[shard * 4 : shard * 4 + 4])]
    for shard in asked:
        respond(trainer, 1, shard)
        annotate(trainer, 1, shard)
    sidecar.turn()
    assert hints.frontier(trainer.run.root)["annotate"] == []
    condemn(trainer, layout.annotations(1, asked[0]))
    sidecar.turn()
    assert hints.frontier(trainer.run.root)["annotate"] == [asked[0]]


# ---------------------------------------------------------------------------------------------- several, and killed ones


def begin_round(trainer: Trainer, round_index: int) -> None:
    trainer.policy(*range(round_index + 1))
    trainer.score(round_index, *SHARDS)
    for version in (1, 2) if round_index == 2 else ():
        trainer.meta_batch(version, rows=7)


def play(trainer: Trainer, *sidecars: Pending) -> dict[str, object]:
    """A run's course; returns everything derived in it."""
    for round_index in (1, 2):
        begin_round(trainer, round_index)
        for _ in range(6):
            for sidecar in sidecars:
                sidecar.turn()
    return derived(trainer)


def derived(trainer: Trainer) -> dict[str, object]:
    found: dict[str, object] = {f"requests {index}": requests(trainer, index) for index in (1, 2)}
    for version in range(3):
        found |= {f"phi {version} {name}": value.tobytes() for name, value in state_of(trainer, version).items()}
    for index in (1, 2):
        found[f"statistics {index}"] = trainer.run.records.require(layout.statistics(index)).attributes
    return found


def test_two_sidecars_at_once_make_the_records_of_one(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    assert play(one, pending(one)) == play(two, pending(two), pending(two))
    manifests = [path for path in (two.run.root / "rounds").rglob("*.json") if "requests" in path.parts]
    assert len(manifests) == 4 and all(path.name.endswith(".g0.json") for path in manifests)


# Forks a sidecar again and again and kills it at a random moment; the last one of a round lives until nothing is left to do.
KILLED_SIDECARS = """
import os, random, signal, sys, time
from pathlib import Path
from tests.sidecar.test_pending import begin_round
from tests.sidecar.conftest import Trainer
from toolkit.exchange.run import Run
from toolkit.sidecar.pending import Pending

root, kills = Path(sys.argv[1]), int(sys.argv[2])
random = random.Random(0)
for index in (1, 2):
    begin_round(Trainer(Run.open(root, "trainer")), index)
    for number in range(kills + 1):
        pid = os.fork()
        if pid == 0:
            pending = Pending(Run.open(root, f"sidecar-{number}"))
            while pending.turn():
                pass
            os._exit(0)
        if number < kills:
            time.sleep(random.uniform(0, 0.1))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert status == 0, status
"""


def test_a_sidecar_that_is_killed_again_and_again_changes_nothing(tmp_path: Path) -> None:
    undisturbed, killed = make_run(tmp_path / "undisturbed"), make_run(tmp_path / "killed")
    answer(script(KILLED_SIDECARS, killed.run.root, 12))
    assert derived(killed) == play(undisturbed, pending(undisturbed))
