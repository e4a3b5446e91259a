"""Success rates per policy and task from CSV files, checked: a lab's real results, or real beside imagined ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from workflow_src.common.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

KEY = ["policy", "task"]
REALITY_COLUMNS = [*KEY, "success", "n"]
REAL_COLUMNS, IMAGINED_COLUMNS = ["real", "n_real"], ["imagined", "n_imagined"]


@dataclass(frozen=True)
class Cells:
    """Measured success of P policies on K tasks, in the order of the file. Rates and trial counts are float64 `(P, K)`.

    `imagined` and `n_imagined` are None in a table of real results alone. `table` holds the rows as they were read.
    """

    policies: tuple[str, ...]
    tasks: tuple[str, ...]
    real: np.ndarray
    n_real: np.ndarray
    imagined: np.ndarray | None
    n_imagined: np.ndarray | None
    table: pd.DataFrame


def load_cells(file: str | Path) -> Cells:
    """Rates from a CSV with columns policy, task, real, imagined (rates), n_real, n_imagined (trials); others are kept.

    Without the columns `imagined` and `n_imagined` it is a table of real results alone. Raises `UserError`, one line,
    for a missing column, a missing or doubled cell, a policy or task of one side only, a rate outside [0, 1] or n < 1.
    """
    table = _read(file, [*KEY, *REAL_COLUMNS], f"{', '.join(KEY)}, real, imagined, n_real, n_imagined")
    compared = [column for column in IMAGINED_COLUMNS if column in table]
    if len(compared) == 1:
        (absent,) = set(IMAGINED_COLUMNS) - set(compared)
        raise UserError(f"{file}: has a column {compared[0]} but no column {absent}; add it, or leave out both")
    columns = REAL_COLUMNS + compared
    _check_sides(file, table, columns)
    for column in columns:
        table[column] = _numbers(file, table, column)
    policies, tasks = (list(dict.fromkeys(table[name])) for name in KEY)
    grids = dict(zip(columns, _grids(file, table, columns, policies, tasks)))
    return Cells(tuple(policies), tuple(tasks), *(grids.get(c) for c in REAL_COLUMNS + IMAGINED_COLUMNS), table)


@dataclass(frozen=True)
class Reality:
    """A lab's real results: the complete block of `policies` and `tasks` that they cover, which may be empty.

    `rate`, `n` and `partial` (mean partial credit, NaN where not given) are float64 `(P, K)`; `left_out` says in lines what of
    the file or of the ranking was not used.
    """

    policies: list[str]
    tasks: list[str]
    rate: np.ndarray
    n: np.ndarray
    partial: np.ndarray
    left_out: list[str]


def load_reality(
    file: str | Path, policies: Sequence[str], tasks: Sequence[str], names: Mapping[str, str] | None = None
) -> Reality:
    """Real results from a CSV: policy, task, success (rate; or real), n (or n_real), source; maybe trial_id (n is 1), partial.

    `names`: what the file calls a policy or task → what it is called here. Tasks count that some ranked policy has results
    of, and policies that have results of all of those. Raises `UserError` for a missing column, a doubled cell or trial, a
    rate outside [0, 1], n < 1.
    """
    import pandas as pd

    columns = f"{', '.join(REALITY_COLUMNS)}, source"
    # As the published tables call them.
    table = _read(file, KEY, columns).rename(columns=dict(zip(REAL_COLUMNS, REALITY_COLUMNS[2:])))
    if "n" not in table and "trial_id" in table:
        table["n"] = 1
    if missing := [column for column in REALITY_COLUMNS if column not in table]:
        raise UserError(f"{file}: has no column {', '.join(missing)}; columns: {columns}")
    for column in ("success", "n"):
        table[column] = _numbers(file, table, column)
    table["partial"] = _numbers(file, table, "partial") if "partial" in table else np.nan
    table[KEY] = table[KEY].replace(dict(names or {}))
    known = table["policy"].isin(policies) & table["task"].isin(tasks)
    strangers = table.loc[~known, KEY].drop_duplicates()
    left_out = [f"{file}: {row.policy}, {row.task} is not ranked here" for row in strangers.itertuples()]
    rows = table[known]
    weighted = rows.assign(success=rows["success"] * rows["n"], partial=rows["partial"] * rows["n"])
    sums = weighted.groupby(KEY)[["success", "partial", "n"]].sum(min_count=1)
    covered = [task for task in tasks if task in set(rows["task"])]
    complete = [policy for policy in policies if covered and all((policy, task) in sums.index for task in covered)]
    for kind, every, some in (("policy", policies, complete), ("task", tasks, covered if complete else [])):
        left_out += [f"{file}: no complete real results for {kind} {name}" for name in every if name not in some]
    covered = covered if complete else []
    grid = sums.reindex(pd.MultiIndex.from_product([complete, covered], names=KEY))
    success, partial, n = (
        grid[name].to_numpy(float).reshape(len(complete), len(covered)) for name in ("success", "partial", "n")
    )
    return Reality(complete, covered, success / n, n, partial / n, left_out)


# ---- checks ---------------------------------------------------------------------------------------------------------


def _read(file: str | Path, needed: Sequence[str], columns: str) -> pd.DataFrame:
    """The rows of a CSV with policies and tasks as text, each pair (or trial of it, where there is a `trial_id`) once."""
    import pandas as pd

    try:
        table = pd.read_csv(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give a CSV with columns {columns}") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: not a readable CSV ({reason}); columns: {columns}") from error
    if missing := [column for column in needed if column not in table]:
        raise UserError(f"{file}: has no column {', '.join(missing)}; columns: {columns}")
    if not len(table):
        raise UserError(f"{file}: holds no row; give one per policy and task")
    for column in KEY:
        if table[column].isna().any():
            line = int(table[column].isna().to_numpy().argmax()) + 2  # after the header
            raise UserError(f"{file}: line {line} names no {column}; fill it in")
    table[KEY] = table[KEY].astype(str)
    unique = [*KEY, "trial_id"] if "trial_id" in table else KEY
    if table.duplicated(unique).any():
        row = table[table.duplicated(unique)].iloc[0]
        shown = ", ".join(str(row[name]) for name in unique)
        raise UserError(f"{file}: {shown} appears twice; give one row per {' and '.join(unique)}")
    return table


def _check_sides(file: str | Path, table: pd.DataFrame, columns: Sequence[str]) -> None:
    """Raise `UserError` where a policy, a task or a cell has values on one side only."""
    for column in columns:
        given = table[column].notna()
        for name in KEY:
            some = given.groupby(table[name]).any()
            if not some.all():
                lacking = some.index[~some][0]
                raise UserError(
                    f"{file}: {name} {lacking!r} has no {column} at all; every {name} needs both sides: add it or "
                    f"remove the {name}"
                )
        if not given.all():
            row = table[~given].iloc[0]
            raise UserError(f"{file}: no {column} for {row.policy}, {row.task}; fill in the cell")


def _numbers(file: str | Path, table: pd.DataFrame, column: str) -> pd.Series:
    """A column of trial counts (its name begins with n) or of rates."""
    import pandas as pd

    values = pd.to_numeric(table[column], errors="coerce")
    rate = not column.startswith("n")
    bad = ~((values >= 0) & (values <= 1)) if rate else ~((values >= 1) & (values % 1 == 0))
    if bad.any():
        row = table[bad].iloc[0]
        shown = row[column].item() if hasattr(row[column], "item") else row[column]
        needed = "a rate between 0 and 1" if rate else "a whole number of trials, at least 1"
        raise UserError(f"{file}: {column} of {row.policy}, {row.task} is {shown!r}; it must be {needed}")
    return values.astype(float)


def _grids(
    file: str | Path, table: pd.DataFrame, columns: Sequence[str], policies: Sequence[str], tasks: Sequence[str]
) -> list[np.ndarray]:
    """Columns as arrays `(P, K)`; `UserError` for a missing cell."""
    grid = table.pivot(index="policy", columns="task").reindex(index=list(policies))
    found = [grid[column].reindex(columns=list(tasks)).to_numpy(float) for column in columns]
    if np.isnan(found[0]).any():
        p, k = np.argwhere(np.isnan(found[0]))[0]
        raise UserError(f"{file}: no row for {policies[p]}, {tasks[k]}; add the cell")
    return found
