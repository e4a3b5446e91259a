"""Trials: the first frames and instructions that every policy is tried on, in both worlds.

A trial is a pair `<task>/<name>.png` + `<task>/<name>.json` under one root (WorldGym's layout); its id is
`<task>/<name>`. `trials.json` beside them, written last, lists the trials of the root with checksums; without it, every
pair below the root counts. As a program: draw trials from the lab. Trials from elsewhere: `rollouts/gather.py`.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from workflow_src.common.config import Stage, load_stage
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import atomic_path, sha256_file, write_json
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import Progress
from workflow_src.common.seeds import derive
from workflow_src.rollouts.pictures import read_picture
from workflow_src.rollouts.worlds import make_lab

LISTING = "trials.json"
DRAWN_AT_ONCE = 32  # places of the lab while drawing; changes no trial


@dataclass(frozen=True)
class Trial:
    """One first frame with its instruction."""

    trial_id: str  # "<task>/<name>"
    task: str
    instruction: str
    image: np.ndarray  # uint8 (H, W, 3)
    initial_state: list[float] | None  # what the lab's `reset` puts the scene into; None: no lab has this scene
    seed: int  # 63 bits; all randomness of the trial's rollouts derives from it
    partial_credit_criteria: str | None = None
    source: str | None = None  # where the picture is from, and whether it stands in for another; None: the lab

    def options(self, repeat: int) -> dict[str, Any]:
        """The trial as both worlds' `reset(options={"trials": [...]})` takes it."""
        return {
            "trial_id": self.trial_id, "task": self.task, "instruction": self.instruction, "image": self.image,
            "initial_state": self.initial_state, "seed": self.seed, "repeat": repeat,
        }  # fmt: skip


# ---- reading --------------------------------------------------------------------------------------------------------


def load_trials(root: str | Path) -> list[Trial]:
    """All trials of `root` (a folder, or its `trials.json`), sorted by id.

    Raises `UserError` that lists every broken pair by path: half a pair, unreadable files, a missing instruction, a
    checksum that differs from the listing, images of another size than the rest.
    """
    root = Path(root)
    root = root.parent if root.name == LISTING else root
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of trials")
    trials, problems = [], []
    for stem, checksums in sorted(_stems(root).items()):
        try:
            trials.append(_load_pair(root, stem, checksums))
        except UserError as error:
            problems.append(str(error))
    problems += odd_sizes(root, [(trial.trial_id, trial.image.shape[:2]) for trial in trials])
    if problems:
        raise UserError(f"{root}: {len(problems)} broken trial(s): " + "; ".join(problems))
    if not trials:
        raise UserError(f"{root}: holds no trial; expected <task>/<name>.png with <task>/<name>.json")
    return trials


