"""The command line: what it imports, its exit codes, one sentence per error."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.exchange.conftest import ROOT, make_config, publish_pairs, run
from toolkit import __version__, cli
from toolkit.exchange import hints, layout
from toolkit.exchange.run import Run
from toolkit.reporting.status import collect

__all__ = ["run"]
HEAVY = ("torch", "hydra", "omegaconf", "transformers", "matplotlib", "vllm", "megatron", "datasets", "submitit")

IMPORTS = """
import sys
from toolkit.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("imported:", *sorted({name.split(".")[0] for name in sys.modules}))
"""


def imported(*arguments: object) -> tuple[str, set[str]]:
    """What the command printed, and the packages it imported."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    printed, _, modules = done.stdout.rpartition("imported:")
    return printed, set(modules.split())


def test_help_imports_nothing_heavy() -> None:
    printed, modules = imported("--help")
    assert "launch" in printed and "verify" in printed
    assert not modules & {*HEAVY, "numpy", "pyarrow", "rich"}


@pytest.mark.parametrize("arguments", [["--json"], [], ["--json", "--refresh"]])
@pytest.mark.parametrize("ticked", [True, False])
def test_status_imports_nothing_heavy(run: Run, arguments: list[str], ticked: bool) -> None:
    if ticked:
        hints.set_status(run.root, collect(run, {}))
    printed, modules = imported("status", run.root, *arguments)
    assert not modules & set(HEAVY)
    if arguments == ["--json"]:
        assert json.loads(printed)["steps"] == {"done": 0, "of": run.plan.steps}
        assert not ticked or not modules & {"numpy", "pyarrow", "rich"}
    elif not arguments:
        assert "step 0 of" in printed


# ---------------------------------------------------------------------------------------------- verbs


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def one_sentence(found: tuple[int, str, str], *words: str) -> None:
    """An error of the user's making: exit code 2, its message on stderr, no traceback."""
    code, _, errors = found
    assert code == 2 and errors.startswith("metaapo: ") and "Traceback" not in errors
    for word in words:
        assert word in errors


@pytest.mark.parametrize("verb", ["status", "tick", "cancel", "resume", "verify", "report", "explain", "logs"])
def test_what_is_no_run_is_said_to_be_none(capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str) -> None:
    one_sentence(call(capsys, verb, tmp_path), f"{tmp_path} holds no run")
    if verb == "logs":
        one_sentence(call(capsys, verb, tmp_path, "trainer"), f"{tmp_path} holds no run")
    assert not list(tmp_path.iterdir())


HOSTILE = "\x1b[2J\x1b]52;c;aGk=\x07\x9b31m\x08\x7f"  # clears the screen, writes the clipboard, …


