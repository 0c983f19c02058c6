"""Jobs of this machine for real: submitit, processes, snapshots, supervision. Only what the roles do is the tests'."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.launch.conftest import make_config, publish_pairs
from toolkit.cluster import ClusterConfig, JobRequest
from toolkit.errors import UserError
from toolkit.exchange import layout
from toolkit.exchange.jobs import process_start
from toolkit.exchange.run import Run
from toolkit.launch import snapshot
from toolkit.launch.adapter import JobSpec, State
from toolkit.launch.attempts import Attempt, attempts, current
from toolkit.launch.local import ALL, VISIBLE, LocalAdapter, gpus, processes, visible
from toolkit.launch.supervise import Supervisor, specification

Define = Callable[[str], None]


def supervise(run: Run) -> list[Attempt]:
    """Look at the run once. Returns what then stands for each slot."""
    supervisor = Supervisor(run.root, run.attempt, LocalAdapter())
    supervisor.supervise()
    return [current(history) for history in supervisor.histories.values() if history]


def wait_until(true: Callable[[], object], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run of one trainer, which leaves no process behind."""
    offline = {"gate": {"kind": "none"}, "weight": {"kind": "one"}, "rounds": 1, "warm_start": "none"}
    made = Run.create(tmp_path / "run", make_config(tmp_path / "run", method=offline, reward={"model": None}), "test")
    publish_pairs(made, (4,))
    yield made
    ids = [attempt.id for attempt in attempts(made, "trainer")]
    LocalAdapter().cancel(ids, kill=True)
    wait_until(lambda: not any(processes(ids).values()))


def newest(run: Run) -> Attempt:
    return attempts(run, "trainer")[-1]


def until_over(run: Run) -> Attempt:
    """Wait for the newest attempt to end and leave."""
    wait_until(lambda: newest(run).over)
    wait_until(lambda: not processes([newest(run).id])[newest(run).id])
    return newest(run)


def log(run: Run, number: int = 0) -> str:
    (folder,) = (run.root / "logs" / "trainer").glob(f"{number:04d}-*")
    return "".join(path.read_text() for path in sorted(folder.glob("*_log.out")))


# ---------------------------------------------------------------------------------------------- ends


def test_a_role_that_refuses_ends_the_run_with_its_sentence(run: Run, payload: Define) -> None:
    payload('raise UserError("model.policy: no such folder")')
    (attempt,) = supervise(run)
    assert attempt.outcome == "pending"
    end = until_over(run).end.attributes
    assert (end["outcome"], end["kind"], end["message"]) == ("failed", "refused", "model.policy: no such folder")
    with pytest.raises(UserError, match=r"trainer stopped: model\.policy: no such folder"):
        supervise(run)
    assert len(attempts(run, "trainer")) == 1
    assert "model.policy: no such folder" in log(run)


def test_all_ranks_play_and_one_speaks(run: Run, payload: Define) -> None:
    payload('(run.root / f"{slot}-{rank}-of-{size}").touch(); return "done"')
    run.set_operations(replace(run.config, trainer=replace(run.config.trainer, tensor=2)))
    supervise(run)
    assert until_over(run).outcome == "done"
    wait_until(lambda: len(list(run.root.glob("trainer-*"))) == 2)
    assert sorted(path.name for path in run.root.glob("trainer-*")) == ["trainer-0-of-2", "trainer-1-of-2"]


