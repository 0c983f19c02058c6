"""What a trainer's process does before and after training."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import torch

from tests.exchange.conftest import make_config, publish_pairs
from toolkit.exchange.run import Run
from toolkit.signals import StopFlag
from toolkit.training import device, role


@pytest.mark.parametrize(
    ("kind", "gpu_request", "driver", "refused"),
    [
        ("slurm", "--gres=gpu:{gpus}", True, True),
        ("slurm", "", True, True),
        ("slurm", None, True, False),
        ("slurm", "--gres=gpu:{gpus}", False, False),
        ("local", "--gres=gpu:{gpus}", True, False),
    ],
)
def test_a_job_with_gpus_does_not_train_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, gpu_request: str | None, driver: bool, refused: bool
) -> None:
    monkeypatch.setattr(role, "NVIDIA_DRIVER", tmp_path / "nvidiactl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if driver:
        role.NVIDIA_DRIVER.touch()
    run = Run.create(
        tmp_path / "run", make_config(tmp_path, cluster={"kind": kind, "jobs": {"gpu_request": gpu_request}}), "test"
    )
    if not refused:
        role._check_gpu(run)
        return
    with pytest.raises(RuntimeError, match=re.escape(torch.__version__)) as caught:
        role._check_gpu(run)
    assert socket.gethostname() in str(caught.value)


def test_after_an_error_nobody_waits_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL leaves a group together with the others, who wait for this rank in a collective call that it never joins."""

    def fail(*_: object) -> None:
        raise MemoryError("the cause")

    run = Run.create(tmp_path, make_config(tmp_path), "test")
    publish_pairs(run)
    monkeypatch.setattr(device, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(device, "shutdown", lambda: pytest.fail("waits for the others"))
    monkeypatch.setattr(role, "PolicyEngine", fail)
    with pytest.raises(MemoryError, match="the cause"):
        role.main(run, "trainer", 0, 0, 1, StopFlag())
