"""The miniature chain through the profile on a real Slurm: jobs that are cancelled or stopped go on, to the same tables."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.chain import MINI, ROOT, assert_nobody_left, assert_same_tables, command, copy_of, copy_project
from tests.slurm.cluster import Cluster, running

pytestmark = [pytest.mark.requires("slurm"), pytest.mark.timeout(600)]

# Read by every Python that runs from the copied project: writes down each checkpoint, and when a training has its first,
# cancels that training's job, or sends it what Slurm sends shortly before the time limit.
CANCELS = """
    import fnmatch, os, subprocess, time
    rename = os.replace
    HOW = {"tokenizer": [], "world_model": ["--signal=TERM"]}

    def replace(source, target, **options):
        rename(source, target, **options)
        words = str(target).split("/")
        if fnmatch.fnmatch(words[-1], "step_*.json") and len(words) > 1 and words[-2] in HOW:
            training, step = words[-2], int(words[-1][5:-5])
            with open("checkpoints", "a") as handle:
                first = handle.tell() == 0 or training not in open("checkpoints").read()
                handle.write(f"{training} {step}\\n")
            if first:
                subprocess.run(["scancel", *HOW[training], os.environ["SLURM_JOB_ID"]], check=True)
                time.sleep(2)  # the signal is on its way

    os.replace = replace
"""
GPUS = "gpus: {tokenizer: 1, world_model: 1, judges: 1, rollouts: {bc_3: 1, bc_6: 2, random: 0}}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Cluster:
    folder = tmp_path_factory.mktemp("cluster")
    with running(folder) as one:
        yield one
    assert_nobody_left(folder)


def steps(folder: Path, training: str) -> list[int]:
    return [
        int(step)
        for name, step in map(str.split, (folder / "checkpoints").read_text().splitlines())
        if name == training
    ]


def test_a_run_on_slurm_whose_trainings_are_cancelled_gives_the_tables_of_one_machine(cluster, finished, tmp_path):
    project, folder = copy_project(tmp_path / "project"), tmp_path / "run"
    shutil.copytree(ROOT / "slurm", project / "slurm")
    (project / "sitecustomize.py").write_text(textwrap.dedent(CANCELS))
    folder.mkdir()
    config = tmp_path / "config.yaml"
    config.write_text(f"{MINI.read_text()}\n{GPUS}\nlocal_cache: {tmp_path / 'scratch'}\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "slurm" / "impatient.py"), "--profile", "slurm", "--directory", str(folder),
         "--configfile", str(config), "--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "1",
         "results/tables/policy_ranking.csv"],
        cwd=project, env=cluster.environment | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    assert_same_tables(finished, folder)

    # State and comment of every job; a job that failed was submitted again.
    jobs = cluster.ask("squeue", "--states=all", "--noheader", "--sort=i", "--format=%T %k").splitlines()
    states = {
        rule: [job.split()[0] for job in jobs if f"rule_{rule}" in job]
        for rule in ("train_tokenizer", "train_world_model")
    }
    assert states["train_tokenizer"] == ["CANCELLED", "COMPLETED"]
    assert states["train_world_model"] == ["FAILED", "COMPLETED"]
    assert sum("roll_out_serve_policy" in job and job.startswith("COMPLETED") for job in jobs) == 3
    # The signal came during step 4, whose end is a checkpoint; neither training began anew.
    assert steps(folder, "world_model") == [3, 4, 6, 8]
    assert steps(folder, "tokenizer") in ([3, 6], [3, 4, 6])
    assert list((tmp_path / "scratch").glob("*/*/tabletop/train/latents.json"))
    assert_nobody_left(folder)


def test_several_nodes_meet_and_snakemake_goes_on_with_what_they_trained(cluster, finished, tmp_path):
    """The script for several nodes, as its first lines say it, on the one node that there is."""
    folder = copy_of(finished, tmp_path / "run", "world_model", "state/world_model")
    target = "results/world_model/model.safetensors"
    ask = command(folder, "--dry-run", "--printshellcmds", "--", target)
    printed = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    (arguments,) = re.findall("--config .* --state [^ ]*", printed)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    less = ["--nodes=1", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=4000", "--time=10"]
    environment = cluster.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RENDEZVOUS_PORT": port}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    submit = ["sbatch", "--parsable", *less, str(ROOT / "slurm" / "multi_node.sh"), *arguments.split()]
    job = subprocess.run(submit, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    query = ["squeue", "--states=all", "--noheader", "--format=%T", f"--jobs={job}"]
    while (state := cluster.ask(*query)) in ("PENDING", "RUNNING", "COMPLETING"):
        time.sleep(0.3)
    assert state == "COMPLETED", (folder / f"world_model-{job}.log").read_text()
    trained, alone = load_file(folder / target), load_file(finished / target)
    assert trained.keys() == alone.keys() and all(np.array_equal(trained[name], alone[name]) for name in alone)
    again = subprocess.run(ask, capture_output=True, text=True, check=True, env=os.environ)
    assert "Nothing to be done" in again.stdout + again.stderr
