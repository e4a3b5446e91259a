"""How Snakemake runs the jobs: what their shells begin with, what their images see, how many servers and GPUs are in use."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from workflow_src.checks import ROOT
from workflow_src.common.gpus import POOL, visible_gpus
from workflow_src.common.sections import Config
from workflow_src.training.local_cache import VARIABLE

JOBS_BESIDE = 3  # trainings that may run while policies are served
# A cluster sends SIGTERM to every process of a job, some time before its limit. The shell and `tee` stay for the last words
# of what they wait for, and a shell that died would take the job's processes with it.
OUTLAST_SIGTERM = "trap : TERM; tee() ( trap '' TERM; exec tee \"$@\" ); "


def shell_prefix(deployment: Any, config: Config, devices: tuple[str, ...] | None = ()) -> str:
    """Opens every job's shell: `python -m workflow_src…` works from any directory, and idle OpenMP threads stay off the cores.

    With conda or Apptainer among Snakemake's `deployment` methods, each rule's environment or image has put its own Python
    first. Otherwise it is the Python that runs Snakemake. What `config` says about the way there, and not about results,
    travels as variables: a changed prefix reruns nothing. `lease N command` is the command, on N of `devices` that are its
    alone; where there are none, nothing stands before it.
    """
    own = {"conda", "apptainer"} & set(map(str, deployment))
    settings = f"PYTHONPATH={shlex.quote(str(ROOT))} OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1"
    path = "" if own else f" PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    given = "".join(f" {name}={shlex.quote(value)}" for name, value in manner_variables(config).items())
    given += f" {POOL}={shlex.quote(','.join(devices))}" if devices else ""
    launcher = 'shift; exec "$@"' if devices == () else 'exec python -m workflow_src.common.gpus "$@"'
    lease = _doubled(f"lease() {{ {launcher}; }}; ")
    # A job's shell, or what runs its image, would survive a killed Snakemake and hide its death from the job, so jobs watch
    # Snakemake itself: the process that reads this, since Snakemake starts no shell from another.
    watched = f" REHEARSAL_PARENT={os.getpid()}"
    return f"set -euo pipefail; export {settings}{path}{watched}{_doubled(given)}; {OUTLAST_SIGTERM}{lease}"


def _doubled(text: str) -> str:
    """Braces as they have to be in what Snakemake formats."""
    return text.replace("{", "{{").replace("}", "}}")


def manner_variables(config: Config) -> dict[str, str]:
    """Variables of the environment that `distributed` and `local_cache` stand for, unless they are set already."""
    chosen = config.distributed
    level = {"warnings": ("WARN", "OFF"), "info": ("INFO", "INFO"), "detail": ("TRACE", "DETAIL")}[chosen.debug]
    configured = {
        VARIABLE: config.local_cache,
        "REHEARSAL_GROUP_TIMEOUT": str(chosen.timeout),
        "NCCL_IB_DISABLE": str(int(not chosen.infiniband)),
        "NCCL_DEBUG": level[0],
        "TORCH_DISTRIBUTED_DEBUG": level[1],
    }
    return {name: os.environ.get(name, value) for name, value in configured.items()}


def contained(workflow: Any) -> bool:
    """Whether Snakemake's `workflow` runs its jobs in images (--sdm apptainer)."""
    return "apptainer" in map(str, workflow.deployment_settings.deployment_method)


def show_in_images(workflow: Any, paths: list[str]) -> None:
    """Have Snakemake's `workflow` show its images these `paths`, besides the working directory that it shows anyway."""
    settings = workflow.deployment_settings
    given = shlex.split(settings.apptainer_args)
    binds = [f"--bind={path}" for path in paths if f"--bind={path}" not in given]
    settings.apptainer_args = " ".join(filter(None, [settings.apptainer_args, shlex.join(binds)]))


def preflight_command(workflow: Any, results: str) -> str:
    """The preflight of what Snakemake's `workflow` would run by default, with its Python, its cores and its environments."""
    command = [sys.executable, "-m", "workflow_src.preflight", "--configfile", f"{results}/run_config.yaml"]
    cores = workflow.resource_settings.cores
    command += ["--cores", str(cores)] if cores else []
    methods = {"conda", "apptainer"} & set(map(str, workflow.deployment_settings.deployment_method))
    command += [f"--sdm={method}" for method in sorted(methods)]
    return _doubled(shlex.join(command))


def servers_at_once(cores: int) -> int:
    """How many policies may be served side by side on a machine of `cores`.

    Snakemake runs its jobs in a pool of `cores + 5` threads, and a served policy takes three of them: server, rollouts,
    and the group of both. A server that waits for a thread misses the seconds in which its endpoint file is expected.
    """
    fitting = [n for n in range(1, cores + 1) if 3 * n + min(cores - n, JOBS_BESIDE) <= cores + 5]
    return max(fitting, default=1)


def rollout_retries(workflow: Any) -> int:
    """Once on one machine, for a server that died; on a cluster also for jobs that were stopped at their time limit."""
    return 5 if _submits(workflow) else 1


def _submits(workflow: Any) -> bool:
    """Whether this Snakemake hands jobs to a cluster (`--jobs`, not `--cores`), and is not one that runs such a job."""
    return workflow.is_main_process and workflow.nodes is not None


def limit_servers(workflow: Any) -> None:
    """Declare to Snakemake's `workflow` how many policies may be served at once here, unless `--resources` says it.

    On a cluster each has a machine's share of its own.
    """
    if not _submits(workflow) and "servers" not in workflow.global_resources:
        workflow.register_resource("servers", servers_at_once(workflow.resource_settings.cores or 1))


def local_gpus(workflow: Any) -> tuple[str, ...] | None:
    """Ids of the GPUs that Snakemake's `workflow` can give to jobs on this machine; None where a cluster runs its jobs."""
    # Snakemake does not say here what will run the jobs. Only a cluster has a limit to the number of jobs, and in a job of
    # a cluster works a Snakemake of its own, which is not the main one.
    return tuple(visible_gpus()) if workflow.nodes is None and workflow.is_main_process else None


def limit_gpus(workflow: Any, devices: tuple[str, ...] | None) -> None:
    """Declare to Snakemake's `workflow` how many GPUs its jobs may use at once here, unless `--resources` says it."""
    if devices and "gpu" not in workflow.global_resources:
        workflow.register_resource("gpu", len(devices))
