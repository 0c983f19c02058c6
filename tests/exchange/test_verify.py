"""The proof of a run finds what is wrong with it, by name; damage to a whole real run is in tests/e2e."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.sidecar.conftest import SHARDS, Trainer, make_run
from toolkit.algorithms.draws import sample_seed
from toolkit.errors import UserError
from toolkit.exchange import layout, lineage, tables
from toolkit.exchange.lineage import Progress
from toolkit.exchange.records import Corrupt, File, Ref
from toolkit.exchange.reports import condemn_reported, report
from toolkit.exchange.run import Run
from toolkit.exchange.verify import verify
from toolkit.sidecar.pending import Pending

# What the training of round 1, shard 0, reads.
NEEDED = (layout.logprobs("policy-0001", "offline", 1, 0), layout.requests(1, 0), layout.annotations(1, 0))


class Story:
    """A run up to its second round, told step by step; a test changes one sentence."""

    def __init__(self, root: Path) -> None:
        self.trainer: Trainer = make_run(root)
        self.run = self.trainer.run
        self.sidecar = Pending(self.run)
        self.parent: Any = None
        self.consumed: dict[str, str] = {}

    def policy(self, version: int, **attributes: Any) -> None:
        source = {"model": "m"} if self.parent is None else {"checkpoint": self.parent.digest}
        self.run.records.publish(layout.policy(version), {"version": version, "source": source} | attributes)

    def checkpoint(self, step: int, index: int, first: int | None = None) -> None:
        before = (0 if self.parent is None else self.parent.attributes["step"]) if first is None else first
        at = Progress(step, index, 0)
        self.parent = lineage.publish(self.run.records, self.parent, at, self.consumed, before, [], {})

    def consume(self, *refs: Ref) -> None:
        self.consumed |= {str(ref): self.run.records.require(ref).digest for ref in refs}

    def begin(self) -> None:
        self.policy(0)
        self.checkpoint(2, 1)
        self.policy(1)
        self.trainer.score(1, *SHARDS)

    def decide(self) -> None:
        while self.sidecar.turn():
            pass

    def asked(self) -> list[str]:
        table = self.run.records.table(self.run.records.require(layout.requests(1, 0)))
        return [row["pair_id"] for row in table.to_pylist() if row["sampled"]]

    def answer(self, seed: int = 0, swap: bool = False, tokens: int = 5, policy: int = 1) -> None:
        """Responses and annotations of round 1, shard 0: every second response is better than the one before it."""
        samples = self.run.config.method.sampling.samples
        responses, annotations = [], []
        for key in self.asked():
            for number in range(samples):
                draw = sample_seed(self.run.config.seed, 1, key, number) + seed
                row = {"pair_id": key, "sample": number, "token_ids": [number, 9], "text": "t", "finish_reason": "stop"}
                responses.append(row | {"logprob": -1.0, "seed": draw})
            best, worst = samples - 1, 0
            row = {"pair_id": key, "outcome": "pair", "rewards": [float(number) for number in range(samples)]}
            row |= {"chosen_sample": worst if swap else best, "rejected_sample": best if swap else worst}
            row |= {
                "chosen_ids": [best, tokens],
                "rejected_ids": [worst, 9],
                "chosen_reward": 1.0,
                "rejected_reward": 0.0,
            }
            annotations.append(row)
        digest = self.run.records.require(layout.policy(policy)).digest
        table = pa.Table.from_pylist(responses, tables.RESPONSES)
        made, _ = self.run.records.publish(layout.responses(1, 0), {"policy": digest}, table=table)
        table = pa.Table.from_pylist(annotations, tables.ANNOTATIONS)
        self.run.records.publish(layout.annotations(1, 0), {"responses": made.digest}, table=table)

    def problems(self) -> list[str]:
        return verify(Run.open(self.run.root)).problems


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path / "run")


def test_a_sound_run_is_clean_and_counted(story: Story) -> None:
    assert verify(story.run).clean
    story.begin()
    story.decide()
    story.answer(tokens=9)
    story.consume(*NEEDED, layout.phi(0))
    story.checkpoint(4, 1)
    found = verify(Run.open(story.run.root))
    assert found.problems == [] and found.clean
    assert "clean: examined" in found.as_text()
    counts = found.as_json()["counts"]
    assert counts["gate decisions"] == 7 and counts["pairs trained"] == 8 and counts["checkpoints"] == 2
    assert counts["meta-learner versions"] == 1 and counts["annotations"] == len(story.asked())


def only(problems: list[str], *words: str) -> None:
    assert problems, "it was not found"
    for problem in problems:
        assert all(word in problem for word in words), problem


# ---------------------------------------------------------------------------------------------- bytes


def test_a_flipped_byte_a_cut_and_a_missing_file_are_named(story: Story) -> None:
    story.begin()
    manifest = story.run.records.require(layout.logprobs("policy-0001", "offline", 1, 1))
    path = manifest.directory / manifest.files[0].path
    content = path.read_bytes()
    for damaged in (content[:50] + bytes([content[50] ^ 1]) + content[51:], content[:-1]):
        path.write_bytes(damaged)
        only(story.problems(), "rounds/001/logprobs/policy-0001/offline/000/000001")
    path.unlink()
    only(story.problems(), "rounds/001/logprobs/policy-0001/offline/000/000001", "missing")
    path.write_bytes(content)
    assert story.problems() == []


def test_what_a_reader_may_not_read_is_a_note(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's run that is shared: checkpoints are their owner's alone (they are read with pickle)."""
    story.begin()
    stage = story.run.records.stage(layout.checkpoint(1), private=True)
    entries = []
    for name in ("a", "b"):
        (stage / name).write_bytes(b"0")
        entries.append(File(f"{stage.name}/{name}", 1, hashlib.sha256(b"0").hexdigest()))
    lineage.publish(story.run.records, story.parent, Progress(2, 1, 0), {}, 2, entries, {})
    stat = Path.stat

    def refuse(self: Path, **options: Any) -> Any:
        if self.parent == stage:
            raise PermissionError(13, "Permission denied")
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    found = verify(Run.open(story.run.root))
    assert found.clean
    assert [note for note in found.notes if "not examined" in note] == [
        "checkpoints: their owner's alone; the bytes there were not examined"
    ]


