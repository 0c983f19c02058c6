"""Runs at three stages of their life, of real records."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reporting.sketch import Sketch


@pytest.fixture
def sketch(tmp_path: Path) -> Sketch:
    """A run that has just been made."""
    return Sketch(tmp_path / "run")


@pytest.fixture
def halfway(sketch: Sketch) -> Sketch:
    """See `Sketch.go_halfway`."""
    sketch.go_halfway()
    return sketch


@pytest.fixture
def finished(halfway: Sketch) -> Sketch:
    """See `Sketch.finish`."""
    halfway.finish()
    return halfway
