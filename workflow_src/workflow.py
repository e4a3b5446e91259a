"""What the Snakefile needs to know, as plain tested Python: checked configuration, stage files, targets, shell prefix."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workflow_src.common import config as configuration
from workflow_src.common.config import check_name, to_dict, write_stage
from workflow_src.common.errors import UserError
from workflow_src.common.files import write_if_changed
from workflow_src.common.progress import say
from workflow_src.common.sections import Config, Policy

ROOT = Path(__file__).resolve().parents[1]
WORLDS = ("lab", "world_model")
CORRUPTIONS = ("as_recorded", "gripper_open", "offset", "frozen", "reversed", "shuffled")  # rollouts/corruptions.py
JOBS_BESIDE = 3  # trainings that may run while policies are served


@dataclass(frozen=True)
class Workflow:
    """One checked configuration and everything the rules ask about it."""

    config: Config

    @property
    def results(self) -> str:
        return self.config.results

    def stage(self, name: str) -> str:
        """Path of a stage file."""
        return f"{self.results}/config/{name}.json"

    @property
    def episodes(self) -> str:
        return f"{self.results}/episodes/{self.config.episodes.dataset}"

    def served(self, policy: str) -> bool:
        """Whether the workflow starts this policy's server itself."""
        return not self.config.policies[policy].endpoint

    def network_files(self, policy: str) -> list[str]:
        """The trained files that a policy's server loads."""
        network = self.config.policies[policy].network
        return [f"{self.results}/policies/{network}/{network}.json"] if network else []

    def per_rollout(self, template: str, world: str | None = None) -> list[str]:
        """`template` filled for every (world, policy, shard)."""
        return [
            template.format(results=self.results, world=w, policy=p, shard=s)
            for w in ([world] if world else WORLDS)
            for p in self.config.policies
            for s in range(self.config.rollouts.shards)
        ]

    def sources(self, *files: str) -> list[str]:
        """Source files of the analysis, which is cheap: standing among its inputs, an edit reruns it."""
        return [str(ROOT / "workflow_src" / "analysis" / file) for file in files]

    def write_stage_files(self) -> None:
        """Write `run_config.yaml` and every stage file; those that do not change keep their time stamps."""
        import yaml

        text = yaml.safe_dump(to_dict(self.config), sort_keys=False)
        write_if_changed(f"{self.results}/run_config.yaml", text)
        for name, sections in _stages(self.config).items():
            write_stage(f"{self.results}/config", name, self.config, sections)


def _stages(config: Config) -> dict[str, dict[str, Any]]:
    """Stage → the sections it depends on (None: all of the section). Knobs that change no result are left at defaults."""
    lab = to_dict(replace(config.lab, workers=2))
    rollouts = to_dict(replace(config.rollouts, shards=1, server_deadline=900, step_timeout=120))
    world_model = to_dict(replace(config.world_model, processes=1))
    stages: dict[str, dict[str, Any]] = {
        "episodes": {"lab": lab, "episodes": None},
        "tokenizer": {"lab": lab, "tokenizer": None},
        "latents": {"tokenizer": None},
        "world_model": {"lab": lab, "tokenizer": None, "world_model": world_model},
        "judges": {"lab": lab, "judges": None},
        "trials": {"lab": lab, "trials": None},
        "corruptions": {"lab": lab, "rollouts": rollouts},
        "analysis": {
            name: None for name in ("lab", "policies", "behaviour_cloning", "judges", "trials", "analysis", "reality")
        },
    }
    plain = to_dict(config)
    for name, network in plain["behaviour_cloning"].items():
        stages[f"behaviour_cloning/{name}"] = {"lab": lab, "behaviour_cloning": {name: network}}
    for name, policy in plain["policies"].items():
        network = policy["network"]
        needed = {network: plain["behaviour_cloning"][network]} if network else {}
        stages[f"policies/{name}"] = {
            "lab": lab, "policies": {name: policy}, "behaviour_cloning": needed, "rollouts": rollouts,
        }  # fmt: skip
    return stages


# ---- checking -------------------------------------------------------------------------------------------------------


