"""The code that jobs run: a copy named by its digest, which a later edit of the checkout does not touch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from toolkit.errors import UserError
from toolkit.launch import job, snapshot
from toolkit.launch.snapshot import directory, package_digest, take


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of two modules, in place of this one."""
    root = tmp_path / "checkout" / "toolkit"
    (root / "launch").mkdir(parents=True)
    (root / "cli.py").write_text("print('one')\n")
    (root / "launch" / "job.py").write_text("print('two')\n")
    monkeypatch.setattr(snapshot, "PACKAGE", root)
    return root


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_digest_is_of_names_and_contents(package: Path) -> None:
    first = package_digest(package)
    (package / "launch" / "__pycache__").mkdir()
    (package / "launch" / "__pycache__" / "job.py").write_text("compiled")
    (package / "notes.txt").write_text("no code")
    assert package_digest(package) == first
    (package / "cli.py").write_text("print('One')\n")
    second = package_digest(package)
    (package / "cli.py").rename(package / "cly.py")
    assert len({first, second, package_digest(package)}) == 3


def test_a_snapshot_is_taken_once_and_stays_when_the_checkout_changes(package: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    digest = take(run)
    assert files(directory(run, digest)) == {
        "toolkit/cli.py": b"print('one')\n",
        "toolkit/launch/job.py": b"print('two')\n",
    }
    assert package_digest(directory(run, digest) / "toolkit") == digest
    assert take(run) == digest
    (package / "cli.py").write_text("print('edited')\n")
    later = take(run)
    assert later != digest
    assert files(directory(run, digest))["toolkit/cli.py"] == b"print('one')\n"
    assert sorted(path.name for path in (run / "code").iterdir()) == sorted([digest, later])


def test_many_may_take_it_at_once(package: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(lambda _: take(tmp_path / "run"), range(8)))
    (digest,) = digests
    assert [path.name for path in (tmp_path / "run" / "code").iterdir()] == [digest]
    assert package_digest(directory(tmp_path / "run", digest) / "toolkit") == digest


def test_what_a_killed_one_left_is_not_taken_for_a_snapshot(package: Path, tmp_path: Path) -> None:
    digest = package_digest(package)
    half = tmp_path / "run" / "code" / f".{digest}.0123abcd" / "toolkit"
    half.mkdir(parents=True)
    (half / "cli.py").write_text("pri")
    assert take(tmp_path / "run") == digest
    assert package_digest(directory(tmp_path / "run", digest) / "toolkit") == digest


def test_a_job_that_runs_other_code_refuses(package: Path) -> None:
    job.check_code(package_digest(package))
    with pytest.raises(UserError, match=rf"submitted with code {'0' * 12} and runs .* from {package}.*PYTHONPATH"):
        job.check_code("0" * 64)
