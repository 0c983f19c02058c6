"""vLLM as the worker sees it: a policy whose weights are reloaded in place and proven, and a reward model.

Token ids in, token ids out. Both engines live in the worker's own process (with tensor parallelism, their shards in
child processes), where starting the second one costs a second instead of half a minute, and they live as long as it: an
engine that is given up takes what they share with it. vLLM is imported when the first one starts, since
``environment.prepare`` must come before.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from toolkit.errors import UserError
from toolkit.inference.model_folder import check_reward_model, check_same_tensors, tensor_shapes
from toolkit.inference.settings import EngineSettings, SamplingSettings

if TYPE_CHECKING:
    from vllm import LLM

log = logging.getLogger(__name__)

# How far vLLM's log-prob of a token may be from the trainer's, in nats: other kernels, other layout.
TOKEN_TOLERANCE = {"float32": 3e-5, "float16": 0.0125, "bfloat16": 0.1}
TF32_TOLERANCE = 5e-3  # to which vLLM's attention rounds float32 on a GPU
# Times as much for any response, unless both compute in fp32 on a CPU: large logits are spaced that far apart.
FLOOR = 5.0


@dataclass(frozen=True)
class Probe:
    """A sequence with its response's summed log-prob (nats) by the trainer, by which loaded weights are recognised.

    ``dtype`` is the one that the trainer computed in.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    logprob: float
    dtype: str


@dataclass(frozen=True)
class Response:
    """A sampled response.

    Attributes:
        token_ids: as sampled; the token that ended it is the last one.
        finish_reason: ``stop`` (a stop token), or ``length`` (cut by ``max_new_tokens`` or by the end of the context).
        logprob: summed log-prob (nats) of the tokens under the policy itself: before temperature and top-p.
    """

    token_ids: list[int]
    finish_reason: str
    logprob: float


@dataclass(frozen=True)
class Rejected:
    """Why the engine cannot take a prompt."""

    reason: str


