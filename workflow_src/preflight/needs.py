"""What a run needs and may not find: data, weights, tokens, environments, conda, GPUs, first frames, disk, Slurm."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from workflow_src.buckets.addresses import in_bucket
from workflow_src.checks import EXISTING, ROOT, gathered, recorded_sets
from workflow_src.common.errors import UserError
from workflow_src.common.gpus import visible_gpus
from workflow_src.common.sections import Config
from workflow_src.containers import image_of
from workflow_src.judges.transport import find_key
from workflow_src.preflight.costs import TABLE, megaweights
from workflow_src.preflight.dry_run import Job
from workflow_src.resources import gpus_of_policy
from workflow_src.rollouts.suites import PICTURES, left_out, origins, pictures
from workflow_src.world_model.published import is_address

CONDA = (24, 7, 1)  # what Snakemake 9 asks for
PATIENCE = 20  # seconds for a command that asks a cluster or a driver
HUB = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name
GPUS = {  # rule → the kind of job under `gpus`, of rules without a policy that may take several
    "train_tokenizer": "tokenizer", "cache_latents": "latents", "train_world_model": "world_model",
    "train_policy_network": "behaviour_cloning", "train_judge": "judges", "judge_rollouts": "judges",
    "calibrate_judges": "judges", "judge_corrupted": "judges",
}  # fmt: skip
TRAININGS = ("train_tokenizer", "train_world_model", "train_policy_network", "train_judge")


@dataclass(frozen=True)
class Need:
    """One thing that a run needs. Without those that are not `there` it would fail, or not be as configured."""

    there: bool
    text: str


def retrained(jobs: Sequence[Job], folder: Path) -> list[Job]:
    """Trainings whose result is there already, in the run's `folder`: they would throw it away."""
    return [job for job in jobs if job.rule in TRAININGS and any((folder / file).exists() for file in job.output)]


def needs(config: Config, jobs: Sequence[Job], size: float, sdm: Sequence[str], profile: str) -> list[Need]:
    """What the run needs, and whether it is there. `size`: bytes that it would write; `sdm`: as Snakemake is given it."""
    rules = {job.rule for job in jobs}
    served = sorted({job.wildcards["policy"] for job in jobs if job.rule in ("serve_policy", "examine_policy")})
    found = [*_data(config, rules), *_weights(config, rules, served), *_keys(config, jobs)]
    found += [*_environments(config, rules, served, sdm), *_first_frames(config, rules)]
    return [*found, *_gpus(config, jobs, served, profile), *_slurm(profile), _disk(config, size)]


def _data(config: Config, rules: set[str]) -> Iterator[Need]:
    if "download_dataset" in rules:
        for name, entry in recorded_sets(config).items():
            if name not in config.episodes.recorded.copies:
                size = f"{entry.bytes / 1e9:.0f} GB" if entry.bytes else "size not known"
                if entry.address:
                    yield Need(True, f"data set {name}: is fetched from {entry.address} ({size})")
                else:
                    yield Need(
                        False, f"data set {name}: has no address; name a copy in episodes.recorded.copies.{name}"
                    )

    if "fetch_store" in rules:
        for name, place in config.episodes.stores.items():
            if in_bucket(place):
                yield Need(True, f"data set {name}: is fetched from {place}")
    if "publish_part" in rules:
        yield Need(True, f"results: are sent to {config.publish.to}")


def _weights(config: Config, rules: set[str], served: Sequence[str]) -> Iterator[Need]:
    gated = [config.tokenizer.source] if "fetch_tokenizer" in rules else []
    source = config.world_model.source.checkpoint
    if "fetch_checkpoint" in rules:
        yield Need(True, f"world model: is fetched from {source}")
        gated += [source] if source.startswith("hf://") else []
    elif source and "import_world_model" in rules and not is_address(source) and not Path(source).is_file():
        yield Need(False, f"world_model.source.checkpoint: {source} is not a file")
    for place in gated:
        if not Path(place).is_dir():
            token = bool(os.environ.get("HF_TOKEN"))
            yield Need(token, f"HF_TOKEN: is {'set' if token else 'not set'}, for {place}")
    for name in served:
        policy = config.policies[name]
        place = policy.checkpoint.removeprefix("hf://")
        if place and not Path(policy.checkpoint).expanduser().exists():
            hub = bool(HUB.fullmatch(place)) or is_address(policy.checkpoint)
            if not hub:
                yield Need(False, f"policies.{name}.checkpoint: {policy.checkpoint} is not there")
            elif not policy.offline:
                yield Need(True, f"policy {name}: {place} is fetched from its hub unless it is in the cache")
        for key, file in policy.files.items():
            if not Path(file).expanduser().exists():
                yield Need(False, f"policies.{name}.files.{key}: {file} is not there")


