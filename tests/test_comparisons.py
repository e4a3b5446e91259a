"""Comparison of policies: exact tests against scipy and enumeration, intervals, letters, and when to stop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import stats

from workflow_src.analysis import comparisons as cp
from workflow_src.analysis.records import Outcomes


def outcomes(successes, repeats: int = 1, tasks: int = 1) -> Outcomes:
    successes = np.asarray(successes, float)
    return Outcomes(successes, np.full(successes.shape, float(repeats)), np.arange(successes.shape[1]) % tasks)


# ---- tests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plus", "minus"), [(9, 2), (0, 5), (4, 4), (1, 0), (0, 0), (60, 30)])
def test_without_repeats_it_is_mcnemar(plus, minus):
    differences = np.array([1] * plus + [-1] * minus + [0] * 7)
    expected = stats.binomtest(plus, plus + minus).pvalue if plus + minus else 1.0
    assert cp.mcnemar_p(differences) == pytest.approx(expected, rel=1e-9)


@given(some.lists(some.integers(-3, 3), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_with_repeats_a_frame_flips_as_a_whole(differences):
    observed = abs(sum(differences))
    sums = [
        sum(s * d for s, d in zip(signs, differences)) for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    assert cp.mcnemar_p(np.array(differences)) == pytest.approx(np.mean(np.abs(sums) >= observed))


def test_barnard_and_score_are_scipy_s():
    assert cp.barnard_p([12, 5], [20, 20]) == pytest.approx(stats.barnard_exact([[12, 5], [8, 15]]).pvalue)
    rates, n = np.array([[0.6], [0.5]]), np.array([[1000.0], [1000.0]])
    chi2 = stats.chi2_contingency([[600, 500], [400, 500]], correction=False).pvalue
    assert cp.score_p(rates, n) == pytest.approx(chi2, rel=1e-6)
    assert cp.score_p(np.ones((2, 3)), np.full((2, 3), 9.0)) == 1.0


def test_holm_by_hand():
    corrected = cp.holm(np.array([0.01, 0.04, 0.03, np.nan]))
    np.testing.assert_allclose(corrected, [0.03, 0.06, 0.06, np.nan])
    assert cp.holm(np.array([0.7, 0.8])).tolist() == [1, 1]


def test_equal_policies_are_rarely_called_different():
    generator = np.random.default_rng(0)
    p = [cp.mcnemar_p(np.diff((generator.random((2, 60)) < 0.4).astype(int), axis=0)[0]) for _ in range(400)]
    assert np.mean(np.array(p) <= 0.05) <= 0.05


# ---- sequential -----------------------------------------------------------------------------------------------------


def test_wealth_is_fair_and_exceeds_its_bound_rarely():
    generator = np.random.default_rng(1)
    differences = generator.choice([-1, 0, 1], size=(2000, 100), p=[0.2, 0.6, 0.2])
    paths = np.array([cp.e_process(path) for path in differences])
    assert (paths.max(1) >= 20).mean() <= 0.05  # however often one looks
    assert paths[:, 9].mean() == pytest.approx(1, abs=0.1)


def test_a_clear_difference_stops_early_and_a_faint_one_says_how_long():
    clear = cp.paired_rows(outcomes([[1] * 40, [0] * 40]), ("good", "bad"), "real", 0.95)[0]
    assert clear["stop_after"] < 12 and clear["frames_needed"] is None and clear["e_value"] > 1e6
    assert clear["different"] and clear["a_better"] == 40 and clear["b_better"] == 0
    faint = cp.paired_rows(outcomes([[1, 1, 1, 1, 0] * 8, [1, 1, 0, 1, 0] * 8]), ("a", "b"), "real", 0.99)[0]
    assert faint["stop_after"] is None and faint["frames_needed"] > 40
    same = cp.paired_rows(outcomes([[1, 0] * 20, [1, 0] * 20]), ("a", "b"), "real", 0.95)[0]
    assert same["stop_after"] is None and same["frames_needed"] is None and same["p"] == 1


def test_more_pairs_ask_for_more_evidence():
    two, four = (
        cp.paired_rows(outcomes([[1] * 40, *[[0] * 40] * (n - 1)]), "abcd"[:n], "real", 0.95)[0] for n in (2, 4)
    )
    assert four["stop_after"] > two["stop_after"]


def test_tasks_take_turns():
    order = cp._interleaved(np.array([0, 0, 0, 1, 1, 1, 2]))
    assert order.tolist() == [0, 3, 6, 1, 4, 2, 5]


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_the_better_policy_comes_first_and_signs_follow():
    row = cp.paired_rows(outcomes([[0, 0, 0, 1], [1, 1, 0, 0]], tasks=2), ("low", "high"), "imagined", 0.95)[0]
    assert (row["policy_a"], row["policy_b"]) == ("high", "low") and (row["success_a"], row["success_b"]) == (0.5, 0.25)
    assert row["difference"] == 0.25 and row["low"] < 0.25 < row["high"]
    assert (row["a_better"], row["b_better"]) == (2, 1)


def test_trials_without_a_judgement_are_not_shared():
    found = outcomes([[1, 1, 1, 0], [0, 0, 0, 0]])
    found.counts[1, 0] = 0
    row = cp.paired_rows(found, ("a", "b"), "imagined", 0.95)[0]
    assert row["n"] == 3 and row["success_a"] == pytest.approx(2 / 3)


def test_identical_repeats_add_no_evidence():
    once = cp.paired_rows(outcomes([[1] * 8, [0] * 8]), ("a", "b"), "imagined", 0.95)[0]
    thrice = cp.paired_rows(outcomes([[3] * 8, [0] * 8], repeats=3), ("a", "b"), "imagined", 0.95)[0]
    for name in ("p", "low", "high", "e_value", "n"):
        assert once[name] == pytest.approx(thrice[name])


@pytest.mark.parametrize("per_task", [10, 34])
def test_paired_interval_covers_the_mean_over_tasks(per_task):
    generator, hits = np.random.default_rng(2), []
    tasks = np.repeat([0, 1, 2], per_task)
    rate_a, rate_b = np.array([0.95, 0.9, 1.0])[tasks], np.array([0.3, 0.6, 0.5])[tasks]
    for _ in range(1000):
        # Half of the frames are as hard for the one as for the other.
        one, other = generator.random((2, len(tasks)))
        other = np.where(generator.random(len(tasks)) < 0.5, one, other)
        low, high = cp.paired_interval((one < rate_a).astype(float) - (other < rate_b), tasks, 0.95)
        hits.append(low <= (0.65 + 0.3 + 0.5) / 3 <= high)
    assert np.mean(hits) >= 0.93


def test_unpaired_rows_say_which_test():
    rate = np.array([[0.9, 0.8], [0.2, 0.25]])
    equal, unequal, many = (
        cp.unpaired_rows(rate, np.array(n, float), ("a", "b"), "real", 0.95)[0]
        for n in ([[10, 10]] * 2, [[10, 20]] * 2, [[300, 300]] * 2)
    )
    assert equal["test"] == cp.BARNARD and "partial credit" in equal["note"]  # 2.5 successes
    assert unequal["test"] == many["test"] == cp.SCORE
    assert equal["p"] < 0.01 and equal["low"] < 0.62 < equal["high"]


# ---- letters --------------------------------------------------------------------------------------------------------


@given(some.integers(2, 6), some.data())
@settings(max_examples=60, deadline=None)
def test_policies_share_a_letter_just_when_they_are_not_different(n, data):
    names = list("ABCDEF"[:n])
    different = [pair for pair in itertools.combinations(names, 2) if data.draw(some.booleans())]
    found = cp.letters(names, different)
    for pair in itertools.combinations(names, 2):
        assert bool(set(found[pair[0]]) & set(found[pair[1]])) == (pair not in different), (pair, different, found)
    assert found[names[0]].startswith("a")