def test_a_job_has_a_session_an_environment_and_code_of_its_own(
    run: Run, payload: Define, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload("""
        import toolkit
        print("here:", os.getsid(0), os.getcwd(), toolkit.__file__, os.environ["COLOUR"], os.environ["PYTHONSAFEPATH"])
        print("inherited:", *(os.environ.get(name) for name in ("SLURM_LOCALID", "METAAPO_DEADLINE")))
        return "done"
    """)
    monkeypatch.setenv("SLURM_LOCALID", "7")  # launched from inside a job
    monkeypatch.setenv("METAAPO_DEADLINE", "1")
    run.set_operations(replace(run.config, cluster=ClusterConfig(jobs=JobRequest(environment={"COLOUR": "blue"}))))
    supervise(run)
    until_over(run)
    (line,) = [line for line in log(run).splitlines() if line.startswith("here:")]
    _, session, _, package, colour, safe = line.split()
    assert int(session) != os.getsid(0), "Ctrl-C in the launcher's terminal would reach it"
    assert Path(package).is_relative_to(run.root / "code")
    assert (colour, safe) == ("blue", "1")
    assert "inherited: None None" in log(run)


# ---------------------------------------------------------------------------------------------- deaths

WAITS = """
    print("playing", flush=True)
    while not stop.sleep(0.05):
        if run.closing(run.incarnation) is not None:
            return "done"
    return "saved"
"""


def started(run: Run) -> Attempt:
    wait_until(lambda: newest(run).start is not None and "playing" in log(run, newest(run).number))
    return newest(run)


def test_a_job_that_is_told_to_stop_saves_and_is_submitted_again(run: Run, payload: Define) -> None:
    payload(WAITS)
    local = LocalAdapter()
    Supervisor(run.root, run.attempt, local).supervise()
    first = started(run)
    assert {name: job.state for name, job in local.look([first.id, "nobody"]).items()} == {
        first.id: State.RUNNING,
        "nobody": State.GONE,
    }
    local.cancel([first.id])
    assert until_over(run).outcome == "saved"
    Supervisor(run.root, run.attempt, local).supervise()
    assert started(run).number == 1
    run.close("cancelled", "by hand")
    assert until_over(run).outcome == "done"
    Supervisor(run.root, run.attempt, local).supervise()
    assert len(attempts(run, "trainer")) == 2


def test_a_killed_job_is_buried_with_all_its_processes(run: Run, payload: Define) -> None:
    payload("""
        if number == 0:
            subprocess.Popen(["sleep", "300"])
            print("playing", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"
    """)
    supervise(run)
    first = started(run)
    wait_until(lambda: process_start(first.start.attributes["pid"]) is None)
    assert processes([first.id])[first.id], "its child lives on"
    supervise(run)
    end = attempts(run, "trainer")[0].end.attributes
    assert (end["outcome"], end["kind"]) == ("died", "crash")
    wait_until(lambda: not processes([first.id])[first.id])
    assert newest(run).number == 1 and until_over(run).outcome == "done"


def test_a_job_that_ignores_everything_is_killed(run: Run, payload: Define) -> None:
    payload("""
        for name in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(name, signal.SIG_IGN)
        print("playing", flush=True)
        time.sleep(300)
    """)
    local = LocalAdapter()
    Supervisor(run.root, run.attempt, local).supervise()
    job = started(run)
    local.cancel([job.id])
    time.sleep(0.5)
    assert local.look([job.id])[job.id].state is State.RUNNING
    local.cancel([job.id], kill=True)
    wait_until(lambda: local.look([job.id])[job.id].state is State.GONE)


NAMES_ITSELF = "import setproctitle, time; setproctitle.setproctitle('VLLM::Worker'); print('playing', flush=True); time.sleep(300)"


def test_a_process_that_names_itself_is_found(run: Run, payload: Define) -> None:
    """As vLLM's engine and worker processes do, whose names would be written over their environment."""
    pytest.importorskip("setproctitle")
    payload(f"""
        child = subprocess.Popen([sys.executable, "-c", {NAMES_ITSELF!r}])
        (run.root / "child").write_text(str(child.pid))
        stop.sleep(300)
        return "saved"
    """)
    local = LocalAdapter()
    Supervisor(run.root, run.attempt, local).supervise()
    job = started(run)
    child = int((run.root / "child").read_text())
    try:
        assert b"VLLM" in Path(f"/proc/{child}/cmdline").read_bytes()
        assert child in processes([job.id])[job.id]
    finally:
        os.kill(child, signal.SIGKILL)
    local.cancel([job.id])
    assert until_over(run).outcome == "saved"


def test_a_paused_job_is_alive(run: Run, payload: Define) -> None:
    payload(WAITS)
    supervise(run)
    job = started(run)
    pid = job.start.attributes["pid"]
    os.kill(pid, signal.SIGSTOP)
    supervise(run)
    assert len(attempts(run, "trainer")) == 1 and not newest(run).over
    os.kill(pid, signal.SIGCONT)
    LocalAdapter().cancel([job.id])
    assert until_over(run).outcome == "saved"


# ---------------------------------------------------------------------------------------------- code


def submit(run: Run, number: int, code: str) -> str:
    """Submit an attempt with the code of this digest, as `supervise` does."""
    attempt = f"by-hand-{number}"
    intent = {"attempt": attempt, "incarnation": 0, "code": code, "progress": []}
    run.records.publish(layout.job("trainer", number, "intent"), intent)
    folder = snapshot.directory(run.root, code)
    LocalAdapter().submit(JobSpec(run.root, "trainer", number, attempt, folder, 1, 1, 0, JobRequest(time_minutes=60)))
    return attempt


def test_a_job_runs_the_code_it_was_submitted_with(run: Run, payload: Define) -> None:
    payload('print("old code"); return "done"')
    old = snapshot.take(run.root)
    payload('print("new code"); return "done"')
    new = snapshot.take(run.root)
    for number, code in enumerate((old, new)):
        submit(run, number, code)
        assert until_over(run).outcome == "done"
    assert "old code" in log(run, 0) and "new code" in log(run, 1)


def test_a_job_refuses_a_snapshot_that_was_edited(run: Run, payload: Define) -> None:
    payload('return "done"')
    code = snapshot.take(run.root)
    with (snapshot.directory(run.root, code) / "toolkit" / "cli.py").open("a") as file:
        file.write("# a quick fix\n")
    attempt = submit(run, 0, code)
    wait_until(lambda: not processes([attempt])[attempt])
    assert newest(run).start is None
    assert f"submitted with code {code[:12]}" in log(run)


# ---------------------------------------------------------------------------------------------- GPUs


def test_every_job_has_gpus_of_its_own(run: Run) -> None:
    config = make_config(
        run.root, reward={"model": "reward"}, trainer={"tensor": 2}, inference={"workers": 2, "tensor_parallel": 2}
    )
    there = list("abcdefg")
    slots = ("trainer", "sidecar", "worker-000", "worker-001")
    assert [gpus(config, slot, there) for slot in slots] == [["a", "b"], [], ["c", "d"], ["e", "f"]]
    assert gpus(config, "trainer", []) == [], "a machine without GPUs"
    with pytest.raises(
        UserError,
        match=r"6 GPUs = 2 of the trainer .* \+ 2 workers x inference\.tensor_parallel=2 are needed, there are 1",
    ):
        gpus(config, "sidecar", ["0"])
    assert gpus(config, "worker-001", ["0"] * 6) == ["0", "0"], "all share one, if a person says so"


def test_gpus_are_those_that_are_named_or_all_of_the_machine(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert visible({}, tmp_path) == ["0", "1"]
    assert visible({VISIBLE: "5, GPU-1f"}, tmp_path) == ["5", "GPU-1f"]
    assert visible({VISIBLE: ""}, tmp_path) == []
    assert visible({VISIBLE: "5", ALL: "5,6"}, tmp_path) == ["5", "6"], "a job that has its own submits another one"


def test_a_job_sees_its_own_gpus_unless_its_profile_names_them(
    run: Run, payload: Define, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload('print("gpus:", os.environ["CUDA_VISIBLE_DEVICES"]); return "done"')
    monkeypatch.setenv(VISIBLE, "7,8")
    supervise(run)
    until_over(run)
    assert "gpus: 7\n" in log(run)
    by_hand = JobRequest(time_minutes=60, environment={VISIBLE: "3"})
    job = replace(
        specification(run.config, run.root, "trainer", 1, "by-hand", snapshot.take(run.root)), request=by_hand
    )
    run.records.publish(layout.job("trainer", 1, "intent"), {**newest(run).intent.attributes, "attempt": "by-hand"})
    LocalAdapter().submit(job)
    until_over(run)
    assert "gpus: 3\n" in log(run, 1)


def test_an_interpreter_that_is_not_there_stops_the_run(run: Run, payload: Define) -> None:
    run.set_operations(replace(run.config, cluster=ClusterConfig(trainer=JobRequest(python="/no/such/python"))))
    with pytest.raises(UserError, match=r"could not start trainer here: .*/no/such/python"):
        supervise(run)
    assert "/no/such/python" in run.closing().attributes["reason"]
