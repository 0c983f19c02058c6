"""Proof of a run from its records alone: every byte, one lineage, each pair trained exactly once, every decision recomputed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.exchange import layout, lineage, retention
from toolkit.exchange.records import Corrupt, Manifest, check, decode
from toolkit.exchange.run import Run

MANIFEST = re.compile(r"\.g\d+\.json$")


@dataclass
class Findings:
    """What was examined, and what is wrong. ``notes`` are for people and do not make a run unclean."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def clean(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        return {"clean": self.clean, "problems": self.problems, "notes": self.notes, "counts": dict(self.counts)}

    def as_text(self) -> str:
        counted = ", ".join(f"{number:,} {what}" for what, number in self.counts.items())
        lines = [f"problem: {problem}" for problem in self.problems] + [f"note: {note}" for note in self.notes]
        return "\n".join(
            [*lines, f"{'clean' if self.clean else f'{len(self.problems)} problem(s)'}: examined {counted}"]
        )


def verify(run: Run) -> Findings:
    """Examine a run, finished or not.

    Gate decisions and meta-learner versions are recomputed where torch is installed; elsewhere a note says that they were not.
    """
    found = Findings()
    _bytes(run, found)
    if run.records.find(layout.PAIRS) is None:
        if run.newest_policy() is None:
            found.notes.append("no pairs are prepared yet")
        else:
            found.problems.append(f"{layout.PAIRS}: missing, though a policy was published")
        return found
    if found.problems:
        found.notes.append("the records' meaning was not examined, because some are damaged")
        return found
    try:
        _lineage(run, found)
        _exactly_once(run, found)
        _consumed(run, found)
        _policies(run, found)
        _requests(run, found)
        _annotations(run, found)
        _complete(run, found)
        try:
            import torch  # noqa: F401
        except ImportError:
            found.notes.append(
                "gate decisions and meta-learner versions were not recomputed: torch is not installed here"
            )
        else:
            _derived(run, found)
    except (UserError, KeyError, TypeError, ValueError) as error:
        found.problems.append(f"{type(error).__name__}: {error}")
    return found


# ------------------------------------------------------------------------------------------- bytes


def manifests(root: Path) -> Iterator[Path]:
    """Paths of all manifests of a run, tombstones included."""
    for path in sorted(root.rglob("*.json")):
        if MANIFEST.search(path.name) or path.name.endswith(".tombstone.json"):
            yield path


def _bytes(run: Run, found: Findings) -> None:
    """Every manifest against its own digest, every file against its manifest's."""
    for path in manifests(run.root):
        name = path.relative_to(run.root)
        if path.name.endswith(".tombstone.json"):
            found.notes.append(f"{name.with_name(path.name.removesuffix('.tombstone.json'))} was condemned")
            continue
        if path.with_name(path.name.removesuffix(".json") + ".tombstone.json").exists():
            continue
        try:
            manifest = decode(path, path.read_bytes())
            found.counts["records"] += 1
            _files(run, manifest, found)
        except Corrupt as error:
            found.problems.append(f"{name}: {error.detail}")
        except UserError as error:
            found.problems.append(str(error))


def _files(run: Run, manifest: Manifest, found: Findings) -> None:
    """Raise `Corrupt` if a file is not what its manifest says, unless its deletion was announced."""
    try:
        for entry in manifest.files:
            check(manifest, entry)
            found.counts["files"] += 1
            found.counts["bytes"] += entry.bytes
    except PermissionError:
        note = f"{manifest.ref.directory}: their owner's alone; the bytes there were not examined"
        found.notes += [] if note in found.notes else [note]
    except Corrupt:
        if not retention.is_deleted(run, manifest.ref):
            raise


# ------------------------------------------------------------------------------------------- lineage


