"""The trainer's round: score, wait for annotations, train shard by shard, meet the meta boundaries, publish the next policy.

Every method is collective: all ranks call it in the same order; only rank 0 reads, waits and publishes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from toolkit.algorithms.features import FeatureStatistics
from toolkit.algorithms.meta_learner import MetaLearner, MetaLearnerState
from toolkit.errors import UserError
from toolkit.exchange import derive, layout, lineage, tables
from toolkit.exchange.jobs import Heartbeat
from toolkit.exchange.lineage import Progress
from toolkit.exchange.plan import Batch
from toolkit.exchange.readiness import shard_is_ready
from toolkit.exchange.records import Manifest, Ref
from toolkit.exchange.run import Run
from toolkit.reporting.metrics import MetricsWriter
from toolkit.training import publication, scoring
from toolkit.training import shard as shards
from toolkit.training.control import Control, Starved, Stopped
from toolkit.training.engine import PolicyEngine, StepResult
from toolkit.training.losses import PairLoss
from toolkit.training.weights import WeightsStore

# How far train-mode log-probs may be from the published scores of the same weights: (relative, absolute in nats).
TOLERANCE = {"float32": (2e-5, 1e-3), "bfloat16": (1e-2, 1.0)}


def is_zero_margin_loss(losses: np.ndarray, zero: float, dtype: str) -> bool:
    """Whether the losses `(n,)` of a policy that is its own reference are ``zero``, the objective's loss at margin 0.

    In fp32 each is. In bf16 single margins may be off by a nat or two, to either side: the mean must be near.
    """
    if dtype == "bfloat16":
        return bool(abs(losses.mean() - zero) <= 0.25 * zero)
    return bool(np.allclose(losses, zero, rtol=1e-3, atol=1e-3))


class Trainer:
    """Trains a run from its newest checkpoint to its last policy.

    Args:
        metrics: rank 0's writer, None elsewhere.
        heartbeat: rank 0's, which says what shard it is at; None elsewhere.
    """

    def __init__(
        self,
        run: Run,
        engine: PolicyEngine,
        control: Control,
        metrics: MetricsWriter | None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.run, self.engine, self.control, self.metrics, self.heartbeat = run, engine, control, metrics, heartbeat
        self.config, self.plan = run.config, run.plan
        self.method = run.config.method
        self.objective = derive.objective(self.method)
        self.store = WeightsStore(run, engine, control)
        self.newest: Manifest | None = None  # rank 0's checkpoint that training stands on
        self.sequence = -1  # its number, on every rank
        self.step = self.saved_step = self.round = self.boundary = 0
        self.meta_rows = tables.META_BATCH.empty_table()
        self.consumed: dict[str, str] = {}
        self._learner: tuple[int, MetaLearnerState] | None = None
        self._round_statistics: tuple[int, FeatureStatistics] | None = None
        self._shard: tuple[tuple[int, int], pa.Table] | None = None
        self._arrived = (-1, -1)  # round and shard up to which references of online pairs were computed

    # ------------------------------------------------------------------------------------ the whole run

    def train(self) -> str:
        """Train until the last policy is published, or until told to stop.

        Returns:
            ``done``, ``saved`` (stopped by a signal or the deadline) or ``starved``.

        Raises:
            Superseded: another trainer of this run is ahead.
            UserError: training and scoring disagree, or weights are not finite.
        """
        self._restore()
        try:
            while self.round < self.plan.rounds:
                self._train_round(self.round)
            self._publish_policy(self.plan.rounds)
            return "done"
        except (Stopped, Starved) as reason:
            if self.step > self.saved_step:
                self._checkpoint()
            return "saved" if isinstance(reason, Stopped) else "starved"

    def _restore(self) -> None:
        """Take up the newest checkpoint, or begin with the model that the engine was built with, the configured one."""

        def look() -> dict[str, Any] | None:
            self.newest = lineage.newest(self.run.records)
            if self.newest is None:
                return None
            folder = publication.checkpoint_folder(self.run, self.newest)
            return {"attributes": self.newest.attributes, "folder": str(folder)}

        found = self.control.lead(look)
        if found is None:
            self._start_schedule(0)
            if self._uses_average:
                self.store.start_average()
            self._note("start", step=0, round=0)
            return
        attributes = found["attributes"]
        self.sequence = int(attributes["sequence"])
        self.step = self.saved_step = int(attributes["step"])
        self.round, self.boundary = int(attributes["round"]), int(attributes["boundary"])
        self.store.average = self.engine.restore(found["folder"])
        self.meta_rows = self.control.lead_table(
            lambda: tables.read_parquet(Path(found["folder"]) / publication.META_ROWS)
        )
        self._note("restore", step=self.step, round=self.round, sequence=self.sequence)

    @property
    def _uses_average(self) -> bool:
        return "ema" in (self.method.gate_reference, self.method.loss_reference)

    def _start_schedule(self, round_index: int) -> None:
        restart = self.method.round_start.schedule == "restart"
        self.engine.restart_schedule(self.plan.steps_in_round(round_index) if restart else self.plan.steps)

    # ------------------------------------------------------------------------------------ one round

    def _train_round(self, index: int) -> None:
        first = self.plan.first_step[index]
        if self.step == first:
            self._begin_round(index)
        self._score(index)
        for batch in self.plan.batches(index):
            if batch.step < self.step:
                continue
            self._train_batch(batch)
            self.control.check_stop()
            ends_round = self.step == self.plan.first_step[index + 1]
            if ends_round:
                self.round = index + 1
                self.meta_rows = self.meta_rows.slice(0, 0)  # what `remainder: discard` leaves
            if ends_round or self.step - self.saved_step >= self.config.trainer.checkpoint_steps:
                self._checkpoint()
                self.control.check_stop()

    def _begin_round(self, index: int) -> None:
        """What happens between two rounds; the same whether training came here or was restored here."""
        self._publish_policy(index)
        if index > 0 and self.method.round_start.optimizer == "reset":
            self.engine.reset_optimizer()
        if index > 0 and self.method.round_start.schedule == "restart":
            self._start_schedule(index)

    def _score(self, index: int) -> None:
        """Publish the round's scores: references first, so that each score of the policy lets a shard go ahead."""
        names = [derive.loss_reference(self.config, index, 0), derive.gate_reference(self.config, index)]
        gated = self.plan.gated[index]
        references = {name for name in names[: 1 + gated] if name is not None and not name.startswith("ema-")}
        policy = layout.policy_name(index)
        every = range(self.plan.shards(index))
        current = policy if self.step == self.plan.first_step[index] else None
        average = derive.gate_reference(self.config, index) if gated and self.method.gate_reference == "ema" else None
        order = [(name, every) for name in (*sorted(references - {policy}), *filter(None, [average]))]
        order.append((policy, every if gated or policy in references else range(1)))
        for name, wanted in order:
            self._publish_logprobs(name, "offline", index, list(wanted), current)

    def _publish_logprobs(
        self, name: str, half: str, index: int, wanted: list[int], current: str | None = None
    ) -> None:
        started = time.monotonic()

        def rows(shard: int) -> pa.Table:
            return self.run.pairs(index, shard) if half == "offline" else shards.online_rows(self.run, index, shard)

        published = scoring.publish_missing(
            self.run, self.engine, self.control, self.store, name, half, index, wanted, rows, current
        )
        if published:
            self._note("score", weights=name, half=half, round=index, seconds=time.monotonic() - started)

    # ------------------------------------------------------------------------------------ one optimizer step

    def _train_batch(self, batch: Batch) -> None:
        table = self._prepared_shard(batch)
        version = self.plan.version_at_step(batch.step, self.method.meta.lag)
        pairs, constants = shards.batch(table, batch.start, batch.stop, self.method.global_batch)
        loss = PairLoss(
            objective=self.objective,
            feature=self.method.meta.feature,
            statistics=self._statistics(batch.round),
            online=self.plan.gated[batch.round],
            weight=self.method.weight.kind,
            weight_parameters=self.method.weight.parameters,
            missing=self.method.missing_online,
            learner=self._meta_learner(version) if self._weighs_with_phi(batch.round) else None,
            constants=constants,
        )
        is_first = batch.step == self.plan.first_step[batch.round]

        def check(extras: dict[str, np.ndarray]) -> None:
            if is_first:
                self._check_agreement(batch, table, extras)

        started = time.monotonic()
        result = self.engine.train_step(pairs, loss, int(loss.contributing.sum()), check)
        self.step = batch.step + 1
        self._note_step(batch, table, loss, result, time.monotonic() - started)
        if loss.online and self.run.config.learns and result.stepped:
            self._keep_meta_rows(batch, table, constants.has_online.numpy(), result.extras)
        if self.store.average is not None and batch.stop == self.plan.shard_rows(batch.round, batch.shard):
            self.store.move_average(self.method.ema_decay)
        if self.boundary < len(self.plan.boundaries) and self.plan.boundaries[self.boundary].after_step == self.step:
            self._meet_boundary()

    def _prepared_shard(self, batch: Batch) -> pa.Table:
        """The batch's shard with all its records, once they are there; references of arrived online pairs are computed."""
        key = (batch.round, batch.shard)
        if self._shard is not None and self._shard[0] == key:
            return self._shard[1]
        gated = self.plan.gated[batch.round]
        if gated:
            self._wait_for_shard(*key)
        self.control.lead(lambda: self._say_working_on(layout.training(*key)))
        name = derive.loss_reference(self.config, *key)
        if name is not None and name.startswith("ema-"):
            self._publish_logprobs(name, "offline", batch.round, [batch.shard])
        if name is not None and gated:
            arrived = [batch.shard]
            if key > self._arrived and not name.startswith("ema-"):  # one swap of weights serves all that are there
                later = range(batch.shard + 1, self.plan.shards(batch.round))
                is_ready = partial(shard_is_ready, self.run, batch.round)
                arrived += self.control.lead(lambda: list(takewhile(is_ready, later)))
                self._arrived = (batch.round, arrived[-1])
            current = layout.policy_name(batch.round) if self.step == self.plan.first_step[batch.round] else None
            self._publish_logprobs(name, "online", batch.round, arrived, current)

        def assemble() -> pa.Table:
            table, consumed = shards.assemble(self.run, *key)
            self.consumed |= consumed
            return table

        self._shard = (key, self.control.lead_table(assemble))
        return self._shard[1]

    def _say_working_on(self, claim: str) -> None:
        if self.heartbeat is not None:
            self.heartbeat.working_on = [claim]
            self.heartbeat.beat()

    def _wait_for_shard(self, index: int, shard: int) -> None:
        started = time.monotonic()

        def look() -> bool:
            if shard_is_ready(self.run, index, shard):
                return True
            if self.run.records.find(layout.policy(index)) is None:
                self._give_up(layout.policy(index), self.plan.first_step[index])
            patient = time.monotonic() - started <= self.config.trainer.meta_wait
            if not patient and self.run.records.find(layout.requests(index, shard)) is None:
                self._gate(index)  # nobody else does; one that is gated waits for its annotations only
            return False

        self._wait(look, self.config.trainer.poll)
        self._note("wait", round=index, shard=shard, seconds=time.monotonic() - started)

    def _wait(self, look: Callable[[], bool], poll: float) -> None:
        self.control.wait(
            look, poll, self.config.idle_exits["trainer"], lambda: self.run.closing(self.run.incarnation) is not None
        )

    def _gate(self, index: int) -> None:
        self._publish_phis(self.plan.version_before_round(index))
        if derive.needs_statistics(self.method) and not derive.publish_statistics(self.run, index):
            return
        for shard in range(self.plan.shards(index)):
            derive.publish_requests(self.run, index, shard)

    # ------------------------------------------------------------------------------------ the meta-learner

    def _weighs_with_phi(self, index: int) -> bool:
        return self.method.weight.kind == "meta" and self.plan.gated[index]

    def _statistics(self, index: int) -> FeatureStatistics | None:
        if not self.plan.gated[index] or not derive.needs_statistics(self.method):
            return None
        if self._round_statistics is None or self._round_statistics[0] != index:
            values = self.control.lead(lambda: vars(derive.statistics(self.run, index)))
            self._round_statistics = (index, FeatureStatistics(**values))
        return self._round_statistics[1]

    def _meta_learner(self, version: int) -> MetaLearner:
        """The meta-learner of this version, waited for; computed here if nobody publishes it."""
        if self._learner is None or self._learner[0] != version:
            started = time.monotonic()

            def look() -> bool:
                if self.run.records.find(layout.phi(version)) is not None:
                    return True
                if time.monotonic() - started > self.config.trainer.meta_wait:
                    self._publish_phis(version)
                return False

            self._wait(look, min(1.0, self.config.trainer.poll))
            self._note("wait", phi=version, seconds=time.monotonic() - started)
            states: list[MetaLearnerState] = []

            def read() -> dict[str, Any]:
                states.append(derive.phi_state(self.run, version))
                self.consumed[str(layout.phi(version))] = self.run.records.require(layout.phi(version)).digest
                return states[0].to_tensors()[1]

            values = self.control.lead(read)
            tensors = self.control.share_bytes(save_tensors(states[0].to_tensors()[0]) if states else None)
            self._learner = (version, MetaLearnerState.from_tensors(load_tensors(tensors), values))
        return self._learner[1].learner()

    def _publish_phis(self, version: int) -> None:
        derive.publish_phis(self.run, version)
        find = self.run.records.find
        for boundary in reversed(self.plan.boundaries[:version]):
            if find(layout.phi(boundary.version)) is not None:
                return
            if find(layout.meta_batch(boundary.version)) is None:
                self._give_up(layout.meta_batch(boundary.version), boundary.after_step - 1)

    def _give_up(self, ref: Ref, step: int) -> NoReturn:
        """A record was condemned that only training can make again, which did so when ``step`` steps were done.

        Raises:
            RuntimeError: the checkpoint is not past it. Nothing is saved: the next attempt makes the record.
            UserError: it is past it.
        """
        if self.saved_step <= step:
            raise RuntimeError(
                f"record {ref} was damaged; the next attempt makes it again, from step {self.saved_step}"
            )
        raise UserError(
            f"record {ref} was damaged after training had gone on from it to the checkpoint at step {self.saved_step}, so it can't "
            f"be made again and this run can't go on. Its policies stay usable: metaapo launch run=NEW model.policy=POLICY with a "
            f"folder of {self.run.root / layout.policy(0).directory}."
        )

    def _keep_meta_rows(
        self, batch: Batch, table: pa.Table, has_online: np.ndarray, extras: dict[str, np.ndarray]
    ) -> None:
        count = batch.stop - batch.start
        kept = np.flatnonzero(has_online[:count])
        rows = table.slice(batch.start, count).take(pa.array(kept))
        columns = {
            "pair_id": rows["pair_id"],
            "step": np.full(len(kept), batch.step),
            "s": extras["s"][kept],
            "loss_offline": extras["loss_offline"][kept],
            "loss_online": extras["loss_online"][kept],
            "w_gate": rows["w_gate"],
        }
        new = tables.conform(pa.table(columns), tables.META_BATCH)
        self.meta_rows = pa.concat_tables([self.meta_rows, new]).combine_chunks()

    def _meet_boundary(self) -> None:
        """Publish the rows since the last boundary; the sidecar makes the next meta-learner of them."""
        boundary = self.plan.boundaries[self.boundary]
        attributes = {"boundary": boundary.version, "round": boundary.round, "after_step": boundary.after_step}
        rows = self.meta_rows

        def publish() -> None:
            # A farewell: a checkpoint of this step, on the way out, must not stand past a boundary that was never met.
            self.run.records.publish(layout.meta_batch(boundary.version), attributes, table=rows, farewell=True)

        self.control.lead(publish)
        self.meta_rows = rows.slice(0, 0)
        self.boundary += 1

    # ------------------------------------------------------------------------------------ publishing

    def _checkpoint(self) -> None:
        started = time.monotonic()
        at = Progress(self.step, self.round, self.boundary)
        self.newest = publication.publish_checkpoint(
            self.run,
            self.engine,
            self.control,
            self.newest,
            self.sequence + 1,
            at,
            self.saved_step,
            self.consumed,
            self.meta_rows,
            self.store.average,
        )
        self.sequence += 1
        self.saved_step, self.consumed = self.step, {}
        self._note("checkpoint", step=self.step, sequence=self.sequence, seconds=time.monotonic() - started)

    def _publish_policy(self, version: int) -> None:
        """Publish the policy at a round's start from the checkpoint it stands on, unless that was done."""
        if self.control.lead(lambda: self.run.records.find(layout.policy(version)) is not None):
            return
        started = time.monotonic()
        publication.publish_policy(self.run, self.engine, self.control, version, self.newest)
        self._note("policy", version=version, seconds=time.monotonic() - started)

    # ------------------------------------------------------------------------------------ checks and metrics

    def _check_agreement(self, batch: Batch, table: pa.Table, extras: dict[str, np.ndarray]) -> None:
        """At a round's first step the policy is what was scored: its train-mode log-probs must be the published ones.

        Where it is the loss reference too, every margin is 0 and each loss is objective(0).
        """
        count = batch.stop - batch.start
        rows = table.slice(batch.start, count)
        relative, absolute = TOLERANCE[self.config.model.dtype]
        for column, side in enumerate(("chosen", "rejected")):
            expected, found = rows[f"score_{side}"].to_numpy(), extras["logprobs"][:count, column]
            distance = np.abs(found - expected) - (absolute + relative * np.abs(expected))
            worst = int(np.argmax(np.where(np.isfinite(distance), distance, np.inf)))
            if not distance[worst] <= 0:
                raise UserError(
                    f"training and scoring disagree at the start of round {batch.round}: pair {rows['pair_id'][worst]} ({side}) was "
                    f"scored {expected[worst]:.6f} and has log-prob {found[worst]:.6f} in training (tolerance {absolute} + "
                    f"{relative} x |score|). Nothing was updated. Check that layout, dtype and model are those of the scores."
                )
        zero = self.objective.zero_margin_loss
        if zero is not None and derive.loss_reference(self.config, batch.round, batch.shard) == layout.policy_name(
            batch.round
        ):
            losses = extras["loss_offline"][:count]
            if not is_zero_margin_loss(losses, zero, self.config.model.dtype):
                raise UserError(
                    f"the policy is the loss reference at the start of round {batch.round}, so each loss must be {zero:.6f}; "
                    f"got {losses.min():.6f} to {losses.max():.6f}, {losses.mean():.6f} on average. Nothing was updated."
                )

    def _note(self, kind: str, **values: Any) -> None:
        if self.metrics is not None:
            self.metrics.write(kind, **values)

    def _note_step(self, batch: Batch, table: pa.Table, loss: PairLoss, result: StepResult, seconds: float) -> None:
        if self.metrics is None:
            return
        if not result.stepped:  # no pair of the batch counted
            self.metrics.write("step", step=batch.step, round=batch.round, shard=batch.shard, counted=0, stepped=False)
            return
        real = loss.constants.real.numpy()
        online = loss.constants.has_online.numpy()
        counted = loss.contributing.numpy()
        extras, beta = result.extras, self.objective.beta
        ratios = extras["logprobs"] - loss.constants.loss_reference.numpy()

        def mean(values: np.ndarray, rows: np.ndarray) -> float | None:
            return float(values[rows].mean()) if rows.any() else None

        self.metrics.write(
            "step",
            step=batch.step,
            round=batch.round,
            shard=batch.shard,
            loss=mean(extras["loss"], counted),
            loss_offline=mean(extras["loss_offline"], real),
            loss_online=mean(extras["loss_online"], online),
            s=mean(extras["s"], real),
            w=mean(extras["w"], online),
            margin_offline=mean(beta * (ratios[:, 0] - ratios[:, 1]), real),
            margin_online=mean(beta * (ratios[:, 2] - ratios[:, 3]), online),
            reward_chosen=mean(beta * ratios[:, 0], real),
            reward_rejected=mean(beta * ratios[:, 1], real),
            pairs=int(real.sum()),
            online=int(online.sum()),
            counted=int(counted.sum()),
            gradient_norm=result.gradient_norm,
            learning_rate=result.learning_rate,
            tokens=result.tokens,
            stepped=result.stepped,
            seconds=round(seconds, 4),
        )
