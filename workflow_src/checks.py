"""Cross-checks of a configuration before any job starts: every mistake is one `UserError` that names the key and the remedy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from workflow_src.buckets.addresses import check_bucket, in_bucket
from workflow_src.common.addresses import check_address, is_loopback
from workflow_src.common.config import check_name
from workflow_src.common.errors import UserError
from workflow_src.common.sections import Config, Foreign, Policy, Publish, Vlm
from workflow_src.embodiments import EMBODIMENTS
from workflow_src.episodes.mixture import frame_skips, read_mixture
from workflow_src.episodes.registry import Dataset, load_registry
from workflow_src.episodes.sources import description, find_split
from workflow_src.policies.foreign import check as check_foreign
from workflow_src.rollouts.suites import origins
from workflow_src.world_model.published import check as check_published

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ROOT / "config" / "prompts"
FILE_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
LEARNED = ("classifier", "state")  # judges that one training makes and one job runs
HUMAN = "human"
# Folders of the results that can be published.
PARTS = ("tables", "figures", "gallery", "notebooks", "rollouts", "judgements", "world_model", "config", "trials",
         "calibration", "judge", "policies", "tokenizer", "episodes")  # fmt: skip
EXISTING = "conda:"  # before the name of a conda environment that exists


def check(config: Config) -> Config:
    """`config` with its tasks filled in. Raises `UserError` for the first mistake."""
    config = _with_tasks(config)
    _check_lab(config)
    _check_policies(config)
    _check_images(config)
    _check_judges(config)
    _check_numbers(config)
    _check_data(config)
    _check_own_frames(config)
    check_published(config)
    if config.publish.to:
        _check_publish(config.publish)
    if config.reality and not Path(config.reality).is_file():
        raise UserError(f"reality: {config.reality!r} is not a file; give a CSV of real results, or '' for the lab")
    return config


def _with_tasks(config: Config) -> Config:
    """Without a lab, tasks that are not named are those that there are first frames of."""
    if config.lab.scene != "none" or config.lab.tasks:
        return config
    return replace(config, lab=replace(config.lab, tasks=tuple(origins(config.trials))))


def gathered(config: Config) -> bool:
    """Whether trials come from elsewhere than the lab."""
    return bool(config.trials.root or config.trials.suites or config.trials.store)


def prompt_file(vlm: Vlm) -> Path:
    """Where the prompt of a vision-language model lies."""
    return PROMPTS / f"{vlm.prompt}.yaml"


def _check_lab(config: Config) -> None:
    from workflow_src.tabletop.tasks import tasks_of

    if config.lab.scene == "none":
        if config.policies and not gathered(config):
            raise UserError(
                "trials.root: is empty; without a lab (lab.scene: none) name a folder of first frames, suites or a store"
            )
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
        _check_file_name("episodes.dataset" if name == own else f"episodes.stores.{name}", name)
    if own in stores:
        raise UserError(f"episodes.stores.{own}: is what the lab's data set is called (episodes.dataset); rename one")
    here = [name for name, place in stores.items() if not in_bucket(place)]
    for name, place in stores.items():
        if name in here:
            split_folder(config, name, "train")
        else:
            check_bucket(f"episodes.stores.{name}", place)
    mixture = read_mixture(config.world_model.data, own)
    registered = load_registry(config.episodes.recorded.registry)
    for name in mixture.names:
        check_name("world_model.data", name, [own, *stores, *registered])
    _check_recorded(config, registered)
    if mixture.names[0] in here:
        split_folder(config, mixture.names[0], "validation")
    skips = dict(zip(mixture.names, frame_skips(config.world_model.frame_skip, mixture.names)))
    frames = 1 + (config.world_model.clip_frames - 1) * skips.get(own, 0)
    if frames > config.lab.horizon + 1:
        raise UserError(
            f"world_model.clip_frames: {config.world_model.clip_frames} is longer than an episode "
            f"({config.lab.horizon + 1} frames at lab.horizon {config.lab.horizon}"
            + (f", every {skips[own]}. shown)" if skips[own] > 1 else ")")
        )


def _check_publish(publish: Publish) -> None:
    check_bucket("publish.to", publish.to)
    for i, part in enumerate(publish.parts):
        check_name(f"publish.parts[{i}]", part, PARTS)
    if not publish.parts:
        raise UserError(f"publish.parts: [] is empty; name at least one of {', '.join(PARTS)}")


def recorded_sets(config: Config) -> dict[str, Dataset]:
    """The registered data sets among those of `world_model.data`, and the one that `dataset` asks for."""
    own = config.episodes.dataset
    registry = load_registry(config.episodes.recorded.registry)
    there = {own, *config.episodes.stores}
    named = read_mixture(config.world_model.data, own).names
    asked = () if config.dataset == "all" else (config.dataset,)
    return {name: registry[name] for name in dict.fromkeys((*named, *asked)) if name not in there}


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
    if config.dataset != "all":
        check_name("dataset", config.dataset, ["all", *registered])
        if config.dataset in config.episodes.stores:
            raise UserError(
                f"dataset: {config.dataset!r} is there already (episodes.stores); remove it there to fetch it"
            )
    if recorded.stream and recorded.tensorflow:
        raise UserError("episodes.recorded.stream: TensorFlow reads files; leave out stream or tensorflow")
    if recorded.tensorflow:
        _check_environment("episodes.recorded.tensorflow", recorded.tensorflow, ["tfds"])
    trained = read_mixture(config.world_model.data, config.episodes.dataset).names
    unknown = [
        name
        for name, entry in recorded_sets(config).items()
        if name in trained and EMBODIMENTS[entry.embodiment].lateral_axis is None
    ]
    if config.world_model.mirror and unknown:
        raise UserError(
            f"world_model.mirror: how the robot of {unknown[0]} would move mirrored is not known; set it to false"
        )
    if recorded_sets(config) and config.lab.image_size % 2:
        raise UserError(
            f"lab.image_size: {config.lab.image_size} is odd; converted videos need an even number of pixels"
        )


def split_folder(config: Config, dataset: str, split: str) -> Path:
    """Folder of a split of one of `episodes.stores`. Raises UserError where there are no episodes."""
    try:
        return find_split(Path(config.episodes.stores[dataset]), split)
    except UserError as error:
        raise UserError(f"episodes.stores.{dataset}: {error}") from None


def _check_policies(config: Config) -> None:
    from workflow_src.policies.adapter import ADAPTERS

    for name, policy in config.policies.items():
        path = f"policies.{name}"
        _check_file_name(path, name)
        if policy.endpoint:
            _check_endpoint(path, policy)
            continue
        state = {"state": policy.foreign.state, "state_layout": policy.foreign.state_layout}
        if policy.foreign != replace(Foreign(), **state):
            raise UserError(
                f"{path}.foreign: is for a server that is already running; name it as endpoint, or of a checkpoint give "
                "state and state_layout alone"
            )
        check_foreign(f"{path}.foreign", policy.foreign)
        check_name(f"{path}.adapter", policy.adapter, ADAPTERS)
        _check_environment(f"{path}.env", policy.env, [file.stem for file in (ROOT / "envs").glob("*.yaml")])
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


def _check_environment(path: str, env: str, names: list[str]) -> None:
    """Raise where nothing is at hand that could serve; the name of a conda environment is conda's to check."""
    if "/" in env:
        if not os.access(python_of(env), os.X_OK):
            raise UserError(f"{path}: {env!r} is no Python interpreter here; see envs/build.py")
    elif not env.startswith(EXISTING):
        check_name(path, env, names)