def _lineage(run: Run, found: Findings) -> None:
    """One chain, without gaps, whose checkpoints consumed the records that are there now."""
    previous: Manifest | None = None
    for manifest in lineage.chain(run.records):
        attributes, name = manifest.attributes, str(manifest.ref)
        found.counts["checkpoints"] += 1
        below = 0 if previous is None else lineage.sequence(previous) + 1
        expected = 0 if previous is None else previous.attributes["step"]
        if lineage.sequence(manifest) != below:
            missing = f"{layout.checkpoint(below)}: missing or not readable"
            found.problems.append(f"{missing}, so nothing proves what {name} was trained from")
        elif attributes["parent"] != (None if previous is None else previous.digest):
            found.problems.append(f"{name}: its parent is not the checkpoint before it")
        elif attributes["first_step"] != expected or attributes["step"] < expected:
            found.problems.append(
                f"{name}: covers steps {attributes['first_step']} to {attributes['step']}, expected from {expected}"
            )
        for consumed, digest in attributes["consumed"].items():
            directory, _, leaf = consumed.rpartition("/")
            current = run.records.find(layout.Ref(directory, leaf))
            if current is None:
                found.problems.append(f"{consumed}: missing, though {name} consumed it")
            elif not _is_same(current, digest):
                found.problems.append(f"{consumed}: is not the record that {name} consumed")
        previous = manifest
    newest = run.newest_policy()
    if newest is not None and newest > 0 and previous is None:
        found.problems.append("checkpoints: there is none, though a policy was trained")
    if run.finished() and (previous is None or previous.attributes["step"] != run.plan.steps):
        found.problems.append(f"checkpoints: the last one does not end at the plan's {run.plan.steps} steps")


def _is_same(current: Manifest, digest: str) -> bool:
    """Whether a record is the one with this digest, or was made again to the same bytes after that one was condemned."""
    if current.digest == digest:
        return True
    for generation in range(current.generation):
        path = current.directory / f"{current.ref.name}.g{generation}.json"
        try:
            old = decode(path, path.read_bytes())
        except (Corrupt, FileNotFoundError):
            return True  # its tombstone required equality when the new one was published
        if old.digest == digest:
            return sorted(f.digest for f in old.files) == sorted(f.digest for f in current.files)
    return False


def _exactly_once(run: Run, found: Findings) -> None:
    """Each prepared pair is in exactly one batch of each epoch of its round, up to where the lineage stands."""
    newest = lineage.newest(run.records)
    done = 0 if newest is None else int(newest.attributes["step"])
    plan, seen = run.plan, Counter[str]()
    for index in range(plan.rounds):
        ids = {shard: run.pairs(index, shard)["pair_id"].to_pylist() for shard in range(plan.shards(index))}
        seen.update(pair_id for shard in ids.values() for pair_id in shard)
        trained = Counter[tuple[int, str]]()
        for batch in plan.batches(index):
            if batch.step < done:
                trained.update((batch.epoch, pair_id) for pair_id in ids[batch.shard][batch.start : batch.stop])
        if any(count != 1 for count in trained.values()):
            found.problems.append(
                f"round {index}: {sum(c != 1 for c in trained.values())} pair(s) trained more than once"
            )
        complete = done >= plan.first_step[index + 1]
        if complete and len(trained) != plan.epochs * plan.pairs_per_round[index]:
            found.problems.append(
                f"round {index}: {len(trained)} of {plan.epochs * plan.pairs_per_round[index]} pairs were trained"
            )
        found.counts["pairs trained"] += sum(trained.values())
    if repeated := [pair_id for pair_id, count in seen.items() if count > 1]:
        found.problems.append(f"data/pairs: {len(repeated)} pair(s) are in more than one place, {repeated[0]} for one")


def _consumed(run: Run, found: Findings) -> None:
    """Of each gated shard that was trained, checkpoints consumed the scores, the decisions, and what those asked for."""
    chain = lineage.chain(run.records)
    consumed = {name for manifest in chain for name in manifest.attributes["consumed"]}
    done = int(chain[-1].attributes["step"]) if chain else 0
    for index in range(run.plan.rounds):
        trained = {batch.shard for batch in run.plan.batches(index) if batch.step < done}
        for shard in sorted(trained) if run.plan.gated[index] else []:
            requests = layout.requests(index, shard)
            needed = [layout.logprobs(layout.policy_name(index), "offline", index, shard), requests]
            decided = run.records.find(requests)
            if decided is not None and decided.attributes["sampled"]:  # `_requests` proves that number
                needed.append(layout.annotations(index, shard))
            found.problems += [
                f"{ref}: no checkpoint consumed it, though its shard was trained"
                for ref in needed
                if str(ref) not in consumed
            ]