class PolicyEngine:
    """Samples from one policy at a time. Starts at the first ``load``; every further one takes the place of the last."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.policy: Path | None = None  # the folder whose weights are loaded and proven
        self._llm: LLM | None = None
        self._shapes: dict[str, tuple[int, ...]] | None = None  # of a proven policy
        self._failed = False

    def load(self, folder: Path, probes: Sequence[Probe]) -> None:
        """Take the weights of a policy, forget every cached prefix, and prove by the probes that it is this policy.

        After a failure nothing is loaded: the engine samples again once a ``load`` succeeds.

        Raises:
            UserError: the folder's weights are no safetensors, or incomplete.
            RuntimeError: what vLLM made of them is not what the trainer probed (another node may do better).
        """
        self.policy = None
        shapes = tensor_shapes(folder)
        if self._shapes is not None:
            check_same_tensors(folder, shapes, self._shapes)
        if self._llm is None:
            self._llm = _start(folder, self.settings, skip_tokenizer_init=True, enable_prefix_caching=True)
        else:
            self._reload(self._llm, folder)
        self._prove(folder, probes)
        self._shapes, self.policy = shapes, folder

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        settings: SamplingSettings,
        stop_token_ids: Sequence[int],
    ) -> list[list[Response] | Rejected]:
        """One response for each prompt and seed.

        A response depends on its prompt and seed alone, not on what else is sampled (on a GPU: up to rounding).

        Args:
            prompts: token ids of each prompt.
            seeds: for each prompt, the seeds of its responses.
            stop_token_ids: what ends a response; nothing else does, but its length.

        Returns:
            For each prompt its responses in the order of the seeds, or why the engine cannot take it.

        Raises:
            UserError: the policy gives log-probs that are not finite.
        """
        llm = self._require(loaded=True)
        model = llm.llm_engine.model_config
        context, vocabulary = model.max_model_len, model.get_vocab_size()
        refusals = [refusal(prompt, vocabulary, context - 1) for prompt in prompts]
        wanted = [(index, seed) for index, reason in enumerate(refusals) if reason is None for seed in seeds[index]]
        # vLLM would shorten max_tokens silently as well; `length` means both.
        outputs = self._generate(
            [prompts[index] for index, _ in wanted],
            [
                {
                    "temperature": settings.temperature,
                    "top_p": settings.top_p,
                    "max_tokens": min(settings.max_new_tokens, context - len(prompts[index])),
                    "seed": seed,
                    "stop_token_ids": list(stop_token_ids),
                    "ignore_eos": True,  # the stop set is ours, not the generation config's
                    "logprobs": 0,
                }
                for index, seed in wanted
            ],
        )
        results: list[list[Response] | Rejected] = [[] if reason is None else Rejected(reason) for reason in refusals]
        for (index, _), output in zip(wanted, outputs, strict=True):
            [completion] = output.outputs
            if completion.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM ended a response with {completion.finish_reason!r}; expected stop or length")
            if not math.isfinite(completion.cumulative_logprob):
                raise UserError(f"policy {self.policy} gives log-probs that are not finite; its weights are broken")
            results[index].append(  # type: ignore[union-attr]
                Response(list(completion.token_ids), completion.finish_reason, completion.cumulative_logprob)
            )
        return results

    def _logprobs(self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> list[float]:
        """Summed log-prob (nats) of each sequence's tokens after its prompt.

        Args:
            sequences: token ids of prompt and response, shorter than ``max_model_len`` (vLLM wants room for one more).
            prompt_lengths: tokens of each prompt, at least 1.
        """
        asked = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        outputs = self._generate(sequences, [asked] * len(sequences))
        # With prompt_logprobs=0 there is exactly one entry a position, of the token that stands there.
        return [
            math.fsum(entry.logprob for at in list(output.prompt_logprobs)[length:] for entry in at.values())
            for output, length in zip(outputs, prompt_lengths, strict=True)
        ]

    def _generate(self, prompts: Sequence[Sequence[int]], options: Sequence[dict[str, Any]]) -> list[Any]:
        """vLLM's outputs, one for each prompt, in order."""
        if not prompts:
            return []
        from vllm import SamplingParams, TokensPrompt

        llm = self._require()
        self._failed = True
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
            [SamplingParams(**option, detokenize=False, flat_logprobs=True) for option in options],
            use_tqdm=False,
        )
        self._failed = False
        return outputs

    def _require(self, loaded: bool = False) -> LLM:
        if self._failed:  # it would never return from its next step
            raise RuntimeError("the policy engine failed while it was generating; only a new process can go on")
        if self._llm is None or (loaded and self.policy is None):
            raise RuntimeError("no policy is loaded: PolicyEngine.load comes first, and must have succeeded")
        return self._llm

    def _reload(self, llm: LLM, folder: Path) -> None:
        from vllm.platforms import current_platform

        try:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            if current_platform.is_cpu():
                llm.apply_model(_pack_tied_head)
        except (KeyError, ValueError, SafetensorError) as error:  # the engine takes good weights afterwards
            raise UserError(f"vLLM cannot load the weights in {folder}: {type(error).__name__}: {error}") from error
        # Without this, tokens computed with the old weights are used again, silently.
        if not llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")

    def _prove(self, folder: Path, probes: Sequence[Probe]) -> None:
        from vllm.platforms import current_platform

        model = self._require().llm_engine.model_config
        dtype = str(model.dtype).removeprefix("torch.")
        fitting = [p for p in probes if len(p.prompt_ids) + len(p.response_ids) < model.max_model_len]
        if not fitting:
            raise UserError(
                f"policy {folder}: none of its {len(probes)} probe(s) is shorter than the engine's context of "
                f"{model.max_model_len} tokens, so what it loads cannot be proven. Raise inference.max_model_len"
            )
        found = self._logprobs([p.prompt_ids + p.response_ids for p in fitting], [len(p.prompt_ids) for p in fitting])
        for index, (probe, logprob) in enumerate(zip(fitting, found, strict=True)):
            allowed = tolerance({dtype, probe.dtype}, len(probe.response_ids), current_platform.is_cpu())
            if not abs(logprob - probe.logprob) <= allowed:  # so that NaN fails
                raise RuntimeError(
                    f"policy {folder}: vLLM does not give the log-probs that the trainer probed. Probe {index}: expected a sum "
                    f"of {probe.logprob:.6f}, got {logprob:.6f} (tolerance {allowed:.2g}; the trainer's {probe.dtype}, vLLM's "
                    f"{dtype}). The files' digests were right, so vLLM did not take the weights, this node's processor is faulty, "
                    "or its kernels round otherwise than the trainer's: set inference.dtype to model.dtype"
                )


