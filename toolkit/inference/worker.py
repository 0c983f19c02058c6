"""The inference worker's loop: annotate what is sampled, sample what is asked, evaluate what is new. Workers share by claims, which
are advice: two that do the same shard publish the same record, and the second one's is garbage.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from toolkit.exchange import hints, layout, series
from toolkit.exchange.jobs import Heartbeat, Observer
from toolkit.exchange.records import Manifest, Ref
from toolkit.exchange.reports import Condemnations
from toolkit.exchange.run import Run
from toolkit.inference.annotation import annotate_shard
from toolkit.inference.engine import PolicyEngine, Probe, RewardEngine
from toolkit.inference.evaluation import evaluate_policy, load_metric
from toolkit.inference.sampling import sample_shard
from toolkit.inference.settings import SamplingSettings, engine_settings
from toolkit.inference.staging import policy_folder
from toolkit.reporting.metrics import MetricsWriter
from toolkit.signals import StopFlag

if TYPE_CHECKING:  # brings transformers and torch: seconds, before the first heartbeat
    from toolkit.data.template import ChatTokenizer, RewardTokenizer

WINDOW = 64  # open shards looked at in one turn


class Worker:
    """Works on a run until it is closed. Holds one policy engine and one engine per reward model, started when first needed."""

    def __init__(self, run: Run, slot: str, stop: StopFlag) -> None:
        self.run, self.slot, self.stop = run, slot, stop
        self.config = run.config
        self.does = set(self.config.inference.does)
        self.metrics = MetricsWriter(run.root, slot, run.attempt)
        self.heartbeat = Heartbeat(run.root, slot, run.attempt)
        self.observer = Observer(run.root, 4 * self.config.inference.heartbeat)
        self.version: int | None = None  # of the policy loaded
        self.newest = -1
        self.open: tuple[int, list[int]] = (-1, [])  # a round and its shards not known to be done
        self.asked: dict[int, bool] = {}  # whether anything was asked of a shard of that round
        self.condemnations = Condemnations(run)
        self.rewards: dict[str, tuple[RewardEngine, RewardTokenizer]] = {}

    def work(self) -> str:
        """The loop. Returns ``done``, ``saved`` or ``starved``."""
        self.heartbeat.start(self.config.inference.heartbeat)
        busy = time.monotonic()
        while not self.stop.is_set():
            if self.run.closing(self.run.incarnation) is not None:
                return "done"
            if self._turn():
                busy = time.monotonic()
            elif time.monotonic() - busy > self.config.idle_exits["worker"]:
                return "starved"
            else:
                self.stop.sleep(self.config.inference.poll)
        return "saved"

    def _turn(self) -> bool:
        """Do one piece of work. False if there is none."""
        if self.run.records.find(layout.PAIRS) is None:
            return False
        newest = self.run.newest_policy()
        if newest is None:
            return False
        self.newest = newest
        claimed = self.observer.claimed(self.slot)
        for ref, action in self._candidates(claimed):
            if str(ref) not in claimed:
                with self._claim(ref):
                    action()
                return True
        return False

    @contextmanager
    def _claim(self, ref: Ref) -> Iterator[None]:
        self.heartbeat.working_on = [str(ref)]
        self.heartbeat.beat()
        yield  # what it died at stays written
        self.heartbeat.working_on = []

    def _candidates(self, claimed: set[str]) -> Iterator[tuple[Ref, Callable[[], None]]]:
        """What could be done now, the most wanted first: what lies sampled, what the trainer waits for, then evaluation."""
        index = self.newest
        if index < self.run.plan.rounds and self.run.plan.gated[index]:
            annotate, sample = self._open_shards(index, claimed)
            if "annotate" in self.does:
                for shard in annotate:
                    yield layout.annotations(index, shard), lambda shard=shard: self._annotate(index, shard)
            if "sample" in self.does:
                for shard in sample:
                    yield layout.responses(index, shard), lambda shard=shard: self._sample(index, shard)
        for version in sorted(self.run.unevaluated(), key=lambda version: (version != self.version, version)):
            yield layout.evaluation(version), lambda version=version: self._evaluate(version)

    def _open_shards(self, index: int, claimed: set[str]) -> tuple[list[int], list[int]]:
        """Shards of the round to annotate and to sample, oldest first, those that the sidecar's hint names before all others.

        Claimed ones are left out before any is looked at: else more workers than the window is wide would find nothing.
        """
        if self.open[0] != index or self.condemnations.news():
            self.open = (index, list(range(self.run.plan.shards(index))))
            self.asked = {}
        hint = hints.frontier(self.run.root)
        hinted = [*hint["annotate"], *hint["sample"]] if hint.get("round") == index else []
        kinds = (layout.responses, layout.annotations)
        every = dict.fromkeys([*hinted, *self.open[1]])
        shards = [shard for shard in every if not any(str(kind(index, shard)) in claimed for kind in kinds)]
        for start in range(0, len(shards), WINDOW):
            annotate, sample, waiting = self._look(index, shards[start : start + WINDOW])
            if annotate or sample or waiting:
                return annotate, sample
        return [], []

    def _look(self, index: int, shards: list[int]) -> tuple[list[int], list[int], bool]:
        """Which of these shards are to be annotated and to be sampled, and whether any waits for its requests."""
        find = self.run.records.find
        kinds = (layout.requests, layout.responses, layout.annotations)
        there = series.present(self.run.root, {kind(index, shard) for shard in shards for kind in kinds})
        annotate: list[int] = []
        sample: list[int] = []
        waiting = False
        for shard in shards:
            requests, responses, annotations = (kind(index, shard) for kind in kinds)
            if shard not in self.asked and requests in there and (manifest := find(requests)) is not None:
                self.asked[shard] = manifest.attributes["sampled"] > 0
            if shard not in self.asked:
                waiting = True
            elif not self.asked[shard] or (annotations in there and find(annotations) is not None):
                if shard in self.open[1]:
                    self.open[1].remove(shard)
            else:
                (annotate if responses in there and find(responses) is not None else sample).append(shard)
        return annotate, sample, waiting

    # ------------------------------------------------------------------------------------ the three kinds of work

    def _sample(self, index: int, shard: int) -> None:
        policy = self._load(index)
        started = time.monotonic()
        requests = self.run.records.require(layout.requests(index, shard))
        table = sample_shard(
            self.run.records.table(requests),
            self.run.pairs(index, shard),
            self.engine,
            self.sampling,
            self.config.seed,
            index,
            self.tokenizer.stop_ids,
            self.tokenizer.decode,
        )
        attributes = {"round": index, "shard": shard, "policy": policy.digest, "version": index, **self.run.provenance}
        self.run.records.publish(layout.responses(index, shard), attributes, table=table)
        tokens = sum(len(ids) for ids in table["token_ids"].to_pylist())
        self.metrics.write(
            "sample",
            round=index,
            shard=shard,
            prompts=requests.attributes["sampled"],
            responses=table.num_rows,
            tokens=tokens,
            seconds=time.monotonic() - started,
        )

    def _annotate(self, index: int, shard: int) -> None:
        assert self.config.reward.model is not None
        engine, tokenizer = self._reward(self.config.reward.model)
        started = time.monotonic()
        responses = self.run.records.require(layout.responses(index, shard))
        table = annotate_shard(
            self.run.records.table(responses),
            self.run.pairs(index, shard),
            engine,
            tokenizer.render_for_reward,
            self.config.method.sampling.allow_truncated,
        )
        outcomes = dict(Counter(table["outcome"].to_pylist()))
        attributes = {
            "round": index,
            "shard": shard,
            "responses": responses.digest,
            "reward": {"model": self.config.reward.model, "digests": tokenizer.digests},
            "outcomes": outcomes,
            **self.run.provenance,
        }
        self.run.records.publish(layout.annotations(index, shard), attributes, table=table)
        self.metrics.write("annotate", round=index, shard=shard, outcomes=outcomes, seconds=time.monotonic() - started)

    def _evaluate(self, version: int) -> None:
        assert self.config.evaluation_reward is not None
        policy = self._load(version)
        engine, tokenizer = self._reward(self.config.evaluation_reward)
        started = time.monotonic()
        metrics = {
            name: load_metric(Path(metric.file), metric.function)
            for name, metric in self.config.evaluation.metrics.items()
        }
        evaluation = self.config.evaluation
        settings = SamplingSettings(
            1, evaluation.temperature, evaluation.top_p, self.config.method.sampling.max_new_tokens
        )
        table = evaluate_policy(
            self.run.heldout(),
            self.engine,
            engine,
            settings,
            self.config.seed,
            self.tokenizer.stop_ids,
            self.tokenizer.decode,
            tokenizer.render_for_reward,
            metrics,
        )
        attributes = {
            "version": version,
            "policy": policy.digest,
            "reward": {"model": self.config.evaluation_reward, "digests": tokenizer.digests},
            **self.run.provenance,
        }
        self.run.records.publish(layout.evaluation(version), attributes, table=table)
        self._note_evaluation(version, table, time.monotonic() - started)

    def _note_evaluation(self, version: int, table: pa.Table, seconds: float) -> None:
        tokens = sum(len(ids) for ids in table["token_ids"].to_pylist())
        self.metrics.write("evaluate", version=version, prompts=table.num_rows, tokens=tokens, seconds=seconds)

    # ------------------------------------------------------------------------------------ models

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        from toolkit.data.template import ChatTokenizer

        return ChatTokenizer(self.config.model.policy, self.config.model.template_arguments)

    @cached_property
    def engine(self) -> PolicyEngine:
        return PolicyEngine(engine_settings(self.config))

    @property
    def sampling(self) -> SamplingSettings:
        sampling = self.config.method.sampling
        return SamplingSettings(sampling.samples, sampling.temperature, sampling.top_p, sampling.max_new_tokens)

    def _load(self, version: int) -> Manifest:
        """Have a policy's weights in the engine, verified by digest and proven by its probes."""
        manifest = self.run.records.require(layout.policy(version))
        if self.version != version:
            started = time.monotonic()
            self.version = None
            attributes = manifest.attributes
            probes = [Probe(**probe, dtype=attributes["dtype"]) for probe in attributes["probes"]]
            self.engine.load(policy_folder(self.run.records, manifest, self.slot), probes)
            self.version = version
            self.metrics.write("load", version=version, seconds=time.monotonic() - started)
        return manifest

    def _reward(self, folder: str) -> tuple[RewardEngine, RewardTokenizer]:
        if folder not in self.rewards:
            from toolkit.data.template import RewardTokenizer

            started = time.monotonic()
            self.rewards[folder] = RewardEngine(Path(folder), engine_settings(self.config)), RewardTokenizer(folder)
            self.metrics.write("load", reward=folder, seconds=time.monotonic() - started)
        return self.rewards[folder]
