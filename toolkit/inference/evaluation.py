"""Every policy on the held-out prompts: its responses, their rewards and further metrics."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from toolkit.algorithms.draws import sample_seed
from toolkit.data.formats import Message
from toolkit.errors import UserError
from toolkit.exchange.tables import EVALUATION
from toolkit.inference.annotation import Render, judge
from toolkit.inference.engine import PolicyEngine, Rejected, RewardEngine
from toolkit.inference.sampling import Decode
from toolkit.inference.settings import SamplingSettings

Metric = Callable[[str, str], float]  # (last user message, response text) -> judgement

# Every policy answers with the same seeds, so that policies differ by their weights alone.
EVALUATION_ROUND = -1


def evaluate_policy(
    heldout: pa.Table,
    engine: PolicyEngine,
    reward: RewardEngine,
    settings: SamplingSettings,
    seed: int,
    stop_token_ids: Sequence[int],
    decode: Decode,
    render: Render,
    metrics: Mapping[str, Metric],
) -> pa.Table:
    """One response of the engine's policy to each held-out prompt, judged.

    Args:
        heldout: ``HELDOUT``.
        settings: its ``samples`` are not used.

    Returns:
        ``EVALUATION``, in the order of ``heldout``. A prompt that the engine cannot take has ``finish_reason``
        "rejected", the reason as text, a reward of NaN and no metrics.

    Raises:
        UserError: a metric fails, or gives something that is no number.
    """
    prompts = heldout.to_pylist()
    seeds = [[sample_seed(seed, EVALUATION_ROUND, prompt["prompt_id"], 0)] for prompt in prompts]
    answers = engine.sample([prompt["prompt_ids"] for prompt in prompts], seeds, settings, stop_token_ids)
    rows: list[dict[str, Any]] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if isinstance(answer, Rejected):
            row = {
                "token_ids": [],
                "text": answer.reason,
                "finish_reason": "rejected",
                "reward": math.nan,
                "metrics": [],
            }
        else:
            [response] = answer
            text = decode(response.token_ids)
            question = _last_user_message(prompt["prompt"])
            row = {
                "token_ids": response.token_ids,
                "text": text,
                "finish_reason": response.finish_reason,
                "metrics": [
                    {"name": name, "value": _measure(name, metric, question, text)} for name, metric in metrics.items()
                ],
            }
        rows.append({"prompt_id": prompt["prompt_id"], **row})
    answered = [(row, prompt) for row, prompt in zip(rows, prompts, strict=True) if row["finish_reason"] != "rejected"]
    rewards = judge(reward, render, ((prompt["prompt"], row["text"]) for row, prompt in answered))
    for (row, _), value in zip(answered, rewards, strict=True):
        row["reward"] = value
    return pa.Table.from_pylist(rows, schema=EVALUATION)


def load_metric(file: Path, function: str) -> Metric:
    """The function of that name in a Python file.

    Raises:
        UserError: no such file, it does not import, or it has no such function (those it has are listed).
    """
    name = f"metaapo_metric_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UserError(f"a metric is a function in a Python file; there is none at {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as an import would: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"the metric file {file} does not import: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        there = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise UserError(f"{file} has no function {function!r}; it has: {', '.join(there) or 'none'}")
    return found


def _measure(name: str, metric: Metric, question: str, text: str) -> float:
    try:
        return float(metric(question, text))
    except Exception as error:
        raise UserError(
            f"metric {name!r} failed with {type(error).__name__}: {error}; prompt {question[:200]!r}, response {text[:200]!r}"
        ) from error


def _last_user_message(messages: Sequence[Message]) -> str:
    return next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
