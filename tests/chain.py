"""The miniature chain for tests that run Snakemake: commands, a finished run to copy, and faults to order."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from workflow_src.common.process import alive

ROOT = Path(__file__).resolve().parents[1]
MINI = ROOT / "tests" / "mini.yaml"
TABLES = ("policy_ranking", "per_task", "agreement", "judge", "comparisons", "prediction_powered", "variance")
LIMIT = 600  # seconds; nothing takes that long, not on a busy machine either

# Read by every Python that runs from a copied project: kills a process right after a file got its final name.
FAULTS = """
    import fnmatch, os, signal
    rename, pattern = os.replace, os.environ.get("KILL_AFTER")

    def replace(source, target, **options):
        rename(source, target, **options)
        if fnmatch.fnmatch(str(target), pattern):
            victim = os.environ["KILL_WHOM"]
            pid = {"self": os.getpid(), "parent": os.getppid()}.get(victim) or int(os.environ["REHEARSAL_PARENT"])
            os.kill(pid, signal.SIGKILL)

    if pattern:
        os.replace = replace
"""


def command(
    folder: Path, *more: str, config: Path = MINI, overrides: tuple[str, ...] = (), project: Path = ROOT, cores: int = 2
) -> list[str]:
    """The literal Snakemake command for the miniature chain in `folder`."""
    settings = ["--config", *overrides] if overrides else []
    return [
        sys.executable, "-m", "snakemake", "--snakefile", str(project / "Snakefile"), "--directory", str(folder),
        "--cores", str(cores), "--configfile", str(config), "--rerun-incomplete", *settings, *more,
    ]  # fmt: skip


def run(folder: Path, *more: str, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Run Snakemake to its end; with `check`, a failure fails the test and shows what was printed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        command(folder, *more, **options), capture_output=True, text=True, timeout=LIMIT, cwd=folder, check=False
    )
    if check and done.returncode:
        pytest.fail(f"snakemake failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def errors(done: subprocess.CompletedProcess) -> list[str]:
    """The lines that say what went wrong, each once."""
    return list(dict.fromkeys(line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")))


def tables(folder: Path) -> dict[str, Any]:
    """The result tables as data frames. pandas is imported late: threads are set before numpy is."""
    import pandas as pd

    return {name: pd.read_csv(folder / "results" / "tables" / f"{name}.csv") for name in TABLES}


def assert_same_tables(one: Path, other: Path) -> None:
    from pandas.testing import assert_frame_equal

    for name, table in tables(one).items():
        assert_frame_equal(table, tables(other)[name], check_exact=True, obj=name)


def rollouts(folder: Path, policy: str, world: str) -> Any:
    """What matters of a policy's rollouts, as a data frame; None where they are not finished."""
    import pandas as pd

    path = folder / "results" / "rollouts" / world / policy / "shard_0" / "rollouts.parquet"
    columns = ["trial_id", "repeat", "seed", "steps", "sha256", "sha256_arrays", "success_at_end"]
    return pd.read_parquet(path)[columns] if path.is_file() else None


def processes_of(folder: Path) -> list[str]:
    """Processes that work in or name a folder: id and command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            place = os.readlink(entry / "cwd")
        except OSError:
            continue
        if str(folder) in words + place and int(entry.name) != os.getpid() and alive(int(entry.name)):
            found.append(f"{entry.name} {words}")
    return found


def assert_nobody_left(folder: Path, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while (left := processes_of(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == [], "processes outlive their run"


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, "the run ended before it came that far"
        assert time.monotonic() < end
        time.sleep(0.02)


def copy_of(folder: Path, target: Path, *without: str) -> Path:
    """A copy of a finished run, time stamps included, without some of its results."""
    subprocess.run(["cp", "-a", str(folder), str(target)], check=True)
    for name in without:
        subprocess.run(["rm", "-rf", str(target / "results" / name)], check=True)
    return target


def copy_project(target: Path) -> Path:
    """A copy of the project to which a test may add files; it obeys KILL_AFTER (pattern) and KILL_WHOM."""
    for name in ("Snakefile", "rules", "workflow_src", "config", "envs", "notebooks"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    (target / "sitecustomize.py").write_text(textwrap.dedent(FAULTS))
    return target


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A folder with one uninterrupted run of everything. Copy it; do not change it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one run for all workers: their folders lie beside each other
        base = base.parent
    folder, done = base / "uninterrupted", base / "uninterrupted.done"
    with FileLock(base / "uninterrupted.lock"):
        if not done.exists():
            run(folder)
            done.touch()
    return folder