def test_damage_of_what_is_announced_to_go_is_none(story: Story) -> None:
    story.begin()
    manifest = story.run.records.require(layout.logprobs("policy-0001", "offline", 1, 1))
    (manifest.directory / manifest.files[0].path).unlink()
    assert story.problems() != []
    story.run.records.publish(layout.deletion(str(manifest.ref)), {})
    assert story.problems() == []


def test_a_copy_and_a_newer_record_are_named(story: Story) -> None:
    story.begin()
    story.decide()
    path = story.run.records.require(layout.requests(1, 0)).path
    other = path.with_name("000007.g0.json")
    other.write_bytes(path.read_bytes())
    only(story.problems(), "000007.g0.json", "copy of the record rounds/001/requests/000/000000")
    other.write_text(json.dumps(json.loads(path.read_bytes()) | {"schema_version": 9}))
    only(story.problems(), "000007.g0.json", "newer version")


# ---------------------------------------------------------------------------------------------- lineage


def test_a_record_that_a_checkpoint_consumed_must_be_there_and_be_the_same(story: Story) -> None:
    story.begin()
    story.decide()
    story.answer(tokens=9)
    story.consume(*NEEDED)
    story.checkpoint(4, 1)
    assert story.problems() == []
    directory = story.run.records.require(layout.requests(1, 0)).directory
    for path in directory.glob("000000.*"):
        path.unlink()
    only(story.problems(), "rounds/001/requests/000/000000", "missing, though checkpoints/000001 consumed it")
    story.run.records.publish(layout.requests(1, 0), {"sampled": 0}, table=tables.REQUESTS.empty_table())
    assert any("is not the record that checkpoints/000001 consumed" in problem for problem in story.problems())


