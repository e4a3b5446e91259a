"""What the Snakefile needs to know, as plain tested Python: checked configuration, stage files, targets, shell prefix."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from workflow_src.common import config as configuration
from workflow_src.common.addresses import is_loopback
from workflow_src.common.config import check_name, to_dict, write_stage
from workflow_src.common.errors import UserError
from workflow_src.common.files import write_if_changed
from workflow_src.common.progress import say
from workflow_src.common.sections import Config, Policy, Vlm
from workflow_src.embodiments import EMBODIMENTS
from workflow_src.episodes.mixture import Mixture, frame_skips, read_mixture
from workflow_src.episodes.registry import Dataset, entry_dict, load_registry
from workflow_src.episodes.sources import description
from workflow_src.world_model.published import check as check_published
from workflow_src.world_model.published import is_address

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ROOT / "config" / "prompts"
WORLDS = ("lab", "world_model")
SPLITS = {"train": ("train",), "validation": ("validation", "val", "test")}  # what data sets of others call them
FILE_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
CORRUPTIONS = ("as_recorded", "gripper_open", "offset", "frozen", "reversed", "shuffled")  # rollouts/corruptions.py
LEARNED = ("classifier", "state")  # judges that one training makes and one job runs
LEARNED_FIELDS = ("batch", "width", "latent_noise", "training")  # what these depend on
HUMAN = "human"
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
        """Folder of the lab's data set."""
        return f"{self.results}/episodes/{self.config.episodes.dataset}"

    @property
    def tokenizer(self) -> str:
        """The file that the tokenizer's folder gets last."""
        last = "config.json" if self.config.tokenizer.kind == "sd3" else "model.safetensors"
        return f"{self.results}/tokenizer/{last}"

    @property
    def checkpoint(self) -> str:
        """The published checkpoint: the file that is configured, or the one that is fetched from the configured address."""
        source = self.config.world_model.source.checkpoint
        return f"{self.results}/downloads/checkpoint.pt" if is_address(source) else source

    @property
    def mixture(self) -> Mixture:
        """The data sets that the world model is trained on."""
        return read_mixture(self.config.world_model.data, self.config.episodes.dataset)

    @cached_property
    def recorded(self) -> dict[str, Dataset]:
        """The registered data sets among them, which are fetched and converted."""
        return _recorded(self.config)

    def source(self, dataset: str) -> str:
        """Folder of a registered data set as its authors publish it: a copy that is here, or the download."""
        return self.config.episodes.recorded.copies.get(dataset, f"{self.results}/downloads/{dataset}")

    def source_file(self, dataset: str) -> str:
        """The file that stands for that folder among a rule's inputs."""
        if dataset in self.config.episodes.recorded.copies:
            return str(description(self.source(dataset)))
        return f"{self.source(dataset)}/download.json"

    def groups(self, dataset: str) -> list[str]:
        """Results of all shard groups of a registered data set."""
        count = self.config.episodes.recorded.groups
        return [f"{self.results}/episodes/{dataset}/groups/{i}-of-{count}.json" for i in range(1, count + 1)]

    def store(self, dataset: str, split: str) -> str:
        """What stands for a split of a data set among a rule's inputs: its table, or its folder where there is none."""
        if dataset == self.config.episodes.dataset:
            return f"{self.episodes}/{split}/episodes.parquet"
        if dataset in self.recorded:
            there = self.recorded[dataset].stored_splits()
            name = next(name for name in SPLITS.get(split, (split,)) if name in there)
            return f"{self.results}/episodes/{dataset}/{name}/episodes.parquet"
        folder = _split_folder(self.config, dataset, split)
        table = folder / "episodes.parquet"
        return str(table if table.is_file() else folder)

    @property
    def recording(self) -> str | Callable:
        """The stage file that recording starts from; without a lab, what ends Snakemake when recordings are asked for."""
        return _nothing_to_record if self.config.lab.scene == "none" else self.stage("episodes")

    @property
    def worlds(self) -> tuple[str, ...]:
        """The worlds that policies are rolled out in."""
        return WORLDS[1:] if self.config.lab.scene == "none" else WORLDS

    def caches(self, split: str, datasets: Iterable[str]) -> list[str]:
        """Latent caches of a split; none where latents are encoded on the fly."""
        cached = self.config.world_model.latents == "cached"
        return [f"{self.results}/latents/{dataset}/{split}/latents.json" for dataset in datasets if cached]

    def served(self, policy: str) -> bool:
        """Whether the workflow starts this policy's server itself."""
        return not self.config.policies[policy].endpoint

    def environment(self, policy: str) -> str | None:
        """Conda environment of a policy's server: a file beside the rules; None where an interpreter is configured."""
        env = self.config.policies[policy].env
        return None if "/" in env else f"../envs/{env}.yaml"

    def interpreter(self, policy: str) -> str:
        """What runs a policy's server: the environment's Python, or the configured one."""
        env = self.config.policies[policy].env
        return shlex.quote(str(Path(env).expanduser())) if "/" in env else "python"

    def endpoint_arguments(self, policy: str) -> str:
        """How the doctor reaches a policy whose server is already running; empty: it serves the policy itself."""
        one = self.config.policies[policy]
        given = {"--endpoint": one.endpoint, "--token-env": one.token_env}
        plain = "--allow-plaintext " if one.allow_plaintext else ""
        return plain + "".join(f"{flag} {shlex.quote(value)} " for flag, value in given.items() if value)

    def network_files(self, policy: str) -> list[str]:
        """The trained files that a policy's server loads."""
        network = self.config.policies[policy].network
        return [f"{self.results}/policies/{network}/{network}.json"] if network else []

    def per_rollout(self, template: str, worlds: Iterable[str] = WORLDS) -> list[str] | Callable:
        """`template` filled for every (world, policy, shard); without policies, what ends Snakemake when it is asked for."""
        if not self.config.policies:
            return _nothing_to_rank
        return [
            template.format(results=self.results, world=w, policy=p, shard=s)
            for w in worlds
            if w in self.worlds
            for p in self.config.policies
            for s in range(self.config.rollouts.shards)
        ]

    def judgements(self) -> list[str] | Callable:
        """The judgements of all configured judges, one file for each job that judges.

        Without a lab there is nothing that the learned ones could learn from: ranking by them ends Snakemake.
        """
        lab = self.config.lab.scene != "none"
        if not lab and self.config.judges.primary in LEARNED:
            return _nothing_to_judge_by if self.config.policies else _nothing_to_rank
        names = [
            *(["learned"] if lab else []),
            *self.config.judges.vlm,
            *([HUMAN] if self.config.judges.human.labels else []),
        ]
        return [f"{self.results}/judgements/{name}.parquet" for name in names]

    def probes(self) -> list[str]:
        """Every judge's verdicts on changed lab clips, one file for each job that makes them."""
        seeing = [name for name, vlm in self.config.judges.vlm.items() if "lab" in vlm.worlds]
        return [f"{self.results}/calibration/{name}.parquet" for name in ("learned", *seeing)]

    def prompt(self, judge: str) -> str:
        """The prompt file of a vision-language model."""
        return str(prompt_file(self.config.judges.vlm[judge]))

    def sources(self, *files: str) -> list[str]:
        """Source files of the analysis, which is cheap: standing among its inputs, an edit reruns it."""
        return [str(ROOT / "workflow_src" / "analysis" / file) for file in files]

    def write_stage_files(self) -> None:
        """Write `run_config.yaml` and every stage file; those that do not change keep their time stamps."""
        import yaml

        text = yaml.safe_dump(to_dict(self.config), sort_keys=False)
        write_if_changed(f"{self.results}/run_config.yaml", text)
        for name, entry in self.recorded.items():
            write_if_changed(self.stage(f"datasets/{name}"), json.dumps({name: entry_dict(entry)}, indent=1) + "\n")
        for name, sections in _stages(self.config).items():
            write_stage(f"{self.results}/config", name, self.config, sections)


