"""What a worker's engines are told, and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.exchange.conftest import make_config
from toolkit.config import InferenceConfig
from toolkit.errors import UserError
from toolkit.inference.settings import EngineSettings, SamplingSettings, engine_settings


@pytest.mark.parametrize(
    ("does", "groups", "engines"),
    [
        (["sample", "annotate", "evaluate"], {}, 2),
        (["sample", "annotate", "evaluate"], {"evaluation": {"reward": "another"}}, 3),
        (["sample", "annotate", "evaluate"], {"evaluation": {"reward": "reward"}}, 2),
        (["sample"], {"evaluation": {"reward": "another"}}, 1),
        (["annotate"], {}, 1),
        (["evaluate"], {"evaluation": {"reward": "another"}}, 2),
        (["sample", "annotate", "evaluate"], {"method": {"gate": {"kind": "none"}}}, 2),
        (["annotate", "evaluate"], {"method": {"gate": {"kind": "none"}}, "evaluation": {"reward": "another"}}, 2),
    ],
)
def test_the_engines_of_a_worker_share_its_gpu(
    does: list[str], groups: dict[str, Any], engines: int, tmp_path: Path
) -> None:
    config = make_config(tmp_path, reward={"model": "reward"}, **groups)
    config = replace(config, inference=InferenceConfig(does=does))
    assert engine_settings(config).gpu_memory_utilization == pytest.approx(0.9 / engines)


def test_settings_name_what_is_wrong() -> None:
    with pytest.raises(UserError, match=r"unknown dtype.*'fp32'.*float32"):
        EngineSettings(dtype="fp32", max_model_len=10)
    with pytest.raises(UserError, match=r"tensor_parallel.*above 0.*0"):
        EngineSettings(dtype="auto", max_model_len=10, tensor_parallel=0)
    with pytest.raises(UserError, match="top_p"):
        SamplingSettings(top_p=1.5)