def printable(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


def test_no_text_of_a_run_steers_the_terminal(
    capsys: pytest.CaptureFixture[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_attempt(
        run, "trainer", 0, {"outcome": "died", "kind": "crash", "message": f"gone {HOSTILE}", "nodes": HOSTILE}
    )
    write_log(run, 0, 0, f"a{HOSTILE}\n")
    run.close("failed", f"trainer died {HOSTILE}")
    for arguments in (["status"], ["status", "--refresh"], ["status", "--watch"], ["explain"], ["report"], ["verify"]):
        code, text, errors = call(capsys, arguments[0], run.root, *arguments[1:])
        assert code == 0 and text and printable(text + errors), arguments
    assert printable(call(capsys, "logs", run.root, "--list")[1])
    assert call(capsys, "logs", run.root, "trainer")[1].endswith(f"a{HOSTILE}\n"), "a file gets the bytes"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    shown = call(capsys, "logs", run.root, "trainer")[1]
    assert printable(shown) and "a\N{REPLACEMENT CHARACTER}[2J" in shown
    code, _, errors = call(capsys, "status", f"{run.root}{HOSTILE}")
    assert code == 2 and printable(errors)


def test_the_console_moves_its_own_cursor_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    monkeypatch.setenv("TERM", "xterm")
    console = cli._console()
    console.file, console._force_terminal = io.StringIO(), True
    table = Table(f"heading {HOSTILE}")
    table.add_row(HOSTILE)
    with Live(Text(f"one {HOSTILE}"), console=console, auto_refresh=False) as live:
        live.update(table, refresh=True)
    console.print(HOSTILE, Text(HOSTILE))
    text = console.file.getvalue()
    assert "\x1b[" in text, "the cursor of the live table"
    assert not any(word in text for word in ("\x1b]", "\x07", "\x9b", "\x08", "\x7f", "\x1b[2J"))


def test_what_is_missing_for_a_report_is_told_with_the_way_to_get_it(
    capsys: pytest.CaptureFixture[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "toolkit.reporting.report", None)
    monkeypatch.setattr("toolkit.reporting.report", None, raising=False)
    monkeypatch.delattr("toolkit.reporting.report")
    code, text, _ = call(capsys, "report", run.root)
    assert code == 0 and "in a clone of this project: pip install '.[report]'" in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.beta=1"], ["method.beta=1", "keys there"]),
        (["method=metapo"], ["Available options in 'method'"]),
        (["experiment=quickstart", "toy=/nowhere"], ["data.path", "/nowhere/pairs.jsonl"]),
        (["data.path=x", "model.policy=y"], ["set reward.model"]),
        (["replay_from=/nowhere", "run=again"], ["/nowhere holds no run"]),
    ],
)
def test_a_launch_that_is_refused_makes_no_run(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for verb in ("launch", "prepare"):
        one_sentence(call(capsys, verb, *overrides), *words)
    assert not list(tmp_path.iterdir())


def test_arguments_that_are_none_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["fly"], [], ["status"]):
        with pytest.raises(SystemExit) as leaves:
            cli.main(arguments)
        assert leaves.value.code == 2
    with pytest.raises(SystemExit) as leaves:
        cli.main(["--version"])
    assert leaves.value.code == 0 and __version__ in capsys.readouterr().out


def test_overrides_may_stand_on_both_sides_of_an_option(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = call(capsys, "launch", "data.path=x", "--dry-run", "method.rouns=3")
    one_sentence(found, "method.rouns=3: ")
    for arguments in (["launch", "a=1", "--dry-rum", "b=2"], ["status", "run", "a=1"]):
        with pytest.raises(SystemExit) as leaves:
            cli.main(arguments)
        assert leaves.value.code == 2


def test_a_path_that_can_be_no_run_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for verb in ("status", "tick", "explain"):
        one_sentence(call(capsys, verb, tmp_path / "file"), str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "cannot write x.json: No space left on device"),
        (errno.EDQUOT, "Free space (or inodes, or quota) on the filesystem of /runs"),
        (errno.EROFS, "/runs/x.json: Read-only file system. A run is a directory"),
        (errno.ENOTDIR, "/runs/x.json: Not a directory"),
    ],
)
def test_what_a_filesystem_refuses_is_said(
    capsys: pytest.CaptureFixture[str], run: Run, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    from toolkit.launch import control

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "/runs/x.json")

    monkeypatch.setattr(control, "tick", refuse)
    one_sentence(call(capsys, "tick", run.root), words)


def test_other_errors_of_the_system_are_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.launch import control

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "/runs/x.json")

    monkeypatch.setattr(control, "tick", fail)
    with pytest.raises(OSError, match="Input/output error"):
        cli.main(["tick", str(run.root)])


