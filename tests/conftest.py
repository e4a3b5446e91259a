"""What all tests share: one torch thread, and host-dependent tests that may or may not be skipped."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile

import pytest

from envs.build import interpreter
from tests.chain import finished  # noqa: F401  (a fixture for all)
from tests.slurm.cluster import installed

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Name → whether this host has it. REHEARSAL_REQUIRE=name,… turns a skip into a failure (CI names what must not be skipped).
HOST = {
    "conda": lambda: shutil.which("conda") is not None,
    "chromium": lambda: shutil.which("chromium") is not None,
    "mount": lambda: can_mount(),
    "slurm": lambda: installed() and importlib.util.find_spec("snakemake_executor_plugin_slurm") is not None,
    "lerobot": lambda: interpreter("lerobot").is_file(),  # `python envs/build.py lerobot` makes it
    "openvla": lambda: interpreter("openvla").is_file(),  # `python envs/build.py openvla` makes it
    "jax": lambda: interpreter("jax").is_file(),  # `python envs/build.py jax` makes it
    "openpi": lambda: interpreter("openpi").is_file(),  # `python envs/build.py openpi` makes it
    "tensorflow": lambda: interpreter("tfds").is_file(),  # `python envs/build.py tfds` makes it
}


@functools.cache
def can_mount() -> bool:
    """Whether tests may mount a small disk here, which takes root."""
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
        )
        return mounted.returncode == 0 and subprocess.run(["umount", folder], check=False).returncode == 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that run Snakemake first: they are the long ones, and no worker shall begin one when the others are done."""

    def runs_snakemake(item: pytest.Item) -> bool:
        return any(getattr(value, "__module__", None) == "tests.chain" for value in vars(item.module).values())

    items.sort(key=lambda item: not runs_snakemake(item))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of one megabyte, for tests that require `mount`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    required = os.environ.get("REHEARSAL_REQUIRE", "").split(",")
    for mark in item.iter_markers("requires"):
        (name,) = mark.args
        if not HOST[name]():
            if name in required:
                pytest.fail(f"{name} is required by REHEARSAL_REQUIRE but is not on this machine")
            pytest.skip(f"needs {name}, which is not on this machine")
