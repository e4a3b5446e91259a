"""The workflow on Modal (modal.com): the same Snakemake targets in a container, results on a Volume that outlives it.

    pip install -c constraints.txt -e '.[cloud]' && modal setup
    modal secret create huggingface-secret HF_TOKEN=…
    modal run --detach cloud/modal_app.py::download --dataset-name bridge
    modal run --detach cloud/modal_app.py::train --subset-names bridge --num-gpus 4 --gpu A100-80GB
    modal run cloud/modal_app.py::status
    REHEARSAL_POLICIES=openvla,octo modal run --detach cloud/modal_app.py::rank

Variables where a command is started: REHEARSAL_VOLUME (name of the Volume, default rehearsal), REHEARSAL_SECRETS (names of
secrets, default huggingface-secret; a judge's key is another), REHEARSAL_POLICIES (environments of policies that the image
holds, default none; policies of others are named and left out). One command at a time may write to a Volume. What the
commands do is in `entry.py`.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import modal

PROJECT = "/opt/rehearsal"  # in the container
ROOT = Path(__file__).resolve().parents[1] if modal.is_local() else Path(PROJECT)
sys.path.insert(0, str(ROOT))

from cloud import entry  # noqa: E402
from cloud.images import WORKFLOW, policy_environments, workflow_requirements  # noqa: E402
from envs.make_environments import ENVIRONMENTS, requirements  # noqa: E402
from workflow_src.common.config import check_name  # noqa: E402

FOLDER = "/data"  # where the Volume is mounted
DAY = 24 * 60 * 60  # seconds; Modal grants no more to one attempt
MARGIN = 15 * 60  # seconds before its end in which an attempt leaves with a checkpoint
UV = "uv==0.13.9"  # brings the Pythons of policies
SETTINGS = {"REHEARSAL_VOLUME": "rehearsal", "REHEARSAL_SECRETS": "huggingface-secret", "REHEARSAL_POLICIES": ""}
FULL_SCALE = "config/worldgym.yaml"
RUN = "bridge.yaml"  # what `train --subset-names bridge` leaves on the Volume


def _settings() -> dict[str, str]:
    """The variables above, as they are where the command is started; the image hands them on to its containers."""
    return {name: os.environ.get(name, default) for name, default in SETTINGS.items()}


def _names(variable: str) -> list[str]:
    return [name for name in _settings()[variable].split(",") if name]


def _policy_environment(name: str) -> list[str]:
    """Commands that build a policy's environment beside the workflow's."""
    check_name("REHEARSAL_POLICIES", name, policy_environments())
    folder = entry.POLICIES / name
    return [
        f"uv venv --python {ENVIRONMENTS[name].python} {folder}",
        f"uv pip install --python {folder}/bin/python {shlex.join(requirements(name))}",
    ]


def _image() -> modal.Image:
    """The workflow with the project's pins, the environments of the policies, and last the code, which changes most often."""
    image = (
        modal.Image.debian_slim("3.11")
        .apt_install("git", "g++")  # for what comes as source, and torch.compile
        .add_local_file(ROOT / "constraints.txt", f"{PROJECT}/constraints.txt", copy=True)
        .pip_install(UV, *workflow_requirements(), extra_options=f"-c {PROJECT}/constraints.txt")
    )
    for name in _names("REHEARSAL_POLICIES"):
        image = image.run_commands(*_policy_environment(name))
    image = image.env({"PYTHONPATH": PROJECT, **_settings()})
    for path in (*WORKFLOW, "pyproject.toml", "cloud"):
        add = image.add_local_dir if (ROOT / path).is_dir() else image.add_local_file
        image = add(ROOT / path, f"{PROJECT}/{path}")
    return image


app = modal.App("rehearsal")
volume = modal.Volume.from_name(_settings()["REHEARSAL_VOLUME"], create_if_missing=True)
image = _image()
working = {
    "image": image,
    "volumes": {FOLDER: volume},
    "secrets": [modal.Secret.from_name(name) for name in _names("REHEARSAL_SECRETS")],
    "timeout": DAY,
    "retries": modal.Retries(max_retries=5, initial_delay=10.0, backoff_coefficient=2.0, max_delay=60.0),
    "max_containers": 1,
}  # fmt: skip


def _run(command: str, options: dict[str, Any]) -> int:
    volume.reload()
    return entry.run(command, options, Path(FOLDER), volume.commit, seconds=DAY - MARGIN)


@app.function(**working, cpu=8, memory=32 * 1024)
def on_processors(command: str, options: dict[str, Any]) -> int:
    """Run a command of `entry.COMMANDS` on a machine without GPU. Returns its exit code."""
    return _run(command, options)


@app.function(**working, gpu="A100-80GB:4", cpu=16, memory=128 * 1024)
def on_gpus(command: str, options: dict[str, Any]) -> int:
    """The same on GPUs; callers say which and how many."""
    return _run(command, options)


@app.function(image=image, volumes={FOLDER: volume}, timeout=600)
def look(command: str, options: dict[str, Any]) -> str:
    """`list_datasets` or `status`: text to print."""
    return {"list_datasets": entry.list_datasets, "status": entry.status}[command](Path(FOLDER), **options)


# ---- commands ---------------------------------------------------------------------------------------------------------


def _start(command: str, options: dict[str, Any], gpu: str = "", num_gpus: int = 0) -> None:
    """Run a command and end with its exit code."""
    function = on_gpus.with_options(gpu=f"{gpu}:{num_gpus}") if num_gpus else on_processors
    sys.exit(function.remote(command, options))


@app.local_entrypoint()
def download(dataset_name: str = "bridge", configfile: str = FULL_SCALE):
    """Fetch and convert data sets: a name, several with commas between, or all."""
    _start("download", {"dataset_name": dataset_name, "configfile": configfile})


@app.local_entrypoint()
def list_datasets():
    """Known data sets, and which of them are on the Volume."""
    print(look.remote("list_datasets", {}))


@app.local_entrypoint()
def train(
    subset_names: str = "bridge",
    batch_size: int = 4,
    max_train_steps: int = 100_000,
    validate_every: int = 2000,
    num_gpus: int = 4,
    gpu: str = "A100-80GB",
    configfile: str = FULL_SCALE,
):
    """Train a world model; batch_size is per GPU."""
    options = {
        "subset_names": subset_names,
        "batch_size": batch_size,
        "max_train_steps": max_train_steps,
        "validate_every": validate_every,
        "num_gpus": num_gpus,
        "configfile": configfile,
    }
    _start("train", options, gpu, num_gpus)


@app.local_entrypoint()
def rollout(configfile: str = RUN, num_gpus: int = 1, gpu: str = "A100-80GB"):
    """Roll out a run's policies in its world model."""
    _start("rollout", {"configfile": configfile}, gpu, num_gpus)


@app.local_entrypoint()
def rank(configfile: str = RUN, num_gpus: int = 1, gpu: str = "A100-80GB"):
    """Rank a run's policies."""
    _start("rank", {"configfile": configfile}, gpu, num_gpus)


@app.local_entrypoint()
def status(configfile: str = RUN):
    """A run's checkpoints, logs and last metrics."""
    print(look.remote("status", {"configfile": configfile}))
