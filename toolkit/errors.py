"""Errors meant for the person who runs the toolkit."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """One message that says what was expected, what came, and what to do. The command line prints it and exits 2."""


def unknown(kind: str, name: object, valid: Iterable[str]) -> UserError:
    """The error for a name that is not among the ``valid`` ones, which it lists."""
    return UserError(f"unknown {kind} {name!r}; expected one of: {', '.join(sorted(valid))}")
