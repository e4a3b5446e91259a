"""What the true success rates may be behind the measured ones: a posterior that takes the binomial noise out.

A correlation of measured rates is lower than that of the true ones, and resampling adds the same noise once more. Here
the true rates of P policies on K tasks, real and imagined, follow a model whose spread is estimated with them:

    logit rate[i, j] = policy[i] + task[j] + rest[i, j]         each a pair (imagined, real)
    policy[i] ~ N(mean, S_policy)    task[j] ~ N(0, S_task)    rest[i, j] ~ N(0, S_rest)
    successes[i, j] ~ Binomial(n[i, j], rate[i, j]), independent between the two sides

with half-t(2 degrees of freedom, scale 1) priors on standard deviations and uniform ones on the correlations inside each S
(Huang and Wand, Bayesian Analysis 8, 2013) and mean ~ N(0, 1.5²). Sampled by Metropolis within Gibbs, many chains at once.
How often its intervals hold the truth, also where the model is wrong: `benchmarks/coverage.md`.

D data sets · C chains · B draws · P policies · K tasks · 2 sides (imagined, real). Logits are natural.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CHAINS, WARM_UP, KEPT, THIN = 16, 200, 125, 4
NU, SCALE, MEAN_SD = 0.5, 1.0, 1.5
# Gauss-Hermite nodes for averages over new tasks: exact to three digits for the spreads that occur.
NODES = 15


@dataclass(frozen=True)
class Posterior:
    """B draws of the true rates. `cells (..., B, P, K, 2)`: of the table's own tasks; the last axis is imagined, real.

    `means (..., B, P, 2)`, `squares` (same shape) and `products (..., B, P)`: averages over new tasks from the same
    population of the rates, of their squares, and of imagined times real.
    """

    cells: np.ndarray
    means: np.ndarray
    squares: np.ndarray
    products: np.ndarray

    @property
    def imagined(self) -> np.ndarray:
        return self.cells[..., 0]

    @property
    def real(self) -> np.ndarray:
        return self.cells[..., 1]

    def only(self, policies: list[int]) -> Posterior:
        """The same, for some of the policies."""
        return Posterior(
            self.cells[..., policies, :, :], self.means[..., policies, :], self.squares[..., policies, :],
            self.products[..., policies],
        )  # fmt: skip

    def pearson_over_new_cells(self) -> np.ndarray:
        """Pearson correlation `(..., B)` over the cells of these policies and ever more new tasks."""
        centre = self.means.mean(-2)
        variance = self.squares.mean(-2) - centre**2
        return (self.products.mean(-1) - centre.prod(-1)) / np.sqrt(variance.prod(-1))

    def repeated(
        self, n_imagined: np.ndarray, n_real: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Measured rates `(imagined, real)` of repetitions with `(P, K)` trials, each `(..., B, P, K)`."""
        return _measure(self.imagined, n_imagined, generator), _measure(self.real, n_real, generator)

    def replicas(
        self, n_imagined: np.ndarray, n_real: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `repeated`, had the imagined world the real one's true rates."""
        return _measure(self.real, n_imagined, generator), _measure(self.real, n_real, generator)


def _measure(rate: np.ndarray, n: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Rates of as many whole trials as come nearest to `n (..., P, K)`, for true rates `(..., B, P, K)`."""
    n = np.maximum(np.rint(n), 1).astype(np.int64)[..., None, :, :]
    return generator.binomial(n, rate) / n


def sample(
    imagined: np.ndarray, real: np.ndarray, n_imagined: np.ndarray, n_real: np.ndarray, generator: np.random.Generator,
    chains: int = CHAINS,
) -> Posterior:  # fmt: skip
    """The posterior of rates `(..., P, K)` measured with `n_imagined` and `n_real` trials (same shape; > 0, real numbers).

    Leading axes are data sets, sampled side by side. B is `chains` × `KEPT`.
    """
    n = np.stack([np.broadcast_to(n_imagined, imagined.shape), np.broadcast_to(n_real, real.shape)], -1).astype(float)
    rates = np.stack([imagined, real], -1)
    shape = rates.shape
    chain = _Chain(*(np.repeat(part.reshape(-1, 1, *shape[-3:]), chains, 1) for part in (rates * n, n)), generator)
    for _ in range(WARM_UP):
        chain.sweep()
    kept = []
    for _ in range(KEPT):
        for _ in range(THIN):
            chain.sweep()
        kept.append((_expit(chain.logits), *chain.population()))
    return Posterior(*(_draws(parts, shape[:-3]) for parts in zip(*kept)))


def _draws(kept: list[np.ndarray], lead: tuple[int, ...]) -> np.ndarray:
    """Kept states `(D, C, ...)` → `(*lead, B, ...)`."""
    stacked = np.stack(kept, 2)
    return stacked.reshape(*lead, -1, *stacked.shape[3:])


def _expit(x: np.ndarray) -> np.ndarray:
    # As 1 / (1 + exp(-x)), but without overflow where a table says next to nothing and logits wander far out.
    return 0.5 * (1 + np.tanh(0.5 * x))


class _Chain:
    """State of all chains: `logits (D, C, P, K, 2)`, effects of policies `(D, C, P, 2)` and tasks `(D, C, K, 2)`."""

    def __init__(self, successes: np.ndarray, n: np.ndarray, generator: np.random.Generator):
        self.successes, self.n, self.generator = successes, n, generator
        self.lead = successes.shape[:2]
        start = (successes + 0.5) / (n + 1)
        # What the data alone say about a logit, as a precision: it sets the length of the proposals.
        self.information = n * start * (1 - start)
        logits = np.log(start / (1 - start))
        self.logits = logits + 0.3 * generator.standard_normal(logits.shape)
        self.policy = self.logits.mean(3)
        self.mean = self.policy.mean(2)
        self.task = np.zeros_like(self.logits[:, :, 0])
        unit = np.broadcast_to(np.eye(2), (*self.lead, 2, 2))
        # Precision matrices and the auxiliary scales of their priors, by level.
        self.precision = {level: unit.copy() for level in ("policy", "task", "rest")}
        self.scales = {level: np.ones((*self.lead, 2)) for level in self.precision}

    def sweep(self) -> None:
        """One round over all unknowns."""
        self._update_logits()
        policies, tasks = self.logits.shape[2:4]
        rest = self.precision["rest"]
        shift = _times(self.precision["policy"], self.mean)[:, :, None]
        shift = shift + _times(rest[:, :, None], (self.logits - self.task[:, :, None]).sum(3))
        self.policy = self._normal(self.precision["policy"] + tasks * rest, shift)
        shift = _times(rest[:, :, None], (self.logits - self.policy[:, :, :, None]).sum(2))
        self.task = self._normal(self.precision["task"] + policies * rest, shift)
        self._move_level()
        prior = np.eye(2) / MEAN_SD**2
        shift = _times(self.precision["policy"], self.policy.sum(2))[:, :, None]
        self.mean = self._normal(prior + policies * self.precision["policy"], shift)[:, :, 0]
        self._update_precision("policy", self.policy - self.mean[:, :, None])
        self._update_precision("task", self.task)
        residual = self.logits - self.policy[:, :, :, None] - self.task[:, :, None]
        self._update_precision("rest", residual.reshape(*self.lead, -1, 2))

    def _update_logits(self) -> None:
        """Random-walk Metropolis on every cell's pair of logits, twice."""
        precision = self.precision["rest"]
        diagonal = np.stack([precision[..., 0, 0], precision[..., 1, 1]], -1)[:, :, None, None]
        step = 1.7 / np.sqrt(self.information + diagonal)
        centre = self.policy[:, :, :, None] + self.task[:, :, None]
        density = self._log_density(self.logits, centre, precision)
        for _ in range(2):
            proposal = self.logits + step * self.generator.standard_normal(self.logits.shape)
            proposed = self._log_density(proposal, centre, precision)
            accepted = -self.generator.standard_exponential(density.shape) < proposed - density
            self.logits = np.where(accepted[..., None], proposal, self.logits)
            density = np.where(accepted, proposed, density)

    def _log_density(self, logits: np.ndarray, centre: np.ndarray, precision: np.ndarray) -> np.ndarray:
        gap = logits - centre
        first, second = gap[..., 0], gap[..., 1]
        a, b, c = (precision[..., i, j][..., None, None] for i, j in ((0, 0), (0, 1), (1, 1)))
        prior = first * (a * first + 2 * b * second) + c * second * second
        log_failure = np.maximum(logits, 0) + np.log1p(np.exp(-np.abs(logits)))
        likelihood = self.successes * logits - self.n * log_failure
        return likelihood[..., 0] + likelihood[..., 1] - 0.5 * prior

    def _move_level(self) -> None:
        """Shift a constant from the tasks to the policies: along this direction single updates would hardly move."""
        tasks, policies = self.task.shape[2], self.policy.shape[2]
        of_policy, of_task = self.precision["policy"], self.precision["task"]
        shift = _times(of_task, self.task.sum(2)) - _times(of_policy, (self.policy - self.mean[:, :, None]).sum(2))
        constant = self._normal(tasks * of_task + policies * of_policy, shift[:, :, None])
        self.task = self.task - constant
        self.policy = self.policy + constant

    def _normal(self, precision: np.ndarray, shift: np.ndarray) -> np.ndarray:
        """Draw from N(Q⁻¹ shift, Q⁻¹) for `precision` Q `(D, C, 2, 2)` and `shift (D, C, m, 2)`."""
        a, b, c = precision[..., 0, 0, None], precision[..., 0, 1, None], precision[..., 1, 1, None]
        # Cholesky factor [[p, 0], [q, r]].
        p = np.sqrt(a)
        q = b / p
        r = np.sqrt(c - q * q)
        z = self.generator.standard_normal(shift.shape)
        first = shift[..., 0] / p
        second = ((shift[..., 1] - q * first) / r + z[..., 1]) / r
        return np.stack([(first + z[..., 0] - q * second) / p, second], -1)

    def _update_precision(self, level: str, effects: np.ndarray) -> None:
        """Draw a level's precision matrix given its `effects (D, C, m, 2)`, then the auxiliary scales of its prior."""
        square = np.swapaxes(effects, -1, -2) @ effects
        scale = square + 2 * NU * np.eye(2) / self.scales[level][..., None, :]
        drawn = _wishart(NU + 1 + effects.shape[2], scale, self.generator)
        self.precision[level] = drawn
        diagonal = np.stack([drawn[..., 0, 0], drawn[..., 1, 1]], -1)
        rate = NU * diagonal + 1 / SCALE**2
        self.scales[level] = rate / self.generator.gamma((NU + 2) / 2, size=diagonal.shape)

    def population(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Averages over new tasks, as in `Posterior`: means, squares `(D, C, P, 2)` and products `(D, C, P)`."""
        spread = np.linalg.inv(self.precision["task"]) + np.linalg.inv(self.precision["rest"])
        nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
        weights = weights / weights.sum()
        # Correlated pairs of nodes: the first side, then the second given the first.
        p = np.sqrt(spread[..., 0, 0])[..., None, None]
        q = spread[..., 0, 1][..., None, None] / p
        r = np.sqrt(np.maximum(spread[..., 1, 1][..., None, None] - q * q, 1e-12))
        first = _expit(self.policy[..., 0, None] + p * nodes)
        second = _expit(self.policy[..., 1, None, None] + (q * nodes)[..., None] + (r * nodes)[..., None, :])
        means = np.stack([first @ weights, second @ weights @ weights], -1)
        squares = np.stack([first**2 @ weights, second**2 @ weights @ weights], -1)
        return means, squares, (first * (second @ weights)) @ weights


def _times(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """`(..., 2, 2)` times `(..., 2)`."""
    return (matrix * vector[..., None, :]).sum(-1)


def _wishart(freedom: float, scale: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw from Wishart(`freedom`, `scale`⁻¹) for `scale (..., 2, 2)`, by Bartlett's decomposition."""
    lower = np.linalg.cholesky(np.linalg.inv(scale))
    lead = scale.shape[:-2]
    factor = np.zeros((*lead, 2, 2))
    factor[..., 0, 0] = np.sqrt(generator.chisquare(freedom, lead))
    factor[..., 1, 1] = np.sqrt(generator.chisquare(freedom - 1, lead))
    factor[..., 1, 0] = generator.standard_normal(lead)
    root = lower @ factor
    return root @ np.swapaxes(root, -1, -2)
