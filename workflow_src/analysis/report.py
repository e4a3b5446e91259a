"""The agreement report on a table of rates that was measured elsewhere: the same tables and figures as a run's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from workflow_src.analysis import agreement, comparisons, figures, resampling
from workflow_src.analysis import statistics as st
from workflow_src.analysis.cells import Cells, load_cells
from workflow_src.analysis.study import Rates
from workflow_src.analysis.summary import agreement_lines, read_rows
from workflow_src.analysis.tables import AGREEMENT_COLUMNS, write_csv
from workflow_src.common import seeds
from workflow_src.common.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

# Rates are printed to three digits, so successes come out whole only to about this much.
WHOLE = 0.3


def write_report(pairs: Path, out: Path, confidence: float, seed: int) -> None:
    """Write policy_ranking, per_task, agreement and comparisons (.csv) and the figures into `out`; print the main numbers."""
    if not 0 < confidence < 1:
        raise UserError(f"--confidence: {confidence:g} is not between 0 and 1; 0.95 is usual")
    cells = load_cells(pairs)
    compared = comparison_table(cells, confidence)
    ranking = comparisons.add_groups(ranking_table(cells, confidence), compared)
    tasks, rows = per_task_table(cells, confidence), agreement_rows(cells, confidence, seed)
    write_csv(compared, out / "comparisons.csv")
    write_csv(tasks, out / "per_task.csv")
    write_csv(rows, out / "agreement.csv")
    write_csv(ranking, out / "policy_ranking.csv")
    figures.draw_all(figures.FIGURES, out, ranking, tasks, rows)
    print(f"{pairs}: {len(cells.policies)} policies, {len(cells.tasks)} tasks")
    alone = ["  no imagined results: intervals, comparisons, and what a perfect world model would reach"]
    print("\n".join(alone if cells.imagined is None else agreement_lines(read_rows(out / "agreement.csv"))))
    print(f"  tables and figures in {out}")


def _sides(cells: Cells) -> dict[str, Rates]:
    sides = {"imagined": (cells.imagined, cells.n_imagined), "real": (cells.real, cells.n_real)}
    return {name: Rates(rate, n, n) for name, (rate, n) in sides.items() if rate is not None}


def ranking_table(cells: Cells, confidence: float) -> pd.DataFrame:
    """One row per policy, best imagined (or, without imagined results, best real) first.

    Columns as in a run's `policy_ranking.csv`, and `*_se_tasks`: the standard error of the mean over tasks as a sample
    (n - 1 in the denominator), which papers print. `partial_credit` says whether the rates contain any.
    """
    import pandas as pd

    table = pd.DataFrame({"policy": cells.policies, "family": "trained"})
    for side in ("imagined", "real"):
        names = [f"rank_{side}", *(f"success_{side}{end}" for end in ("", "_low", "_high", "_se_tasks")), f"n_{side}"]
        table[names] = np.nan
        if rates := _sides(cells).get(side):
            rate, low, high = rates.means(confidence)
            spread = rates.rate.std(1, ddof=1) / np.sqrt(len(cells.tasks)) if len(cells.tasks) > 1 else np.nan
            columns = (st.competition_ranks(rate), rate, low, high, spread, rates.n.sum(1).astype(int))
            for name, values in zip(names, columns):
                table[name] = values
    table["partial_credit"] = _partial(cells)
    first = "rank_imagined" if cells.imagined is not None else "rank_real"
    return table.sort_values([first, "policy"], kind="stable", ignore_index=True)


def _partial(cells: Cells) -> np.ndarray:
    """Per policy, whether some cell's successes are no whole number."""
    found = np.zeros(len(cells.policies), bool)
    for rates in _sides(cells).values():
        successes = rates.rate * rates.n
        found |= (np.abs(successes - np.rint(successes)) > WHOLE).any(1)
    return found


def per_task_table(cells: Cells, confidence: float) -> pd.DataFrame:
    """One row per policy and task in the order of the file; columns as in a run's `per_task.csv`, and the file's own."""
    table = cells.table[["policy", "task"]].copy()
    table["family"] = "trained"
    p = table["policy"].map(list(cells.policies).index).to_numpy()
    k = table["task"].map(list(cells.tasks).index).to_numpy()
    for side in ("imagined", "real"):
        names = [f"success_{side}{end}" for end in ("", "_low", "_high")]
        table[[*names, f"n_{side}"]] = np.nan
        if rates := _sides(cells).get(side):
            for name, values in zip(names, (rates.rate, *rates.intervals(confidence))):
                table[name] = values[p, k]
            table[f"n_{side}"] = rates.n[p, k].astype(int)
    extra = [name for name in cells.table if name not in ("policy", "task", "real", "imagined", "n_real", "n_imagined")]
    table[extra] = cells.table[extra]
    return table.reset_index(drop=True)


def comparison_table(cells: Cells, confidence: float) -> pd.DataFrame:
    """Every pair of policies on each side; the trials behind two cells are not the same ones."""
    rows = []
    for side, rates in _sides(cells).items():
        rows += comparisons.unpaired_rows(rates.rate, rates.n, cells.policies, side, confidence)
    return comparisons.comparison_table(rows)


def agreement_rows(cells: Cells, confidence: float, seed: int) -> pd.DataFrame:
    """Rows as in a run's `agreement.csv`; of real results alone, what a perfect world model would reach."""
    import pandas as pd

    generator, names = seeds.rng(seed, "agreement"), (cells.policies, cells.tasks)
    if cells.imagined is None:
        rows = agreement.ceiling_rows(cells.real, cells.n_real, confidence, generator)
        return pd.DataFrame(rows, columns=AGREEMENT_COLUMNS)
    paired = resampling.from_cells(
        *names, cells.imagined, cells.real, cells.n_imagined, cells.n_real, seeds.rng(seed, "posterior")
    )
    rows = agreement.policy_rows(paired, "all policies", confidence, generator)
    rows += agreement.cell_rows(paired, "policy x task cells", confidence, generator)
    return pd.DataFrame(rows + agreement.within_rows(paired), columns=AGREEMENT_COLUMNS)
