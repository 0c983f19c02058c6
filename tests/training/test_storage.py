"""Which failures of writing a person must mend, and which another attempt may survive."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from toolkit.errors import UserError
from toolkit.training.storage import write_failure


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_for_a_person(tmp_path: Path, number: int) -> None:
    for error in (
        OSError(number, os.strerror(number)),
        Exception(f"I/O error: {os.strerror(number)} (os error {number})"),
    ):
        found = write_failure("the checkpoint", tmp_path, error)
        assert isinstance(found, UserError)
        assert "could not write the checkpoint" in str(found) and "space and quota" in str(found)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        Exception("(os error 116)"),
        RuntimeError("unexpected pos"),
        RuntimeError(),
    ],
)
def test_a_hiccup_is_no_refusal(tmp_path: Path, error: Exception) -> None:
    found = write_failure("the policy", tmp_path, error)
    assert type(found) is RuntimeError
    assert (str(error) or "RuntimeError") in str(found)
    assert not any(tmp_path.iterdir())
