"""The configuration of a run: what may stand in it, with defaults, and what is refused.

Two halves. *Identity* (data, models, method, evaluation, seed) is hashed and immutable; *operations* (cluster, layout, workers,
times, retention) may change with ``resume RUN key=value``. The YAML files that fill it are in ``configs/``.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from toolkit.cluster import ROLES, ClusterConfig, request
from toolkit.errors import UserError, unknown

T = TypeVar("T")


# ------------------------------------------------------------------------------------------------ identity


@dataclass
class DataConfig:
    path: str = ""  # Parquet, JSON lines or Arrow file, or a Hugging Face dataset id
    split: str = "train"
    format: str = "auto"  # auto, strings, messages, hh_rlhf
    limit: int | None = None  # read only the first rows
    max_pairs: int | None = None  # train on at most this many pairs
    heldout_prompts: int = 64  # prompts kept for evaluation
    max_prompt_tokens: int = 1024
    max_tokens: int = 2048  # prompt and response together


@dataclass
class ModelConfig:
    policy: str = ""  # Hugging Face folder of the policy at the start
    reference: str | None = None  # folder of the `initial` reference; null: the policy's
    dtype: str = "bfloat16"  # float32 or bfloat16: parameters, and the exported policies
    template_arguments: dict[str, Any] = field(default_factory=dict)  # passed to the chat template


@dataclass
class RewardConfig:
    model: str | None = None  # Hugging Face folder of a sequence classifier with one label


@dataclass
class ObjectiveConfig:
    name: str = "dpo"
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass
class ChoiceConfig:
    kind: str = "meta"
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass
class MetaConfig:
    init: str = "random"  # random, constant
    feature: str = "standardised"  # log_sigmoid_beta, log_sigmoid, standardised
    interval: int = 8  # T_meta, optimizer steps
    remainder: str = "update"  # update, discard: the steps after a round's last full interval
    lag: int = 1  # versions that the training weight is behind; 0 waits for each
    epochs: int = 1  # passes over a meta batch
    minibatch: int | None = 128  # rows of one Adam step; null: all rows
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    clamp: float = 0.02  # weights stay within [clamp, 1 - clamp]
    exploration: float = 0.1  # least chance of a prompt to be sampled by the meta gate


@dataclass
class SamplingConfig:
    samples: int = 8  # K
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    allow_truncated: bool = False  # whether a response cut at the limit may enter a pair


@dataclass
class OptimizerConfig:
    learning_rate: float = 5e-7
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    schedule: str = "cosine"  # cosine, linear, constant
    warmup_fraction: float = 0.03
    min_ratio: float = 0.1  # of the learning rate, at the schedule's end


@dataclass
class RoundStartConfig:
    optimizer: str = "keep"  # keep, reset
    schedule: str = "continue"  # continue, restart


@dataclass
class MethodConfig:
    name: str = "metaapo"
    rounds: int = 3  # without the warm-start round
    warm_start: str = "none"  # none, offline_round
    warm_start_pairs: int | None = None  # null: as many as any other round
    global_batch: int = 128  # pairs an optimizer step
    shard_size: int = 512  # pairs a shard
    epochs: int = 1
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    gate: ChoiceConfig = field(default_factory=ChoiceConfig)
    weight: ChoiceConfig = field(default_factory=ChoiceConfig)
    gate_reference: str = "initial"  # initial, previous, behaviour, ema
    loss_reference: str = "initial"
    ema_decay: float = 0.99  # per shard
    missing_online: str = "offline_full"  # offline_full, offline_w, drop
    meta: MetaConfig = field(default_factory=MetaConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    round_start: RoundStartConfig = field(default_factory=RoundStartConfig)


@dataclass
class MetricConfig:
    file: str = ""  # a Python file
    function: str = "reward"  # (prompt: str, response: str) -> float


@dataclass
class EvaluationConfig:
    reward: str | None = None  # folder of another reward model; null: the training one
    temperature: float = 1.0
    top_p: float = 1.0
    metrics: dict[str, MetricConfig] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------- operations


@dataclass
class TrainerConfig:
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    micro_batch: int = 1  # pairs
    recompute: str = "none"  # none, selective, full
    distributed_optimizer: bool = False
    checkpoint_steps: int = 50  # optimizer steps between checkpoints; a round's end is always one
    meta_wait: float = 60.0  # seconds until the trainer computes a missing derived record itself
    poll: float = 5.0  # seconds between looks at the exchange
    idle_exit: float = 1800.0  # seconds without work after which the trainer saves and frees its GPUs


@dataclass
class InferenceConfig:
    workers: int = 1
    does: list[str] = field(default_factory=lambda: ["sample", "annotate", "evaluate"])
    dtype: str = "bfloat16"
    tensor_parallel: int = 1
    max_model_len: int = 4096
    kv_cache_gib: float | None = None  # null: vLLM's share of the GPU memory
    gpu_memory_utilization: float = 0.9  # all engines of a worker together
    poll: float = 5.0
    heartbeat: float = 15.0
    idle_exit: float = 1800.0


@dataclass
class SidecarConfig:
    poll: float = 3.0


@dataclass
class RetentionConfig:
    checkpoints: int = 2
    policies: int = 2  # besides the first and those in use
    grace: float = 600.0  # seconds between a deletion's record and the deletion


@dataclass
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    name: str = "run"
    run: str = "runs/${name}"  # the run directory
    replay_from: str | None = None  # a run whose requests, annotations and meta-learner versions are taken as they are
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    sidecar: SidecarConfig = field(default_factory=SidecarConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)

    @property
    def needs_workers(self) -> bool:
        """Whether anything is sampled, or judged by a reward model: offline training that nobody evaluates is a trainer and nothing else."""
        return self.method.gate.kind != "none" or (
            self.evaluation_reward is not None and "evaluate" in self.inference.does
        )

    @property
    def gate_parameters(self) -> dict[str, Any]:
        """Parameters of the gate; the meta gate's are among the meta-learner's settings."""
        method = self.method
        return {"exploration": method.meta.exploration} if method.gate.kind == "meta" else method.gate.parameters

    @property
    def learns(self) -> bool:
        """Whether the method has a meta-learner."""
        return "meta" in (self.method.gate.kind, self.method.weight.kind)

    @property
    def idle_exits(self) -> dict[str, float]:
        """Seconds without work after which a ``trainer`` or a ``worker`` leaves: in a chain never, for its next link would start at once."""
        if self.cluster.chained:
            return {"trainer": math.inf, "worker": math.inf}
        return {"trainer": self.trainer.idle_exit, "worker": self.inference.idle_exit}

    @property
    def evaluation_reward(self) -> str | None:
        return self.evaluation.reward or self.reward.model

    @property
    def evaluates(self) -> bool:
        """Whether the workers judge every policy; a replay only trains."""
        return self.replay_from is None and self.evaluation_reward is not None and "evaluate" in self.inference.does

    @property
    def gated(self) -> tuple[bool, ...]:
        """For each round, the warm-start round included, whether it may ask for online samples."""
        asks = self.method.gate.kind != "none"
        return (False,) * (self.method.warm_start == "offline_round") + (asks,) * self.method.rounds


IDENTITY = ("data", "model", "reward", "method", "evaluation", "seed", "replay_from")
OPERATIONS = ("trainer", "inference", "sidecar", "cluster", "retention")


def identity(config: Config) -> dict[str, Any]:
    """The immutable half, as JSON values."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key in IDENTITY}