def prompt_file(vlm: Vlm) -> Path:
    """Where the prompt of a vision-language model lies."""
    return PROMPTS / f"{vlm.prompt}.yaml"


def _stages(config: Config) -> dict[str, dict[str, Any]]:
    """Stage → the sections it depends on (None: all of the section). Knobs that change no result are left at defaults."""
    lab = to_dict(replace(config.lab, workers=2))
    rollouts = to_dict(replace(config.rollouts, shards=1, server_deadline=900, step_timeout=120))
    data = config.world_model.data or config.episodes.dataset
    world_model = to_dict(replace(config.world_model, processes=1, data=data))
    episodes = to_dict(replace(config.episodes, stores={}))
    del episodes["recorded"]  # the lab's episodes do not depend on it
    plain = to_dict(config)
    stages: dict[str, dict[str, Any]] = {
        "episodes": {"lab": lab, "episodes": episodes},
        "tokenizer": {"lab": lab, "tokenizer": None},
        "latents": {"tokenizer": None, "world_model": {"mirror": config.world_model.mirror}},
        "world_model": {"lab": lab, "tokenizer": None, "world_model": world_model},
        "judges": {"lab": lab, "judges": {name: plain["judges"][name] for name in LEARNED_FIELDS}},
        "trials": {"lab": lab, "trials": None},
        "corruptions": {"lab": lab, "rollouts": rollouts},
        "analysis": {
            name: None for name in ("lab", "policies", "behaviour_cloning", "judges", "trials", "analysis", "reality")
        },
    }
    if config.world_model.source.checkpoint:
        # What an import depends on, of a world model that others have trained.
        stages["world_model"] = {
            "lab": {name: lab[name] for name in ("image_size", "embodiment")},
            "world_model": {name: world_model[name] for name in ("source", "network", "sampler")},
        }
    for name, vlm in plain["judges"]["vlm"].items():
        stages[f"judges/{name}"] = {"lab": lab, "judges": {"vlm": {name: vlm}}}
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
    config = _with_tasks(configuration.from_dict(Config, mapping))
    _check_lab(config)
    _check_policies(config)
    _check_judges(config)
    _check_numbers(config)
    _check_data(config)
    _check_own_frames(config)
    check_published(config)
    if config.reality and not Path(config.reality).is_file():
        raise UserError(f"reality: {config.reality!r} is not a file; give a CSV of real results, or '' for the lab")
    return Workflow(config)