def checked(mapping: dict[str, Any]) -> Workflow:
    """Build and cross-check the configuration that Snakemake merged. Raises `UserError` before any job starts."""
    config = configuration.from_dict(Config, mapping)
    _check_lab(config)
    _check_policies(config)
    _check_numbers(config)
    _check_own_frames(config)
    if config.reality and not Path(config.reality).is_file():
        raise UserError(f"reality: {config.reality!r} is not a file; give a CSV of real results, or '' for the lab")
    return Workflow(config)


def _check_lab(config: Config) -> None:
    from workflow_src.tabletop.tasks import tasks_of

    allowed = tasks_of(config.lab.scene)
    for i, task in enumerate(config.lab.tasks):
        check_name(f"lab.tasks[{i}]", task, allowed)
    if not config.lab.tasks:
        raise UserError(f"lab.tasks: [] is empty; name at least one of {', '.join(allowed)}")
    for split in ("train", "validation", "judge"):
        if split not in config.episodes.splits:
            raise UserError(f"episodes.splits: {split!r} is missing; the chain trains and validates on it")
    from workflow_src.episodes.behaviours import BEHAVIOURS

    for name, split in config.episodes.splits.items():
        for behaviour in split.mix:
            check_name(f"episodes.splits.{name}.mix.{behaviour}", behaviour, BEHAVIOURS)


def _check_policies(config: Config) -> None:
    from workflow_src.policies.adapter import ADAPTERS

    if not config.policies:
        raise UserError("policies: is empty; name at least one policy to rank")
    for name, policy in config.policies.items():
        path = f"policies.{name}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise UserError(f"{path}: {name!r} is not usable as a file name; use letters, digits, '_', '-' and '.'")
        if policy.endpoint:
            _check_endpoint(path, policy)
            continue
        check_name(f"{path}.adapter", policy.adapter, ADAPTERS)
        check_name(f"{path}.env", policy.env, [file.stem for file in (ROOT / "envs").glob("*.yaml")])
        if policy.network:
            check_name(f"{path}.network", policy.network, config.behaviour_cloning)
            snapshots = config.behaviour_cloning[policy.network].snapshots
            if policy.snapshot not in snapshots:
                raise UserError(
                    f"{path}.snapshot: {policy.snapshot} is not a snapshot of {policy.network!r}; "
                    f"allowed: {', '.join(map(str, snapshots))}"
                )
    for name, network in config.behaviour_cloning.items():
        if late := [step for step in network.snapshots if not 0 < step <= network.training.steps]:
            raise UserError(
                f"behaviour_cloning.{name}.snapshots: {late[0]} is outside 1…{network.training.steps} (training.steps)"
            )


def _check_endpoint(path: str, policy: Policy) -> None:
    if not policy.revision:
        raise UserError(f"{path}.revision: is empty; say what the server at {policy.endpoint} serves")
    if not re.match(r"wss?://", policy.endpoint):
        raise UserError(f"{path}.endpoint: {policy.endpoint!r} is not a websocket address; write ws://host:port")
    local = re.match(r"wss?://(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:|/|$)", policy.endpoint)
    if policy.endpoint.startswith("ws://") and not local and not policy.allow_plaintext:
        raise UserError(f"{path}.endpoint: {policy.endpoint!r} is unencrypted; use wss:// or set allow_plaintext: true")


def _check_own_frames(config: Config) -> None:
    own, model = config.world_model.own_frames, config.world_model
    if own.share == 0:
        return
    path = "world_model.own_frames"
    for name in ("share", "begin"):
        if not 0 <= getattr(own, name) <= 1:
            raise UserError(f"{path}.{name}: {getattr(own, name)} is not a fraction between 0 and 1")
    if own.every < 1:
        raise UserError(f"{path}.every: {own.every} is impossible; it must be at least 1")
    if model.objective.schedule != "flow":
        raise UserError(
            f"{path}.share: needs world_model.objective.schedule flow, not {model.objective.schedule}; or set 0"
        )
    sampler = model.sampler
    if not 1 <= sampler.horizon < sampler.window <= model.clip_frames:
        raise UserError(
            f"world_model.sampler: horizon {sampler.horizon} and window {sampler.window} do not fit; "
            f"1 <= horizon < window <= {model.clip_frames} (world_model.clip_frames)"
        )
    if not model.clip_frames - 1 <= own.horizon <= config.lab.horizon:
        raise UserError(
            f"{path}.horizon: {own.horizon} does not fit; from {model.clip_frames - 1} (a clip of world_model.clip_frames) "
            f"to {config.lab.horizon} (lab.horizon)"
        )


