"""The policy under Megatron: scoring, optimizer steps, checkpoints and export, for any layout.

Every public method of ``PolicyEngine`` that isn't marked local is a collective call: all ranks of the layout call it,
in the same order and with the same arguments. Data come whole to every rank; each takes its part by itself.

Scale of the loss: the objective of a step is ``sum(losses) / denominator`` over the global batch. Megatron is told
``calculate_per_token_loss``, with which it neither averages over micro-batches nor over copies of the model: gradients
are plain sums, and the denominator is the caller's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor

from toolkit.conversion.reading import read_shards
from toolkit.conversion.registry import read_shape
from toolkit.conversion.weights import global_name
from toolkit.errors import UserError, unknown
from toolkit.training import checkpoint, device
from toolkit.training.collective import gather_items, together
from toolkit.training.export import export
from toolkit.training.layout import ParallelLayout
from toolkit.training.logprobs import response_logprobs
from toolkit.training.microbatches import MicroBatch, Pair, PairBatch, check_items, micro_batches
from toolkit.training.model import RECOMPUTE, build_model, transformer_config
from toolkit.training.optimizer import OptimizerSettings, PolicyOptimizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

PairLoss = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(n, 4) fp32 log-prob sums in the order of ``microbatches.SIDES`` (0 where a sequence is absent) and (n,) int64
positions in the global batch -> (n,) losses, already weighted and masked, and values (n, ...) to be returned by name.
Called on the last pipeline stage only."""