def test_a_gap_in_the_steps_is_named(story: Story) -> None:
    story.begin()
    story.checkpoint(5, 1, first=3)
    assert "checkpoints/000001: covers steps 3 to 5, expected from 2" in story.problems()


def test_training_consumed_what_it_claims_to_have_trained(story: Story) -> None:
    story.begin()
    story.decide()
    story.checkpoint(4, 1)  # both batches of round 1's first shard, without its records
    expected = [f"{ref}: no checkpoint consumed it, though its shard was trained" for ref in NEEDED]
    assert story.problems() == expected
    story.answer(tokens=9)
    story.consume(*NEEDED)
    story.checkpoint(4, 1)
    assert story.problems() == []


def test_a_policy_made_again_to_the_same_bytes_is_the_same(story: Story) -> None:
    story.policy(0)
    story.checkpoint(2, 1)
    source = {"version": 1, "source": {"checkpoint": story.parent.digest}}
    first, _ = story.run.records.publish(layout.policy(1), source, blobs={".bin": b"weights"})
    story.trainer.score(1, *SHARDS)
    story.decide()
    story.answer(tokens=9)
    story.run.records.publish(layout.evaluation(1), {"policy": first.digest})
    (first.directory / first.files[0].path).write_bytes(b"Weights")
    report(story.run, Corrupt(first.path, "its digest"))
    assert condemn_reported(story.run) != []
    with pytest.raises(UserError, match="other bytes"):
        story.run.records.publish(layout.policy(1), source, blobs={".bin": b"other weights"})
    again, _ = story.run.records.publish(layout.policy(1), source, blobs={".bin": b"weights"})
    assert again.digest != first.digest and story.problems() == []


def test_a_policy_of_the_wrong_moment_is_named(story: Story) -> None:
    story.policy(0)
    story.checkpoint(1, 0)
    story.policy(1)
    only(story.problems(), "policies/0001: exported after step 1, not at the start of its round")


def test_an_evaluation_of_another_policy_is_named(story: Story) -> None:
    story.policy(0)
    story.run.records.publish(layout.evaluation(0), {"policy": "0" * 64})
    only(story.problems(), "evaluations/0000: evaluates another policy than policies/0000")


def test_a_finished_run_keeps_what_its_plan_promises(story: Story) -> None:
    story.begin()
    story.decide()
    story.run.close("finished", "so it says")
    problems = "\n".join(story.problems())
    for missing in (
        "policies/0003",
        "evaluations/0001",
        "rounds/002/requests/000/000001",
        "meta/000/000001",
        "phi/000/000002",
    ):
        assert f"{missing}: missing, though the run is finished" in problems


def test_a_run_whose_pairs_are_lost_is_not_clean(story: Story) -> None:
    story.begin()
    for path in (story.run.root / "data").glob("pairs.g0.*"):
        path.unlink()
    only(story.problems(), "data/pairs: missing")


# ---------------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize("column", ["sampled", "w_gate", "u", "pair_id"])
def test_a_forged_decision_is_found(story: Story, column: str) -> None:
    story.begin()
    honest = Story(story.run.root.parent / "honest")
    honest.begin()
    honest.decide()
    rows = honest.run.records.table(honest.run.records.require(layout.requests(1, 1))).to_pylist()
    forged = {"sampled": not rows[0]["sampled"], "w_gate": rows[0]["w_gate"] + 0.01, "u": 0.123, "pair_id": "other"}
    rows[0][column] = forged[column]
    table = pa.Table.from_pylist(rows, tables.REQUESTS)
    asked = sum(row["sampled"] for row in rows)
    story.run.records.publish(layout.requests(1, 1), {"sampled": asked, "phi": 0}, table=table)
    story.decide()
    only(story.problems(), "rounds/001/requests/000/000001")


