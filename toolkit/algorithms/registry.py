"""Build a configured object (objective, gate, preset) from its name and parameters, with errors that list what is valid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from toolkit.errors import UserError, unknown


def build(kind: str, registered: Mapping[str, type], name: str, parameters: Mapping[str, Any]) -> Any:
    """An instance of the dataclass registered under ``name``.

    Raises ``UserError`` for an unknown name, an unknown parameter (the valid ones are listed with their defaults) or a
    missing one.
    """
    if name not in registered:
        raise unknown(kind, name, registered)
    fields = dataclasses.fields(registered[name])
    valid = "its parameters: " + (", ".join(_signature(field) for field in fields) or "none")
    if surplus := sorted(set(parameters) - {field.name for field in fields}):
        raise UserError(f"{kind} {name!r} has no parameter {', '.join(map(repr, surplus))}; {valid}")
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    if missing := sorted(required - set(parameters)):
        raise UserError(f"{kind} {name!r} needs the parameter {', '.join(map(repr, missing))}; {valid}")
    return registered[name](**parameters)


def check_number(
    name: str,
    value: object,
    expected: str,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    minimum: float = -math.inf,
    maximum: float = math.inf,
) -> None:
    """Raise ``UserError`` unless ``value`` is a finite number, ``above < value < below`` and within the closed bounds."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not (above < value < below and minimum <= value <= maximum)
    ):
        raise UserError(f"{name} must be {expected}, got {value!r}")


def check_integer(name: str, value: object, minimum: int) -> None:
    """Raise ``UserError`` unless ``value`` is an integer, ``minimum`` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise UserError(f"{name} must be an integer >= {minimum}, got {value!r}")


def _signature(field: dataclasses.Field) -> str:
    return f"{field.name} (required)" if field.default is dataclasses.MISSING else f"{field.name}={field.default!r}"
