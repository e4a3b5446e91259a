"""One run's judgements as arrays, and success rates of policies on tasks: what the tables are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from workflow_src.analysis import cells, records
from workflow_src.analysis import statistics as st
from workflow_src.analysis.records import IMAGINED, LAB, TRUTH, Outcomes
from workflow_src.common.errors import UserError
from workflow_src.common.progress import say
from workflow_src.common.sections import Policy

if TYPE_CHECKING:
    import pandas as pd

CROSS_CHECK = "state"


@dataclass(frozen=True)
class Rates:
    """Success rates of P policies on K tasks in one world. All `(P, K)`; `size` is the effective number of rollouts."""

    rate: np.ndarray
    n: np.ndarray
    size: np.ndarray

    def intervals(self, confidence: float) -> tuple[np.ndarray, np.ndarray]:
        """Wilson intervals of the cells."""
        return st.wilson(self.rate, self.size, confidence)

    def means(self, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each policy's success with each task counting alike, and its Wilson interval.

        The mean of K rates with n_k rollouts varies like one rate with K² / Σ(1/n_k) rollouts (K·n if all n_k are n).
        """
        rate = self.rate.mean(1)
        return rate, *st.wilson(rate, self.mean_size(), confidence)

    def mean_size(self) -> np.ndarray:
        """Effective number of rollouts behind each policy's mean."""
        return self.rate.shape[1] ** 2 / (1 / self.size).sum(1)


def family(policy: Policy) -> str:
    """What kind of policy the configuration describes: 'random', 'scripted', 'perturbed' (has options) or 'trained'."""
    for word, name in (("random", "random"), ("script", "scripted")):
        if word in policy.adapter and not policy.endpoint:
            return name
    return "perturbed" if policy.options else "trained"


def rates_of(found: Outcomes) -> Rates:
    """Cell rates with effective sample sizes: repeats of a first frame are not counted as new samples."""
    rate, n = found.cells()
    size = [
        [st.effective_size(found.successes[p, members], found.counts[p, members]) for members in _members(found)]
        for p in range(len(rate))
    ]
    return Rates(rate, n, np.array(size))


def _members(found: Outcomes) -> list[np.ndarray]:
    return [found.tasks == task for task in range(found.tasks.max() + 1)]


@dataclass(frozen=True)
class Study:
    """One run's judgements as arrays. `real` is None without real results, `truth` also where a CSV gives them.

    `real` covers `real_policies` and `real_tasks`: all, where the lab is reality. `reality` is what a CSV said.
    """

    stage: Any
    judgements: pd.DataFrame
    policies: list[str]
    tasks: list[str]
    imagined: Outcomes
    state: Outcomes | None
    truth: Outcomes | None
    real: Rates | None
    real_policies: list[str]
    real_tasks: list[str]
    reality: cells.Reality | None = None

    @property
    def confidence(self) -> float:
        return self.stage.analysis.confidence

    def trained(self) -> list[str]:
        return [name for name in self.policies if family(self.stage.policies[name]) == "trained"]


def open_study(stage: Any, judgements: pd.DataFrame) -> Study:
    """Check the judgements against the configuration and bring them into arrays."""
    policies, tasks = list(stage.policies), list(stage.lab.tasks)
    has = set(zip(judgements["world"], judgements["judge"]))
    if (IMAGINED, stage.judges.primary) not in has:
        raise UserError(
            f"judgements: none by the primary judge {stage.judges.primary!r} in {IMAGINED}; score them first"
        )

    def read(world: str, judge: str) -> Outcomes | None:
        return records.outcomes(judgements, world, judge, policies, tasks) if (world, judge) in has else None

    imagined, state = read(IMAGINED, stage.judges.primary), read(IMAGINED, CROSS_CHECK)
    truth = read(LAB, TRUTH)
    if not stage.reality:
        real = rates_of(truth) if truth is not None else None
        return Study(stage, judgements, policies, tasks, imagined, state, truth, real, policies, tasks)
    found = cells.load_reality(stage.reality, policies, tasks, stage.reality_names)
    for line in found.left_out:
        say(line)
    real = Rates(found.rate, found.n, found.n) if found.policies else None
    return Study(stage, judgements, policies, tasks, imagined, state, None, real, found.policies, found.tasks, found)
