"""How far an imagined ranking can be trusted: agreement rows with intervals, references and what each number means.

As a program: the report on anybody's table of real and imagined success rates.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from workflow_src.analysis import resampling
from workflow_src.analysis import statistics as st
from workflow_src.analysis.records import Outcomes
from workflow_src.analysis.resampling import BOOTSTRAP, SAME_FRAMES, Paired
from workflow_src.analysis.rows import (
    CELLS,
    FIXED,
    MEANS,
    NEW_TASKS,
    NO_INTERVAL,
    NOISE_FREE,
    about,
    make_row,
    median_and_interval,
    percentile_interval,
    reach,
)
from workflow_src.common.errors import run_cli

EXAMPLES = """FILE.csv has one row per policy and task, and these columns (more are kept):
  policy, task        names
  real, imagined      success rates in [0, 1]: successes / trials, partial credit included where a lab gives it
  n_real, n_imagined  trials behind them, whole numbers
A table without the columns imagined and n_imagined gets its intervals, comparisons and ceilings alone.

examples:
  python -m workflow_src.analysis.agreement --pairs config/published/worldgym.csv --out results/published/worldgym
"""
REPLICA_RANGE = "percentiles of simulated replicas"
POSTERIOR = "posterior of the true rates; reaches to the perfect value where a perfect replica cannot be ruled out"
TASK_BOOTSTRAP = "percentile bootstrap over tasks, stretched to hold the value"
TOO_FEW_TASKS = f"none: fewer than {resampling.FEWEST_TASKS} tasks are not resampled"
# Ceilings come from this many simulated replicas, sampled permutation tests from this many orderings.
REPLICAS, ORDERINGS = 2000, 100_000
# A correlation over fewer tasks than this is not worth a row per policy.
FEWEST_PER_POLICY = 4

# statistic → (function, has an interval, convention)
METRICS: dict[str, tuple[st.Metric, bool, str]] = {
    "pearson": (st.pearson, True, "Pearson r"),
    "spearman": (st.spearman, True, "Pearson r of average ranks"),
    "kendall": (st.kendall, True, "tau-b"),
    "mmrv": (st.mmrv, True, "SimplerEnv: mmrv(imagined, real), strict XOR, gap on the real side; 0 is best"),
    "mmrv_sign": (st.mmrv_sign, True, "as mmrv, but only opposite strict orders violate; 0 is best"),
    "mae": (st.mae, True, "mean |imagined - real|"),
    "rmse": (st.rmse, True, "root mean square of imagined - real"),
    "bias": (st.bias, True, "mean of imagined - real; positive: the world model is optimistic"),
}
DECISIONS: dict[str, tuple[st.Metric, bool, str]] = {
    "best_policy_hit": (st.best_hit, False, "share of the imagined best (ties kept) that is also really best"),
    "regret": (st.regret, True, "real success lost by taking the imagined best policy"),
    "pairs_right": (lambda i, r: st.pairs(i, r)[0], False, "pairs that reality does not tie, ordered alike"),
    "pairs_wrong": (lambda i, r: st.pairs(i, r)[1], False, "pairs that reality does not tie, ordered otherwise"),
    "pairs_tied": (lambda i, r: st.pairs(i, r)[2], False, "pairs that only imagination ties"),
}
# Statistics with noise-aware rows → their value for a perfect world model.
PERFECT = {"pearson": 1.0, "spearman": 1.0, "mmrv": 0.0}
CEILINGS = ("pearson", "spearman", "mmrv", "mae", "rmse")

Summary = Callable[[np.ndarray], np.ndarray]  # cells (..., P, K) → points (..., n)


def means(cells: np.ndarray) -> np.ndarray:
    """Policy means, each task counting alike."""
    return cells.mean(-1)


def flat(cells: np.ndarray) -> np.ndarray:
    """All cells."""
    return cells.reshape(*cells.shape[:-2], -1)


# ---- rows -----------------------------------------------------------------------------------------------------------


def policy_rows(paired: Paired, scope: str, confidence: float, generator: np.random.Generator) -> list[dict[str, Any]]:
    """Agreement of policy means (each task counts alike), with decisions, permutation p, leave-one-out and ceilings."""
    points = (means(paired.imagined), means(paired.real))
    # Drawn apart: a row more must not move the numbers of the others.
    (aside,) = generator.spawn(1)
    rows = _metric_rows(METRICS | DECISIONS, paired, means, confidence, "policies")
    rows.append(_permutation_row(*points, generator))
    if 2 <= len(paired.tasks) <= st.MOST_SUBSETS:
        hits = st.best_hit_of_subsets(paired.imagined, paired.real)
        rows.append(
            make_row("best_policy_hit_any_tasks", hits.mean(), "mean of best_policy_hit over all choices of tasks")
        )
    for name in PERFECT:
        low, high = st.leave_one_out(METRICS[name][0], *points)
        value, how = METRICS[name][0](*points), "range when each policy is left out once"
        rows.append(make_row(f"{name}_leave_one_out", value, METRICS[name][2], low, high, how))
    rows += _left_out_rows(paired, means)
    rows += _ceiling_rows(paired.real, paired.n_real, paired.n_imagined, means, confidence, generator)
    new = paired.truth and {
        name: METRICS[name][0](paired.truth.means[..., 0], paired.truth.means[..., 1]) for name in PERFECT
    }
    rows += _noise_free_rows(paired, means, confidence, aside, new=new)
    rows += _new_task_rows(paired, means, PERFECT, confidence, aside)
    return about(rows, scope, len(paired.policies), MEANS, paired.pairing)


def cell_rows(paired: Paired, scope: str, confidence: float, generator: np.random.Generator) -> list[dict[str, Any]]:
    """Agreement over policy x task cells, and what of it a predictor without knowledge of tasks would reach."""
    (aside,) = generator.spawn(1)
    rows = _metric_rows(METRICS, paired, flat, confidence, "cells")
    for name, axis, text in (("policy", -1, "each policy's"), ("task", -2, "each task's")):

        def centred(cells: np.ndarray, axis: int = axis) -> np.ndarray:
            return st.within(cells, axis)

        convention = f"Pearson r after {text} mean is removed from both sides"
        metric = {f"pearson_within_{name}": (st.pearson, True, convention)}
        rows += _metric_rows(metric, paired, centred, confidence, "cells")
        rows += _noise_free_rows(paired, centred, confidence, aside, metric, {f"pearson_within_{name}": 1.0})
    rows += _trivial_rows(paired)
    rows += _line_rows(paired, confidence)
    rows += _left_out_rows(paired, flat)
    rows += _ceiling_rows(paired.real, paired.n_real, paired.n_imagined, flat, confidence, generator)
    new = paired.truth and {"pearson": paired.truth.pearson_over_new_cells()}
    rows += _noise_free_rows(paired, flat, confidence, aside, new=new)
    # Drawn twice, a task takes another's place in MMRV's maximum: the bootstrap held the truth in 69 % of simulations.
    rows += _new_task_rows(paired, flat, ("pearson", "spearman"), confidence, aside)
    return about(rows, scope, paired.real.size, CELLS, paired.pairing)


def credit_rows(paired: Paired, confidence: float) -> list[dict[str, Any]]:
    """Agreement of partial credit, which is what WorldGym correlates: of policy means, and of policy x task cells."""
    rows = []
    for scope, n, what, summary, noun in (
        ("all policies, partial credit", len(paired.policies), "mean partial credit over tasks", means, "policies"),
        ("cells, partial credit", paired.real.size, "partial credit of a policy on a task", flat, "cells"),
    ):
        rows += about(_metric_rows(METRICS, paired, summary, confidence, noun), scope, n, what, paired.pairing)
    return rows


def within_rows(paired: Paired) -> list[dict[str, Any]]:
    """Agreement inside each task (over policies; means and sums over tasks) and inside each policy (over tasks)."""
    points = (paired.imagined.T, paired.real.T)
    rows = []
    if len(paired.policies) > 1:
        for name, (metric, _, convention) in (METRICS | DECISIONS).items():
            values = metric(*points)
            count = name.startswith("pairs_")
            known = values[~np.isnan(values)]
            value = known.sum() if count else known.mean() if len(known) else math.nan
            text = f"{convention}; over policies, {'sum' if count else 'mean'} of the {len(known)} tasks that have it"
            rows.append(make_row(name, value, text))
    rows = about(rows, "within tasks", len(paired.tasks), "success on one task", paired.pairing)
    if len(paired.tasks) < FEWEST_PER_POLICY:
        return rows
    for policy, imagined, real in zip(paired.policies, paired.imagined, paired.real):
        some = [make_row(name, METRICS[name][0](imagined, real), f"{METRICS[name][2]}; over tasks") for name in PERFECT]
        rows += about(some, f"tasks of {policy}", len(paired.tasks), "success on one task", paired.pairing)
    return rows


def ceiling_rows(
    real: np.ndarray, n_real: np.ndarray, confidence: float, generator: np.random.Generator
) -> list[dict[str, Any]]:
    """For real results `(P, K)` alone: what a perfect world model would reach, tried as often as reality was."""
    rows = []
    for scope, n, what, summary in (
        ("all policies", len(real), MEANS, means), ("policy x task cells", real.size, CELLS, flat)
    ):  # fmt: skip
        found = _ceiling_rows(real, n_real, n_real, summary, confidence, generator)
        rows += about(found, scope, n, what, "no imagined results")
    return rows


def trial_rows(imagined: Outcomes, real: Outcomes, weights: np.ndarray, confidence: float) -> list[dict[str, Any]]:
    """Whether single rollouts end alike in both worlds, and how often they would if only the cells' rates were right.

    `imagined` and `real` hold the same trials; `weights (B, N)` resample them. Every cell counts alike.
    """
    there = (imagined.counts > 0) & (real.counts > 0)
    imagined, real = (
        Outcomes(found.successes * there, found.counts * there, found.tasks) for found in (imagined, real)
    )
    rates = [found.successes / np.maximum(found.counts, 1) for found in (imagined, real)]
    alike = Outcomes(np.where(there, _match(*rates), 0.0), there.astype(float), imagined.tasks)
    values = _trial_values(alike.cells()[0], imagined.cells()[0], real.cells()[0])
    draws = _trial_values(*(resampling.frame_draws(found, weights) for found in (alike, imagined, real)))
    conventions = {
        "agreement": "share of trials that end alike in both worlds, mean over cells",
        "agreement_by_chance": "reference: the same rates per cell, but independent outcomes",
        "kappa": "(agreement - by chance) / (1 - by chance); 0: rates alone, 1: every trial",
    }
    rows = [
        make_row(name, values[name], convention, *percentile_interval(draws[name], confidence, values[name]), BOOTSTRAP)
        for name, convention in conventions.items()
    ]
    return about(rows, "trials", int(there.sum()), "outcome of a policy on one of these first frames", SAME_FRAMES)


def _match(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Chance that independent outcomes with these success rates are equal."""
    return one * other + (1 - one) * (1 - other)


