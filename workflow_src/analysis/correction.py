"""Success rates corrected for a judge's errors, from labels on a sample of the videos that it judged.

Symbols as in Lee et al., "How to correctly report LLM-as-a-judge evaluations" (arXiv 2511.21140): p is the share that the
judge calls successes, q1 its sensitivity, q0 its specificity, θ the true success rate; then θ = (p + q0 - 1) / (q0 + q1 - 1).

Labels are drawn within strata of what the judge said, so what they measure directly is how often each verdict is true. The two
forms are one identity: with q0 and q1 of the same, weighted labels, θ is p · P(true | said success) + (1 - p) · P(true | said
failure).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from workflow_src.analysis import statistics as st
from workflow_src.analysis.records import IMAGINED, KEY
from workflow_src.common import seeds

if TYPE_CHECKING:
    import pandas as pd

HUMAN = "human"
NO_LABELS = "no labels on generated video"
DRAWS = 4000
LEAST = 1.1  # q0 + q1 of a judge that can be corrected; a coin has 1


# ---- the formula ----------------------------------------------------------------------------------------------------


def corrected(p: float, q0: float, q1: float) -> float:
    """θ = (p + q0 - 1) / (q0 + q1 - 1), within [0, 1]. Raises `ValueError` when q0 + q1 is at most 1.1."""
    if not q0 + q1 > LEAST:
        raise ValueError(f"q0 + q1 = {q0 + q1:.2f} is at most {LEAST}: the verdicts say too little")
    return float(np.clip((p + q0 - 1) / (q0 + q1 - 1), 0, 1))


def corrected_interval(
    p: float, n: float, q0: float, m0: float, q1: float, m1: float, confidence: float
) -> tuple[float, float]:
    """Interval of `corrected` that covers all three samples: n judged videos, m0 labelled failures, m1 successes.

    Adjusted Wald interval of arXiv 2511.21140, after Lang and Reiczigel, Prev. Vet. Med. 113 (2014). Sizes may be
    effective ones. Raises `ValueError` as `corrected` does.
    """
    corrected(p, q0, q1)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    n, m0, m1 = n + z * z, m0 + 2, m1 + 2
    p, q0, q1 = (p * (n - z * z) + z * z / 2) / n, (q0 * (m0 - 2) + 1) / m0, (q1 * (m1 - 2) + 1) / m1
    youden = q0 + q1 - 1
    theta = (p + q0 - 1) / youden
    v0, v1 = q0 * (1 - q0) / m0, q1 * (1 - q1) / m1
    shift = 2 * z * z * (theta * v1 - (1 - theta) * v0)
    half = z * np.sqrt(p * (1 - p) / n + (1 - theta) ** 2 * v0 + theta**2 * v1) / youden
    return float(np.clip(theta + shift - half, 0, 1)), float(np.clip(theta + shift + half, 0, 1))


def jeffreys(rate: np.ndarray, n: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Jeffreys interval `(low, high)` of binomial rates, reaching 0 and 1 where all agree (Brown, Cai, DasGupta 2001).

    `n` may be an effective sample size; n = 0 gives (0, 1).
    """
    from scipy.special import betaincinv

    tail, hits = (1 - confidence) / 2, rate * n
    low = np.where(hits > 0, betaincinv(hits + 0.5, n - hits + 0.5, tail), 0.0)
    return low, np.where(hits < n, betaincinv(hits + 0.5, n - hits + 0.5, 1 - tail), 1.0)


