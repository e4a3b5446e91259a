"""The agreement statistics against plain definitions and scipy; worked values of publications: test_published_numbers.py."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import stats

from workflow_src.analysis import agreement, resampling
from workflow_src.analysis import statistics as st
from workflow_src.analysis.records import Outcomes

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
    weights = resampling.frame_weights(tasks, 1500, generator)
    draws = resampling.frame_draws(found, weights)
    assert draws.shape == (1500, 2, 2) and (weights[:, :60].sum(1) == 60).all()
    rate, _ = found.cells()
    assert draws.mean(0) == pytest.approx(rate, abs=0.01)
    assert draws.std(0) == pytest.approx(np.sqrt(rate * (1 - rate) / 60), rel=0.1)
    same = resampling.frame_draws(Outcomes(outcome, np.ones((2, 120)), tasks), weights)
    assert (same == draws).all()  # the same frames are drawn for every world and judge


# ---- rows ------------------------------------------------------------------------------------------------------------


def paired(policies: int = 4, tasks: int = 5, n: int = 20, seed: int = 4) -> resampling.Paired:
    """Rates of policies of rising skill, measured in two worlds that share their true rates."""
    generator = np.random.default_rng(seed)
    truth = np.clip(np.linspace(0.1, 0.9, policies)[:, None] + generator.normal(0, 0.1, (policies, tasks)), 0.02, 0.98)
    imagined, real = generator.binomial(n, truth, (2, policies, tasks)) / n
    names = [f"p{i}" for i in range(policies)], [f"t{i}" for i in range(tasks)]
    trials = np.full(truth.shape, float(n))
    return resampling.from_cells(*names, imagined, real, trials, trials, generator)


def rows_of(rows: list[dict]) -> dict[str, dict]:
    assert len({(row["scope"], row["statistic"]) for row in rows}) == len(rows)
    return {row["statistic"]: row for row in rows}


def test_every_row_says_what_it_is_about():
    found, generator = paired(), np.random.default_rng(0)
    rows = agreement.policy_rows(found, "policies", 0.95, generator) + agreement.within_rows(found)
    rows += agreement.cell_rows(found, "cells", 0.95, generator)
    assert len({(row["scope"], row["statistic"]) for row in rows}) == len(rows)
    for row in rows:
        assert row["pairing"] == resampling.OTHER_FRAMES and row["convention"] and row["interval"]
        tasks, rates = row["estimand"].split("; ")[1:]
        assert tasks == (agreement.NEW_TASKS if "new_tasks" in row["statistic"] else agreement.FIXED)
        assert rates == (agreement.NOISE_FREE if "noise_free" in row["statistic"] else agreement.OBSERVED)
        if not row["statistic"].endswith("leave_one_task_out"):
            assert not row["low"] > row["value"] and not row["high"] < row["value"], row


def test_fewer_than_eight_tasks_are_not_resampled():
    few, many = (rows_of(agreement.policy_rows(paired(tasks=k), "all", 0.95, np.random.default_rng(0))) for k in (7, 8))
    assert math.isnan(few["pearson_new_tasks"]["low"]) and "fewer than 8 tasks" in few["pearson_new_tasks"]["interval"]
    assert many["pearson_new_tasks"]["low"] <= many["pearson_new_tasks"]["value"] <= many["pearson_new_tasks"]["high"]
    assert not math.isnan(few["pearson_noise_free_new_tasks"]["low"])  # the model needs no resampling


def test_a_row_more_moves_no_other_number():
    found = paired()
    with_model = rows_of(agreement.cell_rows(found, "cells", 0.95, np.random.default_rng(3)))
    without = resampling.Paired(**{**found.__dict__, "truth": None})
    for name, row in rows_of(agreement.cell_rows(without, "cells", 0.95, np.random.default_rng(3))).items():
        np.testing.assert_equal(row, with_model[name])


def test_rows_of_some_policies_leave_out_the_others():
    found = paired()
    two = found.only(["p3", "p0"])
    assert two.real == pytest.approx(found.real[[3, 0]]) and two.real_draws.shape[1:] == (2, 5)
    assert two.truth.means.shape[1:] == (2, 2)
    rows = rows_of(agreement.policy_rows(two, "two", 0.95, np.random.default_rng(0)))
    assert rows["pearson"]["value"] == pytest.approx(1) and rows["pearson"]["n"] == 2
    assert rows["permutation_p"]["value"] == 0.5


def test_a_perfect_replica_is_not_ruled_out_by_noise():
    rows = rows_of(agreement.cell_rows(paired(n=10), "cells", 0.95, np.random.default_rng(0)))
    assert rows["pearson"]["value"] < rows["pearson_noise_free"]["value"] < rows["pearson_noise_free"]["high"] == 1
    assert rows["mmrv_noise_free"]["low"] == 0
    assert agreement.reach(0.5, 0.9, 1.0, observed=0.6, replicas=np.full(100, 0.8), confidence=0.95) == (0.5, 0.9)
    assert agreement.reach(0.1, 0.2, 0.0, observed=0.15, replicas=np.full(100, 0.2), confidence=0.95) == (0.0, 0.2)


def test_line_and_subsets_by_hand():
    imagined, real = np.array([0.3, 0.5, 0.7]), np.array([0.2, 0.6, 1.0])
    assert st.least_squares(imagined, real) == pytest.approx((0.5, 0.2))
    assert st.share_within(imagined, real, 0.1) == pytest.approx(2 / 3)
    cells = np.array([[1.0, 0, 0], [0, 0.4, 0.4]])  # the first policy is best on the first task and on average
    assert st.best_hit_of_subsets(cells, np.array([[1.0, 1, 1], [0, 0, 0]])).tolist() == [1, 0, 1, 0, 1, 0, 1]
    low, high = st.leave_one_task_out(lambda i, r: st.mae(i.mean(-1), r.mean(-1)), cells, np.zeros((2, 3)))
    assert (low, high) == pytest.approx((0.2, 0.35))


# ---- single rollouts ------------------------------------------------------------------------------------------------


def outcomes(successes, counts=None, tasks=None) -> Outcomes:
    successes = np.atleast_2d(np.asarray(successes, float))
    counts = np.ones_like(successes) if counts is None else np.atleast_2d(np.asarray(counts, float))
    return Outcomes(successes, counts, np.zeros(successes.shape[1], int) if tasks is None else np.asarray(tasks))


def single(imagined: Outcomes, real: Outcomes, resamples: int = 200) -> dict[str, dict]:
    weights = resampling.frame_weights(imagined.tasks, resamples, np.random.default_rng(0))
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
