"""Stands in for the models, and only for them: small deterministic trainers and workers without torch and vLLM.

A profile names this file's interpreter script as the role's Python. Jobs, records, claims, heartbeats, signals, deadlines, lineage and
the whole sidecar are the real ones. "Weights" are a digest of everything that training read, in order: they are equal if and only
if the same records were trained in the same order, each once.

Pace and faults come from ``<run>.faults/``: ``pace`` (seconds a step and a piece of worker's work) and, by slot, what goes wrong
there: ``<what> <where>``. Both are looked at again and again.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from toolkit.algorithms.draws import sample_seed
from toolkit.exchange import filesystem, layout, lineage, tables
from toolkit.exchange.jobs import Heartbeat
from toolkit.exchange.lineage import Progress
from toolkit.exchange.readiness import shard_is_ready
from toolkit.exchange.records import File, Ref
from toolkit.exchange.run import Run
from toolkit.signals import StopFlag


def faults(run: Run) -> Path:
    return run.root.with_suffix(".faults")


def pace(run: Run) -> float:
    try:
        return float((faults(run) / "pace").read_text())
    except (OSError, ValueError):
        return 0.05


def work(run: Run, paces: int = 1) -> None:
    """Take as long as the pace says, which the test may change meanwhile."""
    began = time.monotonic()
    while time.monotonic() - began < paces * pace(run):
        time.sleep(0.02)


def fault(run: Run, slot: str, where: str) -> None:
    """What the test planned for this slot at this place, once or always."""
    try:
        what, place, *often = (faults(run) / slot).read_text().split()
    except (OSError, ValueError):
        return
    if place not in where:
        return
    if "always" not in often:
        (faults(run) / slot).unlink()
    if what == "raise":
        raise RuntimeError(f"planned failure at {place}")
    if what == "memory":
        block = b""
        while True:
            block += b"x" * 50_000_000
    if what == "deaf":
        for name in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(name, signal.SIG_IGN)
    if what == "exit":
        os._exit(3)
    if what == "hang":
        time.sleep(3600)
    if what == "pause":
        os.kill(os.getpid(), signal.SIGSTOP)


# ---------------------------------------------------------------------------------------------- trainer


class PayloadTrainer:
    def __init__(self, run: Run, slot: str, stop: StopFlag) -> None:
        self.run, self.slot, self.stop = run, slot, stop
        self.heartbeat = Heartbeat(run.root, slot, run.attempt)
        self.weights = hashlib.sha256(b"the beginning").hexdigest()
        self.parent = lineage.newest(run.records)
        self.at = Progress(0, 0, 0)
        if self.parent is not None:
            self.at = lineage.progress(self.parent)
            [entry] = self.parent.files
            self.weights = run.records.verified(self.parent, entry).read_text()
        self.saved = self.at.step
        self.rows = list(self.parent.attributes["meta_rows"]) if self.parent is not None else []
        self.consumed: dict[str, str] = {}

    def train(self) -> str:
        self.heartbeat.start(0.5)
        plan = self.run.plan
        while self.at.round < plan.rounds:
            index = self.at.round
            if self.at.step == plan.first_step[index]:
                self._policy(index)
            self._score(index)
            for batch in plan.batches(index):
                if batch.step < self.at.step:
                    continue
                outcome = self._wait(batch)
                if outcome is None:
                    self._step(batch)
                    outcome = "saved" if self.stop.is_set() else None
                if outcome is not None:
                    if self.at.step > self.saved:
                        self._checkpoint()
                    return outcome
                ends = self.at.step == plan.first_step[index + 1]
                if ends:
                    self.at = Progress(self.at.step, index + 1, self.at.boundary)
                    self.rows = []
                if ends or self.at.step - self.saved >= self.run.config.trainer.checkpoint_steps:
                    self._checkpoint()
        self._policy(plan.rounds)
        return "done"

    def _wait(self, batch: Any) -> str | None:
        run, started = self.run, time.monotonic()
        phi = layout.phi(run.plan.version_at_step(batch.step, run.config.method.meta.lag))

        def is_ready() -> bool:
            learned = not run.plan.gated[batch.round] or run.records.find(phi) is not None
            return learned and shard_is_ready(run, batch.round, batch.shard)

        while not is_ready():
            if time.monotonic() - started > run.config.trainer.meta_wait:
                self._derive(batch)
            if time.monotonic() - started > run.config.trainer.idle_exit:
                return "starved"
            if run.closing(run.incarnation) is not None or self.stop.sleep(0.1):
                return "saved"
        return None

    def _derive(self, batch: Any) -> None:
        """What the real trainer does without a sidecar."""
        from toolkit.exchange import derive  # brings torch

        run, index = self.run, batch.round
        derive.publish_phis(run, run.plan.version_before_round(index))
        derive.publish_phis(run, run.plan.version_at_step(batch.step, run.config.method.meta.lag))
        if derive.needs_statistics(run.config.method) and not derive.publish_statistics(run, index):
            return
        for shard in range(run.plan.shards(index)):
            derive.publish_requests(run, index, shard)

    def _step(self, batch: Any) -> None:
        self.heartbeat.working_on = [layout.training(batch.round, batch.shard)]
        fault(self.run, self.slot, f"step-{batch.step}.")
        work(self.run)
        run, plan = self.run, self.run.plan
        read = [layout.logprobs(layout.policy_name(batch.round), "offline", batch.round, batch.shard)]
        if plan.gated[batch.round]:
            read.append(layout.requests(batch.round, batch.shard))
            if run.records.require(read[-1]).attributes["sampled"]:
                read.append(layout.annotations(batch.round, batch.shard))
            read.append(layout.phi(plan.version_at_step(batch.step, run.config.method.meta.lag)))
        content = hashlib.sha256(f"{self.weights} {batch.step} {batch.start} {batch.stop}".encode())
        for ref in read:
            manifest = run.records.require(ref)
            for entry in manifest.files:  # the content, not the record: attempts and times differ
                content.update(run.records.verified(manifest, entry).read_bytes())
            self.consumed[str(ref)] = manifest.digest
        self.weights = content.hexdigest()
        ids = run.pairs(batch.round, batch.shard)["pair_id"].to_pylist()[batch.start : batch.stop]
        if plan.gated[batch.round]:
            self.rows += [[pair, batch.step] for pair in ids]
        step = batch.step + 1
        boundary = self.at.boundary
        if boundary < len(plan.boundaries) and plan.boundaries[boundary].after_step == step:
            self._meet(plan.boundaries[boundary])
            boundary += 1
        self.at = Progress(step, batch.round, boundary)

    def _meet(self, boundary: Any) -> None:
        numbers = [int(hashlib.sha256(pair.encode()).hexdigest()[:6], 16) / 2**24 for pair, _ in self.rows]
        columns = {
            "pair_id": [pair for pair, _ in self.rows],
            "step": [step for _, step in self.rows],
            "s": [-number for number in numbers],
            "loss_offline": numbers,
            "loss_online": [1 - number for number in numbers],
            "w_gate": [0.5] * len(numbers),
        }
        table = pa.Table.from_pydict(columns, tables.META_BATCH)
        attributes = {"boundary": boundary.version, "round": boundary.round, "after_step": boundary.after_step}
        self.run.records.publish(layout.meta_batch(boundary.version), attributes, table=table)
        self.rows = []

    def _score(self, index: int) -> None:
        for name in dict.fromkeys([layout.policy_name(0), layout.policy_name(index)]):
            for shard in range(self.run.plan.shards(index)):
                ids = self.run.pairs(index, shard)["pair_id"].to_pylist()
                rows = []
                for pair in ids:
                    number = int(hashlib.sha256(f"{name} {pair}".encode()).hexdigest()[:6], 16) / 2**20
                    row = {"pair_id": pair, "chosen": -10 - number, "rejected": -20 + number}
                    rows.append(row | {"chosen_tokens": 5, "rejected_tokens": 6})
                table = pa.Table.from_pylist(rows, tables.LOGPROBS)
                self.run.records.publish(layout.logprobs(name, "offline", index, shard), {}, table=table)

    def _stage(self, ref: Ref) -> list[File]:
        directory = self.run.records.stage(ref, private=True)
        filesystem.write(directory / "weights", self.weights.encode())
        digest = hashlib.sha256(self.weights.encode()).hexdigest()
        return [File(f"{directory.name}/weights", len(self.weights), digest)]

    def _checkpoint(self) -> None:
        number = 0 if self.parent is None else lineage.sequence(self.parent) + 1
        files = self._stage(layout.checkpoint(number))
        extra = {"meta_rows": self.rows, "weights": self.weights}
        self.parent = lineage.publish(self.run.records, self.parent, self.at, self.consumed, self.saved, files, extra)
        self.saved, self.consumed = self.at.step, {}

    def _policy(self, version: int) -> None:
        ref = layout.policy(version)
        if self.run.records.find(ref) is None:
            source = {"model": "none"} if self.parent is None else {"checkpoint": self.parent.digest}
            attributes = {"version": version, "source": source, "weights": self.weights}
            self.run.records.publish(ref, attributes, staged=self._stage(ref))


def trainer(run: Run, slot: str, number: int, rank: int, size: int, stop: StopFlag) -> str:
    if rank:  # the other ranks compute with rank 0: here they wait for it
        while (end := run.records.find(layout.job(slot, number, "end"))) is None:
            time.sleep(0.2)
        return str(end.attributes["outcome"])
    return PayloadTrainer(run, slot, stop).train()


# ---------------------------------------------------------------------------------------------- worker


def worker(run: Run, slot: str, number: int, rank: int, size: int, stop: StopFlag) -> str:
    from toolkit.inference.worker import Worker  # its engines are started when first used: never here

    class PayloadWorker(Worker):
        def _sample(self, index: int, shard: int) -> None:
            ref = layout.responses(index, shard)
            fault(run, slot, str(ref))
            work(run, 2)
            requests = run.records.require(layout.requests(index, shard))
            asked = [row["pair_id"] for row in run.records.table(requests).to_pylist() if row["sampled"]]
            rows = []
            for pair in asked:
                for sample in range(self.config.method.sampling.samples):
                    seed = sample_seed(self.config.seed, index, pair, sample)
                    row = {"pair_id": pair, "sample": sample, "token_ids": [sample, 9], "text": f"answer {seed}"}
                    rows.append(row | {"finish_reason": "stop", "logprob": -1.0, "seed": seed})
            policy = run.records.require(layout.policy(index)).digest
            run.records.publish(ref, {"policy": policy}, table=pa.Table.from_pylist(rows, tables.RESPONSES))

        def _annotate(self, index: int, shard: int) -> None:
            ref = layout.annotations(index, shard)
            fault(run, slot, str(ref))
            work(run)
            responses = run.records.require(layout.responses(index, shard))
            samples = self.config.method.sampling.samples
            rows = []
            for pair in dict.fromkeys(run.records.table(responses)["pair_id"].to_pylist()):
                row = {"pair_id": pair, "outcome": "pair", "rewards": [float(number) for number in range(samples)]}
                row |= {"chosen_sample": samples - 1, "rejected_sample": 0}
                row |= {"chosen_ids": [samples - 1, 9], "rejected_ids": [0, 9]}
                rows.append(row | {"chosen_reward": samples - 1.0, "rejected_reward": 0.0})
            attributes = {"responses": responses.digest}
            run.records.publish(ref, attributes, table=pa.Table.from_pylist(rows, tables.ANNOTATIONS))

    return PayloadWorker(run, slot, stop).work()


def main() -> None:
    """``payload.py -u -m submitit.core._submit FOLDER``: what submitit would do, with these roles."""
    from submitit.core.submission import process_job

    from toolkit.launch import job

    real = job._role
    mine = {"trainer": trainer, "sidecar": None}
    job._role = lambda slot: mine.get(slot, worker) or real(slot)
    process_job(sys.argv[-1])


if __name__ == "__main__":
    main()
