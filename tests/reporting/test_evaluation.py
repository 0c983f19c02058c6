from __future__ import annotations

import json
import math

import pyarrow as pa
import pytest

from toolkit.exchange.tables import EVALUATION
from toolkit.reporting.evaluation import summarise


def evaluation(*rows: tuple[str, float, int, str, float]) -> pa.Table:
    """Rows of prompt, reward, tokens, finish reason and gold metric."""
    return pa.Table.from_pylist(
        [
            {
                "prompt_id": prompt,
                "token_ids": list(range(tokens)),
                "text": "",
                "finish_reason": reason,
                "reward": reward,
                "metrics": [] if reason == "rejected" else [{"name": "gold", "value": gold}],
            }
            for prompt, reward, tokens, reason, gold in rows
        ],
        schema=EVALUATION,
    )


INITIAL = evaluation(
    ("a", 1.0, 1, "stop", 0.0), ("b", 1.0, 1, "stop", 0.0), ("c", 1.0, 1, "stop", 0.0), ("d", math.nan, 1, "stop", 0.0)
)


def test_means_and_standard_errors() -> None:
    # In another order than the initial policy's: prompts are matched by name.
    after = evaluation(("c", 0.0, 2, "stop", 1.0), ("b", 1.0, 4, "length", 2.0), ("a", 5.0, 6, "stop", 6.0))
    summary = summarise(after, INITIAL)
    assert [summary[key] for key in ("prompts", "answered", "judged", "compared")] == [3, 3, 3, 3]
    assert summary["reward"] == pytest.approx(2.0)
    assert summary["win_rate"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert summary["tokens"] == pytest.approx(4.0)
    assert summary["truncated"] == pytest.approx(1 / 3)
    assert summary["metrics"] == {"gold": pytest.approx(3.0)}
    # sample standard deviations sqrt(7), 1/2, 2, sqrt(1/3), sqrt(7) over sqrt(3)
    error = {"reward": math.sqrt(7 / 3), "win_rate": math.sqrt(1 / 12), "tokens": math.sqrt(4 / 3), "truncated": 1 / 3}
    assert {key: value for key, value in summary["error"].items() if key != "metrics"} == pytest.approx(error)
    assert summary["error"]["metrics"] == {"gold": pytest.approx(math.sqrt(7 / 3))}
    # differences of the reward 4, 0, -1 and of the metric 6, 2, 1: both vary by 7
    change = {"mean": pytest.approx(1.0), "error": pytest.approx(math.sqrt(7 / 3))}
    assert summary["change"] == {"reward": change, "gold_reward": change | {"mean": pytest.approx(3.0)}}


def test_what_has_no_reward_counts_only_where_it_can() -> None:
    after = evaluation(
        ("a", math.nan, 3, "stop", 1.0),
        ("b", 2.0, 5, "length", math.nan),
        ("c", math.nan, 0, "rejected", 9.0),
        ("d", 3.0, 1, "stop", 3.0),
    )
    summary = summarise(after, INITIAL)
    assert [summary[key] for key in ("prompts", "answered", "judged", "compared")] == [4, 3, 2, 1]
    assert summary["reward"] == pytest.approx(2.5)
    assert summary["win_rate"] == 1.0
    assert summary["error"]["win_rate"] is None
    assert summary["tokens"] == pytest.approx(3.0)
    assert summary["metrics"] == {"gold": pytest.approx(2.0)}
    # only b has a reward from both policies; a and d have the metric of both
    assert summary["change"]["reward"] == {"mean": 1.0, "error": None}
    assert summary["change"]["gold_reward"] == {"mean": pytest.approx(2.0), "error": pytest.approx(1.0)}


def test_without_a_prompt_in_common_there_is_no_change() -> None:
    assert summarise(evaluation(("x", 1.0, 1, "stop", 0.0)), INITIAL)["change"] == {}
    assert summarise(INITIAL, evaluation())["change"] == {}


def test_an_empty_evaluation_is_valid_json() -> None:
    summary = summarise(evaluation(), INITIAL)
    assert summary["reward"] is None and summary["error"]["reward"] is None and summary["metrics"] == {}
    json.loads(json.dumps(summary, allow_nan=False))
