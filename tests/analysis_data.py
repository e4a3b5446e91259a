"""A synthetic run for the analysis tests: a few policies of known quality, two worlds, three judges, small videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from workflow_src.common.config import write_stage
from workflow_src.common.sections import Analysis, Config, Lab, Policy
from workflow_src.common.video import write_video

TASKS = ("put_on_plate", "lift", "push_left")
SKILL = {"early": 0.05, "middle": 0.45, "late": 0.9, "shaky": 0.3, "scripted": 0.85, "random": 0.02}
POLICIES = {
    "early": Policy(network="bc", snapshot=100),
    "middle": Policy(network="bc", snapshot=200),
    "late": Policy(network="bc", snapshot=300),
    "shaky": Policy(network="bc", snapshot=300, options={"noise": 0.02}),
    "scripted": Policy(adapter="tabletop_scripted", network="bc", snapshot=300),
    "random": Policy(adapter="tabletop_random"),
}


def stage_file(folder: Path, reality: str = "", policies: dict | None = None, seed: int = 0) -> Path:
    """Write an analysis stage file."""
    config = Config(
        seed=seed,
        lab=Lab(tasks=TASKS),
        policies=policies or POLICIES,
        analysis=Analysis(resamples=200, real_trials=4),
        reality=reality,
    )
    names = ("lab", "policies", "behaviour_cloning", "judges", "trials", "analysis", "reality", "reality_names")
    return Path(write_stage(folder, "analysis", config, {name: None for name in names}))


def judgements(per_task: int = 10, repeats: int = 1, seed: int = 0, skill: dict | None = None) -> pd.DataFrame:
    """Judgements of every judge in both worlds; imagination follows reality, with noise and some pessimism."""
    generator = np.random.default_rng(seed)
    rows = []
    for policy, quality in (skill or SKILL).items():
        for t, task in enumerate(TASKS):
            rate = np.clip(quality * (1.1, 1.0, 0.7)[t], 0, 1)
            for trial in range(per_task):
                for repeat in range(repeats):
                    real = generator.random() < rate
                    imagined = real if generator.random() < 0.8 else generator.random() < 0.8 * rate
                    key = {"trial_id": f"{task}/{trial:03d}", "task": task, "policy": policy, "repeat": repeat}
                    rows += _rows(key, "lab", {"truth": real, "classifier": _flip(real, 0.03, generator),
                                               "state": _flip(real, 0.02, generator)})  # fmt: skip
                    rows += _rows(
                        key, "world_model", {"classifier": imagined, "state": _flip(imagined, 0.05, generator)}
                    )
    return pd.DataFrame(rows)


def _flip(value: bool, probability: float, generator: np.random.Generator) -> bool:
    return bool(value) ^ bool(generator.random() < probability)


def _rows(key: dict, world: str, verdicts: dict[str, bool]) -> list[dict]:
    return [
        key | {"world": world, "judge": judge, "success_at_end": bool(value), "success_ever": bool(value),
               "partial": 0.5 + 0.5 * bool(value), "score": float(value), "invalid": 0, "error": None}
        for judge, value in verdicts.items()
    ]  # fmt: skip


def write_run(
    folder: Path, table: pd.DataFrame, videos: bool = False, size: int = 16, frames: int = 4
) -> dict[str, list]:
    """Write judgement and rollout files as the workflow lays them out; return {"judgements": […], "rollouts": […]}."""
    files: dict[str, list] = {"judgements": [], "rollouts": []}
    for (world, policy), part in table.groupby(["world", "policy"], sort=False):
        scores = folder / "judgements" / world / policy / "shard_0.parquet"
        record = folder / "rollouts" / world / policy / "shard_0" / "rollouts.parquet"
        for path in (scores, record):
            path.parent.mkdir(parents=True)
        part.to_parquet(scores)
        keys = part.drop_duplicates(["trial_id", "repeat"])[["trial_id", "task", "policy", "world", "repeat"]].copy()
        keys["video"] = [
            f"{trial.replace('/', '__')}__r{repeat}.mp4" for trial, repeat in keys[["trial_id", "repeat"]].values
        ]
        keys["instruction"], keys["control_hz"], keys["seconds"] = "do " + keys["task"], 5.0, 0.1
        keys.to_parquet(record)
        if videos:
            for number, video in enumerate(keys["video"]):
                write_video(record.parent / video, _clip(number, world, frames, size), 5.0)
        files["judgements"].append(scores)
        files["rollouts"].append(record)
    return files


def _clip(number: int, world: str, frames: int, size: int) -> np.ndarray:
    """A square that moves to the right, on a ground that tells the world."""
    clip = np.full((frames, size, size, 3), 200 if world == "lab" else 120, np.uint8)
    for t in range(frames):
        left = (number + t * size // 8) % (size - 4)
        clip[t, size // 2 : size // 2 + 4, left : left + 4] = (200, 40, 40)
    return clip
