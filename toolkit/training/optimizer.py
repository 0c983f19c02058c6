"""Megatron's Adam, its learning-rate schedule, and one view of its state whether or not it is distributed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor
from torch.nn import Parameter

from toolkit.errors import UserError, unknown

SCHEDULES = ("cosine", "linear", "constant")
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (Loshchilov & Hutter 2019); biases and norms have no weight decay.

    Attributes:
        learning_rate: the highest one of the schedule.
        betas, epsilon, weight_decay: Adam's.
        clip_gradient: largest global gradient norm; 0 doesn't clip.
        schedule: how the rate falls after the warm-up, over the rest of the schedule's steps: a name of ``SCHEDULES``.
        warmup_fraction: of the schedule's steps, rounded up: step i of w has i / w of the rate, so the first one none.
        min_learning_rate_ratio: what the schedule ends at, as a fraction of ``learning_rate``.
    """

    learning_rate: float = 5e-7
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_gradient: float = 1.0
    schedule: str = "cosine"
    warmup_fraction: float = 0.03
    min_learning_rate_ratio: float = 0.1

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        for name in ("warmup_fraction", "min_learning_rate_ratio"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"optimizer {name} must lie between 0 and 1; got {getattr(self, name)}")
        for name in ("learning_rate", "epsilon", "weight_decay", "clip_gradient"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0.0):
                raise UserError(f"optimizer {name} must be a number of at least 0; got {getattr(self, name)}")


class PolicyOptimizer:
    """Megatron's optimizer of one model, its state allocated from the start.

    The state of a parameter consists of flat fp32 tensors: its master copy (``main``) and Adam's two moments. With the
    distributed optimizer a data-parallel copy owns a slice of them, perhaps empty.
    """

    def __init__(self, model: DistributedDataParallel, settings: OptimizerSettings, dtype: torch.dtype) -> None:
        config = OptimizerConfig(
            optimizer="adam",
            lr=settings.learning_rate,
            min_lr=settings.learning_rate * settings.min_learning_rate_ratio,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            clip_grad=settings.clip_gradient,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_distributed_optimizer=model.ddp_config.use_distributed_optimizer,
        )
        self.settings = settings
        self.megatron: ChainedOptimizer = get_megatron_optimizer(config, [model], use_gloo_process_groups=False)
        (self._one,) = self.megatron.chained_optimizers  # one, because there are no experts
        self.distributed = isinstance(self._one, DistributedOptimizer)
        self.schedule: OptimizerParamScheduler | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the moments and the number of steps; the master copies follow the model's weights."""
        adam = self._one.optimizer
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            adam.state[parameter] = {name: torch.zeros_like(parameter) for name in MOMENTS}
        self.steps = 0
        self.megatron.reload_model_params()

    @property
    def steps(self) -> int:
        """Optimizer steps so far, for Adam's bias correction (Transformer Engine's Adam counts per group)."""
        adam = self._one.optimizer
        if USING_PYTORCH_OPTIMIZER:
            return int(next(iter(adam.state.values()))["step"])
        return int(adam.param_groups[0].get("step", 0))

    @steps.setter
    def steps(self, count: int) -> None:
        adam = self._one.optimizer
        if USING_PYTORCH_OPTIMIZER:
            for state in adam.state.values():
                state["step"] = torch.tensor(float(count))  # each its own tensor: Adam counts in place
        else:
            for group in adam.param_groups:
                group["step"] = count

    def state(self, parameter: Parameter) -> tuple[slice, dict[str, Tensor]]:
        """This rank's part of a model parameter's state: a slice of the flattened parameter, and ``main``, ``exp_avg``
        and ``exp_avg_sq`` for it, to be read or changed in place."""
        if self.distributed:
            if parameter not in self._one.model_param_gbuf_map:
                return slice(0, 0), {}
            group, order = self._one.model_param_group_index_map[parameter]
            main = self._one.optimizer.param_groups[group]["params"][order]
            owned = self._one._get_model_param_range_map(parameter)["param"]
            part = slice(owned.start, owned.end)
        else:
            main = getattr(parameter, "main_param", parameter)
            part = slice(0, parameter.numel())
        state = self._one.optimizer.state[main]
        return part, {
            name: tensor.detach().view(-1) for name, tensor in {"main": main, **state}.items() if name != "step"
        }

    def restart_schedule(self, total_steps: int, done: int = 0) -> None:
        """Begin a schedule of ``total_steps`` steps, ``done`` of them already taken."""
        warmup = min(math.ceil(self.settings.warmup_fraction * total_steps), total_steps - 1)
        self.schedule = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=self.settings.learning_rate,
            min_lr=self.settings.learning_rate * self.settings.min_learning_rate_ratio,
            lr_warmup_steps=warmup,
            lr_decay_steps=total_steps,
            lr_decay_style=self.settings.schedule,
            start_wd=self.settings.weight_decay,
            end_wd=self.settings.weight_decay,
            wd_incr_steps=total_steps,
            wd_incr_style="constant",
        )
        self.schedule.step(done)

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self.megatron.param_groups[0]["lr"])

    def update(self) -> float:
        """Clip the gradients and step; returns their global norm before clipping. The schedule is not advanced.

        Raises:
            UserError: on every rank if the norm is not finite; the weights are then unchanged.
        """
        self.megatron.prepare_grads()
        norm = float(self.megatron.get_grad_norm())
        if not math.isfinite(norm):
            raise UserError(
                f"the gradient's norm is {norm}; the weights are unchanged. Expected a finite one: "
                "look for non-finite losses in the metrics, and lower the learning rate or change dtype to float32"
            )
        self.megatron.step()
        return norm
