"""Success from a few real trials and many imagined ones: debiased, and never worse by more than it says.

Prediction-powered inference for a mean with power tuning (Angelopoulos, Duchi and Zrnic, PPI++, arXiv 2311.01453), here
stratified by task and clustered by first frame. On n frames a policy was tried for real and in imagination, on N others
in imagination alone:

    estimate = mean over tasks of [ mean real + λ (mean imagined on the N others - mean imagined on the n) ]

λ = 0 is the real trials alone, λ = 1 trusts imagination as far as its bias was measured; between them the λ of least
variance is taken, and the interval pays for having chosen it. The interval is Wilson's at the number of real trials that
would have had the same variance. That number minus n is how many real trials imagination saved: zero where it tells
nothing about single frames, less where choosing λ cost more than it gained.

`ppi-python` 0.2.3 gives the same estimate for one task and frames without repeats (a test holds its values), but knows
neither strata nor clusters, was last released in 2024, and brings numba, statsmodels and scikit-learn along.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workflow_src.analysis import statistics as st
from workflow_src.analysis.records import Outcomes
from workflow_src.common import seeds
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import atomic_path

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = [
    "policy", "success_real", "success_real_low", "success_real_high", "n_real", "success_imagined", "n_imagined",
    "estimate", "low", "high", "lambda", "n_effective", "trials_saved", "trials_saved_low", "trials_saved_high",
    "trials_saved_untuned",
]  # fmt: skip
PAIRED_COLUMNS, IMAGINED_COLUMNS = (
    ["policy", "task", "frame", "real", "imagined"],
    ["policy", "task", "frame", "imagined"],
)
# Frames of the two sets whose imagined success differs by more than chance allows at this level were not drawn alike.
ALIKE, SHUFFLES = 0.001, 10_000
FEWEST = 2  # real frames per task: below, nothing is known of the spread
EXAMPLES = """Both files are CSV with one row per rollout; rows of the same frame are repeats and are averaged:
  --paired    policy, task, frame, real, imagined    frames tried in reality and in imagination
  --imagined  policy, task, frame, imagined          other frames, drawn in the same way, imagined alone
`frame` names the first frame. An optional column `drawn` says how a frame was drawn; it must not differ between them.

examples:
  python -m workflow_src.analysis.prediction_powered --paired paired.csv --imagined imagined.csv --out success.csv
