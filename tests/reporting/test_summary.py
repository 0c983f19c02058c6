from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from tests.reporting.sketch import Sketch, step_line
from toolkit.exchange import layout
from toolkit.launch.attempts import attempts
from toolkit.reporting import summary
from toolkit.reporting.timing import where_time_went


def test_a_finished_run(finished: Sketch) -> None:
    found = summary.write_summary(finished.reopen())
    assert json.loads((finished.root / "summary.json").read_text()) == found
    assert (found["pairs"], found["heldout"], found["outcome"], found["verified"]) == (20, 4, "finished", None)
    assert found["warm_start"]["round"] == 0 and found["warm_start"]["sampled_fraction"] is None
    one, two = found["rounds"]
    assert (one["round"], one["sampled"], one["sampled_fraction"], one["online"]) == (1, 3, 3 / 8, 2)
    assert (two["round"], two["sampled"], two["sampled_fraction"], two["online"]) == (2, 3, 3 / 8, 2)
    # the policy after round 1 is policy 2
    assert (one["reward"], one["gold_reward"], one["win_rate"]) == (2.5, 0.75, 1.0)
    assert (two["reward"], two["gold_reward"], two["win_rate"]) == (3.0, 1.0, 1.0)
    assert found["warm_start"]["gold_reward"] == 0.5
    assert found["reward"] == {"initial": 1.5, "final": 3.0}
    assert found["gold_reward"] == {"initial": 0.25, "final": 1.0}
    assert found["win_rate"] == {"initial": 0.5, "final": 1.0}
    assert found["tokens"] == {"initial": 2.0, "final": 3.0}
    assert found["outcomes"] == {"pair": 4, "tie": 1, "prompt_rejected": 1}
    # 5 prompts were answered twice; 16 pairs decided, 6 asked
    assert found["annotations"] == {"made": 10, "of": 32, "saved_fraction": 1 - 6 / 16}
    assert found["steps"] == {"done": 10, "of": 10}
    # the standard deviation of 0, 1, 2, 3 is sqrt(5/3)
    assert found["policies"][0]["error"]["reward"] == pytest.approx(math.sqrt(5 / 3) / 2)


def test_changes_are_of_the_same_prompts(finished: Sketch) -> None:
    found = summary.summarise_run(finished.reopen())
    # rewards 0, 1, 2, 3 became 2, 2, 4, 4: differences 2, 1, 2, 1
    assert found["change"]["reward"] == {"mean": 1.5, "error": pytest.approx(math.sqrt(1 / 3) / 2)}
    # gold 0, 0, 0, 1 became 1, 1, 1, 1: differences 1, 1, 1, 0
    assert found["change"]["gold_reward"] == {"mean": 0.75, "error": pytest.approx(0.25)}
    assert found["policies"][0]["change"]["reward"] == {"mean": 0.0, "error": 0.0}


def test_attempts_and_wall_time(finished: Sketch) -> None:
    run = finished.reopen()
    found = summary.summarise_run(run)
    assert [(a["slot"], a["number"], a["outcome"]) for a in found["attempts"]] == [
        ("trainer", 0, "died"),
        ("trainer", 1, "done"),
        ("worker-000", 0, "done"),
    ]
    assert found["attempts"][0]["message"] == "gone <away>"
    assert found["deaths"] == {"crash": 1}
    assert found["gpu_hours"] == 2.0  # 4 GPUs for half an hour; the others had none
    seconds = run.closing().written - run.records.require(layout.IDENTITY).written
    assert found["wall_seconds"] == pytest.approx(seconds, abs=0.06)


def test_warnings_name_what_to_doubt(finished: Sketch) -> None:
    about_model, about_length = summary.summarise_run(finished.reopen())["warnings"]
    assert "come from the reward model that chose the training pairs" in about_model
    assert "2 to 3 tokens (x1.50) from policy 0 to 3" in about_length


def test_another_evaluation_reward_takes_the_warning_away(finished: Sketch) -> None:
    run = finished.reopen()
    run.config.evaluation.reward = "another-folder"
    assert not any("reward model that chose" in warning for warning in summary.summarise_run(run)["warnings"])


def test_an_unfinished_run(halfway: Sketch) -> None:
    found = summary.summarise_run(halfway.reopen())
    assert found["reward"] == {"initial": 1.5, "final": None}
    assert [entry["reward"] for entry in found["rounds"]] == [None, None]
    assert found["rounds"][1]["sampled_fraction"] == 1 / 4
    assert found["warnings"][0] == "The run is not finished. The numbers are partial."


def test_a_run_without_anything(sketch: Sketch) -> None:
    found = summary.write_summary(sketch.reopen())
    assert found["rounds"] == [] and found["reward"] == {"initial": None, "final": None} and found["wall_seconds"] >= 0
    Console(file=open("/dev/null", "w")).print(summary.render(found))  # noqa: SIM115, PTH123