def stratified(
    p: np.ndarray, n: np.ndarray, true: np.ndarray, m: np.ndarray, confidence: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(θ, low, high)` from labels drawn by verdict, for any number of policies at once.

    `p`, `n` `(...)`: share judged a success, of how many videos. `true`, `m` `(..., 2)`: share of true successes among the
    labelled videos that the judge called a failure, and a success, and their numbers; m = 0 where it never said so. The
    interval joins those of the three rates (method of variance estimates recovery, Zou and Donner 2008), so it is not empty
    where all labels agree. Of the few labels, Jeffreys' intervals: Wilson's missed rare errors more often in simulation.
    """
    true = np.where(m > 0, true, [0.0, 1.0])
    low, high = jeffreys(true, m, confidence)
    p_low, p_high = st.wilson(p, n, confidence)
    share, gap = np.stack([1 - p, p], -1), true[..., 1] - true[..., 0]
    rate = (share * true).sum(-1)
    down, up = np.where(gap >= 0, p - p_low, p_high - p), np.where(gap >= 0, p_high - p, p - p_low)
    below = np.sqrt(((share * (true - low)) ** 2).sum(-1) + (gap * down) ** 2)
    above = np.sqrt(((share * (high - true)) ** 2).sum(-1) + (gap * up) ** 2)
    return rate, np.clip(rate - below, 0, 1), np.clip(rate + above, 0, 1)


# ---- labels ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JudgeRates:
    """Sensitivity q1 and specificity q0 from weighted labels, with effective numbers m1 and m0 of labels behind them."""

    q1: float
    m1: float
    q0: float
    m0: float
    positive: int  # labelled successes, and
    negative: int  # failures, as they were counted

    @property
    def youden(self) -> float:
        return self.q0 + self.q1


def labelled(judgements: pd.DataFrame, judge: str, world: str = IMAGINED) -> pd.DataFrame:
    """Videos of `world` with a human label and a valid verdict of `judge`: `policy, trial_id, said, label, weight`."""
    rows = judgements[(judgements["world"] == world) & judgements["valid"]]
    people = rows[rows["judge"] == HUMAN].set_index(KEY)
    weight = people["weight"].astype(float).fillna(1.0) if "weight" in people else 1.0
    given = people.assign(label=people["success_at_end"] >= 0.5, weight=weight)[["label", "weight"]]
    said = rows[rows["judge"] == judge].assign(said=lambda table: table["success_at_end"] >= 0.5)
    return said[[*KEY, "task", "said"]].join(given, on=KEY, how="inner")


def verdict_truth(labels: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of labelled videos called a failure (index 0) and a success (1): share of true successes, effective number, weight.

    Unequal weights and repeats of a first frame make labels worth less than their number (Kish 1965).
    """
    true, size, weight = np.full(2, np.nan), np.zeros(2), np.zeros(2)
    for verdict in (0, 1):
        part = labels[labels["said"] == bool(verdict)]
        w = part["weight"].to_numpy(float)
        if len(part):
            weight[verdict] = w.sum()
            true[verdict] = w @ part["label"].to_numpy(float) / w.sum()
            distinct = len(part.drop_duplicates(["policy", "trial_id"]))
            size[verdict] = w.sum() ** 2 / (w @ w) * distinct / len(part)
    return true, size, weight


def judge_rates(labels: pd.DataFrame) -> JudgeRates:
    """Sensitivity and specificity on the population that the weights stand for; NaN without labelled successes (failures).

    Effective sizes by the delta method on the odds, with a half pseudo-label each way: a rare verdict's few labels then
    count for as little as they tell, even where all of them agree.
    """
    true, size, weight = verdict_truth(labels)
    positive, negative = int(labels["label"].sum()), int((~labels["label"]).sum())
    q1, m1 = _recall(true, size, weight)
    q0, m0 = _recall(1 - true[::-1], size[::-1], weight[::-1])
    return JudgeRates(q1 if positive else np.nan, m1, q0 if negative else np.nan, m0, positive, negative)


def _recall(true: np.ndarray, size: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """Share of the true videos that are in stratum 1, and the effective number of labels behind it."""
    found = np.where(weight > 0, true, 0.0) * weight
    rate = float(found[1] / found.sum()) if found.sum() else np.nan
    if not weight.all():
        return rate, float(size.sum())
    smooth = (true * size + 0.5) / (size + 1)
    share = smooth * weight / (smooth * weight).sum()
    variance = ((1 - smooth) / smooth / (size + 1)).sum()  # of the log odds of `share`
    return rate, float(1 / (share.prod() * variance))


def rate_intervals(labels: pd.DataFrame, confidence: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Intervals of `judge_rates`' q1 and q0 from weighted labels; (0, 1) where the judge says one thing only.

    Draws from the Jeffreys posteriors of how often either verdict falls and is true: a few labels that stand for many videos
    leave the rate wide open, even where all of them agree.
    """
    true, size, weight = verdict_truth(labels)
    if not weight.all():
        return (0.0, 1.0), (0.0, 1.0)
    generator, tails = seeds.rng(0, "rate intervals"), [(1 - confidence) / 2, (1 + confidence) / 2]
    missed, found = generator.beta(true * size + 0.5, (1 - true) * size + 0.5, (DRAWS, 2)).T
    said = generator.beta(weight[1] + 0.5, weight[0] + 0.5, DRAWS)
    sensitivity = said * found / (said * found + (1 - said) * missed)
    specificity = (1 - said) * (1 - missed) / ((1 - said) * (1 - missed) + said * (1 - found))
    q1, q0 = (np.quantile(rate, tails) for rate in (sensitivity, specificity))
    return (float(q1[0]), float(q1[1])), (float(q0[0]), float(q0[1]))


# ---- all policies ---------------------------------------------------------------------------------------------------


def refusal(rates: JudgeRates) -> str:
    """Why this judge's rates cannot be corrected; empty if they can."""
    if rates.positive + rates.negative == 0:
        return NO_LABELS
    if not (rates.positive and rates.negative):
        return f"refused: no {'failure' if rates.positive else 'success'} among the labels on generated video"
    if not rates.youden > LEAST:
        return f"refused: sensitivity + specificity = {rates.youden:.2f} on generated video, at most {LEAST}"
    return ""


def correct_policies(
    labels: pd.DataFrame, policies: list[str], p: np.ndarray, n: np.ndarray, confidence: float
) -> pd.DataFrame:
    """Corrected success of each policy from labels on its own generated videos, one row per policy.

    `labels` as from `labelled`; `p`, `n` `(P,)`: judged success and effective number of rollouts. Columns `policy,
    n_labels, success_corrected, success_corrected_low, success_corrected_high, corrected_note`. No policy is corrected by the
    errors that the judge made on another: a judge errs more on some than on others, and intervals that pool them then miss
    the truth of some policies more often than not (benchmarks/correction.md).
    """
    import pandas as pd

    refused = refusal(judge_rates(labels))
    rows = []
    for name, judged, size in zip(policies, p, n):
        own = labels[labels["policy"] == name]
        true, m, _ = verdict_truth(own)
        values, note = (np.nan,) * 3, refused or _unlabelled(judged, m)
        if not note:
            values = tuple(float(part) for part in stratified(judged, size, true, m, confidence))
        rows.append((name, len(own), *values, note))
    names = ["success_corrected", "success_corrected_low", "success_corrected_high"]
    return pd.DataFrame(rows, columns=["policy", "n_labels", *names, "corrected_note"])


def _unlabelled(p: float, m: np.ndarray) -> str:
    """Which of the judge's verdicts on a policy nobody has labelled."""
    if not m.sum():
        return f"{NO_LABELS} of this policy"
    if not m[0] and p < 1:
        return "no labels where the judge says failure"
    if not m[1] and p > 0:
        return "no labels where the judge says success"
    return ""