def operations(config: Config) -> dict[str, Any]:
    """The half that may change, as JSON values."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key in OPERATIONS}


def build(kind: type[T], values: dict[str, Any], where: str = "") -> T:
    """A dataclass of ``kind`` from JSON values; missing keys take their defaults.

    Raises:
        UserError: an unknown key (the valid ones are listed) or a value of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise unknown("configuration key", f"{where}{key}", (f"{where}{name}" for name in hints))
        arguments[key] = _convert(hints[key], value, f"{where}{key}")
    return kind(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a group of keys, got {value!r}")
        return build(typing.cast(type, hint), value, f"{where}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a mapping, got {value!r}")
        return {
            str(k): v if arguments[1] is Any else _convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()
        }
    if origin is list:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: expected a list, got {value!r}")
        return [_convert(arguments[0], v, where) for v in value]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # an environment variable or a name that looks like a number
    if hint is not Any and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise UserError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


CHOICES: dict[str, tuple[str, ...]] = {
    "data.format": ("auto", "strings", "messages", "hh_rlhf"),
    "model.dtype": ("float32", "bfloat16"),
    "inference.dtype": ("float32", "bfloat16", "auto"),
    "method.warm_start": ("none", "offline_round"),
    "method.objective.name": ("dpo", "ipo", "ipo_sum", "simpo"),
    "method.gate.kind": ("none", "all", "random", "fixed", "threshold", "meta"),
    "method.weight.kind": ("one", "zero", "constant", "fixed", "meta"),
    "method.gate_reference": ("initial", "previous", "behaviour", "ema"),
    "method.loss_reference": ("initial", "previous", "behaviour", "ema"),
    "method.missing_online": ("offline_full", "offline_w", "drop"),
    "method.meta.init": ("constant", "random"),
    "method.meta.feature": ("log_sigmoid_beta", "log_sigmoid", "standardised"),
    "method.meta.remainder": ("update", "discard"),
    "method.optimizer.schedule": ("cosine", "linear", "constant"),
    "method.round_start.optimizer": ("keep", "reset"),
    "method.round_start.schedule": ("continue", "restart"),
    "trainer.recompute": ("none", "selective", "full"),
    "cluster.kind": ("local", "slurm"),
    "cluster.control": ("job", "login", "chain"),
    "cluster.sidecar_in": ("own", "trainer"),
    "cluster.preemption": ("none", "requeue", "cancel", "suspend"),
}
POSITIVE = (  # or null, where a key may be
    "data.limit",
    "data.max_pairs",
    "data.max_prompt_tokens",
    "data.max_tokens",
    "method.rounds",
    "method.warm_start_pairs",
    "method.global_batch",
    "method.shard_size",
    "method.epochs",
    "method.meta.interval",
    "method.meta.epochs",
    "method.meta.minibatch",
    "method.meta.learning_rate",
    "method.sampling.samples",
    "method.sampling.max_new_tokens",
    "method.optimizer.learning_rate",
    "trainer.tensor",
    "trainer.pipeline",
    "trainer.data",
    "trainer.micro_batch",
    "trainer.checkpoint_steps",
    "trainer.poll",
    "inference.tensor_parallel",
    "inference.max_model_len",
    "inference.poll",
    "inference.heartbeat",
    "sidecar.poll",
    "cluster.links",
    "cluster.ranks_per_node",
    "cluster.margin",
    "cluster.submit_limit",
    "cluster.supervise",
    "cluster.query_timeout",
    "retention.checkpoints",
)


def lookup(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def validate(config: Config) -> None:
    """Refuse what no run could be made of. Looks at values only, not at files.

    Raises:
        UserError: names the key, what was expected, what came.
    """
    for key, valid in CHOICES.items():
        if lookup(config, key) not in valid:
            raise unknown(key, lookup(config, key), valid)
    for key in POSITIVE:
        value = lookup(config, key)
        if value is not None and not value > 0:
            raise UserError(f"{key}: expected a value above 0, got {value!r}")
    if not config.data.path:
        raise UserError(
            "data.path: expected a preference dataset (Parquet, JSON lines or Arrow file, or a dataset id); nothing came"
        )
    if config.data.heldout_prompts < 0:
        raise UserError(f"data.heldout_prompts: expected 0 or more, got {config.data.heldout_prompts}")
    if not config.model.policy:
        raise UserError("model.policy: expected the Hugging Face folder of the policy to align; nothing came")
    _validate_cluster(config)
    _validate_method(config)
    _validate_inference(config)


def _validate_cluster(config: Config) -> None:
    if not re.fullmatch("0[0-7]{2,3}", config.cluster.umask):
        raise UserError(
            f'cluster.umask: expected an octal number in quotes, such as "027", got {config.cluster.umask!r}; '
            "YAML reads 027 without quotes as 23"
        )
    if int(config.cluster.umask, 8) & 0o022 != 0o022:
        raise UserError(
            f"cluster.umask: {config.cluster.umask!r} lets others write into the run, and who can do that can run code as its "
            'owner; expected "077", "027" or "022"'
        )
    for role in ROLES:
        wish = request(config.cluster, role)
        try:
            (wish.gpu_request or "").format(gpus=1)
        except (AttributeError, LookupError, TypeError, ValueError):
            raise UserError(
                f"cluster.{role}.gpu_request: expected no braces but {{gpus}}, the number of GPUs on a node; got {wish.gpu_request!r}"
            ) from None
        seconds = 60 * (wish.time_minutes or 0)
        if seconds <= 2 * config.cluster.margin and config.cluster.kind != "local":
            raise UserError(
                f"cluster.{role}.time_minutes: {seconds / 60:g} min leave too little beside cluster.margin="
                f"{config.cluster.margin:g} s, in which a role saves before its wall time ends; expected more than twice that"
            )
    world = config.trainer.tensor * config.trainer.pipeline * config.trainer.data
    if (
        config.cluster.kind != "local"
        and world > config.cluster.ranks_per_node
        and world % config.cluster.ranks_per_node
    ):
        raise UserError(
            f"{world} ranks = trainer.tensor {config.trainer.tensor} x pipeline {config.trainer.pipeline} x data "
            f"{config.trainer.data} do not fill nodes of cluster.ranks_per_node={config.cluster.ranks_per_node}"
        )
    if config.trainer.sequence_parallel and config.trainer.tensor == 1:
        raise UserError("trainer.sequence_parallel: expected trainer.tensor of 2 or more, got 1")


def _validate_method(config: Config) -> None:
    method = config.method
    if method.shard_size % method.global_batch:
        raise UserError(
            f"method.shard_size must be a multiple of method.global_batch, got {method.shard_size} = "
            f"{method.shard_size // method.global_batch} x {method.global_batch} + {method.shard_size % method.global_batch}"
        )
    split = config.trainer.data * config.trainer.micro_batch
    if method.global_batch % split:
        raise UserError(
            "method.global_batch must be a multiple of trainer.data x trainer.micro_batch, got "
            f"{method.global_batch} and {config.trainer.data} x {config.trainer.micro_batch} = {split}"
        )
    if method.warm_start_pairs is not None and method.warm_start == "none":
        raise UserError(
            f"method.warm_start_pairs={method.warm_start_pairs}, but there is no round for them: method.warm_start"
        )
    if (method.warm_start_pairs or 0) % method.global_batch:
        raise UserError(
            f"method.warm_start_pairs: expected a multiple of method.global_batch={method.global_batch}, got {method.warm_start_pairs}"
        )
    if method.gate.kind != "none" and config.reward.model is None:
        raise UserError(
            f"method.gate.kind={method.gate.kind} samples online pairs, which a reward model must judge: set reward.model, "
            "or choose method.gate.kind=none for offline training"
        )
    if method.gate.kind != "none" and method.sampling.samples < 2:
        raise UserError(f"method.sampling.samples: a pair needs at least 2 responses, got {method.sampling.samples}")
    if method.gate.kind == "meta" and method.gate.parameters:
        raise UserError(
            f"method.gate.parameters: the meta gate has none, got {', '.join(method.gate.parameters)}; "
            "its least chance of sampling is method.meta.exploration"
        )
    if method.meta.lag < 0:
        raise UserError(f"method.meta.lag: expected 0 or more, got {method.meta.lag}")
    if not 0 <= method.meta.clamp < 0.5:
        raise UserError(f"method.meta.clamp: expected a value in [0, 0.5), got {method.meta.clamp}")


def _validate_inference(config: Config) -> None:
    does = set(config.inference.does)
    unknown_work = sorted(does - {"sample", "annotate", "evaluate"})
    if unknown_work:
        raise unknown("inference.does", unknown_work[0], ("sample", "annotate", "evaluate"))
    if config.method.gate.kind != "none" and not {"sample", "annotate"} <= does:
        raise UserError(
            f"inference.does: method.gate.kind={config.method.gate.kind} needs sample and annotate, got "
            f"{', '.join(config.inference.does) or 'nothing'}; the run would wait for ever"
        )
    if config.needs_workers and config.inference.workers < 1:
        raise UserError(f"inference.workers: this method needs at least 1, got {config.inference.workers}")
    room = config.inference.max_model_len
    if config.needs_workers and config.data.max_prompt_tokens >= room:
        raise UserError(
            f"inference.max_model_len={room} leaves no room for a response after data.max_prompt_tokens={config.data.max_prompt_tokens}"
        )
