from __future__ import annotations

import builtins
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.exchange.conftest import make_config
from tests.reporting.sketch import Sketch, step_line
from toolkit.exchange import derive, layout
from toolkit.exchange.run import Run
from toolkit.reporting import gather, report
from toolkit.reporting.progress import Reader
from toolkit.reporting.summary import summarise_run

VOID = {"meta", "br", "path", "use", "rect", "line", "circle"}


class Outline(HTMLParser):
    """Checks that elements are closed in order; keeps the text outside of style and drawings, and the names of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and "svg" not in self.open:
            self.text += data + "\n"


def outline(text: str) -> Outline:
    found = Outline()
    found.feed(text)
    assert found.open == []
    return found


def html(sketch: Sketch) -> str:
    run = sketch.reopen()
    return report.html(run, summarise_run(run))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a finished run."""
    sketch = Sketch(tmp_path_factory.mktemp("report") / "run")
    sketch.go_halfway()
    for version in range(3):
        if version:
            sketch.meta_batch(version, [(-1.0, 0.9, 0.4, 0.15)])
        derive.publish_phi(sketch.reopen(), version)
    sketch.finish()
    path = report.write_report(sketch.reopen(), summarise_run(sketch.reopen()))
    assert path == sketch.root / "report.html"
    return path.read_text()


def test_a_finished_run(text: str) -> None:
    found = outline(text)
    assert "1.000 ±0.000" in found.text and "+0.750 ±0.250 from 0.250 at the start" in found.text
    assert "62.5%" in found.text and "10 responses judged, 32 if all were sampled" in found.text
    for title in ("Rounds", "Policies", "Gate and meta-learner", "Training", "Where the time went", "Attempts"):
        assert f"<h2>{title}</h2>" in text
    assert text.count("<svg") == 13
    assert "2.0 GPU-hours, 3 attempts, 1 died" in found.text and "Deaths by kind: 1 crash." in found.text
    assert "version 2" in text and "method.shard_size" in text and "crash: gone <away>" in found.text


def test_texts_are_shown_as_they_are(text: str) -> None:
    found = outline(text)
    assert "script" not in found.names and "i" not in found.names  # the pairs' own mark-up stays text
    assert "What is <b>two</b> & two? (r1-0)" in found.text
    assert "It is <i>four</i>." in found.text
    assert "good <ok> r1-0" in found.text and "bad r1-0" in found.text
    assert "reward 0.500 · cut at the limit" in found.text and "reward 1.500 · ended" in found.text
    assert "answer <0> to 2" in found.text and "answer <3> to 2" in found.text


def test_the_tables(text: str) -> None:
    cells = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    assert ["1", "8", "3 (38%)", "2", "1", "0", "0"] in cells
    assert ["policy", "reward", "win rate", "gold reward", "tokens per response", "cut"] in cells
    assert ["3", "3.000 ±0.577", "100.0%", "1.000 ±0.000", "3.0", "0%"] in cells


def test_the_values_of_a_profile_s_variables_stay_at_home(tmp_path: Path) -> None:
    jobs = {"environment": {"HF_TOKEN": "hf_secret"}}
    run = Run.create(tmp_path / "run", make_config(tmp_path / "run", cluster={"jobs": jobs}), "test")
    text = report.html(run, summarise_run(run))
    assert "hf_secret" not in text
    assert "<b>cluster.jobs.environment.HF_TOKEN</b></td><td>(set)</td>" in text


def test_a_rejected_prompt_and_a_failed_reward_have_no_number(sketch: Sketch) -> None:
    sketch.pairs()
    for version in range(2):
        sketch.policy(version)
        sketch.evaluation(version, [float("nan")] * 4, [float("nan")] * 4, finish="rejected")
    words = outline(html(sketch)).text
    assert "prompt rejected" in words and "nan" not in words


def test_of_many_rounds_some_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "ROUNDS_DRAWN", 2)
    run = Sketch(tmp_path / "run", pairs_per_round=[4] * 4, rounds=3)
    run.pairs()
    for version in range(4):
        run.policy(version)
    for index in range(1, 4):
        run.requests(index, 0, [True] * 4)
    text = html(run)
    assert "Of 3 rounds 2 are drawn" in text
    assert text.count(">round 1<") == text.count(">round 3<") == text.count(">round 2<") + 1


