"""How often the intervals of the analysis hold the truth, in simulations that know it.

    python benchmarks/coverage.py                                       # 1,000 data sets per line: about an hour
    python benchmarks/coverage.py --datasets 20 --only rates            # a look at one section: seconds

Prints Markdown, one table per section: `rates` (success rates, paired differences, prediction-powered estimates) and
`agreement` (Pearson, Spearman, MMRV at three sizes of experiment). `--out FILE` keeps what is finished; a second run with
the same file goes on after the last finished table.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from workflow_src.analysis import comparisons, posterior, prediction_powered
from workflow_src.analysis import statistics as st
from workflow_src.analysis.agreement import PERFECT, flat, means
from workflow_src.analysis.rows import reach
from workflow_src.common.files import write_text
from workflow_src.common.progress import Progress

CONFIDENCE = 0.95
SHAPES = [(3, 17, 10), (4, 6, 10), (10, 3, 100)]  # policies, tasks, trials per cell
METRICS = {"pearson": st.pearson, "spearman": st.spearman, "mmrv": st.mmrv}
# Data sets whose posteriors are sampled side by side, and chains of each (a report has four times as many).
BESIDE, CHAINS = 50, 4
NEW_TASKS = 400  # stand for the population of tasks

Rates = tuple[np.ndarray, np.ndarray]  # imagined, real: (..., P, K)
Population = Callable[[int], Rates]  # tasks → rates of the same policies on so many new ones


# ---- worlds ---------------------------------------------------------------------------------------------------------


def logistic(generator: np.random.Generator, policies: int, replica: bool = False) -> Population:
    """Policies whose rates follow the model of `analysis/posterior.py`; `replica`: both sides have the same rates."""
    correlation = (1, 1, 1) if replica else (0.95, 0.7, 0.6)

    def pairs(shape: tuple[int, ...], spread: float, r: float) -> np.ndarray:
        one, other = generator.standard_normal((2, *shape))
        return spread * np.stack([one, r * one + np.sqrt(1 - r * r) * other])

    skill = pairs((policies, 1), 1.5, correlation[0])

    def draw(tasks: int) -> Rates:
        hard, rest = pairs((1, tasks), 0.7, correlation[1]), pairs((policies, tasks), 0.7, correlation[2])
        imagined, real = 1 / (1 + np.exp(0.3 - skill - hard - rest))
        return imagined, real

    return draw


def mixed(generator: np.random.Generator, policies: int) -> Population:
    """Rates that the model does not know: heaps at 0 and 1, and two cells in five imagined without regard to reality."""
    skill = generator.uniform(0.1, 0.9, (policies, 1))
    imagined_skill = np.clip(skill + generator.normal(0, 0.08, skill.shape), 0.05, 0.95)

    def draw(tasks: int) -> Rates:
        shape = (policies, tasks)
        real = generator.beta(2 * skill, 2 * (1 - skill), shape)
        unrelated = generator.beta(2 * imagined_skill, 2 * (1 - imagined_skill), shape)
        related = np.clip(real + generator.normal(0, 0.1, shape), 0, 1)
        return np.where(generator.random(shape) < 0.6, related, unrelated), real

    return draw


WORLDS: dict[str, Callable[[np.random.Generator, int], Population]] = {
    "model holds": logistic, "model does not hold": mixed,
    "perfect replica": lambda generator, policies: logistic(generator, policies, replica=True),
}  # fmt: skip


# ---- agreement ------------------------------------------------------------------------------------------------------


class Tally:
    """How often intervals held their truth, and how wide they were; by statistic and kind of interval."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[tuple[bool, float]]] = {}

    def add(self, statistic: str, kind: str, low: float, high: float, truth: float) -> None:
        if not np.isnan([low, high, truth]).any():
            held = low - st.TIE <= truth <= high + st.TIE
            self.found.setdefault((statistic, kind), []).append((bool(held), high - low))

    def cell(self, statistic: str, kind: str) -> str:
        values = self.found.get((statistic, kind))
        if not values:
            return "–"
        held, width = np.array(values, float).mean(0)
        return f"{100 * held:.1f} ({width:.2f})"


