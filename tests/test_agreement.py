"""The agreement statistics against worked values from published numbers (WorldGym, SIMPLER, WM-PolicyEval)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import stats

from workflow_src.analysis import agreement
from workflow_src.analysis import statistics as st
from workflow_src.analysis.records import Outcomes

# WorldGym (arXiv 2506.00613 v3): successes out of 10 per task, (real, world model), RT-1-X, Octo-Base, OpenVLA.
WORLDGYM = np.array([
    [(1, 1), (5, 1), (10, 7)], [(0, 0), (1, 2), (10, 6)], [(1, 3), (1, 3), (7, 9)], [(1, 0.5), (3.5, 3.5), (7.5, 8)],
    [(1, 3), (4, 6), (9, 9.5)], [(3, 2), (0.5, 1.5), (7.5, 7.5)], [(2, 0.5), (1, 3), (4.5, 6)],
    [(1, 0), (0, 1), (8, 4)],
    [(2, 3), (6, 1), (8, 5)], [(0, 1), (0, 0), (7, 4)], [(1, 2), (0, 3), (5, 5)], [(3, 1), (0, 1), (1, 6)],
    [(6, 5), (0, 2), (4, 4)], [(0.5, 0), (0, 0), (4.5, 6)], [(2.5, 0.5), (4, 5), (7.5, 9)],
    [(1.5, 2.5), (2.5, 2.5), (10, 10)], [(5, 1.5), (5.5, 5), (9.5, 8.5)],
]).transpose(2, 1, 0) / 10  # fmt: skip
REAL, IMAGINED = WORLDGYM  # (3 policies, 17 tasks) each

# SIMPLER's REAL_PERF and SIMPLER_PERF: (real, simulated) per task, policies as in its tables.
SIMPLER = {
    "pick_coke_can": ([0.907, 0.853, 0.920, 0.760, 0.133, 0.293], [0.787, 0.857, 0.710, 0.567, 0.027, 0.170]),
    "move_near": ([0.733, 0.633, 0.583, 0.450, 0.017, 0.350], [0.779, 0.442, 0.354, 0.317, 0.050, 0.042]),
    "open_drawer": ([0.333, 0.815, 0.704, 0.519, 0.000, 0.148], [0.157, 0.601, 0.463, 0.296, 0.000, 0.009]),
    "close_drawer": ([0.630, 0.926, 0.889, 0.741, 0.000, 0.519], [0.343, 0.861, 0.667, 0.891, 0.278, 0.444]),
    "place_apple": ([0.074, 0.185, 0.185, 0.407, 0.000, 0.000], [0.037, 0.065, 0.130, 0.213, 0.000, 0.000]),
    "spoon_on_towel": ([0.000, 0.333, 0.417], [0.000, 0.125, 0.472]),
    "carrot_on_plate": ([0.000, 0.250, 0.083], [0.042, 0.083, 0.097]),
    "stack_cube": ([0.000, 0.000, 0.125], [0.000, 0.000, 0.042]),
    "put_eggplant_in_basket": ([0.000, 0.250, 0.400], [0.000, 0.431, 0.569]),
}
GOOGLE, WIDOWX = list(SIMPLER)[:5], list(SIMPLER)[5:]

# WM-PolicyEval (arXiv 2511.11520 v3): 3 policies x 4 tasks.
POLICYEVAL_REAL = np.array([0.10, 0.30, 0.15, 0.20, 0.15, 0.35, 0.10, 0.30, 0.30, 0.50, 0.50, 0.70])
POLICYEVAL = {
    "cosmos": ([0, 0.10, 0.20, 0.30, 0.10, 0.25, 0.20, 0.25, 0, 0.20, 0.40, 0.60],
               {"pearson": 0.719328, "spearman": 0.580645, "mmrv": 0.1625, "mmrv_sign": 0.154167, "mae": 0.1292}),
    "irasim": ([0, 0.05, 0, 0.30, 0.10, 0.10, 0.30, 0.30, 0.05, 0.15, 0.35, 0.20],
               {"pearson": 0.277248, "spearman": 0.349462, "mmrv": 0.295833, "mmrv_sign": 0.295833, "mae": 0.1958}),
}  # fmt: skip


def simpler(task: str) -> tuple[np.ndarray, np.ndarray]:
    real, simulated = SIMPLER[task]
    return np.array(simulated), np.array(real)


# ---- published values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "mmrv", "swapped", "pearson"), [
    ("pick_coke_can", 0.0313, 0.0618, 0.9754), ("close_drawer", 0.1233, 0.1133, 0.7712),
    ("spoon_on_towel", 0.0, 0.0, 0.8269), ("carrot_on_plate", 0.1113, 0.0093, 0.5714),
    ("put_eggplant_in_basket", 0.0, 0.0, 0.9894),
])  # fmt: skip
def test_simpler_per_task(task, mmrv, swapped, pearson):
    imagined, real = simpler(task)
    assert st.mmrv(imagined, real) == pytest.approx(mmrv, abs=6e-5)
    assert st.mmrv(real, imagined) == pytest.approx(swapped, abs=6e-5)
    assert st.pearson(imagined, real) == pytest.approx(pearson, abs=6e-5)


@pytest.mark.parametrize(("tasks", "mmrv", "means", "pooled_mmrv", "pooled_pearson"), [
    (GOOGLE, 0.0531, 0.9736271622403364, 0.1559, 0.9158), (WIDOWX, 0.0278, 0.9498357332381226, 0.0549, 0.8368)
])  # fmt: skip
def test_simpler_suites(tasks, mmrv, means, pooled_mmrv, pooled_pearson):
    imagined, real = (np.stack([simpler(task)[side] for task in tasks], 1) for side in (0, 1))
    assert np.mean([st.mmrv(*simpler(task)) for task in tasks]) == pytest.approx(mmrv, abs=6e-5)
    assert st.mmrv(imagined.mean(1), real.mean(1)) == 0
    assert st.pearson(imagined.mean(1), real.mean(1)) == pytest.approx(means, abs=1e-7)
    assert st.mmrv(imagined.ravel(), real.ravel()) == pytest.approx(pooled_mmrv, abs=6e-5)
    assert st.pearson(imagined.ravel(), real.ravel()) == pytest.approx(pooled_pearson, abs=6e-5)


def test_simpler_drawer_is_the_mean_of_opening_and_closing():
    imagined, real = (np.mean([simpler(task)[side] for task in ("open_drawer", "close_drawer")], 0) for side in (0, 1))
    assert st.mmrv(imagined, real) == pytest.approx(0.0555, abs=6e-5)
    assert st.pearson(imagined, real) == pytest.approx(0.9159, abs=6e-5)


def test_worldgym_pooled_cells():
    imagined, real = IMAGINED.ravel(), REAL.ravel()
    assert st.pearson(imagined, real) == pytest.approx(0.7847863229, abs=1e-9)
    assert st.spearman(imagined, real) == pytest.approx(0.740, abs=5e-4)
    assert st.kendall(imagined, real) == pytest.approx(0.580, abs=5e-4)
    assert st.mmrv(imagined, real) == pytest.approx(0.361765, abs=5e-7)
    assert st.mmrv_sign(imagined, real) == pytest.approx(0.35, abs=5e-7)
    assert [100 * f(imagined, real) for f in (st.mae, st.rmse, st.bias)] == pytest.approx([15.1, 20.1, -0.8], abs=0.05)


def test_worldgym_means_and_what_the_pooled_value_hides():
    assert 100 * REAL.mean(1) == pytest.approx([18.5, 20.0, 70.6], abs=0.05)
    assert 100 * IMAGINED.mean(1) == pytest.approx([15.6, 23.8, 67.4], abs=0.05)
    means = IMAGINED.mean(1), REAL.mean(1)
    assert st.pearson(*means) == pytest.approx(0.99235, abs=5e-6)
    assert st.permutation_p(*means) == pytest.approx(1 / 6)
    assert st.mmrv(*means) == 0
    assert st.pearson(st.within(IMAGINED, -1), st.within(REAL, -1)) == pytest.approx(0.465, abs=5e-4)
    assert st.pearson(st.within(IMAGINED, -2), st.within(REAL, -2)) == pytest.approx(0.841, abs=5e-4)
    trivial = [st.pearson(st.trivial_prediction(cells).ravel(), REAL.ravel()) for cells in (REAL, IMAGINED)]
    assert trivial == pytest.approx([0.758, 0.752], abs=5e-4)
    assert st.pearson(IMAGINED, REAL) == pytest.approx([0.516, 0.467, 0.442], abs=5e-4)
    assert st.mmrv(IMAGINED, REAL) == pytest.approx([0.226, 0.324, 0.394], abs=5e-4)


def test_worldgym_within_tasks():
    imagined, real = IMAGINED.T, REAL.T
    assert st.pearson(imagined, real).mean() == pytest.approx(0.843, abs=5e-4)
    assert st.mmrv(imagined, real).mean() == pytest.approx(0.0480, abs=5e-5)
    assert st.mmrv_sign(imagined, real).mean() == pytest.approx(0.0353, abs=5e-5)
    assert st.best_hit(imagined, real).sum() == 16
    assert np.flatnonzero(st.regret(imagined, real)).tolist() == [11]
    assert [int(part.sum()) for part in st.pairs(imagined, real)] == [40, 5, 4]


def test_worldgym_ceiling_of_a_perfect_replica():
    n = np.full(REAL.shape, 10)
    imagined, real = st.replica_draws(REAL, n, n, 2000, np.random.default_rng(0))
    r = st.pearson(imagined.reshape(2000, -1), real.reshape(2000, -1))
    assert [r.mean(), *np.quantile(r, [0.025, 0.975])] == pytest.approx([0.878, 0.809, 0.931], abs=0.006)
    mae = 100 * st.mae(imagined.reshape(2000, -1), real.reshape(2000, -1))
    assert [mae.mean(), *np.quantile(mae, [0.025, 0.975])] == pytest.approx([11.6, 8.6, 14.7], abs=0.3)


@pytest.mark.parametrize("model", POLICYEVAL)
def test_policyeval(model):
    imagined, expected = POLICYEVAL[model]
    for name, value in expected.items():
        assert getattr(st, name)(np.array(imagined), POLICYEVAL_REAL) == pytest.approx(value, abs=6e-5), name


# ---- properties -----------------------------------------------------------------------------------------------------

rates = some.lists(some.tuples(some.integers(0, 8), some.integers(0, 8)), min_size=2, max_size=7)


@given(rates)
@settings(max_examples=60, deadline=None)
def test_metrics_equal_plain_definitions(counts):
    imagined, real = np.array(counts).T / 8
    n = len(real)
    worst = [max([abs(real[i] - real[j]) for j in range(n) if (imagined[i] > imagined[j]) != (real[i] > real[j])],
                 default=0.0) for i in range(n)]  # fmt: skip
    assert st.mmrv(imagined, real) == pytest.approx(np.mean(worst))
    assert st.mmrv_sign(imagined, real) <= st.mmrv(imagined, real) + 1e-12
    assert st.average_ranks(real) == pytest.approx(stats.rankdata(real))
    if np.ptp(imagined) and np.ptp(real):
        assert st.spearman(imagined, real) == pytest.approx(stats.spearmanr(imagined, real).statistic)
        assert st.kendall(imagined, real) == pytest.approx(stats.kendalltau(imagined, real).statistic)
    else:
        assert np.isnan(st.pearson(imagined, real)) and np.isnan(st.kendall(imagined, real))


@given(some.lists(some.tuples(some.integers(0, 4), some.integers(0, 4)), min_size=2, max_size=6))
@settings(max_examples=40, deadline=None)
def test_permutation_p_equals_plain_enumeration(counts):
    imagined, real = np.array(counts, float).T
    p = st.permutation_p(imagined, real)
    if not (np.ptp(imagined) and np.ptp(real)):
        assert math.isnan(p)
        return
    centred = real - real.mean()
    sums = [np.array(order) @ centred for order in itertools.permutations(imagined)]
    assert p == pytest.approx(np.mean([total >= imagined @ centred - 1e-9 for total in sums]))


def test_a_batch_gives_what_single_calls_give():
    generator = np.random.default_rng(1)
    imagined, real = generator.integers(0, 6, (2, 20, 5)) / 5
    for metric in (st.pearson, st.spearman, st.kendall, st.mmrv, st.mmrv_sign, st.best_hit, st.regret):
        assert metric(imagined, real) == pytest.approx(
            [float(metric(a, b)) for a, b in zip(imagined, real)], nan_ok=True
        )


def test_sampled_permutations_come_near_the_exact_ones():
    generator = np.random.default_rng(2)
    imagined, real = generator.random((2, 7))
    sampled = st.sampled_permutation_p(imagined, real, generator, 20_000)
    assert sampled == pytest.approx(st.permutation_p(imagined, real), abs=0.02)


def test_leave_one_out_is_a_range():
    imagined, real = np.array([0.1, 0.2, 0.3, 0.9]), np.array([0.3, 0.2, 0.1, 0.9])
    low, high = st.leave_one_out(st.pearson, imagined, real)
    assert low == pytest.approx(-1.0)  # without the one good policy the order of the others is upside down
    assert high > st.pearson(imagined, real)


# ---- intervals ------------------------------------------------------------------------------------------------------


def test_wilson_worked_values():
    low, high = st.wilson(np.array([0.0, 0.5, 1.0]), np.array([10, 10, 10]))
    assert low == pytest.approx([0.0, 0.2366, 0.7225], abs=1e-4)
    assert high == pytest.approx([0.2775, 0.7634, 1.0], abs=1e-4)


def test_wilson_covers_the_true_rate():
    n = 102
    for truth in (0.05, 0.3, 0.85):
        k = np.arange(n + 1)
        low, high = st.wilson(k / n, np.full(n + 1, n))
        assert stats.binom.pmf(k, n, truth)[(low <= truth) & (truth <= high)].sum() >= 0.93


def test_repeats_are_not_new_samples():
    once = st.effective_size(np.array([1.0, 0, 1, 0]), np.ones(4))
    identical = st.effective_size(np.array([5.0, 0, 5, 0]), np.full(4, 5))
    independent = st.effective_size(np.array([2.0, 3, 2, 3]), np.full(4, 5))
    assert (once, identical, independent) == (4, 4, 20)
    assert st.effective_size(np.full(4, 5.0), np.full(4, 5)) == 4  # all alike: nothing tells how alike


def test_bootstrap_draws_are_paired_and_spread_like_sampling_noise():
    generator = np.random.default_rng(3)
    tasks = np.repeat([0, 1], 60)
    outcome = (generator.random((2, 120)) < 0.5).astype(float)
    found = Outcomes(outcome, np.ones((2, 120)), tasks)
    weights = agreement.frame_weights(tasks, 1500, generator)
    draws = agreement.frame_draws(found, weights)
    assert draws.shape == (1500, 2, 2) and (weights[:, :60].sum(1) == 60).all()
    rate, _ = found.cells()
    assert draws.mean(0) == pytest.approx(rate, abs=0.01)
    assert draws.std(0) == pytest.approx(np.sqrt(rate * (1 - rate) / 60), rel=0.1)
    same = agreement.frame_draws(Outcomes(outcome, np.ones((2, 120)), tasks), weights)
    assert (same == draws).all()  # the same frames are drawn for every world and judge


def test_report_on_published_cells_says_what_it_means():
    generator = np.random.default_rng(4)
    n = np.full(REAL.shape, 10)
    draws = [agreement.binomial_draws(cells, n, 400, generator) for cells in (IMAGINED, REAL)]
    paired = agreement.Paired(("rt1x", "octo", "openvla"), tuple(map(str, range(17))), IMAGINED, REAL, n, n, *draws,
                              agreement.OTHER_FRAMES)  # fmt: skip
    cells = {row["statistic"]: row for row in agreement.cell_rows(paired, "cells", 0.95, generator)}
    assert cells["pearson"]["value"] == 0.784786 and cells["pearson"]["n"] == 51
    assert cells["pearson_trivial_real"]["value"] == pytest.approx(0.758, abs=5e-4)
    assert "strict XOR" in cells["mmrv"]["convention"] and cells["mmrv"]["pairing"] == agreement.OTHER_FRAMES
    for row in cells.values():
        assert not row["low"] > row["value"] and not row["high"] < row["value"] and row["estimand"]
    two = paired.only(["openvla", "rt1x"])
    assert two.real[0] == pytest.approx(REAL[2]) and two.real_draws.shape == (400, 2, 17)
    means = {row["statistic"]: row["value"] for row in agreement.policy_rows(paired, "all", 0.95, generator)}
    assert means["permutation_p"] == pytest.approx(1 / 6) and means["best_policy_hit"] == 1 and means["regret"] == 0


# ---- single rollouts ------------------------------------------------------------------------------------------------


def outcomes(successes, counts=None, tasks=None) -> Outcomes:
    successes = np.atleast_2d(np.asarray(successes, float))
    counts = np.ones_like(successes) if counts is None else np.atleast_2d(np.asarray(counts, float))
    return Outcomes(successes, counts, np.zeros(successes.shape[1], int) if tasks is None else np.asarray(tasks))


def single(imagined: Outcomes, real: Outcomes, resamples: int = 200) -> dict[str, dict]:
    weights = agreement.frame_weights(imagined.tasks, resamples, np.random.default_rng(0))
    return {row["statistic"]: row for row in agreement.trial_rows(imagined, real, weights, 0.95)}


@pytest.mark.parametrize(
    ("imagined", "real", "alike", "chance", "kappa"),
    [
        ([1, 1, 0, 0], [1, 0, 1, 0], 0.5, 0.5, 0),  # the rates are right, the rollouts are not
        ([1, 1, 0, 0], [1, 1, 0, 0], 1, 0.5, 1),
        ([1, 1, 0, 0], [0, 0, 1, 1], 0, 0.5, -1),
        ([1, 1, 1, 0], [1, 1, 0, 0], 0.75, 0.5, 0.5),
        ([0, 0, 0, 0], [0, 0, 0, 0], 1, 1, math.nan),  # nothing to tell apart
    ],
)
def test_single_rollouts_by_hand(imagined, real, alike, chance, kappa):
    rows = single(outcomes(imagined), outcomes(real))
    found = [rows[name]["value"] for name in ("agreement", "agreement_by_chance", "kappa")]
    np.testing.assert_allclose(found, [alike, chance, kappa])
    assert rows["agreement"]["low"] <= alike <= rows["agreement"]["high"] and rows["agreement"]["n"] == 4


def test_single_rollouts_count_every_cell_alike_and_only_where_both_worlds_were_judged():
    imagined = outcomes([1, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 0], tasks=[0, 0, 0, 0, 1, 1])
    real = outcomes([1, 1, 0, 1, 0, 1], tasks=[0, 0, 0, 0, 1, 1])
    rows = single(imagined, real)
    assert rows["agreement"]["value"] == pytest.approx((0.75 + 0) / 2) and rows["agreement"]["n"] == 5
    assert rows["agreement_by_chance"]["value"] == pytest.approx((0.5 + 0) / 2)
    assert rows["kappa"]["value"] == pytest.approx((0.375 - 0.25) / 0.75, abs=1e-6)


def test_repeats_enter_as_rates():
    """Two imagined rollouts of a frame, one of which ends like the real one, agree by half."""
    rows = single(outcomes([1, 2], [2, 2]), outcomes([1, 1]))
    assert rows["agreement"]["value"] == pytest.approx(0.75)
