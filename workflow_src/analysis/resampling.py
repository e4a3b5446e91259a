"""Two tables of success rates side by side, and what sampling could have made of them: bootstrap and posterior draws.

B draws · P policies · K tasks · N trials.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from workflow_src.analysis import posterior
from workflow_src.analysis.posterior import Posterior
from workflow_src.analysis.records import Outcomes

SAME_FRAMES = "same first frames"
OTHER_FRAMES = "same tasks, other first frames"
# Noise makes resamples disagree more than the sample did, so a percentile interval can miss the value it belongs to.
BOOTSTRAP = "percentile bootstrap over first frames, stretched to hold the value"
REPETITION = "where a repetition with as many trials would fall (posterior predictive), stretched to hold the value"
# A bootstrap over fewer clusters than this is far too narrow.
FEWEST_TASKS = 8


@dataclass(frozen=True)
class Paired:
    """Real and imagined success rates of P policies on K tasks, all float64.

    `imagined`, `real` and the trial counts are `(P, K)`; `imagined_draws` and `real_draws` `(B, P, K)` say how the
    rates scatter from sample to sample, drawn as `interval` says. `pairing` says whether both sides started from the
    same first frames. `truth`: what the true rates may be, where that was asked for.
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
    interval: str = BOOTSTRAP
    truth: Posterior | None = None

    def only(self, policies: Sequence[str]) -> Paired:
        """The same, for some of the policies."""
        keep = [self.policies.index(policy) for policy in policies]
        parts = ("imagined", "real", "n_imagined", "n_real", "imagined_draws", "real_draws")
        truth = self.truth and self.truth.only(keep)
        chosen = {name: getattr(self, name)[..., keep, :] for name in parts}
        return replace(self, policies=tuple(policies), truth=truth, **chosen)


def from_cells(
    policies: Sequence[str], tasks: Sequence[str], imagined: np.ndarray, real: np.ndarray, n_imagined: np.ndarray,
    n_real: np.ndarray, generator: np.random.Generator,
) -> Paired:  # fmt: skip
    """`Paired` where only rates and trial counts `(P, K)` are known, and the two sides' noise is independent."""
    truth = posterior.sample(imagined, real, n_imagined, n_real, generator)
    draws = truth.repeated(n_imagined, n_real, generator)
    return Paired(
        tuple(policies), tuple(tasks), imagined, real, n_imagined, n_real, *draws, OTHER_FRAMES, REPETITION, truth
    )


# ---- first frames ---------------------------------------------------------------------------------------------------


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


# ---- tasks ----------------------------------------------------------------------------------------------------------


def task_draws(paired: Paired, draws: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
    """Rates `(imagined, real)`, each `(B, P, K)`, with tasks drawn anew; None below `FEWEST_TASKS`.

    Each drawn task brings the trials it has, and with them their noise: drawing those anew too would count it twice.
    """
    tasks = len(paired.tasks)
    if tasks < FEWEST_TASKS:
        return None
    chosen = generator.integers(tasks, size=(draws, tasks))
    return tuple(np.moveaxis(side[:, chosen], 0, 1) for side in (paired.imagined, paired.real))