def _keys(config: Config, jobs: Sequence[Job]) -> Iterator[Need]:
    for name in sorted({job.wildcards["vlm"] for job in jobs if "vlm" in job.wildcards}):
        try:
            find_key(name, config.judges.vlm[name])
        except UserError as error:
            yield Need(False, str(error))
    for name in sorted({job.wildcards["policy"] for job in jobs if job.rule in ("roll_out", "examine_policy")}):
        variable = config.policies[name].token_env
        if variable and variable not in os.environ:
            yield Need(False, f"policies.{name}.token_env: environment variable {variable} is not set")


def _environments(config: Config, rules: set[str], served: Sequence[str], sdm: Sequence[str]) -> Iterator[Need]:
    if "conda" in sdm:
        yield _conda()
    asked = {f"policies.{name}.env": config.policies[name].env for name in served}
    if "convert_dataset" in rules and config.episodes.recorded.tensorflow:
        asked["episodes.recorded.tensorflow"] = config.episodes.recorded.tensorflow
    if "apptainer" in sdm:
        yield from _images(config, asked)
        return
    for env in sorted(set(asked.values())):
        keys = [key for key, value in asked.items() if value == env]
        if "/" in env:
            continue  # an interpreter, which the configuration's own check has found
        if not env.startswith(EXISTING) and not (ROOT / "envs" / f"{env}.yaml").is_file():
            yield Need(False, f"{keys[0]}: there is no envs/{env}.yaml")
        elif env != "tabletop" and "conda" not in sdm:
            text = "is used only with --use-conda; add it, or name a Python interpreter instead"
            yield Need(False, f"environment {env} ({', '.join(keys)}): {text}")


def _images(config: Config, asked: dict[str, str]) -> Iterator[Need]:
    if not shutil.which("apptainer") and not shutil.which("singularity"):
        yield Need(False, "apptainer: is not on PATH; --sdm apptainer needs it, or singularity")
    for env, key in sorted({"base": "", **{env: key for key, env in asked.items()}}.items()):
        if env == "tabletop" and env not in config.images:
            continue  # the base image serves it
        try:
            yield Need(True, f"image of environment {env}: {image_of(config, env, key)}")
        except UserError as error:
            yield Need(False, str(error))


def _conda() -> Need:
    wanted = ".".join(map(str, CONDA))
    try:
        done = subprocess.run(["conda", "--version"], capture_output=True, text=True, timeout=PATIENCE, check=False)
        version = tuple(map(int, re.findall(r"\d+", done.stdout)[:3]))
    except (OSError, subprocess.TimeoutExpired):
        return Need(False, f"conda: is not on PATH; --use-conda needs {wanted} or newer")
    text = ".".join(map(str, version))
    return Need(
        version >= CONDA, f"conda {text}" + ("" if version >= CONDA else f": --use-conda needs {wanted} or newer")
    )


def _first_frames(config: Config, rules: set[str]) -> Iterator[Need]:
    trials = config.trials
    if not gathered(config) or not rules & {"gather_trials", "roll_out"}:
        return
    if trials.root and not Path(trials.root).is_dir():
        yield Need(False, f"trials.root: {trials.root} is not a folder; it holds <task>/<name>.png")
    there = origins(trials)
    if not there:
        yield Need(False, "trials: no first frames for any task; see config/trials/README.md")
    bare = [
        task for task, origin in there.items() if origin.kind == PICTURES and not pictures(trials.root, origin.shown)
    ]
    if bare:
        yield Need(
            False, f"trials.root: {trials.root}: no pictures for {', '.join(bare)}, which a .json there describes"
        )
    for suite, tasks in left_out(trials).items():
        yield Need(True, f"trials.suites: {suite}: no first frames for {', '.join(tasks)}; left out")


# ---- machines -------------------------------------------------------------------------------------------------------


