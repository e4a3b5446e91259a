"""One row of `agreement.csv`: a number, its interval, and what both of them are about."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from workflow_src.analysis import statistics as st

NO_INTERVAL = "none"
# What a number is about: whether these tasks or more like them, and whether the noise of the trials is part of it.
MEANS, CELLS = "mean success over tasks", "success of a policy on a task"
FIXED, NEW_TASKS = "these tasks, fixed", "tasks as a sample"
OBSERVED, NOISE_FREE = "observed rates, sampling noise included", "noise-free rates"


def percentile_interval(values: np.ndarray, confidence: float, value: float) -> tuple[float, float]:
    """Percentile interval of the resamples in which the statistic is defined, stretched to hold `value`."""
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(np.fmin(low, value)), float(np.fmax(high, value))


def median_and_interval(values: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """Median, low and high of posterior draws in which the statistic is defined."""
    values = values[~np.isnan(values)]
    if not len(values):
        return (math.nan,) * 3
    return tuple(map(float, np.quantile(values, [0.5, 0.5 - confidence / 2, 0.5 + confidence / 2])))


def make_row(
    statistic: str, value: float, convention: str, low: float = math.nan, high: float = math.nan,
    interval: str = NO_INTERVAL, tasks: str = FIXED, which: str = OBSERVED, digits: int = 6,
) -> dict[str, Any]:  # fmt: skip
    """A row before `about` has completed it; numbers are rounded to `digits`."""
    # Adding zero turns the -0.0 that rounding leaves into 0.
    value, low, high = (round(float(number), digits) + 0.0 for number in (value, low, high))
    return {
        "statistic": statistic, "value": value, "low": low, "high": high, "interval": interval,
        "estimand": f"{tasks}; {which}", "convention": convention,
    }  # fmt: skip


def about(rows: list[dict[str, Any]], scope: str, n: int, what: str, pairing: str) -> list[dict[str, Any]]:
    """Complete `rows` with what they have in common."""
    return [
        row | {"scope": scope, "n": n, "pairing": pairing, "estimand": f"{what}; {row['estimand']}"} for row in rows
    ]


def reach(
    low: float, high: float, best: float, observed: float, replicas: np.ndarray, confidence: float
) -> tuple[float, float]:
    """Stretch an interval to the `best` value unless perfect replicas `(B,)` hardly ever do as badly as was observed.

    A posterior gives no weight to perfection itself, so without this its interval could never hold it.
    """
    replicas = replicas[~np.isnan(replicas)]
    worse = replicas <= observed + st.TIE if best > 0.5 else replicas >= observed - st.TIE
    if math.isnan(observed) or not len(replicas) or worse.mean() <= 0.5 - confidence / 2:
        return low, high
    return (low, best) if best > 0.5 else (best, high)
