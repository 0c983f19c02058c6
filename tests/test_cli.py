"""The command line: what it imports, its exit codes, one sentence per error."""

from __future__ import annotations

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


@pytest.mark.parametrize("verb", ["status", "tick", "cancel", "resume", "verify", "report"])
def test_what_is_no_run_is_said_to_be_none(capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str) -> None:
    one_sentence(call(capsys, verb, tmp_path), f"{tmp_path} holds no run")
    assert not list(tmp_path.iterdir())


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


def test_logs_are_those_of_the_newest_attempt(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    one_sentence(call(capsys, "logs", run.root, "trainer"), "no logs of trainer", "nobody")
    for number, text in ((0, "old"), (1, "new")):
        folder = run.root / "logs" / "trainer" / f"{number:04d}-abc"
        folder.mkdir(parents=True)
        for rank in (0, 1):
            (folder / f"1_{rank}_log.out").write_text(f"{text} {rank}\n")
    code, text, _ = call(capsys, "logs", run.root, "trainer")
    assert code == 0 and "new 0\n" in text and "new 1\n" in text and "old" not in text
    one_sentence(call(capsys, "logs", run.root, "sidecar"), "there are logs of: trainer")


# ---------------------------------------------------------------------------------------------- another user

# What a command needs is imported first: the interpreter of this test may lie where nobody else can read.
AS_NOBODY = """
import os, sys
import encodings.idna, hydra, toolkit.exchange.verify, toolkit.launch.compose, toolkit.launch.control, toolkit.launch.local
import toolkit.reporting.terminal
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
    before = sorted(open_folder.rglob("*"))
    assert json.loads(as_nobody("status", made.root, "--json").stdout)["steps"]["done"] == 0
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