class RewardEngine:
    """A sequence classifier with one label as reward model, by vLLM's pooling runner.

    Raises:
        UserError: the folder holds no such model.
    """

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        check_reward_model(folder)
        tensor_shapes(folder)  # readable at all
        self._llm = _start(folder, settings, runner="pooling")

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The reward of each conversation, given as token ids: the raw logit, not its sigmoid.

        Equal sequences get equal rewards. NaN: the model cannot take the sequence (empty, longer than the context, an
        unknown id), which is logged, or its logit is not finite.
        """
        from vllm import PoolingParams, TokensPrompt

        model = self._llm.llm_engine.model_config
        refusals = {ids: refusal(ids, model.get_vocab_size(), model.max_model_len) for ids in map(tuple, sequences)}
        if reasons := [reason for reason in refusals.values() if reason is not None]:
            log.warning("%d of %d conversations have no reward; the first: %s", len(reasons), len(refusals), reasons[0])
        rewards = dict.fromkeys(refusals, math.nan)
        if taken := [ids for ids, reason in refusals.items() if reason is None]:
            outputs = self._llm.classify(
                [TokensPrompt(prompt_token_ids=list(ids)) for ids in taken],
                pooling_params=PoolingParams(use_activation=False),
                use_tqdm=False,
            )
            for ids, output in zip(taken, outputs, strict=True):
                [logit] = output.outputs.probs
                rewards[ids] = logit if math.isfinite(logit) else math.nan
        return [rewards[tuple(ids)] for ids in sequences]


def refusal(token_ids: Sequence[int], vocabulary: int, longest: int) -> str | None:
    """Why an engine cannot take ``token_ids``, or None. In vLLM one such sequence fails, or hangs, the whole batch."""
    if not token_ids:
        return "it has no tokens"
    if len(token_ids) > longest:
        return f"{len(token_ids)} tokens; the engine's context has room for {longest}"
    if strange := [token for token in (min(token_ids), max(token_ids)) if not 0 <= token < vocabulary]:
        return f"token id {strange[0]} is outside the model's vocabulary of {vocabulary}"
    return None


def tolerance(dtypes: Collection[str], tokens: int, on_cpu: bool) -> float:
    """How far (nats) the summed log-probs of a response of ``tokens`` may be apart, computed in ``dtypes`` by two engines.

    Rounding errors of tokens are close to independent: they add up like a random walk.
    """
    token, walk = max(TOKEN_TOLERANCE[dtype] for dtype in dtypes), math.sqrt(tokens)
    if on_cpu and set(dtypes) == {"float32"}:
        return token * walk
    return (token if on_cpu else max(token, TF32_TOLERANCE)) * (FLOOR + walk)


def _pack_tied_head(model: Any) -> None:
    """Complete a reload on a CPU, where vLLM multiplies by packed copies of the weights.

    It renews a layer's copy when it loads that layer; but tied output weights are loaded as the embedding's, and the copy
    stays that of the policy before.
    """
    if model.config.tie_word_embeddings:
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def _start(folder: Path, settings: EngineSettings, **options: Any) -> LLM:
    """A vLLM engine on a model folder. Raises UserError if vLLM refuses folder or settings."""
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        if settings.kv_cache_gib is None:
            raise UserError("inference.kv_cache_gib must be set on a machine without a GPU, 0.25 for a small model")
        options["enforce_eager"] = True  # compiling takes a C++ compiler, and minutes
        if options.get("runner") != "pooling":
            # A seeded request whose prompt is computed in two steps crashes the engine: its random generator is to be
            # set back, which torch's CPU generator cannot do.
            options["enable_chunked_prefill"] = False
    if settings.kv_cache_gib is not None:
        options["kv_cache_memory_bytes"] = int(settings.kv_cache_gib * 2**30)
    try:
        with _shielded() if settings.tensor_parallel > 1 else contextlib.nullcontext():
            return LLM(
                model=str(folder),
                dtype=settings.dtype,  # type: ignore[arg-type]
                max_model_len=settings.max_model_len,
                tensor_parallel_size=settings.tensor_parallel,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                load_format="safetensors",  # never a pickle
                generation_config="vllm",  # no sampling defaults from the folder
                logprobs_mode="raw_logprobs",
                use_tqdm_on_load=False,
                **options,
            )
    except (OSError, ValueError) as error:
        if is_nodes_fault(error):
            raise
        raise UserError(f"vLLM cannot start from {folder} with {settings}: {error}") from error


def is_nodes_fault(error: Exception) -> bool:
    """Whether an engine may start elsewhere: a process left over holds the GPU's memory here, or the disk cannot be read."""
    return "Free memory on device" in str(error) or getattr(error, "errno", None) is not None


@contextlib.contextmanager
def _shielded() -> Iterator[None]:
    """Processes started meanwhile never see the signals that ask a job to save: vLLM's shards would end, and the worker with them.

    They end when the worker closes its pipe to them, or is gone.
    """
    resource_tracker.ensure_running()  # it would be started with the first of them, and that lets TERM through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
