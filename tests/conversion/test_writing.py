from __future__ import annotations

import json
from pathlib import Path

from tests.conversion.test_weights import SHAPE
from toolkit.conversion.weights import stage_weights
from toolkit.conversion.writing import plan_files, write_companions


def test_files_are_bounded_and_hold_each_parameter_once() -> None:
    stages = [stage_weights(SHAPE, stage, 2) for stage in range(2)]
    plan = plan_files(stages, element_bytes=4, file_bytes=1000)
    for weights, files in zip(stages, plan, strict=True):
        assert [weight for members in files.values() for weight in members] == weights
        for members in files.values():
            sizes = [4 * sum(rows * (columns[0] if columns else 1) for rows, *columns in w.shapes) for w in members]
            assert len(members) == 1 or sum(sizes) <= 1000
    names = [name for files in plan for name in files]
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    assert len(names) > 4


def test_config_names_the_dtype_and_companions_are_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "config.json").write_text(json.dumps({"hidden_size": 8, "torch_dtype": "float16"}))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "optimizer.pt").write_text("not a companion")
    assert write_companions(source, target, "bfloat16") == ["config.json", "chat_template.jinja"]
    assert json.loads((target / "config.json").read_text()) == {"hidden_size": 8, "dtype": "bfloat16"}
    assert (target / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (target / "optimizer.pt").exists()
