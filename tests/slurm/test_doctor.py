"""`metaapo doctor`, `--write-profile` and the plain sbatch entry, on a real cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from devcluster import DevCluster

from tests.exchange.conftest import ROOT
from tests.launch.conftest import World, world
from tests.slurm.conftest import wait_for
from toolkit.launch.compose import compose

__all__ = ["world"]


def metaapo(cluster: DevCluster, *arguments: str, directory: Path) -> tuple[int, str]:
    """Exit status and output of a command as on the cluster's login node."""
    done = subprocess.run(
        [sys.executable, "-m", "toolkit.cli", *arguments],
        env=cluster.env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    return done.returncode, done.stdout


def lines(output: str, level: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(level)]


def given(world: World) -> list[str]:
    models = [f"model.policy={world.policy}", f"reward.model={world.reward}"]
    return [f"data.path={world.data}", *models, f"run={world.data.parent / 'run'}"]


def test_a_run_on_the_development_cluster_is_in_order(cluster: DevCluster, world: World, tmp_path: Path) -> None:
    layout = ["trainer.tensor=2", "trainer.pipeline=2", "inference.workers=2"]
    arguments = ["--no-environments", "cluster=devcluster", *given(world), *layout]
    before = {job["id"] for job in cluster.jobs()}
    status, output = metaapo(cluster, "doctor", *arguments, directory=tmp_path)
    assert status == 0, output
    assert lines(output, "fault") == []
    assert "trainer script: sbatch: Job" in output and "using 4 processors" in output, "sbatch itself was asked"
    assert "preemption in preemptible: requeue, 10 s" in output
    assert not (tmp_path / "run").exists() and {job["id"] for job in cluster.jobs()} <= before


def test_a_profile_with_mistakes_is_refused_with_each_of_them(
    cluster: DevCluster, world: World, tmp_path: Path
) -> None:
    mistakes = [
        "cluster.trainer.partition=gppu",
        "cluster.worker.partition=short",
        "cluster.sidecar.qos=few",
        "cluster.jobs.account=nobodys",
        "cluster.preemption=cancel",
    ]
    arguments = ["--no-environments", "cluster=devcluster", *given(world), *mistakes]
    status, output = metaapo(cluster, "doctor", *arguments, directory=tmp_path)
    assert status == 1
    for words in (
        "trainer: there is no partition gppu: set cluster.trainer.partition to one of: cpu, gpu, high",
        "worker: cluster.worker.time_minutes=60 is over the limit of partition short (MaxTime): set it to 3 at most",
        "sidecar: cluster.sidecar.time_minutes=60 is over the limit of QOS few (MaxWall)",
        "worker: you have no account nobodys",
        "trainer script: Slurm would refuse it",
    ):
        assert words in output, output


def test_limits_that_test_only_lets_pass_are_found(cluster: DevCluster, world: World, tmp_path: Path) -> None:
    """sbatch --test-only takes the time; the job would pend for ever (PartitionTimeLimit)."""
    arguments = ["launch", "--dry-run", "cluster=devcluster", *given(world), "cluster.worker.partition=short"]
    status, output = metaapo(cluster, *arguments, directory=tmp_path)
    assert status == 2 and "over the limit of partition short" in output
    few = ["cluster.jobs.qos=few", "cluster.jobs.time_minutes=3", "inference.workers=4", "cluster.worker.partition=gpu"]
    status, output = metaapo(
        cluster, "launch", "--dry-run", "cluster=devcluster", *given(world), *few, directory=tmp_path
    )
    assert status == 2 and "this run has 7 jobs in the queue; QOS few lets you have 4" in output, output


def test_a_drafted_profile_loads_and_is_in_order(cluster: DevCluster, world: World, tmp_path: Path) -> None:
    status, output = metaapo(cluster, "doctor", "--write-profile", "mine.yaml", directory=tmp_path)
    assert status == 0, output
    found = compose([f"cluster={tmp_path}/mine.yaml"], tmp_path, complete=False).cluster
    assert (found.trainer.partition, found.worker.partition, found.sidecar.partition) == ("gpu", "preemptible", "cpu")
    assert (found.trainer.gpu_request, found.ranks_per_node, found.jobs.account) == ("--gres=gpu:{gpus}", 2, "dev")
    assert (found.preemption, found.grace) == ("requeue", 10)
    arguments = ["doctor", "--no-environments", "cluster=mine.yaml", *given(world)]
    status, output = metaapo(cluster, *arguments, directory=tmp_path)
    assert status == 0, output
    status, output = metaapo(cluster, "doctor", "--write-profile", "mine.yaml", directory=tmp_path)
    assert status == 2 and "is not overwritten" in output


def test_plain_sbatch_launches(cluster: DevCluster, world: World, tmp_path: Path) -> None:
    """Python comes from the venv named, though Slurm runs a copy of the script somewhere else."""
    venv = tmp_path / "a venv" / "bin"
    venv.mkdir(parents=True)
    command = venv / "metaapo"
    command.write_text(f'#!/bin/bash\nexec "{sys.executable}" -m toolkit.cli "$@"\n')
    command.chmod(0o755)
    output = tmp_path / "job.out"
    exports = f"--export=ALL,METAAPO_VENV={venv.parent},PYTHONPATH={ROOT}"
    script = [
        "sbatch",
        "--parsable",
        f"--output={output}",
        f"--chdir={tmp_path}",
        exports,
        ROOT / "slurm/metaapo.sbatch",
    ]
    arguments = ["--dry-run", "cluster=devcluster", *given(world), "name=with space"]
    job = cluster.run(*script, *arguments).stdout.strip()
    wait_for(cluster, job, "COMPLETED", "FAILED")
    text = output.read_text()
    assert "#SBATCH --partition=preemptible" in text and "GPU-hours" in text, text
    assert "sbatch: Job" in text, "from inside a job, whose variables do not reach the jobs it submits"


def test_plain_sbatch_says_what_it_lacks(cluster: DevCluster, tmp_path: Path) -> None:
    output = tmp_path / "job.out"
    script = ["sbatch", "--parsable", f"--output={output}", f"--chdir={tmp_path}", "--export=ALL,METAAPO_VENV=/no/venv"]
    job = cluster.run(*script, ROOT / "slurm/metaapo.sbatch").stdout.strip()
    wait_for(cluster, job, "FAILED")
    assert "METAAPO_VENV=/no/venv has no bin/metaapo" in output.read_text()