def test_who_has_to_tick_is_said(capsys: pytest.CaptureFixture[str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.launch import control

    monkeypatch.setattr(control, "start", lambda run: [])
    for cluster, ticks in (({}, False), ({"kind": "slurm"}, False), ({"kind": "slurm", "control": "login"}, True)):
        run.set_operations(make_config(run.root, cluster=cluster))
        cli._go_on(run, detach=True)
        assert (
            f"somebody has to tick, from cron for instance: metaapo tick {run.root}" in capsys.readouterr().out
        ) == ticks


def test_verify_exits_1_and_names_the_record(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    code, text, _ = call(capsys, "verify", run.root)
    assert code == 0 and "clean" in text
    path = run.pairs_manifest.directory / run.pairs_manifest.files[0].path
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    code, text, _ = call(capsys, "verify", run.root)
    assert code == 1 and "data/pairs" in text
    code, text, _ = call(capsys, "verify", run.root, "--json")
    assert code == 1 and json.loads(text)["clean"] is False


def test_resume_refuses_the_identity_and_what_is_finished(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    one_sentence(call(capsys, "resume", run.root, "seed=1"), "seed belongs to the identity")
    one_sentence(call(capsys, "resume", run.root, "trainer.pol=1"), "expected one of", "trainer.poll")


def test_status_shows_its_outcome(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    run.close("failed", "because of [this]")
    code, text, _ = call(capsys, "status", run.root, "--watch")
    assert code == 0 and "failed" in text and "because of [this]" in text


def test_cancel_of_a_run_that_is_over_says_how_it_ended(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    code, text, _ = call(capsys, "cancel", run.root)
    assert code == 0 and "cancelled" in text and f"metaapo resume {run.root}" in text
    run.reopen()
    run.finish()
    code, text, _ = call(capsys, "cancel", run.root)
    assert code == 0 and "finished" in text and "resume" not in text


def test_tick_says_whether_the_run_goes_on(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    run.close("cancelled", "by hand")
    code, text, _ = call(capsys, "tick", run.root)
    assert code == 0 and text.strip() == f"{run.root}: cancelled"


def write_log(run: Run, number: int, rank: int, text: str, slot: str = "trainer") -> Path:
    folder = run.root / "logs" / slot / f"{number:04d}-abc"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"1_{rank}_log.out"
    path.write_text(text)
    return path


def publish_attempt(run: Run, slot: str, number: int, end: dict | None = None) -> None:
    intent = {
        "attempt": "abc",
        "slot": slot,
        "number": number,
        "incarnation": 0,
        "progress": [],
        "gpus": 0,
        "code": "c",
    }
    run.records.publish(layout.job(slot, number, "intent"), intent)
    run.records.publish(layout.job(slot, number, "start"), {"kind": "started", "job": "17", "host": "n3"})
    if end is not None:
        run.records.publish(layout.job(slot, number, "end"), end)


def test_logs_are_those_of_the_newest_attempt_that_has_any(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    one_sentence(call(capsys, "logs", run.root, "trainer"), "no logs of trainer", "nobody")
    for number, text in ((8, "old"), (10, "new")):
        for rank in (0, 2, 10):
            write_log(run, number, rank, f"{text} {rank}\n")
    (run.root / "logs" / "trainer" / "0011-pending").mkdir()
    _, text, _ = call(capsys, "logs", run.root, "trainer")
    assert [line for line in text.splitlines() if line.startswith("new")] == ["new 0", "new 2", "new 10"]
    assert "old" not in text
    _, text, _ = call(capsys, "logs", run.root, "trainer", "--attempt", 8, "--rank", 2)
    assert text.splitlines()[1:] == ["old 2"]
    one_sentence(call(capsys, "logs", run.root, "sidecar"), "there are logs of: trainer")
    one_sentence(call(capsys, "logs", run.root, "trainer", "--attempt", 3), "there are: 8, 10, 11")
    one_sentence(call(capsys, "logs", run.root, "trainer", "--attempt", 11), "has not written a log yet")
    one_sentence(call(capsys, "logs", run.root, "trainer", "--rank", 7), "ranks 0, 2, 10")
    for tail in (0, -3):
        one_sentence(call(capsys, "logs", run.root, "trainer", "--tail", tail), f"1 or more, not {tail}")


def test_of_long_logs_the_end_is_shown(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    path = write_log(run, 0, 0, "".join(f"line {number} {'x' * 500}\n" for number in range(1000)) + "the end")
    _, text, _ = call(capsys, "logs", run.root, "trainer")
    lines = text.splitlines()
    assert len(lines) == 202 and lines[2].startswith("line 801 ") and lines[-1] == "the end"
    before = path.stat().st_size - len("\n".join(lines[2:]))
    assert lines[1] == f"… {before:,} bytes before this: --all shows them"
    assert len(call(capsys, "logs", run.root, "trainer", "--tail", 3)[1].splitlines()) == 5
    assert len(call(capsys, "logs", run.root, "trainer", "--all")[1].splitlines()) == 1002


def test_logs_without_a_role_and_lists_of_attempts(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    assert call(capsys, "logs", run.root) == (0, "", "")
    publish_attempt(run, "trainer", 0, {"outcome": "died", "kind": "node", "message": "m", "nodes": "n[1-2]"})
    publish_attempt(run, "trainer", 1)
    publish_attempt(run, "sidecar", 0)
    path = write_log(run, 0, 0, "x\n")
    (path.parent / "job.sh").touch()
    (path.parent / "1_submitted.pkl").touch()
    _, text, _ = call(capsys, "logs", run.root)
    assert text.splitlines() == ["sidecar: 1 attempt, attempt 0 running", "trainer: 2 attempts, attempt 1 running"]
    _, text, _ = call(capsys, "logs", run.root, "trainer", "--list")
    assert text.splitlines() == [
        "trainer attempt 0: died (node), job 17 on n[1-2]",
        f"  {path.parent / 'job.sh'}",
        f"  {path}",
        "trainer attempt 1: running, job 17 on n3",
    ]
    assert "sidecar attempt 0: running, job 17 on n3" in call(capsys, "logs", run.root, "--list")[1]
    one_sentence(call(capsys, "logs", run.root, "x", "--list"), "there are attempts of: sidecar, trainer")


def test_explain_shows_the_lines_and_what_to_do(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    publish_attempt(run, "trainer", 0, {"outcome": "died", "kind": "crash", "message": "gone"})
    path = write_log(run, 0, 1, "a\nslurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\n")
    run.close("failed", "trainer died once")
    code, text, _ = call(capsys, "explain", run.root)
    assert code == 0 and "trainer died once" in text and f"{path.relative_to(run.root)}:2" in text
    assert "cluster.trainer.memory=" in text
    code, text, _ = call(capsys, "explain", run.root, "--json")
    assert code == 0 and json.loads(text)["findings"][0]["kind"] == "memory"


def test_explain_and_a_refreshed_status_change_nothing_and_import_nothing_heavy(run: Run) -> None:
    publish_attempt(run, "trainer", 0)
    before = sorted(run.root.rglob("*"))
    for arguments in (["explain", run.root], ["status", run.root, "--refresh"], ["logs", run.root, "--list"]):
        _, modules = imported(*arguments)
        assert not modules & set(HEAVY)
    assert sorted(run.root.rglob("*")) == before


# ---------------------------------------------------------------------------------------------- another user

# What a command needs is imported first: the interpreter of this test may lie where nobody else can read.
AS_NOBODY = """
import os, sys
import encodings.idna, hydra, toolkit.exchange.verify, toolkit.launch.compose, toolkit.launch.control, toolkit.launch.local
import toolkit.reporting.explain, toolkit.reporting.terminal
from hydra.core.override_parser import overrides_parser
from toolkit.cli import main

os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can look into, as a project's on a cluster."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def as_nobody(*arguments: object) -> subprocess.CompletedProcess[str]:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    return subprocess.run(
        [sys.executable, "-c", AS_NOBODY, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


def test_another_user_reads_a_run_that_is_shared_and_moves_nothing(open_folder: Path) -> None:
    shared = make_config(open_folder / "run", cluster={"umask": "022"})
    made = Run.create(open_folder / "run", shared, "test")
    publish_pairs(made)
    publish_attempt(made, "trainer", 0, {"outcome": "failed", "kind": "crash", "error": "KeyError", "message": "'x'"})
    write_log(made, 0, 0, "secret").parent.chmod(0o700)  # as the launcher makes it
    before = sorted(open_folder.rglob("*"))
    assert json.loads(as_nobody("status", made.root, "--json").stdout)["steps"]["done"] == 0
    assert "KeyError: 'x'" in as_nobody("explain", made.root).stdout
    assert "only the owner of" in as_nobody("logs", made.root, "trainer", "--list").stdout
    unread = as_nobody("logs", made.root, "trainer")
    assert unread.returncode == 2 and "only the owner of" in unread.stderr and "secret" not in unread.stdout
    assert as_nobody("verify", made.root).returncode == 0
    for arguments in (("tick",), ("cancel",), ("resume",)):
        done = as_nobody(arguments[0], made.root)
        assert done.returncode == 2 and done.stderr.startswith("metaapo: ") and "Traceback" not in done.stderr, (
            done.stderr
        )
    assert sorted(open_folder.rglob("*")) == before
    assert made.closing() is None


def test_another_user_does_not_read_a_private_run(open_folder: Path) -> None:
    made = Run.create(open_folder / "run", make_config(open_folder / "run"), "test")
    done = as_nobody("status", made.root)
    assert done.returncode == 2 and "is not readable for this user" in done.stderr and "cluster.umask" in done.stderr


def test_policies_are_seen_in_the_status(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    run.records.publish(layout.policy(0), {})
    _, text, _ = call(capsys, "status", run.root, "--json", "--refresh")
    assert json.loads(text)["policy"] == 0