def test_a_failed_run_says_why(sketch: Sketch) -> None:
    sketch.run.close("failed", "trainer died 5 times")
    assert "failed: trainer died 5 times" in summary.summarise_run(sketch.reopen())["warnings"][0]


def test_offline_training_has_rounds_without_samples(tmp_path: Path) -> None:
    run = Sketch(tmp_path / "run", gate={"kind": "none"}, weight={"kind": "one"}, warm_start="none", rounds=3)
    run.pairs()
    found = summary.summarise_run(run.reopen())
    assert found["warm_start"] is None and [entry["sampled_fraction"] for entry in found["rounds"]] == [None] * 3


def shown(found: dict, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(summary.render(found))
    return console.export_text()


def test_the_tables_for_a_terminal(finished: Sketch) -> None:
    text = shown(summary.summarise_run(finished.reopen()))
    assert "2.0 GPU-hours; deaths: 1 crash." in text
    lines = [line.split() for line in text.splitlines()]
    assert ["0", "(warm)", "4", *["–"] * 5] in lines and ["1", "8", "3", "(38%)", "2", "1", "0", "0"] in lines
    assert ["3", "3.000", "±0.577", "100.0%", "1.000", "±0.000", "3.0", "0%"] in lines
    assert (
        "gold reward 0.250 -> 1.000 (+0.750 ±0.250 on the same prompts)." in text
        and "10 of 32 responses judged, 62% saved." in text
    )


@pytest.mark.parametrize(("metrics", "width"), [(2, 80), (4, 80), (8, 140)])
def test_no_number_of_the_tables_is_cut(finished: Sketch, metrics: int, width: int) -> None:
    found = summary.summarise_run(finished.reopen())
    outcomes = {"pair": 10_240, "tie": 10_241, "all_truncated": 10_242, "reward_failed": 10_243}
    found["rounds"][0] |= {"pairs": 20_480, "sampled": 20_479, "sampled_fraction": 1.0, "online": 10_240}
    found["rounds"][0]["outcomes"] = outcomes
    names = [f"metric{index}" for index in range(metrics)]
    for policy in found["policies"]:
        policy |= {"reward": -12.345, "win_rate": 1.0, "tokens": 1234.5, "truncated": 1.0}
        policy["metrics"] = {name: -12.345 - index for index, name in enumerate(names)}
        policy["error"] |= {"reward": 0.123, "metrics": dict.fromkeys(names, 0.456)}
    found |= {f"{name}_reward": found["reward"] for name in names}
    lines = shown(found, width).split("\ngold reward")[0].splitlines()[1:]
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    assert "…" not in "".join(words)
    for number in ("20,480", "20,479", "(100%)", "10,240", "10,241", "10,242", "10,243", "100.0%", "1234.5", "100%"):
        assert number in words
    for value in ("-12.345", "±0.123", *(f"{-12.345 - index:.3f}" for index in range(metrics))):
        assert words.count(value) >= 4


def test_an_attempt_lasted_as_long_as_its_record_says(sketch: Sketch) -> None:
    # killed after 10 minutes, and noticed by a tick much earlier or later
    sketch.attempt("trainer", 0, "aaa", {"outcome": "died", "kind": "node", "message": "m", "seconds": 600.0})
    sketch.attempt("trainer", 1, "bbb", {"outcome": "done"})
    found = summary.summarise_run(sketch.reopen())["attempts"]
    assert found[0]["seconds"] == 600.0
    assert found[1]["seconds"] == pytest.approx(0.0, abs=1.0)
    run = sketch.reopen()
    tried = attempts(run, "trainer")
    began = tried[0].start.written
    sketch.metrics("trainer", "aaa", [{"time": began + 60.0, "kind": "score", "seconds": 50.0}])
    assert where_time_went(run, tried) == {
        "trainer": {"score": 50.0, "start": pytest.approx(10.0, abs=0.01), "idle": pytest.approx(540.0, abs=0.01)}
    }


def test_where_the_time_went(sketch: Sketch) -> None:
    lines = [
        {"time": 10.0, "kind": "start", "step": 0},
        {"time": 14.0, "kind": "score", "seconds": 3.0},
        step_line(0, 15.0),
        {"time": 20.0, "kind": "wait", "seconds": 4.5},
        {"time": 21.0, "kind": "step", "step": 1, "stepped": False},
    ]
    sketch.metrics("trainer", "aaa", lines)
    sketch.metrics("trainer", "bbb", [{"time": 103.0, "kind": "score", "seconds": 2.0}])
    sketch.metrics("sidecar", "ccc", [{"time": 1.0, "kind": "phi", "version": 0}])
    found = where_time_went(sketch.reopen(), [])
    # 11 s and 2 s in all; of the first, 3 + 0.5 + 4.5 are accounted for
    assert found == {"trainer": {"score": 5.0, "train": 0.5, "wait": 4.5, "start": 0.0, "idle": 3.0}}