def percentiles(draws: np.ndarray) -> tuple[float, float]:
    draws = draws[~np.isnan(draws)]
    return tuple(np.quantile(draws, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])) if len(draws) else (np.nan,) * 2


def agreement(world: str, shape: tuple[int, int, int], datasets: int) -> Tally:
    """All intervals of `datasets` experiments of one `shape` in one world."""
    policies, tasks, n = shape
    generator, tally = np.random.default_rng([len(world), policies, tasks]), Tally()
    with Progress(datasets, f"{world} {policies}x{tasks}x{n}", "data set", every=30) as progress:
        for start in range(0, datasets, BESIDE):
            count = min(BESIDE, datasets - start)
            populations = [WORLDS[world](generator, policies) for _ in range(count)]
            truth = [np.stack(side) for side in zip(*(draw(tasks) for draw in populations))]
            rates = [generator.binomial(n, side) / n for side in truth]
            trials = np.full(rates[0].shape, float(n))
            found = posterior.sample(*rates, trials, trials, generator, chains=CHAINS)
            repeated = found.repeated(trials, trials, generator)
            replicas = found.replicas(trials, trials, generator)
            for i in range(count):
                one = _Experiment(
                    [side[i] for side in truth], [side[i] for side in rates], n, populations[i], generator
                )
                one.count(tally, found, repeated, replicas, i)
                progress.update()
    return tally


