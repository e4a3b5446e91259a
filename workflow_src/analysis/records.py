"""Reading what the analysis stands on: judgements, rollouts and real results, checked before any statistic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from workflow_src.common.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

LAB, IMAGINED = "lab", "world_model"
TRUTH = "truth"
KEY = ["world", "policy", "trial_id", "repeat"]
JUDGEMENT_COLUMNS = [*KEY, "judge", "success_at_end"]
ROLLOUT_COLUMNS = [*KEY, "task", "video"]


@dataclass(frozen=True)
class Outcomes:
    """What one judge saw in one world.

    `successes` and `counts` are float64 `(P, N)`: policies by trials, repeats added up. `tasks (N,)` is each
    trial's index into the list of tasks. A rollout without a valid judgement counts nowhere.
    """

    successes: np.ndarray
    counts: np.ndarray
    tasks: np.ndarray

    def cells(self) -> tuple[np.ndarray, np.ndarray]:
        """Success rate and number of rollouts per policy and task, both `(P, K)`; NaN where nothing was counted."""
        member = self._membership()
        total = self.counts @ member
        with np.errstate(invalid="ignore"):
            return self.successes @ member / total, total

    def _membership(self) -> np.ndarray:
        return (self.tasks[:, None] == np.arange(self.tasks.max() + 1)).astype(float)


# ---- parquet --------------------------------------------------------------------------------------------------------


def load_judgements(files: Iterable[str | Path]) -> pd.DataFrame:
    """All judgements, one row per (rollout, judge), with a boolean column `valid`. Raises `UserError` on duplicates."""
    table = _load(files, JUDGEMENT_COLUMNS, "judgements")
    # An answer that could not be had or read is neither success nor failure.
    valid = table["success_at_end"].notna().to_numpy(bool)
    if "error" in table:
        valid = valid & (table["error"].fillna("").astype(str) == "").to_numpy(bool)
    table["valid"] = valid
    if "task" not in table:
        # A trial id is <task>/<name>.
        table["task"] = table["trial_id"].str.rsplit("/", n=1).str[0]
    for column in ("success_at_end", "success_ever", "partial"):
        if column in table:
            table[column] = table[column].astype("Float64").to_numpy(float, na_value=np.nan)
            _check_rates(table, column)
    _check_duplicates(table, [*KEY, "judge"], "judgements")
    return table


def load_rollouts(files: Iterable[str | Path]) -> pd.DataFrame:
    """All rollout records; `video` is made a path that can be opened from here."""
    files = [Path(file) for file in files]
    table = _load(files, ROLLOUT_COLUMNS, "rollouts")
    table["video"] = [str(_find(file, video)) for file, video in zip(table.pop("file"), table["video"])]
    _check_duplicates(table, KEY, "rollouts")
    return table


def _find(record: str, video: str) -> Path:
    # Records name their videos relative to themselves, so that a results folder can be moved.
    path = Path(video)
    beside = Path(record).parent / path
    return path if path.is_absolute() or not beside.exists() else beside


def _load(files: Iterable[str | Path], needed: list[str], what: str) -> pd.DataFrame:
    import pandas as pd

    tables = []
    for file in files:
        try:
            table = pd.read_parquet(file)
        except FileNotFoundError:
            raise UserError(f"{file}: no such file of {what}; run the workflow up to it") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not a readable parquet file ({error}); delete it and run again") from error
        if missing := [column for column in needed if column not in table]:
            raise UserError(f"{file}: has no column {', '.join(missing)}; delete it and run again")
        tables.append(table.assign(file=str(file)) if what == "rollouts" else table)
    if not tables or not sum(map(len, tables)):
        raise UserError(f"{what}: the tables hold no row; nothing can be ranked")
    return pd.concat(tables, ignore_index=True)


def _check_rates(table: pd.DataFrame, column: str) -> None:
    bad = table[(table[column] < 0) | (table[column] > 1)]
    if len(bad):
        row = bad.iloc[0]
        raise UserError(
            f"judgements: {column} of {row.policy}, {row.trial_id} is {row[column]:g}; it must lie between 0 and 1"
        )


def _check_duplicates(table: pd.DataFrame, key: list[str], what: str) -> None:
    double = table[table.duplicated(key)]
    if len(double):
        row = double.iloc[0]
        shown = ", ".join(f"{name} {row[name]}" for name in key)
        raise UserError(f"{what}: {len(double)} duplicate rows, the first is {shown}; give each file once")


def check_judged(rollouts: pd.DataFrame, judgements: pd.DataFrame) -> None:
    """Raise `UserError` when a rollout has no judgement or a judgement no rollout: two runs got mixed."""
    done, judged = (set(map(tuple, table[KEY].drop_duplicates().to_numpy())) for table in (rollouts, judgements))
    for some, text in ((done - judged, "a rollout without judgement"), (judged - done, "a judgement without rollout")):
        if some:
            shown = ", ".join(map(str, min(some)))
            raise UserError(f"judgements: {len(some)} times {text}, the first is {shown}; score these rollouts again")


# ---- judgements to outcomes -----------------------------------------------------------------------------------------


def trial_tasks(judgements: pd.DataFrame, tasks: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Sorted trial ids and each one's index into `tasks`. Raises `UserError` for a trial of no configured task."""
    pairs = judgements[["trial_id", "task"]].drop_duplicates().sort_values("trial_id")
    if unknown := sorted(set(pairs["task"]) - set(tasks)):
        raise UserError(f"judgements: task {unknown[0]!r} is not among the configured {', '.join(tasks)}")
    if pairs["trial_id"].duplicated().any():
        trial = pairs.loc[pairs["trial_id"].duplicated(), "trial_id"].iloc[0]
        raise UserError(f"judgements: trial {trial!r} appears under two tasks; trial ids must be unique")
    if absent := [task for task in tasks if task not in set(pairs["task"])]:
        raise UserError(f"judgements: no trial of task {absent[0]!r}; every configured task needs trials")
    return list(pairs["trial_id"]), pairs["task"].map(list(tasks).index).to_numpy(np.int64)


