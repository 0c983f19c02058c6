"""An undisturbed run: what it writes, that it is proven, and that damage to it is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import metaapo
from toolkit.exchange import layout
from toolkit.exchange.run import Run


def test_it_finishes_and_says_what_it_did(finished_run: Run) -> None:
    closing = finished_run.closing()
    assert closing is not None and closing.attributes["outcome"] == "finished"
    summary = json.loads((finished_run.root / "summary.json").read_text())
    assert summary["pairs"] == 384
    assert len(summary["rounds"]) == 3
    for entry in summary["rounds"]:
        assert 0 < entry["sampled"] <= 96
        assert entry["sampled_fraction"] == pytest.approx(entry["sampled"] / 96, abs=1e-3)
        assert 0 <= entry["gold_reward"] <= 1
    assert summary["wall_seconds"] > 0
    assert (finished_run.root / "report.html").stat().st_size > 20_000


def test_it_improves_the_gold_reward(finished_run: Run) -> None:
    gold = json.loads((finished_run.root / "summary.json").read_text())["gold_reward"]
    assert gold["final"] > gold["initial"] + 0.05


def test_the_gate_and_the_weights_really_differ_between_pairs(finished_run: Run) -> None:
    weights = finished_run.records.table(finished_run.records.require(layout.requests(3, 0)))["w_gate"].to_numpy()
    assert weights.std() > 0.01


def test_verify_is_clean(finished_run: Run) -> None:
    found = json.loads(metaapo("verify", str(finished_run.root), "--json").stdout)
    assert found["clean"] and not found["notes"]
    assert found["counts"]["pairs trained"] == 384
    assert found["counts"]["gate decisions"] == 288


@pytest.mark.parametrize(
    "record",
    [
        "data/pairs",
        "rounds/001/logprobs/policy-0001/offline/000/000000",
        "rounds/002/requests/000/000000",
        "rounds/002/responses/000/000000",
        "rounds/003/annotations/000/000000",
        "meta/000/000001",
        "phi/000/000002",
        "evaluations/0002",
    ],
)
@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_verify_names_a_damaged_record(finished_run: Run, tmp_path: Path, record: str, damage: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished_run.root, copy, ignore=shutil.ignore_patterns("checkpoints", "logs", "code"))
    shutil.copytree(finished_run.root / "checkpoints", copy / "checkpoints")
    directory, name = (copy / record).parent, (copy / record).name
    data = next(path for path in sorted(directory.glob(f"{name}.g0.*")) if path.suffix != ".json")
    if damage == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    else:
        for path in directory.glob(f"{name}.g0.*"):
            path.unlink()
    done = metaapo("verify", str(copy), check=False)
    assert done.returncode == 1
    assert record in done.stdout


def test_status_tells_that_it_is_over(finished_run: Run) -> None:
    status = json.loads(metaapo("status", str(finished_run.root), "--json").stdout)
    assert status["outcome"] == "finished"
    assert "finished" in metaapo("status", str(finished_run.root)).stdout


def test_a_finished_run_is_not_resumed(finished_run: Run) -> None:
    done = metaapo("resume", str(finished_run.root), check=False)
    assert done.returncode == 2 and "finished" in done.stderr


def test_identity_keys_are_refused_by_name(finished_run: Run) -> None:
    done = metaapo("resume", str(finished_run.root), "method.rounds=5", check=False)
    assert done.returncode == 2 and "method.rounds" in done.stderr and "identity" in done.stderr


def test_a_directory_that_holds_another_run_is_refused(finished_run: Run, toy_world: Path) -> None:
    arguments = ["experiment=quickstart", f"run={finished_run.root}", f"toy={toy_world}", "seed=7"]
    done = metaapo("launch", *arguments, check=False)
    assert done.returncode == 2 and "seed: 0 -> 7" in done.stderr
    assert Run.open(finished_run.root).config.seed == 0