"""


@dataclass(frozen=True)
class Frames:
    """One policy's success by first frame, repeats averaged. Rates float64 in [0, 1]; tasks int64, 0..K-1.

    `real` and `imagined (n,)` on frames of `tasks (n,)`; `others (N,)` imagined alone, on frames of `other_tasks (N,)`.
    """

    real: np.ndarray
    imagined: np.ndarray
    tasks: np.ndarray
    others: np.ndarray
    other_tasks: np.ndarray


def estimate(frames: Frames, confidence: float) -> dict[str, float]:
    """The numbers of one policy, named as in `COLUMNS`. Every task counts alike."""
    real, imagined, others = (
        _Strata(values, tasks)
        for values, tasks in (
            (frames.real, frames.tasks), (frames.imagined, frames.tasks), (frames.others, frames.other_tasks)
        )
    )  # fmt: skip
    n, more = real.share, others.share
    # Sums of squares inside tasks, each already divided as the variance of the mean over tasks wants it.
    covariance = (n * _within(real, imagined)).sum()
    spread = _pooled(imagined, others)
    variance = (n * _within(real, real)).sum()
    total = (n * spread).sum() + (more * spread).sum()
    tuned = float(np.clip(covariance / total, 0, 1)) if total > 0 else 0.0
    low, high = st.wilson(real.mean, real.size, confidence)
    result = {
        "success_real": real.mean, "success_real_low": float(low), "success_real_high": float(high),
        "n_real": len(frames.real), "n_imagined": len(frames.real) + len(frames.others), "lambda": tuned,
        "success_imagined": float(np.mean([np.concatenate(pair).mean() for pair in zip(imagined.parts, others.parts)])),
    }  # fmt: skip

    def ratio(weight: float, chosen: int) -> float:
        """Variance of the estimate over that of the real trials alone; `chosen`: parameters fitted to the same trials."""
        if variance <= 0:
            return 1.0
        free = len(frames.real) - len(n)
        left = variance - 2 * weight * covariance + weight**2 * (n * _within(imagined, imagined)).sum()
        return (left * free / max(free - chosen, 1) + weight**2 * (more * spread).sum()) / variance

    size = real.size / ratio(tuned, chosen=1)
    value = real.mean + tuned * (others.mean - imagined.mean)
    low, high = st.wilson(np.clip(value, 0, 1), size, confidence)
    product = variance * (n * _within(imagined, imagined)).sum()
    shared = covariance / math.sqrt(product) if product > 0 else math.nan
    saved = _saved(shared, real.size, others.size, len(frames.real) - len(n), confidence)
    return result | {
        "estimate": float(value), "low": float(low), "high": float(high), "n_effective": float(size),
        "trials_saved": float(size - real.size), "trials_saved_low": saved[0], "trials_saved_high": saved[1],
        "trials_saved_untuned": float(real.size / ratio(1.0, chosen=0) - real.size),
    }  # fmt: skip


def _saved(r: float, n: float, more: float, free: int, confidence: float) -> tuple[float, float]:
    """Real trials saved at both ends of the interval of `r`, the correlation of real and imagined success inside tasks.

    NaN where the trials leave `r` undefined or at its limit.
    """
    if free < 3 or not abs(r) <= 1 - st.TIE:
        return math.nan, math.nan
    # n frames of K tasks leave as many degrees of freedom as n - K + 1 points of one.
    ends = st.fisher_interval(r, free + 1, confidence)
    return tuple(n / (1 - max(end, 0.0) ** 2 * more / (n + more)) - n for end in ends)


class _Strata:
    """Values by task: `parts` per task, `mean` over tasks, `share (K,)` of each in the variance of that mean."""

    def __init__(self, values: np.ndarray, tasks: np.ndarray):
        self.parts = [values[tasks == task] for task in range(tasks.max() + 1)]
        counts = np.array([len(part) for part in self.parts], float)
        self.mean = float(np.mean([part.mean() for part in self.parts]))
        self.share = 1 / (counts * len(counts) ** 2)
        self.size = float(1 / self.share.sum())


def _within(one: _Strata, other: _Strata) -> np.ndarray:
    """Covariance inside each task `(K,)`, n - 1 in the denominator."""
    pairs = zip(one.parts, other.parts)
    return np.array([((a - a.mean()) * (b - b.mean())).sum() / max(len(a) - 1, 1) for a, b in pairs])


def _pooled(one: _Strata, other: _Strata) -> np.ndarray:
    """Variance inside each task `(K,)` over the frames of both."""
    together = [np.concatenate([a - a.mean(), b - b.mean()]) for a, b in zip(one.parts, other.parts)]
    return np.array([(part**2).sum() / max(len(part) - 2, 1) for part in together])


# ---- a run's own trials ---------------------------------------------------------------------------------------------


def real_trials(tasks: np.ndarray, per_task: int, seed: int) -> np.ndarray:
    """Which of the trials, bool `(N,)`, are taken as tried for real: `per_task` of each task, the same for all policies."""
    chosen = np.zeros(len(tasks), bool)
    generator = seeds.rng(seed, "prediction powered")
    for task in np.unique(tasks):
        chosen[generator.permutation(np.flatnonzero(tasks == task))[:per_task]] = True
    return chosen


def rows_of_run(
    imagined: Outcomes, real: Outcomes, policies: Sequence[str], per_task: int, seed: int, confidence: float
) -> list[dict[str, Any]]:
    """One row per policy, as if only `per_task` trials of each task had been tried for real; the others are imagined.

    `imagined` and `real` hold the same trials. `success_all` is real success over all trials, which a laboratory would
    not know. No row where a task has not two trials on either side.
    """
    chosen = real_trials(real.tasks, per_task, seed)
    rows = []
    for p, policy in enumerate(policies):
        judged, tried = imagined.counts[p] > 0, real.counts[p] > 0
        paired, alone = chosen & judged & tried, ~chosen & judged
        if min(_fewest(imagined.tasks, where) for where in (paired, alone)) < FEWEST:
            return []
        with np.errstate(invalid="ignore", divide="ignore"):
            truth, guess = (found.successes[p] / found.counts[p] for found in (real, imagined))
        frames = Frames(truth[paired], guess[paired], real.tasks[paired], guess[alone], real.tasks[alone])
        everywhere = np.mean([truth[(real.tasks == task) & tried].mean() for task in np.unique(real.tasks)])
        rows.append({"policy": policy} | estimate(frames, confidence) | {"success_all": everywhere})
    return rows


def _fewest(tasks: np.ndarray, where: np.ndarray) -> int:
    return int(np.bincount(tasks[where], minlength=tasks.max() + 1).min())


def table_of(rows: list[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> pd.DataFrame:
    """`prediction_powered.csv`: one row per policy."""
    import pandas as pd

    return pd.DataFrame(rows, columns=list(columns))


# ---- anybody's trials -----------------------------------------------------------------------------------------------


def load_frames(paired: Path, imagined: Path) -> dict[str, Frames]:
    """Policy → frames from two CSV files (see `EXAMPLES`). Raises `UserError` where the two sets cannot be combined."""
    both, alone = _read(paired, PAIRED_COLUMNS), _read(imagined, IMAGINED_COLUMNS)
    for name in ("policy", "task"):
        for one, other, file in ((both, alone, imagined), (alone, both, paired)):
            if absent := sorted(set(one[name]) - set(other[name])):
                raise UserError(f"{file}: has no {name} {absent[0]!r}, which the other file has; both need the same")
    shared = both.merge(alone, on=["policy", "task", "frame"])
    if len(shared):
        row = shared.iloc[0]
        raise UserError(
            f"{imagined}: frame {row.frame} of {row.policy}, {row.task} is in {paired} too; its imagined rollouts would "
            "count twice: leave it out here"
        )
    _check_drawn(paired, imagined, both, alone)
    tasks = sorted(set(both["task"]))
    _check_counts(paired, both, tasks)
    _check_counts(imagined, alone, tasks)
    _check_alike(paired, imagined, both, alone)
    found = {}
    for policy in dict.fromkeys(both["policy"]):
        sides = [table[table["policy"] == policy] for table in (both, alone)]
        numbers = [side["task"].map(tasks.index).to_numpy(np.int64) for side in sides]
        found[policy] = Frames(
            sides[0]["real"].to_numpy(), sides[0]["imagined"].to_numpy(), numbers[0],
            sides[1]["imagined"].to_numpy(), numbers[1],
        )  # fmt: skip
    return found


def _read(file: Path, columns: list[str]) -> pd.DataFrame:
    """One row per policy and frame: repeats averaged, `drawn` kept where it is given."""
    import pandas as pd

    try:
        table = pd.read_csv(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable CSV ({' '.join(str(error).split())})") from None
    if missing := [column for column in columns if column not in table]:
        raise UserError(f"{file}: has no column {', '.join(missing)}; columns: {', '.join(columns)}, perhaps drawn")
    rates = [column for column in ("real", "imagined") if column in columns]
    for column in rates:
        values = pd.to_numeric(table[column], errors="coerce")
        bad = ~((values >= 0) & (values <= 1))
        if bad.any():
            row = table[bad].iloc[0]
            raise UserError(f"{file}: {column} of {row.policy}, {row.task}, frame {row.frame} is {row[column]}; it must "
                            "be between 0 and 1")  # fmt: skip
        table[column] = values.astype(float)
    key = ["policy", "task", "frame"]
    table[key] = table[key].astype(str)
    if "drawn" in table:
        key.append("drawn")
    return table.groupby(key, sort=True)[rates].mean().reset_index()


def _check_drawn(paired: Path, imagined: Path, both: pd.DataFrame, alone: pd.DataFrame) -> None:
    given = [set(table["drawn"]) if "drawn" in table else set() for table in (both, alone)]
    if given[0] != given[1]:
        shown = ["/".join(sorted(map(str, some))) or "not given" for some in given]
        raise UserError(
            f"{imagined}: column drawn is {shown[1]}, in {paired} it is {shown[0]}; frames that were drawn differently "
            "say nothing about each other: draw both in one way"
        )


def _check_counts(file: Path, table: pd.DataFrame, tasks: list[str]) -> None:
    counts = table.groupby(["policy", "task"]).size().unstack(fill_value=0).reindex(columns=tasks, fill_value=0)
    if (counts < FEWEST).any(axis=None):
        policy, task = counts.stack()[lambda some: some < FEWEST].index[0]
        raise UserError(
            f"{file}: {counts.loc[policy, task]} frames of {policy}, {task}; it needs at least {FEWEST} per policy and task"
        )


def _check_alike(paired: Path, imagined: Path, both: pd.DataFrame, alone: pd.DataFrame) -> None:
    """Raise `UserError` when imagination finds the frames of one set easier than those of the other.

    Permutation test on the frames' mean imagined success over policies, tasks kept apart, two-sided at `ALIKE`.
    """
    means = [table.groupby(["task", "frame"])["imagined"].mean().reset_index() for table in (both, alone)]
    values, generator = np.zeros(SHUFFLES + 1), seeds.rng(0, "drawn alike")
    for task in sorted(set(means[0]["task"])):
        one, other = (part.loc[part["task"] == task, "imagined"].to_numpy() for part in means)
        together = np.concatenate([one, other])
        shuffled = generator.permuted(np.broadcast_to(together, (SHUFFLES, len(together))), axis=1)
        orders = np.concatenate([together[None], shuffled])
        values += orders[:, : len(one)].mean(1) - orders[:, len(one) :].mean(1)
    p = float((np.abs(values) >= np.abs(values[0]) - st.TIE).mean())
    if p < ALIKE:
        raise UserError(
            f"{imagined}: its frames were drawn differently from those in {paired}: imagined success differs by "
            f"{values[0] / means[0]['task'].nunique():+.2f} (p = {p:.1g}); pick the frames to be tried for real at random"
        )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.analysis.prediction_powered",
        description="Estimate success from a few real trials and many imagined ones, and say how many trials that saved.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--paired", type=Path, required=True, metavar="FILE.csv", help="frames tried in both worlds")
    parser.add_argument("--imagined", type=Path, required=True, metavar="FILE.csv", help="other frames, imagined alone")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv", help="table to write")
    parser.add_argument("--confidence", type=float, default=0.95, help="of all intervals (default: %(default)s)")
    options = parser.parse_args()
    if not 0 < options.confidence < 1:
        raise UserError(f"--confidence: {options.confidence:g} is not between 0 and 1; 0.95 is usual")
    found = load_frames(options.paired, options.imagined)
    table = table_of([{"policy": policy} | estimate(frames, options.confidence) for policy, frames in found.items()])
    with atomic_path(options.out) as temporary:
        table.to_csv(temporary, index=False, float_format="%.9g")
    for row in table.itertuples():
        print(f"{row.policy}: {row.estimate:.3f} [{row.low:.3f}, {row.high:.3f}] from {row.n_real} real frames and "
              f"{row.n_imagined} imagined ones; {row.trials_saved:+.1f} real trials saved")  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