def outcomes(
    judgements: pd.DataFrame, world: str, judge: str, policies: Sequence[str], tasks: Sequence[str],
    column: str = "success_at_end",
) -> Outcomes:  # fmt: skip
    """Successes of one judge in one world as arrays. Missing policies, cells and rollouts raise `UserError`."""
    trials, task_of = trial_tasks(judgements, tasks)
    rows = judgements[(judgements["world"] == world) & (judgements["judge"] == judge)]
    _check_complete(rows, world, judge, policies, trials)
    valid = rows[rows["valid"] & rows[column].notna()]
    grouped = valid.groupby(["policy", "trial_id"])[column]
    sums, counts = (
        part.unstack().reindex(index=list(policies), columns=trials).fillna(0.0).to_numpy(float)
        for part in (grouped.sum(), grouped.count())
    )
    found = Outcomes(sums, counts, task_of)
    if column == "success_at_end":
        _check_counted(found.cells()[1], world, judge, policies, tasks)
    return found


def _check_complete(rows: pd.DataFrame, world: str, judge: str, policies: Sequence[str], trials: list[str]) -> None:
    where = f"judgements of {judge!r} in {world}"
    if absent := [policy for policy in policies if policy not in set(rows["policy"])]:
        raise UserError(f"{where}: none for {', '.join(absent)}; run their rollouts or drop them from `policies`")
    if extra := sorted(set(rows["policy"]) - set(policies)):
        raise UserError(f"{where}: {', '.join(extra)} not in `policies`; leave out files of other runs")
    expected = rows["repeat"].nunique()
    counts = rows.groupby(["policy", "trial_id"]).size().unstack().reindex(index=list(policies), columns=trials)
    short = np.argwhere(counts.fillna(0).to_numpy() != expected)
    if len(short):
        p, t = short[0]
        raise UserError(
            f"{where}: {len(short)} of {counts.size} policy-trial cells are incomplete, the first is {policies[p]}, "
            f"{trials[t]}; run the missing rollouts"
        )


def _check_counted(n: np.ndarray, world: str, judge: str, policies: Sequence[str], tasks: Sequence[str]) -> None:
    empty = np.argwhere(n == 0)
    if len(empty):
        p, k = empty[0]
        raise UserError(
            f"judgements of {judge!r} in {world}: no valid one for {policies[p]}, {tasks[k]} (n = 0); "
            "look at the `error` and `invalid` columns"
        )
