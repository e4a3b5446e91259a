"""Where the scatter of single rollouts comes from: policy, task, first frame, world-model sampling, judge.

Analysis of variance of success (0 or 1) in one world, by the method of moments (Searle, Casella and McCulloch, Variance
Components, 1992): policies crossed with first frames, frames within tasks, repeats within both, tasks fixed. A
component that the design cannot tell from another is named with it, and has no number of its own: with one repeat,
chance cannot be told from what makes a frame hard for one policy and not for another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from workflow_src.analysis.records import TRUTH

COLUMNS = ["world", "judge", "component", "variance", "share", "sd", "levels", "note"]
ONE_REPEAT = "not identifiable: repeats = 1; part of policy x frame"
ONE_JUDGE = "not identifiable: one judge"
CLIPPED = "estimated below zero"
TEXTS = {
    "policy": "policies differ in their mean success over tasks",
    "policy x task": "a policy is better on one task than on another",
    "first frame": "a frame is hard for every policy",
    "policy x frame": "a frame is hard for one policy",
    "sampling": "repeats of a policy on a frame end differently",
    "judge": "judges disagree about the same rollout; inside the others, not beside them",
}


def components(judgements: pd.DataFrame, world: str, judge: str) -> list[dict[str, Any]]:
    """Rows of `variance.csv` for one world and judge, from judgements as `records.load_judgements` gives them.

    Only frames that every policy has all repeats of are used, and of a task at least two. `share` is of the variance
    of a single rollout over policies and frames; the judge's part lies inside the others.
    """
    rows = judgements[(judgements["world"] == world) & judgements["valid"]]
    cube, tasks = _cube(rows[rows["judge"] == judge])
    if cube is None:
        return []
    levels = {"policy": len(cube), "policy x task": len(np.unique(tasks)), "first frame": len(tasks)}
    levels |= {"policy x frame": cube.shape[0] * cube.shape[1], "sampling": cube.shape[2]}
    found = _moments(cube, tasks)
    total = sum(max(value, 0.0) for value in found.values() if not np.isnan(value))
    disagreement, judges = _between_judges(rows)
    found["judge"], levels["judge"] = disagreement, judges
    return [
        {
            "world": world, "judge": judge, "component": name, "variance": np.maximum(value, 0.0),
            "share": np.maximum(value, 0.0) / total if total > 0 else np.nan, "sd": np.sqrt(np.maximum(value, 0.0)),
            "levels": levels[name], "note": _note(name, value),
        }
        for name, value in found.items()
    ]  # fmt: skip


def _note(name: str, value: float) -> str:
    if np.isnan(value):
        return ONE_JUDGE if name == "judge" else ONE_REPEAT if name == "sampling" else "not identifiable: one policy"
    return f"{TEXTS[name]}; {CLIPPED}" if value < 0 else TEXTS[name]


def _cube(rows: pd.DataFrame) -> tuple[np.ndarray | None, np.ndarray]:
    """Success `(P, F, R)` on the frames that are complete, and their tasks as numbers `(F,)`."""
    table = rows.pivot(index=["policy", "repeat"], columns=["task", "trial_id"], values="success_at_end")
    complete = table.dropna(axis=1)
    tasks = complete.columns.get_level_values("task")
    complete = complete.loc[:, tasks.isin(tasks.value_counts()[lambda n: n > 1].index)]
    policies, repeats = (table.index.get_level_values(name).nunique() for name in ("policy", "repeat"))
    if not complete.shape[1] or len(table) != policies * repeats:
        return None, np.array([])
    cube = complete.sort_index().to_numpy(float).reshape(policies, repeats, -1).transpose(0, 2, 1)
    return cube, pd.factorize(complete.columns.get_level_values("task"))[0]


def _moments(cube: np.ndarray, tasks: np.ndarray) -> dict[str, float]:
    """Variance components from mean squares of `cube (P, F, R)`; NaN where not identifiable."""
    policies, frames, repeats = cube.shape
    members = (tasks[:, None] == np.arange(tasks.max() + 1)).astype(float)
    counts = members.sum(0)
    free = frames - len(counts)
    cell = cube.mean(2)
    by_task = cell @ members / counts  # (P, K)
    of_frame = cell.mean(0)
    centred = of_frame - (of_frame @ members / counts)[tasks]
    residual = cell - by_task[:, tasks] - centred
    sampling = np.nan
    if repeats > 1:
        sampling = ((cube - cell[:, :, None]) ** 2).sum() / (policies * frames * (repeats - 1))
    if policies < 2:
        whole = (centred**2).sum() / free
        chance = 0.0 if np.isnan(sampling) else sampling / repeats
        return {"policy": np.nan, "policy x task": np.nan, "first frame": whole - chance, "policy x frame": np.nan,
                "sampling": sampling}  # fmt: skip
    # Mean squares per cell mean: what they expect is written beside them.
    within = (residual**2).sum() / ((policies - 1) * free)  # policy x frame + sampling / R
    frame = (centred**2).sum() / free  # first frame + within / P
    noise = within * (1 / counts).sum() / len(counts)  # of a cell of the table policies x tasks, mean over tasks
    mean = by_task.mean(1)
    interaction = by_task - mean[:, None] - by_task.mean(0) + mean.mean()
    crossed = np.nan
    if len(counts) > 1:
        crossed = (interaction**2).sum() / ((policies - 1) * (len(counts) - 1)) - noise
    return {
        # Tasks are fixed: how policies differ on them on average needs no task term taken out.
        "policy": mean.var(ddof=1) - noise / len(counts),
        "policy x task": 0.0 if np.isnan(crossed) else crossed * (len(counts) - 1) / len(counts),
        "first frame": frame - within / policies,
        "policy x frame": within - (0.0 if np.isnan(sampling) else sampling / repeats),
        "sampling": sampling,
    }


def _between_judges(rows: pd.DataFrame) -> tuple[float, int]:
    """Variance between judges (truth is none) about the same rollout, and how many judges there are."""
    judged = rows[rows["judge"] != TRUTH].pivot(index=["policy", "trial_id", "repeat"], columns="judge",
                                                values="success_at_end").dropna()  # fmt: skip
    if judged.shape[1] < 2 or not len(judged):
        return np.nan, judged.shape[1]
    return float(judged.var(axis=1, ddof=1).mean()), judged.shape[1]


def variance_table(judgements: pd.DataFrame, sides: list[tuple[str, str]]) -> pd.DataFrame:
    """`variance.csv` for pairs of world and judge."""
    rows = [row for world, judge in sides for row in components(judgements, world, judge)]
    return pd.DataFrame(rows, columns=COLUMNS)
