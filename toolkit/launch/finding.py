"""What `metaapo doctor` has to say of one thing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line. A ``fault`` keeps a run from working, a ``warning`` may; a ``note`` is what a person has to know or to try."""

    level: str  # ok, note, warning, fault
    subject: str
    message: str


def ok(subject: str, message: str) -> Finding:
    return Finding("ok", subject, message)


def note(subject: str, message: str) -> Finding:
    return Finding("note", subject, message)


def warning(subject: str, message: str) -> Finding:
    return Finding("warning", subject, message)


def fault(subject: str, message: str) -> Finding:
    return Finding("fault", subject, message)