def gpu_memory() -> dict[str, float]:
    """Id of every whole GPU → its memory in GB."""
    if not shutil.which("nvidia-smi"):
        return {}
    query = ["nvidia-smi", "--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return {}
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    return {row[0]: float(row[1]) * 2**20 / 1e9 for row in rows if len(row) == 2 and row[1].isdigit()}


def declared_memory(config: Config, policy: str) -> tuple[float, float]:
    """GB of GPU memory of a policy (0: not known) and of the world model that it is rolled out in.

    The world model: weights in 4 bytes, and the keys and values that its sampler keeps, in 2.
    """
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))["policies"]
    network, sampler = config.world_model.network, config.world_model.sampler
    patches = (config.lab.image_size / config.tokenizer.downsample / network.patch) ** 2
    kept = config.rollouts.batch * sampler.window * patches * network.depth * network.width * 2 * 2
    model = (megaweights(config) * 1e6 * 4 + kept * (1 if sampler.guidance == 1 else 2)) / 1e9
    return table.get(config.policies[policy].adapter, {}).get("memory", 0.0), model


def _gpus(config: Config, jobs: Sequence[Job], served: Sequence[str], profile: str) -> Iterator[Need]:
    if profile:
        return  # the cluster's nodes have others
    visible, memory = visible_gpus(), gpu_memory()
    smallest = min((memory[device] for device in visible if device in memory), default=None)
    size = f" of {smallest:.0f} GB" if smallest else ""
    yield Need(
        True, f"GPUs: {len(visible)} visible{size}" if visible else "GPUs: none visible; everything runs on the CPU"
    )
    if visible:
        yield from _too_many(_asked(config, {job.rule for job in jobs}, served), visible)
    for job in {job.wildcards["policy"]: job for job in jobs if job.rule == "roll_out"}.values():
        name = job.wildcards["policy"]
        policy, model = declared_memory(config, name)
        needed = policy + model if job.gpus <= 1 else max(policy / (job.gpus - 1), model)
        if smallest and job.gpus and needed > smallest:
            yield Need(
                False,
                f"GPU memory: policy {name} ({policy:.0f} GB) and world model ({model:.0f} GB) need {needed:.0f} GB of a GPU, "
                f"which has {smallest:.0f}; give them more GPUs, or a smaller rollouts.batch",
            )


def _asked(config: Config, rules: set[str], served: Sequence[str]) -> dict[str, int]:
    """Key of the configuration → GPUs. Not from the jobs, for which Snakemake lowers the number to what there is."""
    found = {f"gpus.{kind}": getattr(config.gpus, kind) for rule, kind in GPUS.items() if rule in rules}
    for name in served:
        key = f"gpus.rollouts.{name}" if isinstance(config.gpus.rollouts, dict) else "gpus.rollouts"
        found[key] = gpus_of_policy(config, name)
    return found


def _too_many(asked: dict[str, int], visible: Sequence[str]) -> Iterator[Need]:
    split = any(device.startswith("MIG-") for device in visible)
    for key, count in asked.items():
        if count > 1 and split:
            text = "a process can use only one instance of a split GPU (MIG); ask for 1"
            yield Need(False, f"{key}: {count} are asked for, but {text}")
        elif count > len(visible):
            yield Need(False, f"{key}: {count} are asked for, {len(visible)} visible; ask for fewer")


def _slurm(profile: str) -> Iterator[Need]:
    if not profile:
        return
    folder = next((place for place in (Path(profile), ROOT / profile) if place.is_dir()), None)
    files = [folder / name for name in ("profile.yaml", "config.yaml")] if folder else []
    settings = next((yaml.safe_load(f.read_text(encoding="utf-8")) for f in files if f.is_file()), {})
    if settings.get("executor") != "slurm":
        return
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        yield Need(False, "Slurm: its plugin is not installed: pip install 'rehearsal[slurm]'")
    try:
        done = subprocess.run(
            ["sinfo", "-h", "-o", "%P"], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        said = done.stderr.strip().splitlines()
        there = done.returncode == 0 and shutil.which("sbatch") is not None
        partitions = ", ".join(sorted(set(done.stdout.split())))
        yield Need(
            there,
            f"Slurm: partitions {partitions}" if there else f"Slurm: {said[0] if said else 'sbatch is not on PATH'}",
        )
    except FileNotFoundError:
        yield Need(False, "Slurm: sinfo is not on PATH; submit from a machine of the cluster")
    except subprocess.TimeoutExpired:
        yield Need(False, f"Slurm: the controller does not answer within {PATIENCE} s")


def _disk(config: Config, size: float) -> Need:
    place = Path(config.results).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    return Need(free > size, f"disk: {size / 1e9:.1f} GB of {free / 1e9:.0f} GB free in {config.results}")
