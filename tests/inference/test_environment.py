from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch  # noqa: F401

from toolkit.inference import environment


def test_prepared_too_late_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="before torch"):
        environment.prepare()


def test_settings_give_way_to_the_environment_but_not_for_the_network() -> None:
    code = (
        "import json, os, sys\nimport toolkit.inference.environment as e\ne.prepare()\n"
        "print(json.dumps([dict(os.environ), sorted({'torch', 'vllm', 'transformers'} & sys.modules.keys())]))"
    )
    given = os.environ | {"OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "ib0"}
    given.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    result = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True)
    prepared, imported = json.loads(result.stdout)
    assert imported == []
    assert prepared["OMP_NUM_THREADS"] == "3"
    assert prepared["GLOO_SOCKET_IFNAME"] == "lo"
    assert prepared["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