def _with_tasks(config: Config) -> Config:
    """Without a lab, tasks that are not named are the folders of the trials."""
    root = Path(config.trials.root)
    if config.lab.scene != "none" or config.lab.tasks or not root.is_dir():
        return config
    tasks = tuple(sorted({path.parent.name for path in root.glob("*/*.json")}))
    return replace(config, lab=replace(config.lab, tasks=tasks))


def _check_lab(config: Config) -> None:
    from workflow_src.tabletop.tasks import tasks_of

    if config.lab.scene == "none":
        if not config.trials.root:
            raise UserError("trials.root: is empty; without a lab (lab.scene: none) name a folder of first frames")
        return
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


def _check_data(config: Config) -> None:
    own, stores = config.episodes.dataset, config.episodes.stores
    for name in (own, *stores):
        path = "episodes.dataset" if name == own else f"episodes.stores.{name}"
        if not re.fullmatch(FILE_NAME, name):
            raise UserError(f"{path}: {name!r} is not usable as a file name; use letters, digits, '_', '-' and '.'")
    if own in stores:
        raise UserError(f"episodes.stores.{own}: is what the lab's data set is called (episodes.dataset); rename one")
    for name in stores:
        _split_folder(config, name, "train")
    mixture = read_mixture(config.world_model.data, own)
    registered = load_registry(config.episodes.recorded.registry)
    for name in mixture.names:
        check_name("world_model.data", name, [own, *stores, *registered])
    _check_recorded(config, registered)
    if mixture.names[0] in stores:
        _split_folder(config, mixture.names[0], "validation")
    skips = dict(zip(mixture.names, frame_skips(config.world_model.frame_skip, mixture.names)))
    frames = 1 + (config.world_model.clip_frames - 1) * skips.get(own, 0)
    if frames > config.lab.horizon + 1:
        raise UserError(
            f"world_model.clip_frames: {config.world_model.clip_frames} is longer than an episode "
            f"({config.lab.horizon + 1} frames at lab.horizon {config.lab.horizon}"
            + (f", every {skips[own]}. shown)" if skips[own] > 1 else ")")
        )


def _recorded(config: Config) -> dict[str, Dataset]:
    own = config.episodes.dataset
    registry = load_registry(config.episodes.recorded.registry)
    there = {own, *config.episodes.stores}
    return {name: registry[name] for name in read_mixture(config.world_model.data, own).names if name not in there}


