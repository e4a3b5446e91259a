"""Which policies differ: exact tests over all pairs, intervals of the differences, and a test that says when to stop.

On shared trials policies are compared frame by frame: repeats of a first frame are one cluster. Only where no trial is
shared the counts are compared as independent samples (Barnard; a score test where tasks differ in their trials, which one
table of counts cannot keep apart, or trials are many). Holm's correction covers all pairs of a side.

The sequential test bets on which of two policies does better on the next frame. Under "no task on which one does better
than the other" its wealth, the e-value, grows beyond m/α with probability at most α/m, however often one looks, so one
may stop there (Ville; Waudby-Smith and Ramdas, J. R. Stat. Soc. B 86, 2024, arXiv 2010.09686; for robot policies: Snyder
et al., arXiv 2503.10966).

As a program: compare policies on trials as they are being run, and say whether to go on.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from workflow_src.analysis import statistics as st
from workflow_src.analysis.records import Outcomes
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import atomic_path

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = [
    "side", "policy_a", "policy_b", "n", "success_a", "success_b", "difference", "low", "high", "a_better", "b_better",
    "p", "p_holm", "different", "test", "e_value", "stop_after", "frames_needed", "note",
]  # fmt: skip
PAIRED = "exact McNemar, first frames as clusters"
BARNARD, SCORE = "Barnard exact", "score test, each task counting alike"
# Bets: shares of the wealth, denser near all and nothing, as the Krichevsky-Trofimov mixture has them.
BETS = np.sin(np.pi * ((np.arange(20) + 0.5) / 20 - 0.5))
# Beyond this many trials of a policy Barnard's test takes seconds per pair, and the score test says the same.
MOST_TRIALS = 400


# ---- tests ----------------------------------------------------------------------------------------------------------


def mcnemar_p(differences: np.ndarray) -> float:
    """Two-sided exact p for whole numbers `differences (F,)` of two policies on F frames: sums under all sign flips.

    For differences of -1, 0 and 1 this is McNemar's exact test. With repeats, a frame's difference flips as a whole.
    """
    sizes = np.abs(np.asarray(differences, np.int64))
    sizes = sizes[sizes > 0]
    total = int(sizes.sum())
    chance = np.zeros(2 * total + 1)
    chance[total] = 1.0
    for size in sizes:
        chance = 0.5 * (np.roll(chance, size) + np.roll(chance, -size))
    reached = np.abs(np.arange(-total, total + 1)) >= abs(int(np.sum(differences)))
    return float(min(chance[reached].sum(), 1.0))


def barnard_p(successes: Sequence[int], trials: Sequence[int]) -> float:
    """Two-sided p of Barnard's exact test for two independent counts."""
    from scipy.stats import barnard_exact

    (a, b), (n, m) = successes, trials
    return float(min(barnard_exact(np.array([[a, b], [n - a, m - b]], np.int64)).pvalue, 1.0))


def score_p(rates: np.ndarray, trials: np.ndarray) -> float:
    """Two-sided p for two policies with `rates (2, K)` and `trials (2, K)`: mean difference over its spread if equal."""
    pooled = (rates * trials).sum(0) / trials.sum(0)
    spread = math.sqrt((pooled * (1 - pooled) * (1 / trials).sum(0)).sum())
    return 2 * NormalDist().cdf(-abs((rates[0] - rates[1]).sum()) / spread) if spread > 0 else 1.0


def holm(p: np.ndarray) -> np.ndarray:
    """p values `(m,)` corrected for being m (Holm 1979); NaN stays NaN and counts for none."""
    corrected, known = np.full(len(p), np.nan), np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


def e_process(differences: np.ndarray) -> np.ndarray:
    """Wealth `(F,)` after each of the frames, from bets on `differences (F,)` in [-1, 1] with mean 0 if none is better."""
    with np.errstate(over="ignore"):
        return np.exp(np.cumsum(np.log1p(BETS * np.asarray(differences, float)[:, None]), 0)).mean(1)


