"""How far an imagined ranking can be trusted: agreement rows with intervals, references and what each number means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from workflow_src.analysis import statistics as st
from workflow_src.analysis.records import Outcomes

SAME_FRAMES = "same first frames"
OTHER_FRAMES = "same tasks, other first frames"
# Noise makes resamples disagree more than the sample did, so a percentile interval can miss the value it belongs to.
BOOTSTRAP = "percentile bootstrap over first frames, stretched to hold the value"
REPLICA_RANGE = "percentiles of simulated replicas"
NO_INTERVAL = "none"
# Ceilings come from this many simulated replicas, sampled permutation tests from this many orderings.
REPLICAS, ORDERINGS = 2000, 100_000

# statistic → (function, has a bootstrap interval, convention)
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
LEFT_OUT = ("pearson", "spearman", "mmrv")
CEILINGS = ("pearson", "spearman", "mmrv", "mae")


@dataclass(frozen=True)
class Paired:
    """Real and imagined success rates of P policies on K tasks, all float64.

    `imagined`, `real` and the trial counts are `(P, K)`; `imagined_draws` and `real_draws` are bootstrap resamples
    `(B, P, K)` of the rates. `pairing` says whether both sides started from the same first frames.
    """

    policies: tuple[str, ...]
    tasks: tuple[str, ...]
    imagined: np.ndarray
    real: np.ndarray
    n_imagined: np.ndarray
    n_real: np.ndarray
    imagined_draws: np.ndarray
    real_draws: np.ndarray
    pairing: str = SAME_FRAMES

    def only(self, policies: Sequence[str]) -> Paired:
        """The same, for some of the policies."""
        keep = [self.policies.index(policy) for policy in policies]
        parts = ("imagined", "real", "n_imagined", "n_real", "imagined_draws", "real_draws")
        return replace(self, policies=tuple(policies), **{name: getattr(self, name)[..., keep, :] for name in parts})


# ---- resampling -----------------------------------------------------------------------------------------------------


def frame_weights(tasks: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Bootstrap weights `(B, N)`: how often each trial is drawn when first frames are drawn anew within each task.

    One weight matrix for all policies, worlds and judges: a hard first frame is hard for everyone.
    """
    weights = np.zeros((resamples, len(tasks)))
    for task in np.unique(tasks):
        members = np.flatnonzero(tasks == task)
        weights[:, members] = generator.multinomial(len(members), np.full(len(members), 1 / len(members)), resamples)
    return weights


def frame_draws(found: Outcomes, weights: np.ndarray) -> np.ndarray:
    """Success rates `(B, P, K)` under `weights (B, N)`. A cell that a resample leaves empty keeps its observed rate."""
    observed, _ = found.cells()
    draws = np.empty((len(weights), *observed.shape))
    for task in range(observed.shape[1]):
        members = found.tasks == task
        counts = weights[:, members] @ found.counts[:, members].T
        successes = weights[:, members] @ found.successes[:, members].T
        draws[..., task] = np.where(counts > 0, successes / np.maximum(counts, 1e-12), observed[:, task])
    return draws


