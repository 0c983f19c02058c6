"""Finding and reading logs; the verb itself is tested in tests/test_cli.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.reporting import logs


def test_foreign_files_and_folders_are_left_alone(tmp_path: Path) -> None:
    for name in ("0000-a", "0012-b", "old-c"):
        (tmp_path / "logs" / "trainer" / name).mkdir(parents=True)
    (tmp_path / "logs" / "README").touch()
    assert logs.slots(tmp_path) == ["trainer"]
    folders = logs.folders(tmp_path, "trainer")
    assert {number: path.name for number, path in folders.items()} == {0: "0000-a", 12: "0012-b"}
    for name in ("7_10_log.out", "7_2_log.out", "7_submitted.pkl", "x_log.out", "job.sh", ".nfs0001"):
        (folders[0] / name).touch()
    assert [logs.rank(path) for path in logs.of_ranks(folders[0])] == [2, 10]


@pytest.mark.parametrize("ending", ["", "\n"])
def test_the_last_lines(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "log"
    lines = [f"{number} {'ä' * 40}" for number in range(5000)]
    path.write_text("\n".join(lines) + ending)
    text, before = logs.tail(path, 1000)
    assert text == "\n".join(lines[-1000:]) + ending
    assert before == path.stat().st_size - len(text.encode())
    assert logs.tail(path, 10_000) == (path.read_text(), 0)


def test_the_end_of_a_log_has_line_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {number}\n" for number in range(1, 20_001)))
    lines, offset = logs.end(path)
    first = logs.line_number(path, offset)
    assert first is not None and first > 10_000 and lines[0] == f"line {first}" and lines[-2] == "line 20000"
    assert logs.end(path)[1] > path.stat().st_size - logs.BLOCK
    monkeypatch.setattr(logs, "COUNTED", 1000)
    assert logs.line_number(path, offset) is None
    path.write_text("a\nb")
    assert (logs.end(path), logs.line_number(path, 0)) == ((["a", "b"], 0), 1)
