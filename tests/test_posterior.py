"""The noise-aware posterior: it holds the truth, where a bootstrap does not, and survives tables without information."""

from __future__ import annotations

import numpy as np
import pytest

from workflow_src.analysis import posterior
from workflow_src.analysis import statistics as st


def flat(cells: np.ndarray) -> np.ndarray:
    return cells.reshape(*cells.shape[:-2], -1)


def measured(generator: np.random.Generator, datasets: int, policies: int, tasks: int, n: int):
    """True rates on the logit scale, and what n trials show of them: (imagined, real) truth, (imagined, real) rates."""

    def pairs(shape: tuple[int, ...], spread: float, correlation: float) -> np.ndarray:
        one, other = generator.standard_normal((2, *shape))
        return spread * np.stack([one, correlation * one + np.sqrt(1 - correlation**2) * other])

    logits = pairs((datasets, policies, 1), 1.5, 0.95) + pairs((datasets, 1, tasks), 0.7, 0.7)
    truth = 1 / (1 + np.exp(-(logits + pairs((datasets, policies, tasks), 0.7, 0.6))))
    return truth, generator.binomial(n, truth) / n


@pytest.mark.parametrize(("policies", "tasks", "n"), [(3, 17, 10), (10, 3, 100)])
def test_intervals_hold_the_noise_free_correlation_where_the_bootstrap_misses_it(policies, tasks, n):
    generator = np.random.default_rng(0)
    truth, rates = measured(generator, 40, policies, tasks, n)
    trials = np.full(rates[0].shape, n)
    found = posterior.sample(*rates, trials, trials, generator, chains=2)
    low, high = np.quantile(st.pearson(flat(found.imagined), flat(found.real)), [0.025, 0.975], 1)
    true = st.pearson(*map(flat, truth))
    assert ((low <= true) & (true <= high)).mean() >= 0.85
    again = generator.binomial(n, rates[:, :, None].repeat(200, 2)) / n
    low, high = np.quantile(st.pearson(*map(flat, again)), [0.025, 0.975], 1)
    assert ((low <= true) & (true <= high)).mean() < 0.85


def test_many_trials_leave_no_doubt():
    truth, _ = measured(np.random.default_rng(1), 1, 5, 4, 1)
    found = posterior.sample(*truth, *np.full((2, *truth[0].shape), 1e5), np.random.default_rng(0), chains=4)
    assert found.cells.std(1).max() < 0.01
    np.testing.assert_allclose(found.cells.mean(1)[..., 0], truth[0], atol=0.005)
    np.testing.assert_allclose(found.cells.mean(1)[..., 1], truth[1], atol=0.005)


def test_rates_are_drawn_towards_each_other_by_little_data():
    rates = np.array([[0.0, 0.5, 1.0], [0.0, 0.5, 1.0]])
    few, many = (
        posterior.sample(rates, rates, n, n, np.random.default_rng(0))
        for n in (np.full((2, 3), 4), np.full((2, 3), 400))
    )
    assert 0 < few.imagined[:, 0, 0].mean() < 0.3 and few.imagined[:, 0, 0].mean() > many.imagined[:, 0, 0].mean()
    assert many.imagined[:, 0, 2].mean() > 0.98


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1), (3, 4)])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_tables_without_information_give_finite_rates(shape, rate):
    rates, n = np.full(shape, rate), np.full(shape, 5.0)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        found = posterior.sample(rates, rates, n, n, np.random.default_rng(0), chains=2)
    for part in (found.cells, found.means, found.squares, found.products):
        assert np.isfinite(part).all() and (part >= 0).all() and (part <= 1).all()


def test_same_seed_same_draws():
    _, rates = measured(np.random.default_rng(2), 1, 3, 4, 10)
    trials = np.full(rates[0].shape, 10)
    one, two = (posterior.sample(*rates, trials, trials, np.random.default_rng(5), chains=2) for _ in range(2))
    assert (one.cells == two.cells).all() and (one.products == two.products).all()


def test_new_tasks_come_from_the_same_population():
    """With many tasks, the means over new ones are those over the old; replicas share the real side's rates."""
    truth, _ = measured(np.random.default_rng(3), 1, 3, 60, 1)
    n = np.full(truth[0, 0].shape, 1000.0)
    found = posterior.sample(truth[0, 0], truth[1, 0], n, n, np.random.default_rng(0))
    np.testing.assert_allclose(found.means.mean(0), np.stack([truth[0, 0].mean(1), truth[1, 0].mean(1)], -1), atol=0.06)
    pooled = st.pearson(flat(truth[0]), flat(truth[1]))[0]
    assert np.median(found.pearson_over_new_cells()) == pytest.approx(pooled, abs=0.1)
    imagined, real = found.replicas(n, n, np.random.default_rng(1))
    assert np.abs(imagined - real).max() < 0.15
    some = found.only([2, 0])
    assert (some.imagined == found.imagined[:, [2, 0]]).all() and (some.means == found.means[:, [2, 0]]).all()
