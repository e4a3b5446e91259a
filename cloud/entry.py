"""What runs inside a cloud's container: the workflow in a folder that is stored for good only when it is committed.

Nothing here knows a provider. `modal_app.py` hands over its Volume; the tests hand over a temporary folder.

    <folder>/<run>.yaml                configuration of a run, written by `train`
    <folder>/data/episodes/<set>/      data sets, by `download`; all runs share them
    <folder>/results/<run>/            latents, checkpoints (state/), world model, rollouts, tables
        served.yaml                    that configuration with the policies of the image, written by `rollout` and `rank`
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from workflow_src.checks import ROOT
from workflow_src.common.config import results_folder
from workflow_src.common.errors import UserError
from workflow_src.common.files import write_if_changed
from workflow_src.common.progress import say
from workflow_src.episodes.registry import load_registry, lookup
from workflow_src.launch import MISTAKE

DATA = "data"  # results folder of the downloads
POLICIES = Path("/opt/policies")  # the image's environments of policies, one folder each
LOCAL_CACHE = "/tmp/rehearsal"  # on the container's own disk
POLL = 2.0  # seconds between looks for new checkpoints
COMMIT_EVERY = 300.0  # seconds; what is downloaded or rolled out has no checkpoints to wait for
LAST_LINES = 5  # of each log that `status` shows


class Order(NamedTuple):
    """What a command comes down to: the folder of its results, and the arguments of `rehearse`."""

    results: str
    arguments: list[str]


# ---- commands ---------------------------------------------------------------------------------------------------------


def download(folder: Path, configfile: str, dataset_name: str) -> Order:
    """Fetch and convert registered data sets: a name, several with commas between, or `all`."""
    names = list(load_registry()) if dataset_name == "all" else _names("--dataset-name", dataset_name)
    for name in names:
        lookup(name)
    world_model = json.dumps({"data": ",".join(names)})
    changes = ["--config", f"results={DATA}", f"world_model={world_model}"]
    return Order(DATA, ["recorded_data", "--configfile", str(find(folder, configfile)), *changes])


def train(
    folder: Path,
    configfile: str,
    subset_names: str,
    batch_size: int,
    max_train_steps: int,
    validate_every: int,
    num_gpus: int,
) -> Order:
    """Train a world model with the settings of `configfile` and what is given here, as the run of that data's name.

    `batch_size` is per GPU. Validations and checkpoints come every `validate_every` steps.
    """
    smallest = {"--batch-size": 1, "--max-train-steps": 1, "--validate-every": 1, "--num-gpus": 0}
    for (flag, least), value in zip(smallest.items(), (batch_size, max_train_steps, validate_every, num_gpus)):
        if value < least:
            raise UserError(f"{flag}: {value} is not {least} or more")
    names = _names("--subset-names", subset_names)
    run = "+".join(names)
    results = f"results/{run}"
    stores = {name: f"{DATA}/episodes/{name}" for name in names}
    stored = {name: path for name, path in stores.items() if (folder / path / "train" / "episodes.parquet").is_file()}
    changes = {
        "results": results,
        "episodes": {"stores": stored},
        "world_model": {
            "source": {"checkpoint": ""},
            "data": ",".join(names),
            "training": {
                "steps": max_train_steps,
                "batch": batch_size * max(num_gpus, 1),
                "micro_batch": batch_size,
                "validate_every": validate_every,
                "checkpoint_every": validate_every,
            },
        },
        "gpus": {"latents": min(num_gpus, 1), "world_model": num_gpus},
        "local_cache": LOCAL_CACHE,
    }
    merged = merge(_read(find(folder, configfile)), changes)
    write_if_changed(folder / f"{run}.yaml", yaml.safe_dump(merged, sort_keys=False))
    say(f"the run's configuration is {run}.yaml; roll out and rank with --configfile {run}.yaml")
    return Order(results, [f"{results}/world_model/model.safetensors", "--configfile", f"{run}.yaml"])


def rollout(folder: Path, configfile: str) -> Order:
    """Roll out every policy of a run that this image can serve in the run's worlds."""
    return Order(_results(folder, configfile), ["rollouts", *_with_policies(folder, configfile)])


def rank(folder: Path, configfile: str) -> Order:
    """Everything up to the ranking of the policies of a run that this image can serve."""
    results = _results(folder, configfile)
    return Order(results, [f"{results}/tables/policy_ranking.csv", *_with_policies(folder, configfile)])


COMMANDS = {"download": download, "train": train, "rollout": rollout, "rank": rank}


def _names(flag: str, given: str) -> list[str]:
    names = [name.strip() for name in given.split(",")]
    if "" in names or len(set(names)) < len(names):
        raise UserError(f"{flag}: {given!r} names nothing or the same twice; write one,two")
    return names


def _with_policies(folder: Path, configfile: str) -> list[str]:
    """The configuration as this image can run it: there is no conda here.

    A policy that names an environment gets the image's interpreter, or is left out where the image lacks it. Raises
    UserError where that leaves none.
    """
    config = _read(find(folder, configfile))
    given = {name: policy or {} for name, policy in (config.get("policies") or {}).items()}
    served, absent = {}, []
    for name, policy in given.items():
        environment = policy.get("env", "tabletop")
        python = POLICIES / environment / "bin" / "python"
        if environment == "tabletop" or "/" in environment or policy.get("endpoint"):
            served[name] = policy  # the tabletop's own policies run in the workflow's environment
        elif python.is_file():
            served[name] = policy | {"env": str(python)}
        else:
            absent.append(f"{name} ({environment})")
    if absent:
        remedy = "name their environments in REHEARSAL_POLICIES where you start the command"
        if not served:
            raise UserError(f"policies: the image has the environment of none: {', '.join(absent)}; {remedy}")
        say(f"left out, as their environments are not in this image: {', '.join(absent)}; {remedy}")
    changed = config | {"policies": served}
    if isinstance(asked := (config.get("gpus") or {}).get("rollouts"), dict):
        kept = {name: count for name, count in asked.items() if name in served or name not in given}
        changed["gpus"] = config["gpus"] | {"rollouts": kept}
    path = Path(_results(folder, configfile)) / "served.yaml"
    write_if_changed(folder / path, yaml.safe_dump(changed, sort_keys=False))
    return ["--configfile", str(path)]