def binomial_draws(rate: np.ndarray, n: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Success rates `(B, P, K)` of new measurements, where only rates and trial counts `(P, K)` are known."""
    return generator.binomial(n.astype(np.int64), rate, size=(resamples, *rate.shape)) / n


# ---- rows -----------------------------------------------------------------------------------------------------------


def policy_rows(paired: Paired, scope: str, confidence: float, generator: np.random.Generator) -> list[dict[str, Any]]:
    """Agreement of policy means (each task counts alike), with decisions, permutation p, leave-one-out and ceilings."""
    points = (paired.imagined.mean(-1), paired.real.mean(-1))
    draws = (paired.imagined_draws.mean(-1), paired.real_draws.mean(-1))
    n = len(paired.policies)
    rows = _metric_rows(METRICS | DECISIONS, points, draws, confidence, "policies")
    rows.append(_permutation_row(*points, generator))
    for name in LEFT_OUT:
        low, high = st.leave_one_out(METRICS[name][0], *points)
        rows.append(_row(f"{name}_leave_one_out", METRICS[name][0](*points), low, high,
                         METRICS[name][2], "range when each policy is left out once"))  # fmt: skip
    rows += _ceiling_rows(paired, lambda cells: cells.mean(-1), confidence, generator)
    estimand = "success over these tasks, tasks fixed; observed rates, sampling noise of the first frames included"
    return [row | {"scope": scope, "n": n, "estimand": estimand, "pairing": paired.pairing} for row in rows]


def cell_rows(paired: Paired, scope: str, confidence: float, generator: np.random.Generator) -> list[dict[str, Any]]:
    """Agreement over policy x task cells, and what of it a predictor without knowledge of tasks would reach."""
    points, draws = (
        (_flat(paired.imagined), _flat(paired.real)),
        (_flat(paired.imagined_draws), _flat(paired.real_draws)),
    )
    rows = _metric_rows(METRICS, points, draws, confidence, "cells")
    for name, axis, text in (("policy", -1, "each policy's"), ("task", -2, "each task's")):
        centred = [st.within(values, axis) for values in (paired.imagined, paired.real)]
        resampled = [st.within(values, axis) for values in (paired.imagined_draws, paired.real_draws)]
        value = float(st.pearson(*centred))
        low, high = _interval(st.pearson(*resampled), confidence, value)
        convention = f"Pearson r after {text} mean is removed from both sides"
        rows.append(_row(f"pearson_within_{name}", value, low, high, convention, BOOTSTRAP))
    rows += _trivial_rows(paired)
    rows += _ceiling_rows(paired, _flat, confidence, generator)
    estimand = "success of a policy on one of these tasks; observed rates, sampling noise of the first frames included"
    return [
        row | {"scope": scope, "n": paired.real.size, "estimand": estimand, "pairing": paired.pairing} for row in rows
    ]


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
    draws = _trial_values(*(frame_draws(found, weights) for found in (alike, imagined, real)))
    conventions = {
        "agreement": "share of trials that end alike in both worlds, mean over cells",
        "agreement_by_chance": "reference: the same rates per cell, but independent outcomes",
        "kappa": "(agreement - by chance) / (1 - by chance); 0: rates alone, 1: every trial",
    }
    estimand = "the outcome of a policy on one of these first frames"
    return [
        _row(name, values[name], *_interval(draws[name], confidence, values[name]), convention, BOOTSTRAP)
        | {"scope": "trials", "n": int(there.sum()), "estimand": estimand, "pairing": SAME_FRAMES}
        for name, convention in conventions.items()
    ]


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


def _flat(cells: np.ndarray) -> np.ndarray:
    return cells.reshape(*cells.shape[:-2], -1)


def _metric_rows(metrics: dict, points: tuple, draws: tuple, confidence: float, noun: str) -> list[dict[str, Any]]:
    rows = []
    for name, (metric, has_interval, convention) in metrics.items():
        value = float(metric(*points))
        low, high = _interval(metric(*draws), confidence, value) if has_interval else (math.nan, math.nan)
        if len(points[0]) < 2:
            convention += f"; undefined below two {noun}"
        rows.append(_row(name, value, low, high, convention, BOOTSTRAP if has_interval else NO_INTERVAL))
    return rows


def _interval(values: np.ndarray, confidence: float, value: float) -> tuple[float, float]:
    """Percentile interval of the resamples in which the statistic is defined, stretched to hold `value`."""
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(np.fmin(low, value)), float(np.fmax(high, value))


def _permutation_row(imagined: np.ndarray, real: np.ndarray, generator: np.random.Generator) -> dict[str, Any]:
    if len(real) <= st.EXACT_POLICIES:
        value, how = st.permutation_p(imagined, real), "all orderings enumerated"
    else:
        value, how = st.sampled_permutation_p(imagined, real, generator, ORDERINGS), f"{ORDERINGS} orderings sampled"
    convention = f"one-sided, of Pearson r over policies; {how}"
    return _row("permutation_p", value, math.nan, math.nan, convention, NO_INTERVAL, digits=12)


def _trivial_rows(paired: Paired) -> list[dict[str, Any]]:
    real = _flat(paired.real)
    texts = {
        "pearson_trivial_real": (paired.real, "predicts each policy's real mean for every task"),
        "pearson_trivial_imagined": (paired.imagined, "predicts each policy's imagined mean for every task"),
    }
    return [
        _row(
            name,
            st.pearson(_flat(st.trivial_prediction(cells)), real),
            math.nan,
            math.nan,
            f"reference: {text}",
            NO_INTERVAL,
        )
        for name, (cells, text) in texts.items()
    ]


def _ceiling_rows(paired: Paired, summarise, confidence: float, generator: np.random.Generator) -> list[dict[str, Any]]:
    imagined, real = st.replica_draws(paired.real, paired.n_real, paired.n_imagined, REPLICAS, generator)
    convention = "reference: a perfect replica measured on other first frames, as many trials; mean of draws"
    rows = []
    for name in CEILINGS:
        values = METRICS[name][0](summarise(imagined), summarise(real))
        mean = float(np.nanmean(values)) if not np.isnan(values).all() else math.nan
        rows.append(_row(f"{name}_ceiling", mean, *_interval(values, confidence, mean), convention, REPLICA_RANGE))
    return rows


def _row(
    statistic: str, value: float, low: float, high: float, convention: str, interval: str, digits: int = 6
) -> dict[str, Any]:
    # Adding zero turns the -0.0 that rounding leaves into 0.
    value, low, high = (round(float(number), digits) + 0.0 for number in (value, low, high))
    return {
        "statistic": statistic, "value": value, "low": low, "high": high, "interval": interval, "convention": convention
    }  # fmt: skip