def test_nothing_comes_from_outside(text: str) -> None:
    assert outline(text).names & {"script", "link", "img", "iframe"} == set()
    assert not re.search(r"@import|url\((?!#)|(?:src|href)=\"(?!#)", text)
    assert "#0a00" not in text  # every colour is the page's


def test_the_same_run_gives_the_same_report(finished: Sketch) -> None:
    assert html(finished) == html(finished)


def test_a_run_halfway(halfway: Sketch) -> None:
    halfway.metrics("trainer", "aaa", [step_line(0, 1.0), {"time": 2.0, "kind": "step", "step": 1, "stepped": False}])
    found = outline(html(halfway))
    assert "not finished" in found.text and "last policy not evaluated" in found.text


@pytest.mark.parametrize("records", ["nothing", "pairs", "policy", "requests"])
def test_a_run_that_has_hardly_begun(sketch: Sketch, records: str) -> None:
    if records != "nothing":
        sketch.pairs()
    if records in ("policy", "requests"):
        sketch.policy(0)
        sketch.evaluation(0, [float("nan")] * 4, [float("nan")] * 4, finish="rejected")
    if records == "requests":
        sketch.policy(1)
        sketch.requests(1, 0, [True] * 4, s=[-0.5] * 4, w=[0.5] * 4)
    outline(report.write_report(sketch.reopen(), summarise_run(sketch.reopen())).read_text())


def test_a_failed_run(sketch: Sketch) -> None:
    sketch.attempt("trainer", 0, "aaa", {"outcome": "failed", "kind": "refused", "message": "no such folder"})
    sketch.run.close("failed", "trainer stopped: no such folder")
    found = outline(html(sketch))
    assert "trainer stopped: no such folder" in found.text and "refused: no such folder" in found.text


def test_without_torch_the_curves_are_missed_and_named(finished: Sketch, monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert "curves are not drawn: torch is not installed" in html(finished)


def test_a_damaged_record_is_named_and_the_rest_is_shown(finished: Sketch) -> None:
    manifest = finished.run.records.require(layout.annotations(1, 0))
    data = manifest.directory / manifest.files[0].path
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    found = outline(html(finished))
    assert "Cannot read rounds/001/annotations/000/000000" in found.text
    assert "good <ok> r2-0" in found.text


def test_gate_values_and_meta_rows(finished: Sketch) -> None:
    reader = Reader(finished.reopen())
    rounds = [{"round": 1, "sampled_fraction": 0.4}, {"round": 2, "sampled_fraction": None}]
    values = gather.gate_values(reader, rounds)
    np.testing.assert_allclose(values["w_gate"][1], [0.2, 0.4, 0.6, 0.8] * 2, rtol=1e-6)
    assert list(values["s"]) == [1]
    rows = gather.meta_rows(reader)
    # minus the losses: online is better where its loss is smaller
    np.testing.assert_allclose(rows["gain"], [0.5, 0.1, -0.5], rtol=1e-6)
    np.testing.assert_allclose(rows["w_gate"], [0.15, 0.15, 0.85], rtol=1e-6)


def test_sampled_rewards_leave_failures_out(finished: Sketch) -> None:
    found = gather.sampled_rewards(Reader(finished.reopen()), [{"round": 1}])
    assert found == {1: {"best": 1.5, "all": 1.0, "worst": 0.5}}


def test_pairs_of_a_replay_have_no_text(tmp_path: Path) -> None:
    run = Sketch(tmp_path / "run")
    run.pairs()
    run.requests(1, 0, [True, False, False, False])
    run.annotations(1, 0, {"r1-0": "pair"})
    [pair] = gather.sampled_pairs(Reader(run.reopen()), 1, 3)
    assert pair["online"]["chosen"] == {"text": None, "reward": 1.5, "finish_reason": None}
    assert pair["offline"]["rejected"]["text"] == "It is five."
    assert pair["w_gate"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("count", "most", "expected"), [(0, 3, []), (1, 3, [0]), (3, 5, [0, 1, 2]), (11, 3, [0, 5, 10])]
)
def test_spread(count: int, most: int, expected: list[int]) -> None:
    assert gather.spread(count, most) == expected