def _check_numbers(config: Config) -> None:
    at_least_one = {
        "lab.horizon": config.lab.horizon, "trials.per_task": config.trials.per_task,
        "rollouts.repeats": config.rollouts.repeats, "rollouts.shards": config.rollouts.shards,
        "rollouts.batch": config.rollouts.batch, "lab.image_size": config.lab.image_size,
    }  # fmt: skip
    for name, split in config.episodes.splits.items():
        at_least_one[f"episodes.splits.{name}.episodes"] = split.episodes
    for path, value in at_least_one.items():
        if value < 1:
            raise UserError(f"{path}: {value} is impossible; it must be at least 1")
    if config.analysis.real_trials < 0:
        raise UserError(f"analysis.real_trials: {config.analysis.real_trials} is impossible; 0 makes no such estimate")
    if config.world_model.clip_frames > config.lab.horizon + 1:
        raise UserError(
            f"world_model.clip_frames: {config.world_model.clip_frames} is longer than an episode "
            f"({config.lab.horizon + 1} frames at lab.horizon {config.lab.horizon})"
        )
    if config.lab.image_size % config.tokenizer.downsample:
        raise UserError(
            f"lab.image_size: {config.lab.image_size} is not a multiple of tokenizer.downsample "
            f"({config.tokenizer.downsample})"
        )


# ---- Snakefile helpers ----------------------------------------------------------------------------------------------


def open_workflow(mapping: dict[str, Any]) -> Workflow:
    """`checked`, for the Snakefile: a mistake ends Snakemake with one line and no traceback."""
    try:
        workflow = checked(json.loads(json.dumps(mapping)))
        workflow.write_stage_files()
        return workflow
    except UserError as error:
        say(f"error: {error}")
        # Snakemake turns any exception into a traceback; a plain exit here is the one line that was promised.
        os._exit(2)


def shell_prefix(deployment: Any) -> str:
    """Opens every job's shell: `python -m workflow_src…` works from any directory, and idle OpenMP threads stay off the cores.

    With conda among Snakemake's `deployment` methods, each rule's environment has put its own Python first. Otherwise it is
    the Python that runs Snakemake.
    """
    conda = "conda" in map(str, deployment)
    settings = f"PYTHONPATH={shlex.quote(str(ROOT))} OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1"
    path = "" if conda else f" PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    # A job's shell would survive a killed Snakemake and hide its death from the job, so jobs watch Snakemake itself.
    return f"set -euo pipefail; export {settings}{path} REHEARSAL_PARENT=$PPID; "


def servers_at_once(cores: int) -> int:
    """How many policies may be served side by side on a machine of `cores`.

    Snakemake runs its jobs in a pool of `cores + 5` threads, and a served policy takes three of them: server, rollouts,
    and the group of both. A server that waits for a thread misses the seconds in which its endpoint file is expected.
    """
    fitting = [n for n in range(1, cores + 1) if 3 * n + min(cores - n, JOBS_BESIDE) <= cores + 5]
    return max(fitting, default=1)


def limit_servers(workflow: Any) -> None:
    """Declare to Snakemake's `workflow` how many policies may be served at once here, unless `--resources` says it."""
    if workflow.local_exec and "servers" not in workflow.global_resources:
        workflow.register_resource("servers", servers_at_once(workflow.resource_settings.cores or 1))


def any_of(names: Any) -> str:
    """A wildcard constraint that admits exactly `names`."""
    return "|".join(re.escape(str(name)) for name in names)
