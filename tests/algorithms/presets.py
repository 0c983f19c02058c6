"""The presets as the configuration files have them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from toolkit.algorithms.meta_learner import MetaSettings
from toolkit.config import MethodConfig, build
from toolkit.exchange.derive import meta_settings

FOLDER = Path(__file__).parents[2] / "configs" / "method"


def method(name: str) -> MethodConfig:
    return build(MethodConfig, yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))


def preset(name: str, **overrides: Any) -> MetaSettings:
    """The meta-learner's settings of a method, some of them replaced."""
    return replace(meta_settings(method(name)), **overrides)
