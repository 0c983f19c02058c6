from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.reporting.sketch import Sketch, step_line
from toolkit.exchange import layout
from toolkit.exchange.records import Records, Ref
from toolkit.reporting import progress, status, terminal
from toolkit.reporting.pace import pace
from toolkit.reporting.progress import Settled, trained_shards


def shown(found: dict, width: int = 80, age: float = 2.0) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(terminal.render(found, age))
    return console.export_text()


def test_a_run_that_is_not_prepared(sketch: Sketch) -> None:
    found = status.collect(sketch.reopen(), {})
    assert found["steps"] is None and found["rounds"] == [] and found["outcome"] is None
    assert "not prepared yet" in shown(found)
    assert terminal.line(found) == "preparing"
    assert terminal.line({}) == "no status yet"
    shown({})


def test_stages_of_every_round(halfway: Sketch) -> None:
    found = status.collect(halfway.reopen(), {})
    stages = [[entry[name] for name in terminal.STAGES] for entry in found["rounds"]]
    # the warm start is trained only; in round 1 nothing was asked of the second shard, so it counts as annotated
    assert stages == [[0, 0, 0, 0, 1], [2, 2, 2, 2, 2], [1, 1, 1, 0, 0]]
    assert [entry["gated"] for entry in found["rounds"]] == [False, True, True]
    assert found["rounds"][1]["outcomes"] == {"pair": 2, "tie": 1}
    assert (found["rounds"][2]["asked"], found["rounds"][2]["decided"]) == (1, 4)
    assert found["steps"] == {"done": 6, "of": 10}
    # 3 prompts were annotated, 2 responses each; 12 pairs are decided, of which 4 were asked
    assert found["annotations"] == {"made": 6, "of": 24, "saved_fraction": 1 - 4 / 12}


def test_evaluations_and_their_win_rate(halfway: Sketch) -> None:
    first, second = status.collect(halfway.reopen(), {})["evaluations"]
    assert (first["version"], first["reward"], first["win_rate"]) == (0, 1.5, 0.5)
    # 1 > 0, 1 = 1, 1 < 2, 5 > 3
    assert (second["reward"], second["win_rate"], second["metrics"]) == (2.0, (1 + 0.5 + 0 + 1) / 4, {"gold": 0.5})


def test_a_policy_evaluated_before_the_initial_one_gets_its_win_rate_later(sketch: Sketch) -> None:
    sketch.pairs()
    sketch.policy(0)
    sketch.policy(1)
    sketch.evaluation(1, [2.0, 2.0, 0.0, 0.0], [0.0] * 4)
    before = status.collect(sketch.reopen(), {})
    assert before["evaluations"][0]["win_rate"] is None
    sketch.evaluation(0, [1.0, 1.0, 1.0, 1.0], [0.0] * 4)
    after = status.collect(sketch.reopen(), {}, before)
    assert [entry["win_rate"] for entry in after["evaluations"]] == [0.5, 0.5]


