"""What the profile asks Slurm for, seen by a stub `sbatch`: GPUs, processor cores, memory, time, tasks, nodes."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from tests.chain import LIMIT, MINI, ROOT
from workflow_src.workflow import checked

# Takes every job, writes down how it was asked for, makes what is missing of $THERE, and says that the job is done.
STUBS = {
    "sbatch": 'printf "%s\\n" "$@" > "$STUB/$$"; for file in $THERE; do touch -a "$file"; done; echo $$',
    "squeue": 'for job in $(ls "$STUB"); do echo "$job|COMPLETED"; done',
    "sinfo": 'echo "main*"',
    "scontrol": 'echo "MinJobAge = 300 sec"',
}
POLICIES = ("bc_3", "bc_6", "random")
# What stands before the jobs that are looked at, and what they make: their outputs, since the stub runs nothing.
THERE = [
    *(f"episodes/tabletop/{split}/episodes.parquet" for split in ("train", "validation")),
    "tokenizer/model.safetensors",
    *(f"latents/tabletop/{split}/latents.json" for split in ("train", "validation")),
    "policies/bc/bc.json", "trials/trials.json", "world_model/model.safetensors", "benchmarks/train_world_model.jsonl",
    *(f"benchmarks/roll_out/{policy}/0.jsonl" for policy in POLICIES),
    *(f"rollouts/{world}/{policy}/shard_0/rollouts.parquet" for world in ("lab", "world_model") for policy in POLICIES),
]  # fmt: skip


def write_config(folder: Path, **settings) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(MINI.read_text()) | settings, sort_keys=False))
    return path


def submitted(folder: Path, *more: str, **settings) -> dict[str, str]:
    """Rule, or policy of a service's group → the options of `sbatch`, of a run through the profile."""
    for name, script in STUBS.items():
        stub = folder / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f"#!/bin/sh\n{script}\n")
        stub.chmod(0o755)
    calls = folder / "calls"
    calls.mkdir()
    config = write_config(folder, **settings)
    (folder / "run").mkdir()
    with contextlib.chdir(folder / "run"):
        checked(yaml.safe_load(config.read_text())).write_stage_files()  # older than what stands for results
    for name in THERE:
        path = folder / "run" / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    command = [
        sys.executable, "-m", "snakemake", "--profile", "slurm", "--directory", str(folder / "run"),
        "--configfile", str(config), "--rerun-triggers", "mtime", "--slurm-status-command", "squeue",
        "--latency-wait", "1", "--slurm-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "1",
        *more, "--forcerun", "train_world_model", "roll_out",
        "--", "results/rollouts/world_model/random/shard_0/rollouts.parquet",
        *(f"results/rollouts/lab/{policy}/shard_0/rollouts.parquet" for policy in POLICIES),
    ]  # fmt: skip
    there = " ".join(f"results/{name}" for name in THERE)
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "STUB": str(calls), "THERE": there}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    found = {}
    for path in calls.iterdir():
        options = " ".join(line for line in path.read_text().splitlines() if not line.startswith("--wrap"))
        (name,) = re.findall(r"--comment rule_(\S+)", options)
        # Of a group Snakemake tells the rules alone; the command that is run names the policy.
        policy = re.search(r"roll_out:policy=(\w+?),", path.read_text())
        found[policy[1] if policy else name] = options
    return found


def values(options: str, flag: str) -> list[str]:
    return re.findall(rf"(?<!\S){flag}[= ](\S+)", options)


def test_four_gpus_for_the_training_and_one_for_policy_and_world_model_together(tmp_path):
    edited = ["train_world_model:gpu_model=h100", "serve_policy:slurm_partition=gpu", "roll_out:slurm_partition=gpu"]
    jobs = submitted(
        tmp_path,
        "--set-resources",
        *edited,
        gpus={"world_model": 4, "rollouts": {"bc_6": 2, "random": 0}},
        rollouts={"batch": 4, "shards": 1},
    )
    assert set(jobs) == {"train_world_model", *POLICIES}
    training = jobs["train_world_model"]
    assert values(training, "--gpus") == ["h100:4"] and values(training, "-p") == ["main"]
    assert values(training, "--nodes") == ["1"] and values(training, "--cpus-per-task") == [
        "16"
    ]  # four beside each GPU
    assert values(training, "--mem") == ["8004"] and values(training, "-t") == ["60"]
    # Of a service's group only the server declares GPUs; asked for by both, it would wait for twice as many.
    assert {policy: values(jobs[policy], "--gpus") for policy in POLICIES} == {
        "bc_3": ["1"],
        "bc_6": ["2"],
        "random": [],
    }
    for policy in POLICIES:
        assert values(jobs[policy], "-p") == ["gpu"] and values(jobs[policy], "--nodes") == ["1"]
        assert values(jobs[policy], "--cpus-per-task") == ["2"]
    assert values(jobs["bc_3"], "--mem") == ["38000"] and values(jobs["random"], "--mem") == ["10000"]
    assert all(values(options, "--signal") == ["TERM@180"] for options in jobs.values())
    # A task per GPU would run every command several times.
    with_gpus = [options for options in jobs.values() if "--gpus" in options]
    assert len(with_gpus) == 3 and not any("ntasks" in options for options in with_gpus)


def test_without_gpus_in_the_configuration_none_are_asked_for(tmp_path):
    jobs = submitted(tmp_path)
    assert len(jobs) == 4 and not any("--gpu" in options or "--gres" in options for options in jobs.values())
    assert values(jobs["train_world_model"], "--cpus-per-task") == ["1"]


def test_a_machine_trains_on_the_gpus_that_it_has(tmp_path):
    """As many processes as GPUs are there, of those that are asked for, and without any as many as are configured."""
    for visible, processes in (("0,1", "(2 ? 2 : 1)"), ("", "(0 ? 0 : 1)")):
        command = [
            sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(tmp_path),
            "--configfile", str(write_config(tmp_path, gpus={"world_model": 4})), "--cores", "8",
            "--dry-run", "--printshellcmds", "--", "results/world_model/model.safetensors",
        ]  # fmt: skip
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=True)
        assert f"--nproc-per-node=$({processes})" in done.stdout
