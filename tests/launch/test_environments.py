"""The Python of each role, as `metaapo doctor` tries it."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.exchange.conftest import ROOT
from tests.launch.conftest import World
from toolkit.cluster import JobRequest
from toolkit.launch import environments
from toolkit.launch.environments import attempt, check_environments, required
from toolkit.launch.finding import Finding


def tried(world: World, kind: str = "slurm", role: str = "sidecar", **request: Any) -> list[Finding]:
    request = {"python": sys.executable} | request
    return list(check_environments(world.config(cluster={"kind": kind, "jobs": request}), [role], ROOT))


def one(found: list[Finding], level: str, *words: str) -> None:
    assert [each.level for each in found] == [level], found
    for word in words:
        assert word in found[0].message, found[0]


def other_python(path: Path, prelude: str) -> str:
    """A Python that does something else first, and then what it is told by ``-c``."""
    path.write_text(
        f"#!{sys.executable}\nimport sys\n{prelude}\n_code, sys.argv = sys.argv[2], sys.argv[2:]\nexec(_code)\n"
    )
    path.chmod(0o755)
    return str(path)


def without(*names: str) -> str:
    return (
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {names!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )


def test_an_environment_that_has_all(world: World) -> None:
    setup = ["export METAAPO_TEST_SETUP=done", "cd /"]
    shell = f'test "$METAAPO_TEST_SETUP" = done && {sys.executable}'
    one(tried(world, setup=setup, python=shell), "ok", "Python 3", "submitit 1.5.4", "torch 2")


def test_it_starts_where_a_job_would(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the run's directory, not the caller's: there a relative path names nothing."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("env.sh").touch()
    found = tried(world, setup=["source env.sh"])
    assert [each.level for each in found] == ["warning", "ok"] and "env.sh" in found[0].message
    Path("python").symlink_to(sys.executable)
    one(tried(world, python="./python"), "fault", "exit status 127")


def test_a_python_that_is_unsaid_or_no_command(world: World) -> None:
    one(tried(world, python="", setup=["exit 4"]), "fault", f"{Path(sys.executable)} fails with exit status 4")
    one(tried(world, python="'"), "fault", "cluster.sidecar.python is no command: No closing quotation: '")


def test_on_this_machine_roles_start_without_setup(world: World) -> None:
    one(tried(world, kind="local", setup=["exit 3"]), "ok")


@pytest.mark.parametrize(
    ("prelude", "level", "words"),
    [
        (
            without("torch"),
            "fault",
            [
                "it lacks torch: pip install '.[trainer]' there, in a clone of this project, or set cluster.sidecar.python"
            ],
        ),
        ("sys.version_info = (3, 9, 1)", "fault", ["Python 3.9.1; 3.11 or newer is needed"]),
        ("sys.exit(3)", "fault", ["fails with exit status 3; mend cluster.sidecar.python or setup"]),
        ("import os; os.kill(os.getpid(), 9)", "warning", ["it was killed, perhaps by this machine's limits"]),
        (
            "sys.modules['pyarrow'] = None",
            "fault",
            ["it lacks pyarrow"],
        ),
        (
            "class L:\n    def find_spec(self, n, p=None, t=None):\n        if n == 'torch': raise ImportError('libcuda.so.1: no')\n"
            "sys.meta_path.insert(0, L())",
            "warning",
            ["its imports fail here; if that is for want of a GPU, try it in a job: ImportError: libcuda.so.1"],
        ),
    ],
)
def test_what_is_wrong_is_said(world: World, tmp_path: Path, prelude: str, level: str, words: list[str]) -> None:
    one(tried(world, python=other_python(tmp_path / "python", prelude)), level, *words)


def test_versions_other_than_ours(world: World, tmp_path: Path) -> None:
    versions = {"submitit": "1.4.0", "torch": "1.0"}
    prelude = (
        "import importlib.metadata as m\n_true = m.version\n"
        f"m.version = lambda name: {versions}.get(name) or _true(name)\n"
    )
    found = tried(world, python=other_python(tmp_path / "python", prelude))
    assert [each.level for each in found] == ["fault", "warning"]
    assert "submitit 1.4.0, here 1.5.4" in found[0].message and "pip install submitit==1.5.4" in found[0].message
    assert "torch 1.0; this release was tested with torch ==" in found[1].message


def test_a_python_without_packages(world: World) -> None:
    one(tried(world, python=f"{sys.executable} -S"), "fault", "it lacks submitit")


def test_programs_that_are_not_here(world: World, tmp_path: Path) -> None:
    one(
        tried(world, python="metaapo-no-such-runtime exec image.sif python3"),
        "warning",
        "there is no metaapo-no-such-runtime here",
    )
    one(tried(world, python=f"{tmp_path}/python"), "fault", "exit status 127", "No such file or directory")


def test_containers_of_srun_are_left_to_people(world: World) -> None:
    found = tried(world, python="python3", srun=["--container-image=/images/a b.sqsh"])
    one(found, "note", "in a job: srun '--container-image=/images/a b.sqsh' python3 -c 'import submitit")


def test_a_line_of_setup_that_fails_is_named(world: World) -> None:
    found = tried(world, setup=["ls /nowhere", "true"])
    assert [each.level for each in found] == ["warning", "ok"]
    assert "fails here: ls /nowhere" in found[0].message


def test_one_that_takes_for_ever_is_ended_with_its_children(tmp_path: Path) -> None:
    mark = f"sleep 97.{int(time.time() * 1000)}"
    trial = attempt("sidecar", JobRequest(python=f"{mark} ; true"), ROOT, local=False, timeout=0.3)
    assert trial.status is None
    wanted, running = mark.replace(" ", "\0").encode(), []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            running.append(path.read_bytes())
    assert not any(wanted in line for line in running)


def test_what_our_own_metadata_asks_for() -> None:
    trainer = required("trainer")
    assert str(trainer["submitit"]) == "==1.5.4" and "torch" in trainer and "vllm" not in trainer
    assert "vllm" in required("inference")
    for need in environments.NEEDS.values():
        assert set(need.packages) <= set(required(need.extra)) | {"torch"}, "their versions are compared"