def _trial_values(alike: np.ndarray, imagined: np.ndarray, real: np.ndarray) -> dict[str, Any]:
    """Agreement, agreement by chance and kappa from rates (..., P, K)."""
    agreement, chance = np.nanmean(alike, (-2, -1)), np.nanmean(_match(imagined, real), (-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        kappa = np.where(chance < 1, (agreement - chance) / (1 - chance), np.nan)
    values = {"agreement": agreement, "agreement_by_chance": chance, "kappa": kappa}
    return {name: value if np.ndim(value) else float(value) for name, value in values.items()}


# ---- kinds of rows --------------------------------------------------------------------------------------------------


def _metric_rows(metrics: dict, paired: Paired, summary: Summary, confidence: float, noun: str) -> list[dict[str, Any]]:
    points, rows = (summary(paired.imagined), summary(paired.real)), []
    for name, (metric, has_interval, convention) in metrics.items():
        value, interval = float(metric(*points)), (math.nan, math.nan, NO_INTERVAL)
        if has_interval:
            draws = metric(summary(paired.imagined_draws), summary(paired.real_draws))
            interval = (*percentile_interval(draws, confidence, value), paired.interval)
        if len(points[0]) < 2:
            convention += f"; undefined below two {noun}"
        rows.append(make_row(name, value, convention, *interval))
    return rows


def _noise_free_rows(
    paired: Paired, summary: Summary, confidence: float, generator: np.random.Generator, metrics: dict = METRICS,
    perfect: dict[str, float] = PERFECT, new: dict[str, np.ndarray] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Statistics of the true rates, as far as the trials tell them: on these tasks, and `new` draws for tasks like them."""
    if paired.truth is None:
        return []
    rows = []
    replicas = [summary(side) for side in paired.truth.replicas(paired.n_imagined, paired.n_real, generator)]
    for name, best in perfect.items():
        metric, _, convention = metrics[name]
        observed, copies = metric(summary(paired.imagined), summary(paired.real)), metric(*replicas)
        kinds = {"noise_free": (metric(summary(paired.truth.imagined), summary(paired.truth.real)), convention, FIXED)}
        if new and name in new:
            population = f"{convention}; population of tasks like these, normal on the logit scale"
            kinds["noise_free_new_tasks"] = (new[name], population, NEW_TASKS)
        for kind, (draws, text, tasks) in kinds.items():
            value, low, high = median_and_interval(draws, confidence)
            low, high = reach(low, high, best, observed, copies, confidence)
            rows.append(make_row(f"{name}_{kind}", value, text, low, high, POSTERIOR, tasks, NOISE_FREE))
    return rows


def _new_task_rows(
    paired: Paired, summary: Summary, names: Iterable[str], confidence: float, generator: np.random.Generator
) -> list[dict[str, Any]]:
    """The observed statistics, had other tasks been drawn."""
    draws, rows = resampling.task_draws(paired, len(paired.real_draws), generator), []
    for name in names:
        metric, _, convention = METRICS[name]
        value, interval = float(metric(summary(paired.imagined), summary(paired.real))), (math.nan, math.nan)
        if draws is not None:
            interval = percentile_interval(metric(*map(summary, draws)), confidence, value)
        how = TOO_FEW_TASKS if draws is None else TASK_BOOTSTRAP
        rows.append(make_row(f"{name}_new_tasks", value, convention, *interval, how, tasks=NEW_TASKS))
    return rows


def _left_out_rows(paired: Paired, summary: Summary) -> list[dict[str, Any]]:
    rows = []
    for name in PERFECT:
        metric, _, convention = METRICS[name]

        def of_cells(imagined: np.ndarray, real: np.ndarray, metric: st.Metric = metric) -> np.ndarray:
            return metric(summary(imagined), summary(real))

        value = of_cells(paired.imagined, paired.real)
        low, high = st.leave_one_task_out(of_cells, paired.imagined, paired.real)
        how = "range when each task is left out once"
        rows.append(make_row(f"{name}_leave_one_task_out", value, convention, low, high, how))
    return rows


def _permutation_row(imagined: np.ndarray, real: np.ndarray, generator: np.random.Generator) -> dict[str, Any]:
    if len(real) <= st.EXACT_POLICIES:
        value, how = st.permutation_p(imagined, real), "all orderings enumerated"
    else:
        value, how = st.sampled_permutation_p(imagined, real, generator, ORDERINGS), f"{ORDERINGS} orderings sampled"
    return make_row("permutation_p", value, f"one-sided, of Pearson r over policies; {how}", digits=12)


def _trivial_rows(paired: Paired) -> list[dict[str, Any]]:
    real = flat(paired.real)
    texts = {
        "pearson_trivial_real": (paired.real, "predicts each policy's real mean for every task"),
        "pearson_trivial_imagined": (paired.imagined, "predicts each policy's imagined mean for every task"),
    }
    return [
        make_row(name, st.pearson(flat(st.trivial_prediction(cells)), real), f"reference: {text}")
        for name, (cells, text) in texts.items()
    ]


def _line_rows(paired: Paired, confidence: float) -> list[dict[str, Any]]:
    """The line through the cells, how many come near, and the interval that is often printed."""
    imagined, real = flat(paired.imagined), flat(paired.real)
    slope, intercept = st.least_squares(imagined, real)
    rows = [
        make_row("slope", slope, "least squares of imagined on real rates; noise in the real rates flattens it"),
        make_row("intercept", intercept, "of the same line"),
    ]
    for points in (10, 20):
        share = st.share_within(imagined, real, points / 100)
        rows.append(
            make_row(f"within_{points}_points", share, f"share of cells with |imagined - real| <= {points} points")
        )
    r = float(st.pearson(imagined, real))
    low, high = (math.nan, math.nan)
    if len(real) > 3 and abs(r) < 1:
        low, high = st.fisher_interval(r, len(real), confidence)
    convention = "Fisher's z as if cells were independent points: they share policies and tasks, so it is no interval"
    rows.append(make_row("pearson_if_independent", r, f"reference: {convention}", low, high, "Fisher z"))
    return rows


def _ceiling_rows(
    real: np.ndarray, n_real: np.ndarray, n_imagined: np.ndarray, summary: Summary, confidence: float,
    generator: np.random.Generator,
) -> list[dict[str, Any]]:  # fmt: skip
    """What a perfect replica of reality would reach."""
    imagined, real = st.replica_draws(real, n_real, n_imagined, REPLICAS, generator)
    convention = "reference: a perfect replica measured on other first frames, as many trials; mean of draws"
    rows = []
    for name in CEILINGS:
        values = METRICS[name][0](summary(imagined), summary(real))
        mean = float(np.nanmean(values)) if not np.isnan(values).all() else math.nan
        rows.append(
            make_row(f"{name}_ceiling", mean, convention, *percentile_interval(values, confidence, mean), REPLICA_RANGE)
        )
    return rows


# ---- command line ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Entry point."""
    from workflow_src.analysis.report import write_report

    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.analysis.agreement",
        description="Report how well imagined success rates agree with real ones, from a CSV of your own numbers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=Path, required=True, metavar="FILE.csv", help="rates per policy and task")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for tables and figures")
    parser.add_argument("--confidence", type=float, default=0.95, help="of all intervals (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn at random (default: %(default)s)")
    options = parser.parse_args()
    write_report(options.pairs, options.out, options.confidence, options.seed)


if __name__ == "__main__":
    run_cli(main)