def _check_images(config: Config) -> None:
    """That each is of some environment; which ones a run needs is asked when it runs in images."""
    known = [file.stem for file in (ROOT / "envs").glob("*.yaml")]
    asked = [config.episodes.recorded.tensorflow, *(policy.env for policy in config.policies.values())]
    known += [env for env in asked if env.startswith(EXISTING)]
    for env, image in config.images.items():
        check_name("images", env, known)
        if not image or re.search(r"\s", image):
            raise UserError(f"images.{env}: {image!r} is no image; write docker://registry/name:tag or a .sif file")


def python_of(env: str) -> Path:
    """The interpreter that `env` is, or that lies in the environment's folder `env`."""
    path = Path(env).expanduser()
    return path / "bin" / "python" if path.is_dir() else path


def _check_file_name(path: str, name: str) -> None:
    if not re.fullmatch(FILE_NAME, name):
        raise UserError(f"{path}: {name!r} is not usable as a file name; use letters, digits, '_', '-' and '.'")


def _check_endpoint(path: str, policy: Policy) -> None:
    if not policy.revision:
        raise UserError(f"{path}.revision: is empty; say what the server at {policy.endpoint} serves")
    if not re.match(r"wss?://", policy.endpoint):
        raise UserError(f"{path}.endpoint: {policy.endpoint!r} is not a websocket address; write ws://host:port")
    if policy.foreign != Foreign():
        if not policy.foreign.cameras:
            raise UserError(f"{path}.foreign.cameras: is empty; name the key under which the server wants the image")
        check_foreign(f"{path}.foreign", policy.foreign)
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
    check_address(f"{path}.base_url", vlm.base_url, vlm.allow_plaintext)
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


def _gpus(config: Config) -> Iterator[tuple[str, int]]:
    """Path and number of GPUs of every kind of job."""
    for kind, asked in vars(config.gpus).items():
        for name, value in asked.items() if isinstance(asked, dict) else [("", asked)]:
            yield f"gpus.{kind}{name and '.'}{name}", value


def _check_numbers(config: Config) -> None:
    at_least_one = {
        "lab.horizon": config.lab.horizon, "trials.per_task": config.trials.per_task,
        "rollouts.repeats": config.rollouts.repeats, "rollouts.shards": config.rollouts.shards,
        "rollouts.batch": config.rollouts.batch, "lab.image_size": config.lab.image_size,
        "judges.probes": config.judges.probes, "distributed.timeout": config.distributed.timeout,
    }  # fmt: skip
    for name, split in config.episodes.splits.items():
        at_least_one[f"episodes.splits.{name}.episodes"] = split.episodes
    for path, value in at_least_one.items():
        if value < 1:
            raise UserError(f"{path}: {value} is impossible; it must be at least 1")
    asked = config.gpus.rollouts
    for name in asked if isinstance(asked, dict) else ():
        check_name("gpus.rollouts", name, config.policies)
    for path, value in _gpus(config):
        if value < 0:
            raise UserError(f"{path}: {value} is impossible; it must be at least 0")
    if config.analysis.real_trials < 0:
        raise UserError(f"analysis.real_trials: {config.analysis.real_trials} is impossible; 0 makes no such estimate")
    if config.lab.image_size % config.tokenizer.downsample:
        raise UserError(
            f"lab.image_size: {config.lab.image_size} is not a multiple of tokenizer.downsample "
            f"({config.tokenizer.downsample})"
        )