def _policies(run: Run, found: Findings) -> None:
    """Each policy names the configured model or a checkpoint of the chain; each evaluation its policy."""
    digests = {manifest.digest: manifest.attributes for manifest in lineage.chain(run.records)}
    newest = run.newest_policy()
    for version in range(0 if newest is None else newest + 1):
        manifest = run.records.find(layout.policy(version))
        if manifest is None:
            found.problems.append(f"{layout.policy(version)}: missing, though policy {newest} was published")
            continue
        found.counts["policies"] += 1
        source = manifest.attributes["source"]
        if "checkpoint" in source:
            attributes = digests.get(source["checkpoint"])
            if attributes is None:
                found.notes.append(f"{manifest.ref}: exported from a checkpoint that was condemned later")
            elif attributes["step"] != run.plan.first_step[version]:
                found.problems.append(
                    f"{manifest.ref}: exported after step {attributes['step']}, not at the start of its round"
                )
        evaluation = run.records.find(layout.evaluation(version))
        if evaluation is not None:
            found.counts["evaluations"] += 1
            if not _is_same(manifest, evaluation.attributes["policy"]):
                found.problems.append(f"{evaluation.ref}: evaluates another policy than {manifest.ref}")


def _complete(run: Run, found: Findings) -> None:
    """A run that was closed as finished has every record that its plan promises."""
    closing = run.closing()
    if closing is None or closing.attributes["outcome"] != "finished":
        return
    promised = [layout.policy(version) for version in range(run.plan.rounds + 1)]
    if run.config.replay_from is None:
        if run.config.evaluates:
            promised += [layout.evaluation(version) for version in range(run.plan.rounds + 1)]
        promised += [layout.requests(index, shard) for index, shard in _gated_shards(run)]
    promised += [layout.meta_batch(boundary.version) for boundary in run.plan.boundaries]
    promised += [layout.phi(version) for version in range(len(run.plan.boundaries) + 1)] if run.config.learns else []
    found.problems += [
        f"{ref}: missing, though the run is finished" for ref in promised if run.records.find(ref) is None
    ]


# ------------------------------------------------------------------------------------------- samples and pairs


def _requests(run: Run, found: Findings) -> None:
    """The decisions about a shard are about its pairs, and what workers and trainer go by is what they say."""
    for index, shard in _gated_shards(run):
        manifest = run.records.find(layout.requests(index, shard))
        if manifest is None:
            continue
        table, attributes = run.records.table(manifest), manifest.attributes
        if table["pair_id"].to_pylist() != run.pairs(index, shard)["pair_id"].to_pylist():
            found.problems.append(f"{manifest.ref}: its pairs are not those of its shard")
        expected = {"sampled": sum(table["sampled"].to_pylist())}
        if run.config.replay_from is None:
            expected["phi"] = run.plan.version_before_round(index)
        stated = {name: attributes.get(name) for name in expected}
        if stated != expected:
            found.problems.append(f"{manifest.ref}: states {stated}, should be {expected}")


def _annotations(run: Run, found: Findings) -> None:
    """Every requested pair was sampled by its round's policy and annotated, best and worst follow from the rewards."""
    from toolkit.algorithms.draws import sample_seed
    from toolkit.algorithms.pairing import best_worst

    if run.config.replay_from is not None:
        found.notes.append("a replay: requests, annotations and meta-learner versions are those of the run it replays")
        return
    sampling = run.config.method.sampling
    for index, shard in _gated_shards(run):
        requests = run.records.find(layout.requests(index, shard))
        responses = run.records.find(layout.responses(index, shard))
        annotations = run.records.find(layout.annotations(index, shard))
        if requests is None or annotations is None:
            continue
        name = str(annotations.ref)
        if responses is None:
            found.problems.append(f"{layout.responses(index, shard)}: missing, though {name} was made from it")
            continue
        if annotations.attributes["responses"] != responses.digest:
            found.notes.append(f"{name}: made from responses that were replaced since")
        policy = run.records.find(layout.policy(index))
        if policy is None or not _is_same(policy, responses.attributes["policy"]):
            found.problems.append(f"{responses.ref}: not sampled by the policy of round {index}")
        asked = [row["pair_id"] for row in run.records.table(requests).to_pylist() if row["sampled"]]
        rows = run.records.table(annotations).to_pylist()
        if [row["pair_id"] for row in rows] != asked:
            found.problems.append(f"{name}: its pairs are not those that were requested")
        samples: dict[str, list[dict[str, Any]]] = {pair_id: [] for pair_id in asked}
        for row in run.records.table(responses).to_pylist():
            samples.setdefault(row["pair_id"], []).append(row)
        for row in rows:
            own = samples[row["pair_id"]]
            found.counts["annotations"] += 1
            if row["outcome"] == "prompt_rejected":
                continue
            seeds = [sample_seed(run.config.seed, index, row["pair_id"], number) for number in range(sampling.samples)]
            if [response["seed"] for response in own] != seeds:
                found.problems.append(f"{responses.ref}: pair {row['pair_id']} was not sampled with its own seeds")
                continue
            cut = [response["finish_reason"] == "length" for response in own]
            ids = [response["token_ids"] for response in own]
            outcome = best_worst(row["rewards"], cut, ids, sampling.allow_truncated)
            expected = (outcome.outcome, outcome.chosen, outcome.rejected)
            if (row["outcome"], row["chosen_sample"], row["rejected_sample"]) != expected:
                found.problems.append(f"{name}: pair {row['pair_id']} should be {expected}")
            elif outcome.chosen is not None and outcome.rejected is not None:
                chosen_and_rejected = (ids[outcome.chosen], ids[outcome.rejected])
                if (row["chosen_ids"], row["rejected_ids"]) != chosen_and_rejected:
                    found.problems.append(f"{name}: pair {row['pair_id']} does not hold the sampled tokens")