def _check_recorded(config: Config, registered: Iterable[str]) -> None:
    recorded = config.episodes.recorded
    for name, folder in recorded.copies.items():
        check_name("episodes.recorded.copies", name, registered)
        try:
            description(folder)
        except UserError as error:
            raise UserError(f"episodes.recorded.copies.{name}: {error}") from None
    if recorded.groups < 1:
        raise UserError(f"episodes.recorded.groups: {recorded.groups} is impossible; it must be at least 1")
    if not 0 <= recorded.max_rejected < 1:
        raise UserError(f"episodes.recorded.max_rejected: {recorded.max_rejected} is not a fraction from 0 to below 1")
    unknown = [name for name, entry in _recorded(config).items() if EMBODIMENTS[entry.embodiment].lateral_axis is None]
    if config.world_model.mirror and unknown:
        raise UserError(
            f"world_model.mirror: how the robot of {unknown[0]} would move mirrored is not known; set it to false"
        )
    if _recorded(config) and config.lab.image_size % 2:
        raise UserError(
            f"lab.image_size: {config.lab.image_size} is odd; converted videos need an even number of pixels"
        )


def _split_folder(config: Config, dataset: str, split: str) -> Path:
    """Folder of a split of one of `episodes.stores`. Raises UserError where there are no episodes."""
    root = Path(config.episodes.stores[dataset])
    names = SPLITS.get(split, (split,))
    for name in names:
        folder = root / name
        if (folder / "episodes.parquet").is_file() or next(folder.glob("*.mp4"), None):
            return folder
    raise UserError(
        f"episodes.stores.{dataset}: {str(root)!r} holds no episodes of the split {split}; "
        f"expected episodes.parquet or mp4 + npz in {' or '.join(names)}/"
    )


def _check_policies(config: Config) -> None:
    from workflow_src.policies.adapter import ADAPTERS

    for name, policy in config.policies.items():
        path = f"policies.{name}"
        _check_file_name(path, name)
        if policy.endpoint:
            _check_endpoint(path, policy)
            continue
        check_name(f"{path}.adapter", policy.adapter, ADAPTERS)
        if "/" not in policy.env:
            check_name(f"{path}.env", policy.env, [file.stem for file in (ROOT / "envs").glob("*.yaml")])
        elif not os.access(Path(policy.env).expanduser(), os.X_OK):
            raise UserError(f"{path}.env: {policy.env!r} is no Python interpreter here; see envs/build.py")
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


def _check_file_name(path: str, name: str) -> None:
    if not re.fullmatch(FILE_NAME, name):
        raise UserError(f"{path}: {name!r} is not usable as a file name; use letters, digits, '_', '-' and '.'")


def _check_endpoint(path: str, policy: Policy) -> None:
    if not policy.revision:
        raise UserError(f"{path}.revision: is empty; say what the server at {policy.endpoint} serves")
    if not re.match(r"wss?://", policy.endpoint):
        raise UserError(f"{path}.endpoint: {policy.endpoint!r} is not a websocket address; write ws://host:port")
    local = is_loopback(urlsplit(policy.endpoint).hostname or "")
    if policy.endpoint.startswith("ws://") and not local and not policy.allow_plaintext:
        raise UserError(f"{path}.endpoint: {policy.endpoint!r} is unencrypted; use wss:// or set allow_plaintext: true")


def _check_judges(config: Config) -> None:
    judges, reserved = config.judges, (*LEARNED, HUMAN, "learned", "truth")
    for name, vlm in judges.vlm.items():
        _check_file_name(f"judges.vlm.{name}", name)
        if name in reserved:
            raise UserError(
                f"judges.vlm.{name}: is the name of another judge; choose one besides {', '.join(reserved)}"
            )
        _check_vlm(f"judges.vlm.{name}", vlm)
    for i, file in enumerate(judges.human.labels):
        if not Path(file).is_file():
            raise UserError(f"judges.human.labels[{i}]: {file!r} is not a file; give a CSV of labels")
    if judges.human.sample and not Path(judges.human.sample).is_file():
        raise UserError(
            f"judges.human.sample: {judges.human.sample!r} is not a file; it lies beside the labelling page"
        )
    check_name("judges.primary", judges.primary, [*LEARNED, *judges.vlm, *([HUMAN] if judges.human.labels else [])])
    if judges.primary in judges.vlm and "world_model" not in judges.vlm[judges.primary].worlds:
        raise UserError(
            f"judges.vlm.{judges.primary}.worlds: lacks world_model, whose rollouts the primary judge ranks"
        )


