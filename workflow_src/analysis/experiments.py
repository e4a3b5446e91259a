"""Figures of published experiments that have imagined success alone: versions and checkpoints, and what lies off the data."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from workflow_src.analysis import statistics as st
from workflow_src.analysis import style
from workflow_src.common.errors import run_cli
from workflow_src.common.process import die_with_parent

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

BASELINE = "in distribution"


def versions(table: pd.DataFrame) -> Figure:
    """Left: policies by version and size with the standard error over tasks; right: checkpoints over training steps.

    Columns of `table`: experiment (versions or checkpoints), policy, step, imagined, se_tasks.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.6), layout="constrained")
    rows = table[table["experiment"] == "versions"].sort_values("imagined")
    left.barh(rows["policy"], rows["imagined"], xerr=rows["se_tasks"], height=0.6, color=style.IMAGINED_COLOUR,
              error_kw={"elinewidth": 1.1, "ecolor": "#333333"})  # fmt: skip
    left.grid(axis="y", visible=False)
    left.set(xlim=(0, 1), xlabel="imagined success (± standard error over tasks)")
    left.set_title("Versions and sizes")
    for (policy, part), colour in zip(
        table[table["experiment"] == "checkpoints"].groupby("policy", sort=False), style.POLICIES
    ):
        right.plot(part["step"] / 1000, part["imagined"], "o-", color=colour, label=policy)
    right.set(ylim=(0, 0.35), xlim=(0, None), xlabel="training steps (thousands)", ylabel="imagined success")
    right.set_title("Checkpoints")
    right.legend(fontsize=9.5)
    return figure


def out_of_distribution(table: pd.DataFrame) -> Figure:
    """Left: imagined success before and after distractors were added; right: by instruction out of distribution.

    Columns of `table`: experiment (distractors or language), condition, policy, imagined, n. Wilson intervals.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10.4, 4.0), layout="constrained", gridspec_kw={"width_ratios": [2, 3]}
    )
    policies = list(dict.fromkeys(table["policy"]))
    rows = table[table["experiment"] == "distractors"]
    conditions = sorted(set(rows["condition"]), key=lambda name: name != BASELINE)
    ends = {}
    for policy, colour, shift in zip(policies, style.POLICIES, (-0.04, 0.0, 0.04)):
        part = rows[rows["policy"] == policy].set_index("condition").loc[conditions]
        left.errorbar(np.arange(len(part)) + shift, part["imagined"], yerr=_arms(part), fmt="o-", color=colour,
                      markeredgecolor="white", markersize=8, elinewidth=1.1, label=policy)  # fmt: skip
        ends[policy] = (
            part["imagined"].iloc[-1],
            f"{part['imagined'].iloc[-1] / part['imagined'].iloc[0] - 1:+.0%}",
            colour,
        )
    height = -1.0
    for end, change, colour in sorted(ends.values()):
        # A line of text is as high as 0.06 of the axis.
        height = max(end, height + 0.06)
        left.text(len(conditions) - 0.86, height, change, va="center", fontsize=9.5, color=colour)
    left.set(xlim=(-0.3, len(conditions) - 0.5), ylim=(0, 1), ylabel="imagined success")
    left.set_xticks(range(len(conditions)), conditions)
    left.set_title("Distractors in the first frame")
    rows = table[table["experiment"] == "language"]
    instructions = list(dict.fromkeys(rows["condition"]))
    for i, (policy, colour) in enumerate(zip(policies, style.POLICIES)):
        part = rows[rows["policy"] == policy].set_index("condition").loc[instructions]
        right.bar(np.arange(len(part)) + (i - 1) * 0.27, part["imagined"], width=0.25, color=colour, yerr=_arms(part),
                  error_kw={"elinewidth": 0.9, "ecolor": "#333333"})  # fmt: skip
    right.set_xticks(range(len(instructions)), [textwrap.fill(name, 16) for name in instructions], fontsize=9.5)
    right.set(ylim=(0, 1))
    right.grid(axis="x", visible=False)
    right.set_title(f"Unseen instructions (n = {style.counts(rows['n'])} each)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(policies), fontsize=9.5)
    return figure


def _arms(rows: pd.DataFrame) -> np.ndarray:
    rate = rows["imagined"].to_numpy(float)
    low, high = st.wilson(rate, rows["n"].to_numpy(float))
    return np.maximum([rate - low, high - rate], 0)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.analysis.experiments",
        description="Draw the figures of published experiments that have imagined success alone.",
        epilog="example:\n  python -m workflow_src.analysis.experiments --versions config/published/experiments/versions.csv "
        "--shifts config/published/experiments/out_of_distribution.csv --out-dir results/published/experiments",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--versions", required=True, help="CSV: experiment, policy, step, imagined, se_tasks")
    parser.add_argument("--shifts", required=True, help="CSV: experiment, condition, policy, imagined, n")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder for the figures")
    options = parser.parse_args()
    die_with_parent()
    tables = (
        style.read_table(options.versions, ["experiment", "policy", "step", "imagined", "se_tasks"]),
        style.read_table(options.shifts, ["experiment", "condition", "policy", "imagined", "n"]),
    )
    style.use_style()
    for draw, table in zip((versions, out_of_distribution), tables):
        style.save(draw(table), options.out_dir, draw.__name__)


if __name__ == "__main__":
    run_cli(main)