def _gated_shards(run: Run) -> Iterator[tuple[int, int]]:
    for index in range(run.plan.rounds):
        if run.plan.gated[index]:
            for shard in range(run.plan.shards(index)):
                yield index, shard


# ------------------------------------------------------------------------------------------- what can be recomputed


def _derived(run: Run, found: Findings) -> None:
    """Feature statistics, gate decisions and meta-learner versions, recomputed from what they follow from."""
    import torch

    from toolkit.exchange import derive

    if run.config.replay_from is not None:
        return
    for index in range(run.plan.rounds):
        manifest = run.records.find(layout.statistics(index))
        if manifest is not None:
            scored, recorded = derive.scored_statistics(run, index), manifest.attributes["statistics"]
            found.counts["feature statistics"] += 1
            if scored is None or any(abs(value - recorded[name]) > 1e-9 for name, value in vars(scored).items()):
                found.problems.append(f"{manifest.ref}: its values {recorded} do not follow from the scores: {scored}")
    for index, shard in _gated_shards(run):
        manifest = run.records.find(layout.requests(index, shard))
        if manifest is None:
            continue
        recorded, again = run.records.table(manifest), derive.request_table(run, index, shard)
        found.counts["gate decisions"] += recorded.num_rows
        if recorded["pair_id"] != again["pair_id"] or recorded["u"] != again["u"]:
            found.problems.append(f"{manifest.ref}: its pairs or draws are not those of this run")
            continue
        margin = abs(again["u"].to_numpy() - again["w_gate"].to_numpy())
        different = (
            recorded["sampled"].to_numpy(zero_copy_only=False) != again["sampled"].to_numpy(zero_copy_only=False)
        ) & (margin > 1e-6)
        far = abs(recorded["w_gate"].to_numpy() - again["w_gate"].to_numpy()) > 1e-6
        for row in (different | far).nonzero()[0][:3]:
            found.problems.append(
                f"{manifest.ref}: pair {recorded['pair_id'][row]} has w_gate {recorded['w_gate'][row]} and sampled="
                f"{recorded['sampled'][row]}; recomputed {again['w_gate'][row]} and {again['sampled'][row]}"
            )
    if not run.config.learns:
        return
    for version in range(len(run.plan.boundaries) + 1):
        manifest = run.records.find(layout.phi(version))
        if manifest is None:
            break
        state = derive.next_phi(run, version)
        if state is None:
            found.problems.append(f"{manifest.ref}: the meta batch it was learned from is missing")
            continue
        found.counts["meta-learner versions"] += 1
        recorded_tensors, _ = derive.phi_state(run, version).to_tensors()
        tensors, _ = state.to_tensors()
        worst = max(float((tensors[name] - recorded_tensors[name]).abs().max()) for name in tensors)
        if not worst <= 1e-5:
            found.problems.append(f"{manifest.ref}: recomputing it differs by {worst:.3g}")
        elif not all(torch.equal(tensors[name], recorded_tensors[name]) for name in tensors):
            found.notes.append(
                f"{manifest.ref}: recomputed here to within {worst:.1g}, not bit for bit (another kind of CPU?)"
            )