@pytest.mark.parametrize("forged", [{"sampled": 0}, {"phi": 99}])
def test_decisions_that_state_something_else_than_their_rows_are_found(story: Story, forged: dict[str, int]) -> None:
    """The trainer goes by what is stated: with nothing asked for it would leave the online half out."""
    story.begin()
    honest = Story(story.run.root.parent / "honest")
    honest.begin()
    honest.decide()
    manifest = honest.run.records.require(layout.requests(1, 0))
    assert manifest.attributes["sampled"] > 0
    table = honest.run.records.table(manifest)
    story.run.records.publish(layout.requests(1, 0), manifest.attributes | forged, table=table)
    story.decide()
    only(story.problems(), "rounds/001/requests/000/000000: states", str(forged)[1:-1])


def test_decisions_about_other_pairs_are_found(story: Story) -> None:
    """Their scores may be of the same other pairs."""
    story.policy(0)
    story.checkpoint(2, 1)
    story.policy(1)
    for name in ("policy-0001", "policy-0000"):
        story.trainer.score(1, *SHARDS, weights=(name,))
        ref = layout.logprobs(name, "offline", 1, 0)
        table = story.run.records.table(story.run.records.require(ref))
        ids = pa.array([f"x{row}" for row in range(table.num_rows)])
        for path in story.run.records.require(ref).directory.glob("000000.*"):
            path.unlink()
        story.run.records.publish(ref, {}, table=table.set_column(0, "pair_id", ids))
    story.decide()
    only(story.problems(), "rounds/001/requests/000/000000: its pairs are not those of its shard")


def test_forged_statistics_are_found(story: Story) -> None:
    story.begin()
    forged = {"mean": -0.7, "std": 0.5, "count": 7, "variance": 0.25}
    story.run.records.publish(layout.statistics(1), {"statistics": forged})
    story.decide()
    only(story.problems(), "rounds/001/statistics")


def test_a_forged_meta_learner_is_found(story: Story) -> None:
    story.begin()
    story.trainer.meta_batch(1, rows=5)
    honest = Story(story.run.root.parent / "honest")
    honest.begin()
    honest.trainer.meta_batch(1, rows=6)
    for one in (honest, story):
        one.decide()
    assert story.problems() == []
    for ref in (layout.phi(1),):
        manifest = honest.run.records.require(ref)
        blob = honest.run.records.verified(manifest, manifest.files[0]).read_bytes()
        for path in story.run.records.require(ref).directory.glob(f"{ref.name}.*"):
            path.unlink()
        story.run.records.publish(ref, manifest.attributes, blobs={".safetensors": blob})
    only(story.problems(), "phi/000/000001: recomputing it differs")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, ("responses", "not sampled with its own seeds")),
        ({"swap": True, "tokens": 9}, ("annotations", "should be ('pair', 7, 0)")),
        ({"tokens": 5}, ("annotations", "does not hold the sampled tokens")),
        ({"policy": 0, "tokens": 9}, ("responses", "not sampled by the policy of round 1")),
    ],
)
def test_forged_samples_and_pairs_are_found(story: Story, change: dict, words: tuple[str, str]) -> None:
    story.begin()
    story.decide()
    story.answer(**change)
    only(story.problems(), f"rounds/001/{words[0]}/000/000000", words[1])


def test_what_was_condemned_and_made_again_is_a_note(story: Story) -> None:
    story.begin()
    story.decide()
    manifest = story.run.records.require(layout.requests(1, 1))
    story.run.records.condemn(manifest.path, manifest.ref, "damaged", "?", None)
    (manifest.directory / manifest.files[0].path).unlink()
    story.sidecar = Pending(story.run)
    story.decide()
    found = verify(Run.open(story.run.root))
    assert found.clean and any("000001.g0 was condemned" in note for note in found.notes)
