"""A training of two processes (gloo) whose process freezes, whose newest checkpoint is damaged, whose disk is full."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_engine import CONFIG, ROOT, TRAINER, same_file, start, wait_for
from workflow_src.training import checkpoint

TIMEOUT = 3  # seconds, for a process that does not answer


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Weights of an uninterrupted training."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder, "whole", 2).wait(120) == 0
    return folder / "whole.safetensors"


def start_ranks(folder: Path, delay: float) -> list[subprocess.Popen]:
    """The two processes of one training as torchrun would start them, but with nobody to start them anew."""
    (folder / "trainer.py").write_text(TRAINER)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
               "REHEARSAL_GROUP_TIMEOUT": str(TIMEOUT), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [sys.executable, "trainer.py", "state", "out.safetensors", str(delay), "1000"]
    return [
        subprocess.Popen(command, cwd=folder, env=os.environ | meeting | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip


def test_a_frozen_process_ends_the_job_and_the_next_attempt_resumes_from_the_newest_valid_checkpoint(tmp_path, whole):
    first, second = start_ranks(tmp_path, 0.2)
    wait_for(lambda: len(list((tmp_path / "state").glob("step_*.json"))) == 2)
    second.send_signal(signal.SIGSTOP)
    said = first.communicate(timeout=60)[1]
    assert (first.returncode not in (0, 143) and "imeout" in said) or "imed out" in said, said
    second.kill()
    second.communicate()
    newest = max((tmp_path / "state").glob("step_*.safetensors"))
    os.truncate(newest, newest.stat().st_size // 2)
    again = start_ranks(tmp_path, 0)
    said = [process.communicate(timeout=60)[1] for process in again]
    assert [process.returncode for process in again] == [0, 0], said
    assert all(f"{newest.name} is damaged" in text for text in said)
    assert same_file(tmp_path / "out.safetensors", whole)


@pytest.mark.requires("mount")
def test_a_full_disk_ends_a_training_with_one_line_and_it_continues_once_there_is_space(tmp_path, small_disk, whole):
    (tmp_path / "full").symlink_to(small_disk)  # its state
    ballast = small_disk / "ballast"
    run = start(tmp_path, "full", 2, 0.1, restarts=3)
    wait_for(lambda: list(small_disk.glob("step_*.json")))
    free = os.statvfs(small_disk)
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize))
    said = run.communicate(timeout=60)[1]
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert run.returncode != 0 and len(errors) == 1, said
    assert re.match(r"error: no space left on the device that holds \S+/step_\d+.safetensors: free some", errors[0])
    ballast.unlink()
    assert 0 < checkpoint.load_newest(small_disk, "d").step < CONFIG.steps
    assert start(tmp_path, "full", 2).wait(120) == 0
    assert same_file(tmp_path / "full.safetensors", whole)