def paired_interval(differences: np.ndarray, tasks: np.ndarray, confidence: float) -> tuple[float, float]:
    """Interval of the mean over tasks of a paired difference in [-1, 1], `differences (F,)` on frames of `tasks (F,)`.

    As Agresti and Min (Statistics in Medicine 24, 2005) for matched pairs, with two pseudo-frames that differ by half a
    success either way; here with the spread inside tasks, each task counting alike, and Student's t.
    """
    from scipy.special import stdtrit

    number, counts = np.unique(tasks, return_inverse=True)[1], np.bincount(tasks)[np.unique(tasks)]
    frames, share = len(differences), counts[number]
    weights = frames / (len(counts) * share)
    centre = np.bincount(number, differences)[number] / share
    # One frame of a task says nothing of the spread inside it: then the spread is taken around zero.
    square = np.where(share > 1, (differences - centre) ** 2 * share / np.maximum(share - 1, 1), differences**2)
    mean = (weights * differences).sum() / (frames + 2)
    spread = math.sqrt((weights**2 * square).sum() + 1) / (frames + 2)
    half = stdtrit(max(frames - len(counts), 1), 0.5 + confidence / 2) * spread
    return max(mean - half, -1.0), min(mean + half, 1.0)


def letters(names: Sequence[str], different: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Compact letter display: two of `names` (best first) share a letter unless the pair is in `different`.

    Insert and absorb (Piepho, J. Comput. Graph. Stat. 13, 2004).
    """
    groups = [frozenset(names)]
    for one, other in different:
        split = [group - {gone} if {one, other} <= group else group for group in groups for gone in (one, other)]
        groups = [group for group in dict.fromkeys(split) if not any(group < larger for larger in split)]
    groups.sort(key=lambda group: sorted(names.index(name) for name in group))
    return {name: "".join(_letter(i) for i, group in enumerate(groups) if name in group) for name in names}


def _letter(i: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[i] if i < 26 else f"({i + 1})"


# ---- all pairs of one side ------------------------------------------------------------------------------------------


def paired_rows(
    found: Outcomes, policies: Sequence[str], side: str, confidence: float, order: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Every pair of policies on the trials they share; the better one is `policy_a`.

    `order (N,)` is that in which the trials were run, for the sequential test; by default tasks take turns.
    """
    order = _interleaved(found.tasks) if order is None else order
    pairs = list(itertools.combinations(range(len(policies)), 2))
    threshold = len(pairs) / (1 - confidence)
    rows = [_paired_row(found, a, b, order, confidence, threshold) for a, b in pairs]
    return _finished(rows, pairs, policies, side, confidence)


def _paired_row(
    found: Outcomes, a: int, b: int, order: np.ndarray, confidence: float, threshold: float
) -> dict[str, Any]:
    shared = order[(found.counts[[a, b]] > 0).all(0)[order]]
    successes, counts = found.successes[[a, b]][:, shared], found.counts[[a, b]][:, shared]
    rates, tasks = successes / counts, found.tasks[shared]
    rate_a, rate_b = (np.mean([rate[tasks == k].mean() for k in np.unique(tasks)]) for rate in rates)
    difference = rates[0] - rates[1]
    # Rates have small denominators; brought to a common one the test stays exact.
    scale = math.lcm(*np.unique(counts).astype(int).tolist())
    wealth = e_process(difference)
    over = np.flatnonzero(wealth >= threshold)
    # Below twice the stake there is nothing to extrapolate from.
    growth = math.log(wealth[-1]) / len(shared) if wealth[-1] > 2 else 0.0
    low, high = paired_interval(difference, tasks, confidence)
    return {
        "n": len(shared), "success_a": rate_a, "success_b": rate_b, "difference": rate_a - rate_b, "low": low,
        "high": high, "a_better": int((difference > st.TIE).sum()), "b_better": int((difference < -st.TIE).sum()),
        "p": mcnemar_p(np.rint(difference * scale)), "test": PAIRED, "e_value": wealth[-1],
        "stop_after": over[0] + 1 if len(over) else None,
        "frames_needed": None if len(over) or not growth else math.ceil(math.log(threshold) / growth),
    }  # fmt: skip


def _interleaved(tasks: np.ndarray) -> np.ndarray:
    """Order of the trials in which tasks take turns, as a sequential comparison would run them."""
    turn = np.zeros(len(tasks), int)
    for task in np.unique(tasks):
        turn[tasks == task] = np.arange((tasks == task).sum())
    return np.lexsort((tasks, turn))


def unpaired_rows(
    rate: np.ndarray, n: np.ndarray, policies: Sequence[str], side: str, confidence: float
) -> list[dict[str, Any]]:
    """Every pair of policies from rates and trial counts `(P, K)` alone.

    Interval: Newcombe's hybrid of the two Wilson intervals (Statistics in Medicine 17, 1998), each task counting alike.
    """
    means, size = rate.mean(1), rate.shape[1] ** 2 / (1 / n).sum(1)
    low, high = st.wilson(means, size, confidence)
    pairs, rows = list(itertools.combinations(range(len(policies)), 2)), []
    for a, b in pairs:
        difference = means[a] - means[b]
        down = math.hypot(means[a] - low[a], high[b] - means[b])
        up = math.hypot(high[a] - means[a], means[b] - low[b])
        rows.append({
            "n": int(n[[a, b]].sum(1).min()), "success_a": means[a], "success_b": means[b], "difference": difference,
            "low": max(difference - down, -1), "high": min(difference + up, 1),
        } | _unpaired_test(rate[[a, b]], n[[a, b]]))  # fmt: skip
    return _finished(rows, pairs, policies, side, confidence)


def _unpaired_test(rates: np.ndarray, trials: np.ndarray) -> dict[str, Any]:
    total = trials.sum(1)
    if np.ptp(trials, 1).any() or total.max() > MOST_TRIALS:
        return {"p": score_p(rates, trials), "test": SCORE}
    successes = (rates * trials).sum(1)
    # Printed rates are rounded; half successes stay half and round down: partial credit is no success.
    whole = np.abs(successes - np.rint(successes)) < 0.3
    counts = np.where(whole, np.rint(successes), np.floor(successes))
    note = None if whole.all() else "partial credit: successes rounded down for the test"
    return {"p": barnard_p(counts, total), "test": BARNARD, "note": note}


def _finished(
    rows: list[dict[str, Any]], pairs: list[tuple[int, int]], policies: Sequence[str], side: str, confidence: float
) -> list[dict[str, Any]]:  # fmt: skip
    """Correct the p values, and turn every pair so that the better policy comes first."""
    corrected, turned = holm(np.array([row["p"] for row in rows])), []
    for row, (a, b), p in zip(rows, pairs, corrected):
        row |= {"side": side, "p_holm": p, "different": bool(p <= 1 - confidence + st.TIE)}
        row |= {"policy_a": policies[a], "policy_b": policies[b]}
        turned.append(_turned(row) if row["difference"] < 0 else row)
    return turned


def _turned(row: dict[str, Any]) -> dict[str, Any]:
    swapped = {"difference": -row["difference"], "low": -row["high"], "high": -row["low"]}
    for name in ("policy", "success"):
        swapped |= {f"{name}_a": row[f"{name}_b"], f"{name}_b": row[f"{name}_a"]}
    if "a_better" in row:
        swapped |= {"a_better": row["b_better"], "b_better": row["a_better"]}
    return row | swapped


# ---- tables ---------------------------------------------------------------------------------------------------------


def comparison_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """`comparisons.csv`: one row per side and pair of policies."""
    import pandas as pd

    table = pd.DataFrame(rows, columns=COLUMNS)
    whole = ["n", "a_better", "b_better", "stop_after", "frames_needed"]
    return table.astype(dict.fromkeys(whole, "Int64"))


def add_groups(ranking: pd.DataFrame, comparisons: pd.DataFrame) -> pd.DataFrame:
    """`ranking` with columns `group_imagined` and `group_real`: policies that share a letter are not told apart."""
    ranking = ranking.copy()
    for side in ("imagined", "real"):
        rows = comparisons[comparisons["side"] == side]
        ranking[f"group_{side}"] = None
        if len(rows):
            different = list(rows.loc[rows["different"], ["policy_a", "policy_b"]].itertuples(index=False, name=None))
            compared = ranking[ranking["policy"].isin({*rows["policy_a"], *rows["policy_b"]})]
            names = compared.sort_values([f"rank_{side}", "policy"], kind="stable")["policy"].tolist()
            ranking[f"group_{side}"] = ranking["policy"].map(letters(names, different))
    return ranking


# ---- trials as they are run -----------------------------------------------------------------------------------------

TRIAL_COLUMNS = ["policy", "task", "frame", "success"]
EXAMPLES = """FILE.csv has one row per trial, in the order in which they were run:
  policy, task   names
  frame          which first frame; policies are compared on those they share, rows of the same frame are repeats
  success        0 or 1, or partial credit between

examples:
  python -m workflow_src.analysis.comparisons --trials today.csv --out comparisons.csv
"""


def load_trials(file: Path) -> tuple[Outcomes, list[str]]:
    """Outcomes and policies of a CSV (see `EXAMPLES`), trials in the order of the file. `UserError` says what is wrong."""
    import pandas as pd

    try:
        table = pd.read_csv(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable CSV ({' '.join(str(error).split())})") from None
    if missing := [column for column in TRIAL_COLUMNS if column not in table]:
        raise UserError(f"{file}: has no column {', '.join(missing)}; columns: {', '.join(TRIAL_COLUMNS)}")
    values = pd.to_numeric(table["success"], errors="coerce")
    bad = ~((values >= 0) & (values <= 1))
    if bad.any():
        row = table[bad].iloc[0]
        raise UserError(f"{file}: success of {row.policy}, {row.task}, frame {row.frame} is {row.success}; it must be "
                        "between 0 and 1")  # fmt: skip
    policies = list(dict.fromkeys(table["policy"].astype(str)))
    if len(policies) < 2:
        raise UserError(f"{file}: holds {len(policies)} policies; it takes two to compare")
    trials = list(dict.fromkeys(zip(table["task"].astype(str), table["frame"].astype(str))))
    tasks = list(dict.fromkeys(task for task, _ in trials))
    sums, counts = np.zeros((2, len(policies), len(trials)))
    for policy, task, frame, value in zip(table["policy"].astype(str), table["task"].astype(str),
                                          table["frame"].astype(str), values):  # fmt: skip
        place = policies.index(policy), trials.index((task, frame))
        sums[place] += value
        counts[place] += 1
    for a, b in itertools.combinations(range(len(policies)), 2):
        if not ((counts[a] > 0) & (counts[b] > 0)).any():
            raise UserError(
                f"{file}: {policies[a]} and {policies[b]} share no frame; try both on the same first frames"
            )
    return Outcomes(sums, counts, np.array([tasks.index(task) for task, _ in trials])), policies


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.analysis.comparisons",
        description="Compare policies on the trials run so far: exact tests, intervals, and whether to go on.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--trials", type=Path, required=True, metavar="FILE.csv", help="trials in the order they were run"
    )
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--confidence", type=float, default=0.95, help="of intervals and tests (default: %(default)s)")
    options = parser.parse_args()
    if not 0 < options.confidence < 1:
        raise UserError(f"--confidence: {options.confidence:g} is not between 0 and 1; 0.95 is usual")
    found, policies = load_trials(options.trials)
    rows = paired_rows(found, policies, "real", options.confidence, np.arange(len(found.tasks)))
    for row in rows:
        if row["stop_after"]:
            verdict = f"decided after {row['stop_after']} frames"
        elif row["frames_needed"]:
            verdict = f"go on; perhaps decided after {row['frames_needed']} frames"
        else:
            verdict = "go on; no difference in sight"
        print(f"{row['policy_a']} - {row['policy_b']}: {row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}] on "
              f"{row['n']} shared frames, p {row['p']:.2g}; {verdict}")  # fmt: skip
    if options.out:
        with atomic_path(options.out) as temporary:
            comparison_table(rows).to_csv(temporary, index=False, float_format="%.9g")


if __name__ == "__main__":
    run_cli(main)