def test_the_previous_status_gives_the_same_and_saves_looking(halfway: Sketch, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = status.collect(halfway.reopen(), {})
    halfway.annotations(2, 0, {"r2-0": "pair"})
    looked: list[Ref] = []
    find = Records.find
    monkeypatch.setattr(Records, "find", lambda self, ref: (looked.append(ref), find(self, ref))[1])
    following = status.collect(halfway.reopen(), {}, json.loads(json.dumps(whole)))
    of_rounds = {str(ref) for ref in looked if ref.directory.startswith("rounds/")}
    # round 1 is done; of round 2 the next score, the next request and the one open shard are looked at
    assert of_rounds == {
        str(layout.logprobs("policy-0002", "offline", 2, 1)),
        str(layout.requests(2, 1)),
        str(layout.annotations(2, 0)),
    }
    assert following["rounds"][2]["annotated"] == 1
    assert following == status.collect(halfway.reopen(), {})


def test_looking_goes_on_beyond_the_window_and_past_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WINDOW", 3)
    many = Sketch(tmp_path / "run", pairs_per_round=[4, 40, 4])
    many.pairs()
    many.policy(0)
    many.policy(1)
    for shard in range(10):
        many.requests(1, shard, [True, False, False, False])
        if shard != 4:
            many.annotations(1, shard, {f"r1-{4 * shard}": "pair"})
    entry = status.collect(many.reopen(), {})["rounds"][1]
    assert (entry["sampled"], entry["annotated"], entry["settled"]["annotated"][0]) == (9, 9, 4)
    assert entry["outcomes"] == {"pair": 9}


def test_settled_shards_are_kept_short() -> None:
    settled = Settled(2, [4])
    settled.add(2)
    settled.add(1)
    assert (settled.following, settled.ahead, settled.count, settled.open(7)) == (3, {4}, 4, [3, 5, 6])
    settled.add(3)
    assert (settled.following, settled.ahead) == (5, set())


def test_trained_shards_over_several_epochs(tmp_path: Path) -> None:
    # 3 shards of 4, 4 and 2 pairs: 2 + 2 + 1 batches an epoch, 2 epochs
    run = Sketch(tmp_path / "run", pairs_per_round=[10, 4], epochs=2, rounds=1)
    run.pairs()
    plan = run.reopen().plan
    assert [trained_shards(plan, 0, steps) for steps in range(12)] == [0] * 7 + [1, 1, 2, 3, 3]


def test_pace_of_the_newest_attempt(halfway: Sketch) -> None:
    halfway.attempt("trainer", 0, "aaa", {"outcome": "died"})
    halfway.attempt("trainer", 1, "bbb")
    halfway.metrics("trainer", "aaa", [step_line(9, 50.0)])  # a step that the death undid
    lines = [{"time": 100.0, "kind": "restore", "step": 6, "round": 2}, step_line(6, 104.0), step_line(7, 106.0)]
    halfway.metrics("trainer", "bbb", [*lines, {"time": 107.0, "kind": "step", "step": 8, "stepped": False}])
    with (halfway.root / "metrics" / "trainer.bbb.jsonl").open("a") as file:
        file.write('{"time": 108.0, "kind": "st')  # torn
    found = status.collect(halfway.reopen(), {})
    assert found["steps"]["done"] == 9
    assert found["tokens_per_second"] == 200.0  # 2 x 100 tokens in 2 x 0.5 s
    assert found["seconds_left"] == pytest.approx((107 - 100) / 3)  # one step left, 3 took 7 s


def test_a_long_metrics_file_is_read_at_its_ends(halfway: Sketch) -> None:
    halfway.attempt("trainer", 0, "aaa")
    lines = [{"time": 0.0, "kind": "start", "step": 0}, *(step_line(n, 2.0 * (n + 1)) for n in range(2000))]
    halfway.metrics("trainer", "aaa", lines)
    assert pace(halfway.reopen()) == {"step": 2000, "tokens_per_second": 200.0, "seconds_per_step": 2.0}


@pytest.mark.parametrize(
    ("kind", "s", "w", "flat"),
    [
        ("meta", [-0.7] * 4, [0.5] * 4, True),
        ("meta", [-0.7, -0.5, -0.3, -0.1], [0.4, 0.5, 0.6, 0.7], False),
        ("threshold", [-0.7, -0.5, -0.3, -0.1], [1.0] * 4, False),
        ("all", [-0.7] * 4, [0.0] * 4, None),
    ],
)
def test_a_gate_without_variance_is_flagged(tmp_path: Path, kind: str, s: list, w: list, flat: bool | None) -> None:
    run = Sketch(tmp_path / "run", gate={"kind": kind})
    run.pairs()
    run.policy(0)
    run.policy(1)
    run.requests(1, 0, [True] * 4, s, w)
    found = status.collect(run.reopen(), {})
    assert found["rounds"][1]["flat"] is flat
    assert bool(found["warnings"]) is bool(flat)


def test_a_damaged_record_is_a_warning(halfway: Sketch) -> None:
    path = halfway.run.records.require(layout.evaluation(1)).path
    path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 7'))
    found = status.collect(halfway.reopen(), {})
    assert [entry["version"] for entry in found["evaluations"]] == [0]
    assert any("evaluations/0001" in warning for warning in found["warnings"])
    shown(found)


def test_outcome_and_jobs(finished: Sketch) -> None:
    jobs = [job("trainer", "failed", number=1, message="no [disk]")]
    jobs += [job(f"worker-{n:03d}", "running") for n in range(9)]
    found = status.collect(finished.reopen(), {"jobs": jobs})
    assert found["outcome"] == "finished" and found["seconds_left"] is None
    assert json.loads(json.dumps(found)) == found
    text = shown(found)
    assert "finished" in text and "trainer (attempt 1) failed" in text and "no [disk]" in text
    assert "9 workers 9 running" in text and "worker-003" not in text
    assert terminal.line(found).startswith("finished: ")
    assert status.collect(finished.reopen(), {}, found)["jobs"] == found["jobs"]


def job(slot: str, outcome: str, reason: str | None = None, **values: object) -> dict:
    """What the control plane says of a job."""
    facts = {"slot": slot, "number": 0, "attempt": "x", "outcome": outcome, "kind": None, "message": None, "job": "7"}
    return facts | {"reason": reason} | values


def test_the_data_that_waits_for_each_stage(halfway: Sketch) -> None:
    found = status.collect(halfway.reopen(), {})
    # of round 1 all is done; of round 2 one shard is sampled and not judged; policy 2 is not evaluated
    assert found["waiting"] == {"gate": 0, "sample": 0, "judge": 1, "train": 0, "evaluate": 1}
    assert "waiting 1 shard to judge, 1 policy to evaluate" in shown(found)
    halfway.scores(2, 1)
    halfway.annotations(2, 0, {"r2-0": "pair"})
    found = status.collect(halfway.reopen(), {}, found)
    assert found["waiting"] == {"gate": 1, "sample": 0, "judge": 0, "train": 1, "evaluate": 1}
    halfway.requests(2, 1, [True] * 4)
    found = status.collect(halfway.reopen(), {}, found)
    assert found["waiting"] == {"gate": 0, "sample": 1, "judge": 0, "train": 1, "evaluate": 1}
    assert "waiting 1 shard to sample, 1 to train, 1 policy to evaluate" in shown(found)
    halfway.run.close("cancelled", "by hand")
    assert "waiting" not in shown(status.collect(halfway.reopen(), {}, found))


def test_pending_jobs_say_why_in_plain_words(halfway: Sketch) -> None:
    jobs = [job("trainer", "pending", "Resources"), job("sidecar", "running")]
    jobs += [job(f"worker-{n:03d}", "pending", "Priority") for n in range(12)]
    jobs[-1] = job("worker-011", "pending", "SomethingNew")
    found = status.collect(halfway.reopen(), {"jobs": jobs})
    assert [entry["waits_for"] for entry in found["jobs"][:2]] == ["the nodes that it needs are busy (Resources)", None]
    text = " ".join(shown(found).split())
    assert "trainer: the nodes that it needs are busy (Resources)" in text
    assert (
        "worker-000, worker-001, worker-002, worker-003 and 7 more: jobs of higher priority are ahead of it (Priority)"
        in text
    )
    assert "worker-011: SomethingNew" in text and "12 workers 12 pending" in text


def test_equal_failures_are_one_line_and_many_are_cut(halfway: Sketch) -> None:
    jobs = [job(f"worker-{n:03d}", "died", message="it was preempted\nby x") for n in range(9)]
    jobs += [job(f"worker-{n:03d}", "died", message=f"message {n}") for n in range(10, 20)]
    lines = shown(status.collect(halfway.reopen(), {"jobs": jobs})).splitlines()
    assert sum("it was preempted" in line for line in lines) == 1 and not any("by x" in line for line in lines)
    assert sum("message 1" in line for line in lines) == terminal.SHOWN_MESSAGES - 1 and "and 7 more" in lines


def test_what_the_run_has_cost(halfway: Sketch) -> None:
    control = {"jobs": [], "deaths": {"preempted": 3, "node": 1}, "gpu_hours": 1234.56, "avoided": ["n7", "n9"]}
    found = status.collect(halfway.reopen(), control)
    assert "deaths 3 preempted, 1 node  GPU-hours 1,234.6  nodes avoided n7, n9" in shown(found)
    again = status.collect(halfway.reopen(), {}, found)
    assert {key: again[key] for key in control} == control
    assert "GPU-hours" not in shown(status.collect(halfway.reopen(), {}))


def test_an_old_status_of_an_open_run_says_what_to_do(halfway: Sketch) -> None:
    found = status.collect(halfway.reopen(), {})
    assert "metaapo tick" not in shown(found, age=terminal.QUIET - 1)
    assert "nobody has ticked this run for 2 h 0 m" in shown(found, age=7200.0)
    halfway.run.close("cancelled", "by hand")
    assert "metaapo tick" not in shown(status.collect(halfway.reopen(), {}), age=7200.0)


def test_a_scheduler_that_does_not_answer_and_jobs_that_it_does_not_have_are_warned_of(halfway: Sketch) -> None:
    found = status.collect(halfway.reopen(), {"jobs": [], "gone": ["trainer"], "unanswered": "squeue is slow"})
    text = " ".join(shown(found).split())
    assert "does not answer (squeue is slow)" in text and "no job any more of: trainer" in text
    later = status.collect(halfway.reopen(), {"jobs": []}, found)
    assert (later["gone"], later["unanswered"], later["warnings"]) == ([], None, [])


def test_the_tables(halfway: Sketch) -> None:
    found = status.collect(halfway.reopen(), {})
    lines = [line.split() for line in shown(found).splitlines()]
    assert ["0", "4", "–", "–", "–", "–", "1/1"] in lines
    assert ["1", "8", "2/2", "2/2", "2/2", "2/2", "2/2", "38%"] in lines
    assert ["2", "8", "1/2", "1/2", "1/2", "0/2", "0/2", "25%"] in lines
    assert ["0", "1.500", "50%", "0.250"] in lines and ["1", "2.000", "62%", "0.500"] in lines
    text = shown(found)
    assert "67% saved" in text and "step 6 of 10" in text
    assert "metaapo report" not in text


def test_no_number_of_the_tables_is_cut(halfway: Sketch) -> None:
    found = status.collect(halfway.reopen(), {})
    found["rounds"] = [
        found["rounds"][2] | {"round": n, "pairs": 60_000, "shards": 469, "trained": 468, "asked": 4, "decided": 4}
        for n in range(40)
    ]
    metrics = {"first_metric": -12.345, "second_metric": -23.456}
    judged = found["evaluations"][0] | {"reward": -34.567, "win_rate": 1.0, "metrics": metrics}
    found["evaluations"] = [judged | {"version": version} for version in range(31)]
    found["policy"] = 31
    text = shown(found)
    lines = [line.split() for line in text.splitlines()]
    assert "…" not in text and all(len(line) <= 80 for line in text.splitlines())
    assert ["31", "60,000", "0%", "0%", "0%", "0%", "99%", "100%"] in lines
    policies = [line for line in lines if line[1:] == ["-34.567", "100%", "-12.345", "-23.456"]]
    assert [int(line[0]) for line in policies] == [0, *range(24, 31)], "the first and the newest"


def test_a_finished_run_says_how_its_report_is_made(finished: Sketch) -> None:
    found = status.collect(finished.reopen(), {})
    assert f"metaapo report {finished.root}" in shown(found, 200)


def test_the_line_changes_with_what_got_done(halfway: Sketch) -> None:
    before = status.collect(halfway.reopen(), {})
    assert terminal.line(before) == (
        "round 2 of 0-2 | scored 1/2 requested 1/2 sampled 1/2 annotated 0/2 trained 0/2 | "
        "policy 1: reward 2.000 win rate 0.625 gold 0.500"
    )
    halfway.annotations(2, 0, {"r2-0": "pair"})
    assert "annotated 1/2" in terminal.line(status.collect(halfway.reopen(), {}, before))


def test_showing_a_status_needs_neither_arrow_nor_torch() -> None:
    code = "import sys; import toolkit.reporting.terminal; print({'pyarrow', 'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.4, "12 s"), (200, "3 m 20 s"), (7500, "2 h 5 m"), (273600, "3 d 4 h"), (-1, "0 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert terminal.duration(seconds) == text