class _Experiment:
    """One experiment: its true and measured rates, and the intervals that each method gives."""

    def __init__(self, truth: list, rates: list, n: int, population: Population, generator: np.random.Generator):
        self.truth, self.rates, self.n, self.population, self.generator = truth, rates, n, population, generator

    def count(self, tally: Tally, found: posterior.Posterior, repeated: Rates, replicas: Rates, i: int) -> None:
        measure = self.generator.binomial
        again = [measure(self.n, side) / self.n for side in self.truth]
        noisy = [measure(self.n, side, size=(500, *side.shape)) / self.n for side in self.rates]
        new = self.population(NEW_TASKS)
        for level, summary in (("policies", means), ("cells", flat)):
            for name, metric in METRICS.items():
                statistic = f"{name}, {level}"
                # MMRV and ranks over many cells cost most; a part of the draws is enough for two percentiles.
                draws = slice(None) if level == "policies" else slice(None, None, 2)
                true = float(metric(*map(summary, self.truth)))
                ends = percentiles(metric(summary(found.imagined[i][draws]), summary(found.real[i][draws])))
                copies = metric(*(summary(side[i][draws]) for side in replicas))
                observed = float(metric(*map(summary, self.rates)))
                tally.add(statistic, "noise-free", *reach(*ends, PERFECT[name], observed, copies, CONFIDENCE), true)
                tally.add(statistic, "bootstrap over trials", *percentiles(metric(*map(summary, noisy))), true)
                ends = percentiles(metric(*(summary(side[i][draws]) for side in repeated)))
                tally.add(statistic, "repetition", *ends, float(metric(*map(summary, again))))
                self._new_tasks(tally, statistic, name, level, summary, new)
                population = self._population(found, name, level, new, i)
                if population is not None:
                    ends = reach(*percentiles(population[0]), PERFECT[name], observed, copies, CONFIDENCE)
                    tally.add(statistic, "tasks as a sample, noise-free", *ends, population[1])

    def _new_tasks(self, tally: Tally, statistic: str, name: str, level: str, summary: Callable, new: Rates) -> None:
        """The bootstrap over tasks against what as many tasks of the population show on average."""
        tasks = self.rates[0].shape[1]
        if tasks < 8:
            return
        metric = METRICS[name]
        chosen = self.generator.integers(tasks, size=(500, tasks))
        drawn = [np.moveaxis(side[:, chosen], 0, 1) for side in self.rates]
        groups = [
            np.moveaxis(side[:, : NEW_TASKS // tasks * tasks].reshape(len(side), -1, tasks), 1, 0) for side in new
        ]
        measured = [self.generator.binomial(self.n, side) / self.n for side in groups]
        expected = float(np.nanmean(metric(*map(summary, measured))))
        tally.add(statistic, "tasks as a sample", *percentiles(metric(*map(summary, drawn))), expected)

    def _population(
        self, found: posterior.Posterior, name: str, level: str, new: Rates, i: int
    ) -> tuple[np.ndarray, float] | None:
        """The model's draws for ever more new tasks, and their truth; None where reports give none."""
        if level == "policies":
            means_of_new = found.means[i]
            return METRICS[name](means_of_new[..., 0], means_of_new[..., 1]), float(METRICS[name](*map(means, new)))
        if name != "pearson":
            return None
        return found.pearson_over_new_cells()[i], float(st.pearson(*map(flat, new)))


KINDS = ("noise-free", "bootstrap over trials", "repetition", "tasks as a sample", "tasks as a sample, noise-free")


def agreement_table(world: str, shape: tuple[int, int, int], datasets: int) -> str:
    tally = agreement(world, shape, datasets)
    lines = [f"| statistic | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    for level in ("policies", "cells"):
        for name in METRICS:
            statistic = f"{name}, {level}"
            lines.append(f"| {statistic} | {' | '.join(tally.cell(statistic, kind) for kind in KINDS)} |")
    return "\n".join(lines)


# ---- rates ----------------------------------------------------------------------------------------------------------


def clustered(generator: np.random.Generator, rates: np.ndarray, frames: int, repeats: int) -> np.ndarray:
    """Successes `(K, frames)` out of `repeats` where a frame's own rate scatters around its task's `(K,)`."""
    own = generator.beta(2 * rates, 2 * (1 - rates), (frames, len(rates))).T
    return generator.binomial(repeats, own)


def wilson_holds(generator: np.random.Generator, rates: np.ndarray, frames: int, repeats: int) -> tuple[bool, float]:
    """A policy's mean over tasks as the tables give it, repeats of a frame clustered."""
    successes = clustered(generator, rates, frames, repeats)
    size = np.array([st.effective_size(row, np.full(frames, float(repeats))) for row in successes])
    low, high = st.wilson(successes.mean() / repeats, len(rates) ** 2 / (1 / size).sum())
    return bool(low <= rates.mean() <= high), high - low


def difference_holds(
    generator: np.random.Generator, rates: np.ndarray, frames: int, shared: float
) -> tuple[bool, float]:
    """The paired difference to a policy that is 0.15 worse on every task and meets the same hard frames."""
    worse, hard = np.clip(rates - 0.15, 0, 1), generator.random((2, len(rates), frames))
    hard[1] = np.where(generator.random(hard[1].shape) < shared, hard[0], hard[1])
    difference = (hard[0] < rates[:, None]).astype(float) - (hard[1] < worse[:, None])
    tasks = np.repeat(np.arange(len(rates)), frames)
    low, high = comparisons.paired_interval(difference.ravel(), tasks, CONFIDENCE)
    return bool(low <= (rates - worse).mean() <= high), high - low


def powered_holds(
    generator: np.random.Generator, rates: np.ndarray, frames: int, others: int, known: float
) -> tuple[bool, float]:
    """The prediction-powered estimate from `frames` real trials per task and `others` imagined ones, 0.1 too low."""
    sides = []
    for count in (frames, others):
        tasks = np.repeat(np.arange(len(rates)), count)
        real = generator.random(len(tasks)) < rates[tasks]
        guess = generator.random(len(tasks)) < rates[tasks] - 0.1
        sides.append(
            (real.astype(float), np.where(generator.random(len(tasks)) < known, real, guess).astype(float), tasks)
        )
    found = prediction_powered.estimate(prediction_powered.Frames(*sides[0], *sides[1][1:]), CONFIDENCE)
    return bool(found["low"] <= rates.mean() <= found["high"]), found["high"] - found["low"]


THREE, HIGH = np.array([0.9, 0.5, 0.2]), np.array([0.97, 0.95, 0.9])
MANY = np.linspace(0.1, 0.9, 17)
RATES: list[tuple[str, Callable[..., tuple[bool, float]], tuple]] = [
    ("success rate, 3 tasks × 34 frames", wilson_holds, (THREE, 34, 1)),
    ("success rate, 3 tasks × 10 frames × 5 repeats", wilson_holds, (THREE, 10, 5)),
    ("success rate, 17 tasks × 10 frames", wilson_holds, (MANY, 10, 1)),
    ("success rate near 1, 3 tasks × 34 frames", wilson_holds, (HIGH, 34, 1)),
    ("paired difference, 3 tasks × 34 frames, frames alike", difference_holds, (THREE, 34, 0.8)),
    ("paired difference, 3 tasks × 10 frames", difference_holds, (THREE, 10, 0.3)),
    ("paired difference, 17 tasks × 10 frames", difference_holds, (MANY, 10, 0.5)),
    ("paired difference near 1, 3 tasks × 34 frames", difference_holds, (HIGH, 34, 0.5)),
    ("prediction-powered, 3 tasks × 10 real + 24 imagined, knows 20 %", powered_holds, (THREE, 10, 24, 0.2)),
    ("prediction-powered, 3 tasks × 10 real + 240 imagined, knows 80 %", powered_holds, (THREE, 10, 240, 0.8)),
    ("prediction-powered, 3 tasks × 34 real + 340 imagined, knows 90 %", powered_holds, (THREE, 34, 340, 0.9)),
    ("prediction-powered, 17 tasks × 4 real + 40 imagined, knows 60 %", powered_holds, (MANY, 4, 40, 0.6)),
    ("prediction-powered near 1, 3 tasks × 10 real + 240 imagined, knows 50 %", powered_holds, (HIGH, 10, 240, 0.5)),
]


def rates_table(datasets: int) -> str:
    lines = ["| interval | holds the truth, % | mean width |", "|---|---|---|"]
    for number, (text, holds, arguments) in enumerate(RATES):
        generator = np.random.default_rng(number)
        held, width = np.mean([holds(generator, *arguments) for _ in range(datasets)], axis=0)
        lines.append(f"| {text} | {100 * held:.1f} | {width:.3f} |")
    return "\n".join(lines)


# ---- the whole ------------------------------------------------------------------------------------------------------


def sections(datasets: int, only: str) -> Iterator[tuple[str, Callable[[], str]]]:
    if only in ("rates", "all"):
        yield "Rates and differences", lambda: rates_table(datasets)
    if only in ("agreement", "all"):
        for policies, tasks, n in SHAPES:
            for world in WORLDS:
                title = f"{policies} policies × {tasks} tasks × {n} trials, {world}"
                yield title, lambda world=world, shape=(policies, tasks, n): agreement_table(world, shape, datasets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=int, default=1000, help="simulated per line (default: %(default)s)")
    parser.add_argument("--only", choices=["all", "rates", "agreement"], default="all")
    parser.add_argument("--out", type=Path, help="Markdown file to write, and to continue")
    options = parser.parse_args()
    text = options.out.read_text(encoding="utf-8") if options.out and options.out.is_file() else ""
    for title, make in sections(options.datasets, options.only):
        if f"## {title}\n" in text:
            continue
        began = time.monotonic()
        part = f"## {title}\n\n{make()}\n\n{options.datasets} data sets, {time.monotonic() - began:.0f} s.\n\n"
        text += part
        print(part, flush=True)
        if options.out:
            write_text(options.out, text)


if __name__ == "__main__":
    main()
