"""Agreement between imagined and real success rates: the metrics and nothing else, in pure numpy.

All metrics take `imagined` and `real` as float arrays `(..., n)` of rates in [0, 1] and work on the last axis, so
that a bootstrap of B resamples is one call on `(B, n)`. Undefined values (a constant side has no correlation) are NaN.

B resamples · P policies · K tasks · n points to compare (policies or cells).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

# Rates are ratios of small counts: differences below this are rounding, so they count as ties.
TIE = 1e-9
# Up to here all orderings are enumerated (in two halves); beyond, they are sampled.
EXACT_POLICIES = 12
# All choices of tasks are tried up to here.
MOST_SUBSETS = 17

Metric = Callable[[np.ndarray, np.ndarray], np.ndarray]


# ---- one rate -------------------------------------------------------------------------------------------------------


def wilson(rate: np.ndarray, n: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Wilson score interval `(low, high)` of a binomial rate; `n` may be an effective, non-integer sample size > 0.

    Wilson, J. Am. Stat. Assoc. 22 (1927). Unlike rate ± z·SE it stays inside [0, 1] and is not empty at 0 or 1.
    """
    rate, n = np.asarray(rate, float), np.asarray(n, float)
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def effective_size(successes: np.ndarray, counts: np.ndarray) -> float:
    """How many independent rollouts `(C,)` clusters with `counts` rollouts each are worth, between C and their sum.

    Rollouts that share a first frame (repeats) are not new samples. Their number is divided by the design effect
    (Kish 1965): variance of the clustered mean over that of independent rollouts. Where all rollouts agree the design
    effect cannot be estimated, and clusters are counted.
    """
    successes, counts = np.asarray(successes, float)[counts > 0], np.asarray(counts, float)[counts > 0]
    clusters, total = len(counts), counts.sum()
    if clusters == total or clusters < 2:
        return float(clusters)
    rate = successes.sum() / total
    if rate <= 0 or rate >= 1:
        return float(clusters)
    variance = clusters / (clusters - 1) * np.sum((successes - rate * counts) ** 2) / total**2
    return float(np.clip(rate * (1 - rate) / max(variance, 1e-12), clusters, total))


# ---- correlation ----------------------------------------------------------------------------------------------------


