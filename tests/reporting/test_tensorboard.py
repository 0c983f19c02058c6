from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.reporting.sketch import Sketch, step_line
from toolkit.exchange import layout
from toolkit.exchange.run import Run
from toolkit.reporting.summary import summarise_run
from toolkit.reporting.tensorboard import write_events


def events_of(run: Run) -> Path:
    return write_events(run, summarise_run(run))


def scalars(directory: str) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(directory).Reload()
    return {
        tag: [(event.step, pytest.approx(event.tensor_proto.float_val[0])) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }


def test_events_read_back(finished: Sketch) -> None:
    directory = events_of(finished.reopen())
    found = scalars(str(directory))
    # steps 0-6 of the first attempt, then 6-9 of the second, whose step 6 counts
    assert found["train/margin_offline"] == [(n, 0.1 * n if n < 6 else 0.2 * n) for n in range(10)]
    assert "train/online" not in found and "train/step" not in found and "train/stepped" not in found
    assert found["evaluation/gold"] == [(0, 0.25), (2, 0.5), (6, 0.75), (10, 1.0)]
    assert found["gate/sampled_fraction"] == [(2, 3 / 8), (6, 3 / 8)]
    assert found["gate/tie"] == [(2, 1.0)]


def test_writing_again_replaces(finished: Sketch) -> None:
    run = finished.reopen()
    events_of(run)
    before = scalars(str(events_of(run)))
    assert len(list((finished.root / "tensorboard").iterdir())) == 1
    assert len(before["evaluation/reward"]) == 4


def test_wall_times_are_those_of_the_run(finished: Sketch) -> None:
    run = finished.reopen()
    events = EventAccumulator(str(events_of(run))).Reload()
    assert events.Tensors("train/loss")[0].wall_time == 101.0
    written = run.records.require(layout.evaluation(3)).written
    assert events.Tensors("evaluation/reward")[3].wall_time == pytest.approx(written)


def test_a_run_without_records_and_values_that_are_not_finite(sketch: Sketch) -> None:
    sketch.metrics("trainer", "aaa", [step_line(0, 1.0, loss=float("nan"), w=None)])
    found = scalars(str(events_of(sketch.reopen())))
    assert set(found) == {"train/tokens", "train/seconds"}