def _check_vlm(path: str, vlm: Vlm) -> None:
    parts = urlsplit(vlm.base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{path}.base_url: {vlm.base_url!r} is not an address; write https://host/v1")
    if parts.username or parts.password:
        raise UserError(f"{path}.base_url: holds a name or password; put the key into the variable {vlm.key_env}")
    if parts.scheme == "http" and not is_loopback(parts.hostname) and not vlm.allow_plaintext:
        raise UserError(f"{path}.base_url: {vlm.base_url!r} is unencrypted; use https:// or set allow_plaintext: true")
    if not vlm.model:
        raise UserError(f"{path}.model: is empty; name the model as the server does")
    if not prompt_file(vlm).is_file():
        known = ", ".join(sorted(file.stem for file in PROMPTS.glob("*.yaml")))
        raise UserError(f"{path}.prompt: {vlm.prompt!r} is not among config/prompts: {known}")
    if not vlm.worlds:
        raise UserError(f"{path}.worlds: is empty; name lab, world_model or both")
    least = {"votes": 1, "concurrency": 1, "timeout": 1, "frames": 0, "side": 0, "retries": 0, "spend_limit": 0}
    for name, value in least.items():
        if getattr(vlm, name) < value:
            raise UserError(f"{path}.{name}: {getattr(vlm, name)} is impossible; it must be at least {value}")
    if vlm.spend_limit and not (vlm.price_input and vlm.price_output):
        raise UserError(
            f"{path}.spend_limit: needs price_input and price_output (per million tokens) to count against it"
        )


def _check_own_frames(config: Config) -> None:
    own, model = config.world_model.own_frames, config.world_model
    if own.share == 0:
        return
    path = "world_model.own_frames"
    names = read_mixture(model.data, config.episodes.dataset).names
    if names != (config.episodes.dataset,) or frame_skips(model.frame_skip, names) != [1] or model.latents != "cached":
        raise UserError(
            f"{path}.share: {own.share} needs the lab's data set alone, with world_model.latents: cached and frame_skip: 1; "
            "set it to 0"
        )
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
        "judges.probes": config.judges.probes,
    }  # fmt: skip
    for name, split in config.episodes.splits.items():
        at_least_one[f"episodes.splits.{name}.episodes"] = split.episodes
    for path, value in at_least_one.items():
        if value < 1:
            raise UserError(f"{path}: {value} is impossible; it must be at least 1")
    if config.analysis.real_trials < 0:
        raise UserError(f"analysis.real_trials: {config.analysis.real_trials} is impossible; 0 makes no such estimate")
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
        _end(error)


def _end(error: UserError) -> None:
    """Snakemake turns any exception into a traceback; a plain exit is the one line that was promised."""
    say(f"error: {error}")
    os._exit(2)


def _nothing_to_rank(wildcards: Any) -> None:
    """The input of rules that need rollouts. Snakemake asks while it builds its graph, before any job and any lock."""
    _end(UserError("policies: is empty, so there is nothing to roll out and to rank; name at least one policy"))


def _nothing_to_judge_by(wildcards: Any) -> None:
    """The input of rules that need judgements, where only judges are configured that learn from a lab's episodes."""
    _end(UserError(
        "judges.primary: the learned judges need a lab's episodes, and lab.scene is none; configure one of judges.vlm or "
        "human labels"
    ))  # fmt: skip


def _nothing_to_record(wildcards: Any) -> None:
    """The input of the rule that records episodes."""
    _end(UserError(
        "lab.scene: is none, so there is no lab to record episodes in, which a tokenizer, a world model or a judge would "
        "learn from; roll out (target `rollouts`), or choose a scene"
    ))  # fmt: skip


def require_keys(workflow: Workflow, jobs: Iterable[Any]) -> None:
    """End a run before its first job when one of its `jobs` will ask a server whose key is missing."""
    from workflow_src.judges.transport import find_key

    for name in sorted({job.wildcards.vlm for job in jobs if hasattr(job.wildcards, "vlm")}):
        try:
            find_key(name, workflow.config.judges.vlm[name])
        except UserError as error:
            say(f"error: {error}")
            sys.exit(2)


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