def find(folder: Path, configfile: str) -> Path:
    """A configuration in the stored folder, or else one of the project's. Raises UserError where there is neither."""
    for place in (folder, ROOT):
        if (place / configfile).is_file():
            return place / configfile
    there = ", ".join(sorted(path.name for path in folder.glob("*.yaml"))) or "none"
    raise UserError(f"--configfile: {configfile!r} is neither stored (there: {there}) nor in the project; `train` writes "
                    "<data>.yaml, and a file of your own can be stored beside it")  # fmt: skip


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _results(folder: Path, configfile: str) -> str:
    return results_folder(find(folder, configfile))


def _read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


# ---- running ----------------------------------------------------------------------------------------------------------


def run(command: str, options: dict[str, Any], folder: Path, commit: Callable[[], None], seconds: float) -> int:
    """Run a command's targets in `folder`; `commit` after every new checkpoint, every few minutes, and at the end.

    `seconds` before the provider would kill it, the run is stopped: trainings leave a checkpoint. Returns 0, or
    `launch.MISTAKE` for a mistake that no further attempt would mend. Raises RuntimeError for everything else, upon which
    the provider starts the next attempt; that goes on from what was committed last.
    """
    try:
        results, arguments = COMMANDS[command](folder, **options)
    except UserError as error:
        say(f"error: {error}")
        return MISTAKE
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "workflow_src.launch", *arguments], cwd=folder, env=environment)
    try:
        code = _follow(process, folder / results / "state", commit, time.monotonic() + seconds)
    finally:
        # Also when the provider takes the machine away (KeyboardInterrupt), and grants some seconds to leave.
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait()
        commit()
    if code not in (0, MISTAKE):
        raise RuntimeError(
            f"{command} stopped before its end ({code}); the next attempt goes on from the last checkpoint"
        )
    return code


def _follow(process: subprocess.Popen, state: Path, commit: Callable[[], None], end: float) -> int:
    """Wait for `process`, committing meanwhile. Returns its exit code."""
    committed, last = set(checkpoints(state)), time.monotonic()
    while (code := process.poll()) is None:
        time.sleep(POLL)
        found, now = set(checkpoints(state)), time.monotonic()
        if found - committed or now - last > COMMIT_EVERY:
            commit()
            committed, last = found, now
        if now > end:
            say("the time granted to this attempt is nearly over; stopping with a checkpoint")
            process.send_signal(signal.SIGTERM)
            end = float("inf")
    return code


def checkpoints(state: Path) -> list[Path]:
    """The records of all checkpoints of a run (`training/checkpoint.py`), the newest of a training last."""
    return sorted([*state.glob("*/step_*.json"), *state.glob("policies/*/step_*.json")])


# ---- looking ----------------------------------------------------------------------------------------------------------


def list_datasets(folder: Path) -> str:
    """A line for every data set that is known by name: size, licence, and what of it is stored."""
    lines = [f"{'name':<42} {'GB':>7}  {'stored':<24} licence"]
    for name, entry in load_registry().items():
        store = folder / DATA / "episodes" / name
        splits = [split for split in entry.stored_splits() if (store / split / "episodes.parquet").is_file()]
        stored = ",".join(splits) or ("unfinished" if (folder / DATA / "downloads" / name).is_dir() else "")
        lines.append(f"{name:<42} {entry.bytes / 1e9 or '?':>7.4}  {stored:<24} {entry.licence}")
    return "\n".join(lines)


def status(folder: Path, configfile: str) -> str:
    """Checkpoints with their last metrics, what is finished, and the last lines of the newest logs of a run."""
    results = folder / _results(folder, configfile)
    lines = [f"run {results.relative_to(folder)}"]
    for training, paths in _by_folder(checkpoints(results / "state")):
        record = json.loads(paths[-1].read_text(encoding="utf-8"))
        lines.append(f"checkpoint  {training}  step {record['step']}  {_metrics(record['history'])}")
    for path in sorted(results.glob("*/metrics.csv")):
        with open(path, encoding="utf-8", newline="") as handle:
            lines.append(f"finished    {path.parent.name}  {_metrics(list(csv.DictReader(handle)))}")
    for path in sorted((results / "logs").rglob("*.log"), key=lambda path: path.stat().st_mtime)[-3:]:
        lines.append(f"log         {path.relative_to(results)}")
        text = path.read_text(encoding="utf-8", errors="replace")
        lines += [f"    {line}" for line in text.splitlines()[-LAST_LINES:]]
    return "\n".join(lines)


def _by_folder(paths: Iterable[Path]) -> list[tuple[str, list[Path]]]:
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(path.parent.name, []).append(path)
    return sorted(groups.items())


def _metrics(history: list[dict[str, Any]]) -> str:
    """The last entry of a training's history."""
    return "  ".join(
        f"{key} {float(value):.4g}" for key, value in (history[-1] if history else {}).items() if value != ""
    )
