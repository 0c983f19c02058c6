"""Held-out prompts answered and judged by the real engines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from tests.inference.conftest import CONTEXT, Model
from toolkit.errors import UserError
from toolkit.exchange.tables import EVALUATION, HELDOUT
from toolkit.inference.engine import PolicyEngine, RewardEngine
from toolkit.inference.evaluation import Metric, evaluate_policy, load_metric
from toolkit.inference.settings import SamplingSettings
from toolkit.reporting.evaluation import summarise

SETTINGS = SamplingSettings(samples=8, max_new_tokens=16)
PROMPTS = {"p": [3, 4, 5], "long": [5] * CONTEXT, "q": [6, 7]}


def spell(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def render(messages: Sequence[dict[str, str]], text: str) -> list[int]:
    return [len(messages), *(int(word) for word in text.split())]


def conversation(name: str) -> list[dict[str, str]]:
    turns = ("system", "be brief"), ("user", "hello"), ("assistant", "yes"), ("user", f"ask {name}")
    return [{"role": role, "content": content} for role, content in turns]


def evaluate(policy: PolicyEngine, reward: RewardEngine, **metrics: Metric) -> pa.Table:
    rows = [{"prompt_id": key, "prompt": conversation(key), "prompt_ids": ids} for key, ids in PROMPTS.items()]
    heldout = pa.Table.from_pylist(rows, schema=HELDOUT)
    return evaluate_policy(heldout, policy, reward, SETTINGS, 5, [], spell, render, metrics)


def test_every_prompt_is_answered_once_and_judged(
    policy: PolicyEngine, reward: RewardEngine, judge_model: Model
) -> None:
    def words(prompt: str, response: str) -> int:
        assert prompt in ("ask p", "ask q")
        return len(response.split())

    table = evaluate(policy, reward, words=words, one=lambda prompt, response: 1.0)
    assert table.schema == EVALUATION
    p, long, q = table.to_pylist()
    assert [row["prompt_id"] for row in (p, long, q)] == ["p", "long", "q"]
    for row in (p, q):
        assert row["finish_reason"] == "length" and len(row["token_ids"]) == 16
        assert row["text"] == spell(row["token_ids"])
        assert row["reward"] == pytest.approx(judge_model.reward([4, *row["token_ids"]]), abs=1e-4)
        assert row["metrics"] == [{"name": "words", "value": 16.0}, {"name": "one", "value": 1.0}]
    assert long["finish_reason"] == "rejected" and math.isnan(long["reward"]) and long["metrics"] == []
    assert long["text"].startswith(f"{CONTEXT} tokens")


def test_policies_meet_the_same_seeds(policy: PolicyEngine, reward: RewardEngine, second: Model) -> None:
    before = evaluate(policy, reward)
    again = evaluate(policy, reward)
    assert again.drop_columns("reward") == before.drop_columns("reward")
    assert again["reward"].to_pylist() == pytest.approx(before["reward"].to_pylist(), abs=0, nan_ok=True)
    same = summarise(before, before)
    assert (same["win_rate"], same["compared"], same["answered"], same["prompts"]) == (0.5, 2, 2, 3)
    policy.load(second.folder, second.probes)
    assert evaluate(policy, reward)["token_ids"] != before["token_ids"]


def test_a_failing_metric_is_named(policy: PolicyEngine, reward: RewardEngine) -> None:
    with pytest.raises(UserError, match=r"metric 'bad' failed with ZeroDivisionError.*prompt 'ask p'"):
        evaluate(policy, reward, bad=lambda prompt, response: 1 / 0)
    with pytest.raises(UserError, match="metric 'none' failed with TypeError"):
        evaluate(policy, reward, none=lambda prompt, response: None)  # type: ignore[arg-type, return-value]


def test_a_metric_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "gold.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Request:\n"
        "    count: int = 2\n\ndef reward(prompt, response):\n    return Request().count + len(response)\n"
    )
    assert load_metric(file, "reward")("ask", "abc") == 5
    with pytest.raises(UserError, match=r"gold.py has no function 'gold'; it has: .*reward"):
        load_metric(file, "gold")
    with pytest.raises(UserError, match=r"there is none at .*silver.py"):
        load_metric(tmp_path / "silver.py", "reward")
    file.write_text("import nothing_of_the_kind\n")
    with pytest.raises(UserError, match=r"gold.py does not import: ModuleNotFoundError"):
        load_metric(file, "reward")
