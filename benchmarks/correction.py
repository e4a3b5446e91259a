"""How often intervals of corrected success rates cover the truth, in simulation.

Each resampling draws rollouts, a judge's verdicts and human labels (so many per policy and verdict), and corrects every policy
as the tables do: by labels of its own (`success_corrected`), and by the labels of all policies (`success_if_alike`, the
interval of arXiv 2511.21140). Judges err alike on all policies, or more on some than on others. Prints Markdown.
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd

from workflow_src.analysis.correction import (
    correct_policies,
    corrected_interval,
    judge_rates,
    refusal,
)

# Name → true rates, rollouts per policy, sensitivity, specificity, spread of both over the policies, labels per cell.
SETTINGS = {
    "13 policies x 102": (np.linspace(0.05, 0.95, 13), 102, 0.95, 0.97, 0.0, 10),
    "13 weak policies x 102": (np.linspace(0.02, 0.5, 13), 102, 0.7, 0.9, 0.0, 5),
    "13 policies x 102, errors differ": (np.linspace(0.05, 0.95, 13), 102, 0.9, 0.93, 0.06, 10),
    "3 policies x 170": (np.array([0.2, 0.25, 0.7]), 170, 0.81, 0.97, 0.0, 20),
    "3 policies x 170, errors differ": (np.array([0.2, 0.25, 0.7]), 170, 0.81, 0.88, 0.1, 20),
    "4 policies x 60, few labels": (np.array([0.05, 0.3, 0.6, 0.9]), 60, 0.85, 0.95, 0.0, 5),
    "poor judge": (np.array([0.1, 0.3, 0.7]), 100, 0.65, 0.65, 0.0, 30),
}


def draw(rates, n, q1, q0, spread, per_cell, generator) -> tuple[pd.DataFrame, np.ndarray]:
    """Labels as the correction takes them, and the share judged a success of each policy."""
    more = spread * np.linspace(-1, 1, len(rates))
    rows, judged = [], []
    for p, rate in enumerate(rates):
        true = generator.random(n) < rate
        said = np.where(true, generator.random(n) < q1 + more[p], generator.random(n) > q0 - more[p])
        judged.append(said.mean())
        for verdict in (False, True):
            cell = np.flatnonzero(said == verdict)
            chosen = generator.permutation(cell)[:per_cell]
            rows += [(f"p{p}", f"t{i}", verdict, bool(true[i]), len(cell) / len(chosen)) for i in chosen]
    return pd.DataFrame(rows, columns=["policy", "trial_id", "said", "label", "weight"]), np.array(judged)


def cover(setting, resamplings: int, generator) -> tuple[np.ndarray, np.ndarray, int]:
    """Per policy: how often own labels, and all labels, cover; and how many resamplings were refused."""
    rates, n = setting[:2]
    names, hits, refused = [f"p{p}" for p in range(len(rates))], np.zeros((2, len(rates))), 0
    for _ in range(resamplings):
        labels, p = draw(*setting, generator)
        found = judge_rates(labels)
        if refusal(found):
            refused += 1
            continue
        own = correct_policies(labels, names, p, np.full(len(p), float(n)), 0.95)
        alike = np.array([corrected_interval(one, n, found.q0, found.m0, found.q1, found.m1, 0.95) for one in p])
        hits[0] += (own["success_corrected_low"] <= rates) & (rates <= own["success_corrected_high"])
        hits[1] += (alike[:, 0] <= rates) & (rates <= alike[:, 1])
    return *hits / max(resamplings - refused, 1), refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("resamplings", type=int, nargs="?", default=1000, help="(default: %(default)s)")
    resamplings = parser.parse_args().resamplings
    print("| setting | own labels: least covered policy | mean | labels of all: least | mean | refused |")
    print("|---|---|---|---|---|---|")
    for name, setting in SETTINGS.items():
        own, alike, refused = cover(setting, resamplings, np.random.default_rng(0))
        cells = (f"{value:.3f}" for value in (own.min(), own.mean(), alike.min(), alike.mean()))
        print(f"| {name} | {' | '.join(cells)} | {refused} of {resamplings} |", flush=True)


if __name__ == "__main__":
    main()