def _stems(root: Path) -> dict[str, dict[str, str]]:
    """Trial ids with their listed checksums (none without a listing)."""
    listing = root / LISTING
    if listing.is_file():
        try:
            return {entry["trial"]: entry for entry in json.loads(listing.read_text(encoding="utf-8"))["trials"]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{listing}: not a listing of trials ({error!r}); delete it") from None
    files = [path for suffix in ("*.png", "*.json") for path in root.glob(f"*/{suffix}")]
    return {path.relative_to(root).with_suffix("").as_posix(): {} for path in files if path.name[0] != "."}


def _load_pair(root: Path, stem: str, checksums: dict[str, str]) -> Trial:
    # Names may contain dots, so the suffix is appended, never replaced.
    picture, text = root / f"{stem}.png", root / f"{stem}.json"
    for path, kind in ((picture, "png"), (text, "json")):
        if not path.is_file():
            raise UserError(f"{path} is missing")
        if kind in checksums and sha256_file(path) != checksums[kind]:
            raise UserError(f"{path} differs from the checksum in {LISTING}")
    fields = read_fields(text)
    return Trial(
        trial_id=stem,
        task=fields.get("task") or stem.partition("/")[0],
        instruction=fields["instruction"],
        image=read_picture(picture),
        initial_state=fields.get("initial_state"),
        seed=fields.get("seed", derive(0, "trial", stem)),
        partial_credit_criteria=fields.get("partial_credit_criteria"),
        source=fields.get("source"),
    )


def read_fields(path: Path) -> dict[str, Any]:
    """What a trial's json says. Raises `UserError` naming the field."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} holds {type(fields).__name__}, not an object with an `instruction`")
    if not isinstance(fields.get("instruction"), str) or not fields["instruction"].strip():
        raise UserError(f"{path}: `instruction` is missing or empty")
    kinds = {"task": str, "seed": int, "partial_credit_criteria": str, "initial_state": list, "source": str}
    for key, kind in kinds.items():
        if fields.get(key) is not None and not isinstance(fields[key], kind):
            raise UserError(f"{path}: `{key}` is {fields[key]!r}, not {kind.__name__}")
    return {key: value for key, value in fields.items() if value is not None}


def odd_sizes(root: Path, sizes: list[tuple[str, tuple[int, int]]]) -> list[str]:
    """What is wrong with `sizes` (trial id, rows and columns): rollouts run in batches of one image size."""
    counted = Counter(size for _, size in sizes)
    usual = max(counted, key=counted.get, default=None)
    return [
        f"{root / name}.png is {size[1]}x{size[0]} pixels, the others {usual[1]}x{usual[0]}; set trials.fit"
        for name, size in sizes
        if size != usual
    ]


# ---- making ---------------------------------------------------------------------------------------------------------


def draw(stage: Stage) -> Iterator[Trial]:
    """Draw `trials.per_task` first frames of every lab task. Trial i of a task is the same whatever their number."""
    wanted = [
        {"task": task, "initial_state": None, "seed": derive(stage.seed, "trials", task, index), "index": index}
        for task in stage.lab.tasks
        for index in range(stage.trials.per_task)
    ]
    places = min(DRAWN_AT_ONCE, len(wanted))
    env = make_lab(stage.lab, places)
    # Not every lab grades partial credit.
    criteria = getattr(env.unwrapped, "partial_credit_criteria", lambda task: None)
    try:
        for start in range(0, len(wanted), places):
            batch = wanted[start : start + places]
            padded = batch + batch[:1] * (places - len(batch))
            observation, info = env.reset(seed=[item["seed"] for item in padded], options={"trials": padded})
            for item, image, state in zip(batch, observation["image"], info["state"]):
                task = item["task"]
                yield Trial(
                    f"{task}/{item['index']:04d}", task, env.unwrapped.instruction(task), image,
                    [float(number) for number in state], item["seed"], criteria(task),
                )  # fmt: skip
    finally:
        env.close()


def save(trial: Trial, root: Path) -> dict[str, str]:
    """Write the trial's pair of files; return its entry of the listing."""
    picture, text = root / f"{trial.trial_id}.png", root / f"{trial.trial_id}.json"
    with atomic_path(picture) as temporary:
        Image.fromarray(trial.image).save(temporary, format="PNG")
    fields = {
        "instruction": trial.instruction, "task": trial.task, "name": trial.trial_id.partition("/")[2],
        "seed": trial.seed, "initial_state": trial.initial_state,
        "partial_credit_criteria": trial.partial_credit_criteria, "source": trial.source,
    }  # fmt: skip
    write_json(text, {key: value for key, value in fields.items() if value is not None})
    return {"trial": trial.trial_id, "png": sha256_file(picture), "json": sha256_file(text)}


def write_listing(entries: list[dict[str, str]], path: Path) -> None:
    """What `save` returned, by trial. Comes last: it vouches for the files."""
    write_json(path, {"trials": sorted(entries, key=lambda entry: entry["trial"])})


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.rollouts.trials",
        description="Draw the trials (first frames and instructions) from the lab.",
        epilog="examples:\n  python -m workflow_src.rollouts.trials --config results/config/trials.json \\\n"
        "      --out results/trials/trials.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="stage file with seed, lab, trials")
    parser.add_argument("--out", type=Path, required=True, help="listing to write; the pairs go beside it")
    options = parser.parse_args()
    die_with_parent()
    stage, root = load_stage(options.config), options.out.parent
    # An old listing must not vouch for new files while they are being written.
    options.out.unlink(missing_ok=True)
    with Progress(stage.trials.per_task * len(stage.lab.tasks), "trials", "trial") as progress:
        entries = []
        for trial in draw(stage):
            entries.append(save(trial, root))
            progress.update()
    write_listing(entries, options.out)


if __name__ == "__main__":
    run_cli(main)