def pearson(imagined: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Pearson correlation. SimplerEnv adds 1e-8 to the denominator, which changes no printed digit."""
    a, b = imagined - imagined.mean(-1, keepdims=True), real - real.mean(-1, keepdims=True)
    product = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(product > TIE**2, np.clip((a * b).sum(-1) / product, -1, 1), np.nan)


def spearman(imagined: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Spearman correlation: Pearson on average ranks."""
    return pearson(average_ranks(imagined), average_ranks(real))


def kendall(imagined: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Kendall's tau-b."""
    a, b = order_signs(imagined), order_signs(real)
    product = np.sqrt(np.abs(a).sum((-2, -1)) * np.abs(b).sum((-2, -1)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(product > 0, (a * b).sum((-2, -1)) / product, np.nan)


def order_signs(values: np.ndarray) -> np.ndarray:
    """`(..., n)` → int8 `(..., n, n)` of -1, 0, 1: the sign of value i minus value j, with rounding taken as a tie."""
    gap = values[..., :, None] - values[..., None, :]
    return (gap > TIE).astype(np.int8) - (gap < -TIE).astype(np.int8)


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 (smallest) along the last axis; ties share their mean rank."""
    signs = order_signs(values)
    return ((signs > 0) + 0.5 * (signs == 0)).sum(-1) + 0.5


def competition_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 (largest value); ties share the best rank, as in a sports table. int64 `(..., n)`."""
    return (order_signs(values) < 0).sum(-1) + 1


# ---- rank violation -------------------------------------------------------------------------------------------------


def mmrv(imagined: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Mean maximum rank violation as SimplerEnv computes it: `mmrv(sim, real)`, strict XOR, real-side gap.

    Mean over i of the largest |R_i - R_j| over those j with (S_i > S_j) XOR (R_i > R_j). A pair that only `imagined`
    ties is a violation in one of its two directions. Not symmetric in its arguments. Source: arXiv 2405.05941 and
    SimplerEnv's `metrics.py` at 4ab7178.
    """
    violated = (order_signs(imagined) > 0) != (order_signs(real) > 0)
    return _mean_maximum(violated, real)


def mmrv_sign(imagined: np.ndarray, real: np.ndarray) -> np.ndarray:
    """The sign variant of `mmrv`: a violation is (S_i - S_j)(R_i - R_j) < 0, so a tie on either side is none."""
    return _mean_maximum(order_signs(imagined) * order_signs(real) < 0, real)


def _mean_maximum(violated: np.ndarray, real: np.ndarray) -> np.ndarray:
    gap = np.abs(real[..., :, None] - real[..., None, :])
    return np.where(violated, gap, 0.0).max(-1).mean(-1)


# ---- distance -------------------------------------------------------------------------------------------------------


def mae(imagined: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Mean absolute difference of the rates."""
    return np.abs(imagined - real).mean(-1)


def rmse(imagined: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Root mean squared difference of the rates."""
    return np.sqrt(((imagined - real) ** 2).mean(-1))


def bias(imagined: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Mean of imagined minus real: positive where the world model is optimistic."""
    return (imagined - real).mean(-1)


def least_squares(imagined: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope and intercept of the least-squares line of imagined on real rates; NaN where `real` is constant."""
    a, b = imagined - imagined.mean(-1, keepdims=True), real - real.mean(-1, keepdims=True)
    square = (b * b).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = np.where(square > TIE**2, (a * b).sum(-1) / square, np.nan)
    return slope, imagined.mean(-1) - slope * real.mean(-1)


def share_within(imagined: np.ndarray, real: np.ndarray, distance: float) -> np.ndarray:
    """Share of the points whose rates differ by at most `distance`."""
    return (np.abs(imagined - real) <= distance + TIE).mean(-1)


# ---- decisions ------------------------------------------------------------------------------------------------------


def best_hit(imagined: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Share of the policies that tie for best in imagination that are also (tied) best in reality: 1, 0 or between."""
    chosen, best = _is_best(imagined), _is_best(real)
    return (chosen & best).sum(-1) / chosen.sum(-1)


def regret(imagined: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Real success given away by taking the policy that looks best in imagination (mean over those tied for it)."""
    chosen = _is_best(imagined)
    return real.max(-1) - np.where(chosen, real, 0.0).sum(-1) / chosen.sum(-1)


def _is_best(values: np.ndarray) -> np.ndarray:
    return values > values.max(-1, keepdims=True) - TIE


def pairs(imagined: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs that reality does not tie, as `(right, wrong, tied)`: ordered alike, otherwise, tied by imagination."""
    signs = order_signs(imagined) * order_signs(real)
    right, wrong = (signs > 0).sum((-2, -1)) // 2, (signs < 0).sum((-2, -1)) // 2
    untied = (order_signs(real) != 0).sum((-2, -1)) // 2
    return right, wrong, untied - right - wrong


# ---- references -----------------------------------------------------------------------------------------------------


def permutation_p(imagined: np.ndarray, real: np.ndarray) -> float:
    """Share of all n! assignments of imagined rates `(n,)` to policies whose Pearson r is at least the observed.

    One-sided and exact, the observed assignment included: never below 1 / n!. Enumerates n! sums as pairs of half sums
    (which values go to the first half of the policies, in which order), so n = 12 takes a second. Raises `ValueError`
    beyond `EXACT_POLICIES`.
    """
    n = len(real)
    if n > EXACT_POLICIES:
        raise ValueError(f"{n} policies are too many for enumeration (at most {EXACT_POLICIES})")
    a, b = imagined - imagined.mean(), real - real.mean()
    if not (np.ptp(a) > TIE and np.ptp(b) > TIE):
        return math.nan
    half = n // 2
    first, second = _permutations(half), _permutations(n - half)
    target = a @ b - 1e-12
    reached = 0
    for chosen in itertools.combinations(range(n), half):
        rest = np.setdiff1d(np.arange(n), chosen)
        left = a[list(chosen)][first] @ b[:half]
        right = np.sort(a[rest][second] @ b[half:])
        reached += int((len(right) - np.searchsorted(right, target - left, side="left")).sum())
    return reached / math.factorial(n)


def _permutations(n: int) -> np.ndarray:
    return np.array(list(itertools.permutations(range(n))), dtype=np.int64).reshape(math.factorial(n), n)


def sampled_permutation_p(imagined: np.ndarray, real: np.ndarray, generator: np.random.Generator, n: int) -> float:
    """`permutation_p` from `n` random assignments plus the observed one (Phipson and Smyth 2010), for many policies."""
    a, b = imagined - imagined.mean(), real - real.mean()
    if not (np.ptp(a) > TIE and np.ptp(b) > TIE):
        return math.nan
    shuffled = generator.permuted(np.broadcast_to(a, (n, len(a))), axis=1)
    return float(((shuffled @ b >= a @ b - 1e-12).sum() + 1) / (n + 1))


def fisher_interval(r: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a correlation `r` of `n` > 3 independent points by Fisher's z. Cells that share policies are not."""
    z, half = math.atanh(r), NormalDist().inv_cdf(0.5 + confidence / 2) / math.sqrt(n - 3)
    return math.tanh(z - half), math.tanh(z + half)


def leave_one_out(metric: Metric, imagined: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Smallest and largest value of `metric` when each of the n points is left out once. NaN below three points."""
    n = len(real)
    if n < 3:
        return math.nan, math.nan
    keep = np.array([[j for j in range(n) if j != i] for i in range(n)])
    values = metric(imagined[keep], real[keep])
    values = values[~np.isnan(values)]
    return (float(values.min()), float(values.max())) if len(values) else (math.nan, math.nan)


def leave_one_task_out(metric: Metric, imagined: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Smallest and largest `metric` of cells `(P, K)` when each task is left out once; `metric` takes cells."""
    tasks = imagined.shape[-1]
    if tasks < 3:
        return math.nan, math.nan
    values = np.array([metric(np.delete(imagined, k, -1), np.delete(real, k, -1)) for k in range(tasks)], float)
    values = values[~np.isnan(values)]
    return (float(values.min()), float(values.max())) if len(values) else (math.nan, math.nan)


def best_hit_of_subsets(imagined: np.ndarray, real: np.ndarray) -> np.ndarray:
    """`best_hit` of the policy means for every non-empty choice of tasks: `(2^K - 1,)` for cells `(P, K)`."""
    tasks = imagined.shape[-1]
    if tasks > MOST_SUBSETS:
        raise ValueError(f"{tasks} tasks have too many subsets (at most {MOST_SUBSETS})")
    chosen = np.arange(1, 2**tasks)[:, None] >> np.arange(tasks) & 1
    size = chosen.sum(1, keepdims=True)
    return best_hit(chosen @ imagined.T / size, chosen @ real.T / size)


def within(values: np.ndarray, axis: int) -> np.ndarray:
    """Cells `(..., P, K)` with each policy's (`axis` -1) or task's (-2) mean removed, flat `(..., P*K)`."""
    centred = values - values.mean(axis, keepdims=True)
    return centred.reshape(*centred.shape[:-2], -1)


def trivial_prediction(cells: np.ndarray) -> np.ndarray:
    """What a predictor says that knows only each policy's mean over the cells `(..., P, K)`: that mean everywhere."""
    return np.broadcast_to(cells.mean(-1, keepdims=True), cells.shape)


def replica_draws(
    rate: np.ndarray, n_rate: np.ndarray, n_imagined: np.ndarray, draws: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Two independent measurements of the same policies: what a perfect replica of reality would give.

    `rate (P, K)` was measured with `n_rate (P, K)` trials. True rates are drawn from the Jeffreys posterior of that
    measurement, then measured with `n_imagined` and with `n_rate` trials. Returns `(imagined, real)`, both `(B, P, K)`.
    """
    successes = rate * n_rate
    size = (draws, *rate.shape)
    truth = generator.beta(successes + 0.5, n_rate - successes + 0.5, size=size)
    n_imagined, n_rate = np.asarray(n_imagined, np.int64), np.asarray(n_rate, np.int64)
    return generator.binomial(n_imagined, truth) / n_imagined, generator.binomial(n_rate, truth) / n_rate
