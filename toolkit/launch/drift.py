"""Whether somebody changed the environment of a run under way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from toolkit.cluster import role_of
from toolkit.launch.attempts import Attempt


def changed_packages(histories: Iterable[Sequence[Attempt]]) -> list[str]:
    """A sentence for each package that attempts of one role found in different versions (`toolkit.launch.job` records them)."""
    seen: dict[tuple[str, str], dict[str, str]] = {}
    for attempt in sorted(
        (attempt for history in histories for attempt in history if attempt.start is not None),
        key=lambda attempt: attempt.start.written,
    ):
        for package, version in attempt.start.attributes.get("packages", {}).items():
            first = seen.setdefault((role_of(attempt.slot), package), {})
            first.setdefault(version, f"{attempt.slot} attempt {attempt.number}")
    return [
        f"the {role}'s environment changed during the run: {package} "
        + ", then ".join(f"{version} (from {attempt})" for version, attempt in versions.items())
        + ". Results may differ from there on in their last digits"
        for (role, package), versions in seen.items()
        if len(versions) > 1
    ]