@dataclass(frozen=True)
class EngineSettings:
    """How the policy is computed and trained.

    Attributes:
        dtype: of weights and activations, a name of ``DTYPES``; log-probs, gradients and the optimizer are fp32 always.
        micro_batch_pairs: pairs, of up to four sequences each, in one forward and backward pass.
        recompute: activations computed again in the backward pass, to save memory: a name of ``model.RECOMPUTE``.
        distributed_optimizer: optimizer state divided among the data-parallel copies (ZeRO-1).
        optimizer: Adam and its schedule.
    """

    dtype: str = "bfloat16"
    micro_batch_pairs: int = 1
    recompute: str = "none"
    distributed_optimizer: bool = False
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.recompute not in RECOMPUTE:
            raise unknown("recompute", self.recompute, RECOMPUTE)
        if self.micro_batch_pairs < 1:
            raise UserError(f"micro_batch_pairs must be at least 1; got {self.micro_batch_pairs}")


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did; the same on every rank.

    Attributes:
        extras: the loss function's values in the order of the global batch, with ``logprobs`` (B, 4) float32; empty if
            nothing was computed.
        gradient_norm: global norm before clipping; 0 if nothing was computed.
        learning_rate: that of this step.
        tokens: tokens computed, prompts included, padding not.
        stepped: whether the weights were updated.
    """

    extras: dict[str, NDArray]
    gradient_norm: float
    learning_rate: float
    tokens: int
    stepped: bool


class PolicyEngine:
    """One model under one layout, inside an initialised process group (``device.initialize`` with the same layout)."""

    def __init__(self, layout: ParallelLayout, model_folder: str | Path, settings: EngineSettings) -> None:
        """Build the model and load its weights from ``model_folder``, a Hugging Face folder.

        Raises:
            UserError: the folder is missing, incomplete or of an unsupported architecture, or the layout doesn't fit.
        """
        self.layout = layout
        self.settings = settings
        self.model_folder = Path(model_folder)
        self.shape = together(lambda: read_shape(self.model_folder))
        layout.check_model(self.shape)
        dtype = DTYPES[settings.dtype]
        config = transformer_config(self.shape, layout, dtype, settings.recompute)
        self.module = build_model(config, self.shape, layout)
        first_layer = self.module.decoder.layers[0].layer_number - 1
        self._names = {name: global_name(name, first_layer) for name, _ in self.module.named_parameters()}
        buckets = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=settings.distributed_optimizer
        )
        self._model = DistributedDataParallel(config, buckets, self.module)
        self._optimizer = PolicyOptimizer(self._model, settings.optimizer, dtype)
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = self._model.no_sync
        self._swapped = False
        self.load(model_folder)

    # Weights

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Set the policy's weights from a Hugging Face folder of the same shape. Optimizer moments stay.

        Raises:
            UserError: on every rank, if the folder isn't a complete model of this shape.
        """
        parameters = dict(self.module.named_parameters())

        def read() -> None:
            for name, shard in self._read(Path(folder)):
                parameters[name].copy_(shard)

        together(read)
        self._optimizer.megatron.reload_model_params()

    def load_weights(self, folder: str | Path) -> dict[str, Tensor]:
        """This rank's part of the weights in a Hugging Face folder, as ``weights`` gives them; the model is untouched.

        Raises:
            UserError: as ``load``.
        """
        dtype = DTYPES[self.settings.dtype]
        return together(lambda: {name: shard.to(dtype) for name, shard in self._read(Path(folder))})

    def _read(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """(name, shard) of each parameter of this rank, one at a time."""
        if read_shape(folder) != self.shape:
            raise UserError(f"{folder} holds a model of another shape than {self.model_folder}; expected the same")
        rank = parallel_state.get_tensor_model_parallel_rank()
        shards = read_shards(folder, self.shape, self._names.values(), rank, self.layout.tensor)
        for name, (_, shard) in zip(self._names, shards, strict=True):
            yield name, shard

    def weights(self) -> dict[str, Tensor]:
        """A copy of this rank's parameters on the CPU, by name. Local."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.module.named_parameters()}

    @contextmanager
    def swapped(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Compute with other weights (as from ``weights`` or ``load_weights``) for a while. Local.

        The policy's own come back bit for bit, also after an exception. There is no training meanwhile.
        """
        own = self.weights()
        self._swapped = True
        try:
            self._assign(weights)
            yield
        finally:
            self._assign(own)
            self._swapped = False

    @torch.no_grad()
    def _assign(self, weights: Mapping[str, Tensor]) -> None:
        parameters = dict(self.module.named_parameters())
        if weights.keys() != parameters.keys():
            raise ValueError(f"weights of other parameters: {sorted(weights.keys() ^ parameters.keys())}")
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])

    # Computation

    def score(self, sequences: Sequence[NDArray[np.int32]], prompt_lengths: Sequence[int]) -> NDArray[np.float32]:
        """Log-prob sums of responses, forward only, by the same code path as training.

        Args:
            sequences: prompt and response token ids, int32 (length,) each.
            prompt_lengths: tokens of each one's prompt.

        Returns:
            (n,) float32 on every rank: sum over the response's tokens of log p.
        """
        items = [Pair(length, (sequence,)) for sequence, length in zip(sequences, prompt_lengths, strict=True)]
        if not items:
            return np.zeros(0, np.float32)

        def collect(micro: MicroBatch, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return logprobs.sum(), {"logprobs": micro.scatter(logprobs)[:, 0]}

        with torch.no_grad():
            return self._run(items, 4 * self.settings.micro_batch_pairs, collect, forward_only=True)["logprobs"]

    def train_step(
        self,
        batch: PairBatch,
        loss: PairLoss,
        denominator: int,
        before_update: Callable[[dict[str, NDArray]], None] | None = None,
    ) -> StepResult:
        """One optimizer step on ``sum(losses) / denominator`` of a global batch, and one step of the schedule.

        Args:
            batch: the global batch, a multiple of data-parallel copies * micro_batch_pairs; pairs without an online
                half and masked ones cost nothing.
            loss: see ``PairLoss``.
            denominator: contributing pairs of the whole batch. With 0 nothing is computed and the weights stay, but the
                schedule goes on.
            before_update: called on every rank with the extras, after the backward pass; if it raises, on all ranks,
                the weights are unchanged.

        Raises:
            UserError: on every rank, if the gradient isn't finite; the weights are unchanged.
        """
        if self._swapped:
            raise RuntimeError("train_step inside swapped(): the policy's weights are put away")
        if self._optimizer.schedule is None:
            raise RuntimeError("train_step before restart_schedule(total_steps)")
        self.layout.check_batch(len(batch.pairs), self.settings.micro_batch_pairs)
        learning_rate = self._optimizer.learning_rate
        if denominator == 0:
            self._optimizer.schedule.step(1)
            return StepResult({}, 0.0, learning_rate, 0, stepped=False)

        def collect(micro: MicroBatch, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            table = micro.scatter(logprobs)
            losses, extras = loss(table, micro.items)
            return losses.sum() / denominator, {**extras, "logprobs": table}

        self._model.zero_grad_buffer()
        self._optimizer.megatron.zero_grad()
        extras = self._run(batch.pairs, self.settings.micro_batch_pairs, collect, forward_only=False)
        if before_update is not None:
            before_update(extras)
        norm = self._optimizer.update()
        self._optimizer.schedule.step(1)
        return StepResult(extras, norm, learning_rate, batch.tokens, stepped=True)

    def _run(
        self,
        items: Sequence[Pair],
        size: int,
        collect: Callable[[MicroBatch, Tensor], tuple[Tensor, dict[str, Tensor]]],
        forward_only: bool,
    ) -> dict[str, NDArray]:
        """Pass all items through the pipeline; returns ``collect``'s values in the order of the items, on every rank.

        ``collect`` turns a micro-batch and its sequences' log-probs (m,) into a scalar loss and values (n, ...).
        """
        check_items(items, self.shape.vocabulary, self.shape.max_positions)
        copy, copies = parallel_state.get_data_parallel_rank(), self.layout.data
        micros = list(micro_batches(items, copy, copies, size, self.layout.sequence_multiple))

        def finish(micro: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor, Any]:
            logprobs = response_logprobs(logits, micro.labels, micro.response, self.shape.vocabulary)
            scalar, values = collect(micro, logprobs)
            arrays = {name: value.detach().cpu().numpy() for name, value in values.items()}
            return scalar, torch.zeros((), dtype=torch.int, device=scalar.device), (micro.items.tolist(), arrays)

        def forward_step(iterator: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
            micro = next(iterator).to(device.current())
            positions = torch.arange(micro.tokens.size(1), device=micro.tokens.device).expand_as(micro.tokens)
            return model(micro.tokens, positions, None), partial(finish, micro)

        parts = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micros),
            model=self._model,
            num_microbatches=len(micros),
            seq_length=self.layout.sequence_multiple,  # not used: the lengths vary
            micro_batch_size=1,  # nor this
            forward_only=forward_only,
        )
        return gather_items(parts, len(items))

    # Optimizer and schedule

    def reset_optimizer(self) -> None:
        """Forget Adam's moments and step count; weights and schedule stay. Local."""
        self._optimizer.reset()

    def restart_schedule(self, total_steps: int) -> None:
        """Begin the learning-rate schedule anew, over ``total_steps`` calls of ``train_step``. Local."""
        self._optimizer.restart_schedule(total_steps)

    # Files

    def save(self, directory: str | Path, extra_weights: Mapping[str, Tensor] | None = None) -> list[str]:
        """Write a checkpoint into an existing empty directory: weights, optimizer, schedule, and ``extra_weights`` (such
        as a moving average, in the form of ``weights``). Returns the files that this rank wrote.

        Raises:
            UserError: on every rank, if the disk is full.
            RuntimeError: on every rank, if it can't be written otherwise.
        """
        schedule = self._optimizer.schedule
        common = {
            "total_steps": schedule.lr_decay_steps if schedule else 0,
            "done_steps": schedule.num_steps if schedule else 0,
        }
        return checkpoint.save(Path(directory), self.module, self._optimizer, common, extra_weights)

    def restore(self, directory: str | Path) -> dict[str, Tensor] | None:
        """Continue from a checkpoint, of this or another layout; returns the extra weights that were saved with it.

        Raises:
            UserError: on every rank, if it is of another dtype or of a newer format.
            RuntimeError: on every rank, if it can't be read into this model.
        """
        common, extra = checkpoint.restore(Path(directory), self.module, self._optimizer)
        if common["total_steps"]:
            self._optimizer.restart_schedule(common["total_steps"], common["done_steps"])
        return extra

    def export(self, directory: str | Path) -> list[str]:
        """Write the policy as a Hugging Face folder into an existing empty directory; returns this rank's files.

        Raises:
            UserError: on every rank, if weights aren't finite or the disk is full.
            RuntimeError: on every rank, if they can't be written otherwise.
        """
        named = {self._names[name]: parameter for name, parameter in self.module.named_parameters()}
        return export(Path(directory), named, self.shape, self.model_folder)
