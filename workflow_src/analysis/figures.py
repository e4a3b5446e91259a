"""The figures of a run: imagined against real success, reliability, the ranking, success per task, fidelity."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workflow_src.analysis.scatter import reliability, scatter
from workflow_src.analysis.style import (
    FAMILIES,
    IMAGINED_COLOUR,
    REAL_COLOUR,
    SUCCESS_TICKS,
    arms,
    counts,
    has,
    has_both,
    nothing,
    read_table,
    save,
    use_style,
)
from workflow_src.common.errors import run_cli
from workflow_src.common.process import die_with_parent

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Letters that fit above a panel of the figure per task.
TITLE_WIDTH = 27

# ---- ranking --------------------------------------------------------------------------------------------------------


def ranking_figure(ranking: pd.DataFrame, per_task: pd.DataFrame, agreement: pd.DataFrame) -> Figure:
    """Policies from best to worst imagined, imagined and real success with intervals side by side."""
    import matplotlib.pyplot as plt

    rows, apart = len(ranking), 0.15 if has_both(ranking) else 0.0
    figure, axes = plt.subplots(figsize=(8.0, 1.4 + 0.36 * rows), layout="constrained")
    height = np.arange(rows)[::-1]
    sides = [("imagined", IMAGINED_COLOUR, "o", apart), ("real", REAL_COLOUR, "D", -apart)]
    sides = [side for side in sides if has(ranking, side[0])]
    for side, colour, marker, shift in sides:
        axes.errorbar(
            ranking[f"success_{side}"].astype(float), height + shift, xerr=arms(ranking, side), fmt=marker,
            color=colour, markersize=6.5, elinewidth=1.8, markeredgecolor="white", markeredgewidth=0.8,
            label=f"{side} (n = {counts(ranking[f'n_{side}'])} each)",
        )  # fmt: skip
    _rank_columns(axes, ranking, height, [side for side, *_ in sides])
    _group_columns(axes, ranking, height, [side for side, *_ in sides])
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.6, rows - 0.4), xticks=SUCCESS_TICKS, xlabel="success rate with its interval")
    axes.set_title("Policy ranking")
    handles, names = axes.get_legend_handles_labels()
    axes.legend([handle[0] for handle in handles], names, loc="lower right", fontsize=10)
    axes.grid(axis="y", visible=False)
    return figure


def _rank_columns(axes: Axes, ranking: pd.DataFrame, height: np.ndarray, sides: list[str]) -> None:
    """Names in their family's colour, and the rank in each world in a column of its own, left of the axes."""
    axes.set_yticks(height, ranking["policy"])
    axes.tick_params(axis="y", pad=10 + 34 * len(sides))
    for label, name in zip(axes.get_yticklabels(), ranking["family"]):
        label.set_color(FAMILIES[name][0])
    for column, side in enumerate(reversed(sides)):
        ranks = [str(int(rank)) for rank in ranking[f"rank_{side}"]]
        _column(axes, ranks, height, (0, -18 - 36 * column), f"rank\n{side}", side)


def _group_columns(axes: Axes, ranking: pd.DataFrame, height: np.ndarray, sides: list[str]) -> None:
    """Letters right of the axes: policies that share one are not told apart by their trials."""
    width = 0.0
    for side in sides:
        texts = ranking[f"group_{side}"].fillna("").tolist()
        # A letter is about six points wide.
        half = max(16, 3.2 * max(map(len, texts)) + 5)
        _column(axes, texts, height, (1, width + half), f"group\n{side}", side)
        width += 2 * half


def _column(axes: Axes, texts: list[str], height: np.ndarray, place: tuple[int, float], title: str, side: str) -> None:
    """A column of `texts` beside the axes, at `place`: edge (0 left, 1 right) and distance in points."""
    edge, distance = place
    colour = {"imagined": IMAGINED_COLOUR, "real": REAL_COLOUR}[side]
    options = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "center", "va": "center",
               "xytext": (distance, 0), "color": colour, "annotation_clip": False}  # fmt: skip
    for y, text in zip(height, texts):
        axes.annotate(text, (edge, y), fontsize=10.5, **options)
    axes.annotate(title, (edge, height[0] + 0.85), fontsize=7.5, **options)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def checkpoints(ranking: pd.DataFrame, per_task: pd.DataFrame, agreement: pd.DataFrame) -> Figure:
    """Imagined and real success over the training steps of every network of which several snapshots were ranked."""
    import matplotlib.pyplot as plt

    plain = ranking[(ranking["family"] == "trained") & ranking["snapshot"].notna()]
    networks = [(name, rows.sort_values("snapshot")) for name, rows in plain.groupby("network") if len(rows) > 1]
    figure, grid = plt.subplots(1, max(len(networks), 1), figsize=(1.2 + 3.8 * max(len(networks), 1), 3.8), sharey=True,
                                squeeze=False, layout="constrained")  # fmt: skip
    if not networks:
        return nothing(grid.flat[0], "no network has several snapshots")
    sides = [("imagined", IMAGINED_COLOUR, "o", "-"), ("real", REAL_COLOUR, "D", "--")]
    for axes, (name, rows) in zip(grid.flat, networks):
        for side, colour, marker, line in sides:
            if has(ranking, side):
                axes.errorbar(rows["snapshot"].astype(float), rows[f"success_{side}"].astype(float), yerr=arms(rows, side),
                              fmt=marker + line, color=colour, markersize=6.5, markeredgecolor="white", elinewidth=1.2,
                              linewidth=1.4, label=side)  # fmt: skip
        axes.set(ylim=(-0.02, 1.02), yticks=SUCCESS_TICKS, xlabel="training steps")
        axes.set_title(name)
    grid.flat[0].set_ylabel("success rate with its interval")
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend([handle[0] for handle in handles], names, loc="outside lower center", ncols=2, fontsize=10)
    return figure


# ---- per task -------------------------------------------------------------------------------------------------------


def per_task_figure(ranking: pd.DataFrame, per_task: pd.DataFrame, agreement: pd.DataFrame) -> Figure:
    """One panel per task: imagined and real success of every policy as bars with intervals, best imagined on top."""
    import matplotlib.pyplot as plt

    tasks, order = list(dict.fromkeys(per_task["task"])), ranking["policy"].tolist()
    columns = min(len(tasks), 3)
    lines = -(-len(tasks) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(2.2 + 2.6 * columns, lines * (1.4 + 0.34 * len(order))),
                                sharey=True, squeeze=False, layout="constrained")  # fmt: skip
    height = np.arange(len(order))[::-1]
    sides = [("imagined", IMAGINED_COLOUR, 0.19), ("real", REAL_COLOUR, -0.19)]
    sides = [side for side in sides if has(per_task, side[0])]
    for axes, task in zip(grid.flat, tasks):
        rows = per_task[per_task["task"] == task].set_index("policy").loc[order]
        for side, colour, shift in sides:
            axes.barh(height + shift, rows[f"success_{side}"].astype(float), height=0.36, color=colour, alpha=0.85,
                      label=side, xerr=arms(rows, side),
                      error_kw={"elinewidth": 0.9, "ecolor": "#333333"})  # fmt: skip
        axes.set(xlim=(0, 1.02), xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"], ylim=(-0.6, len(order) - 0.4))
        title = f"{task.replace('_', ' ')} (n\u00a0=\u00a0{counts(rows[f'n_{sides[0][0]}'])})"
        axes.set_title(textwrap.fill(title, TITLE_WIDTH), fontsize=10.5)
        axes.set_yticks(height, order)
        axes.grid(axis="y", visible=False)
    for axes in list(grid.flat)[len(tasks) :]:
        axes.set_visible(False)
    figure.supxlabel("success rate with its interval", fontsize=11)
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower right", ncols=2, fontsize=10)
    return figure


# ---- fidelity -------------------------------------------------------------------------------------------------------


def fidelity(validation: pd.DataFrame) -> Figure:
    """PSNR and SSIM of replayed held-out actions over the horizon, between ceiling and idle baselines."""
    import matplotlib.pyplot as plt

    lines = {
        "": ("world model", {"marker": "o", "markersize": 4, "color": FAMILIES["trained"][0]}),
        "_tokenizer": ("tokenizer alone", {"linestyle": ":", "color": "#888888"}),
        "_shuffled": ("another episode's actions", {"linestyle": "-.", "color": "#bb8855"}),
        "_frozen": ("first frame held still", {"linestyle": "--", "color": "#888888"}),
    }
    measures = [(name, title) for name, title in (("psnr", "PSNR (dB)"), ("ssim", "SSIM")) if name in validation]
    size = (4.2 * len(measures), 3.4)
    figure, grid = plt.subplots(1, len(measures), figsize=size, squeeze=False, layout="constrained")
    for axes, (name, title) in zip(grid.flat, measures):
        for suffix, (label, style) in lines.items():
            if f"{name}{suffix}" in validation:
                axes.plot(validation["horizon"], validation[f"{name}{suffix}"], label=label, **style)
        axes.set(xlabel="steps into the episode", ylabel=title, xlim=(0, validation["horizon"].max() + 0.5))
        axes.set_title(title)
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(lines), fontsize=9.5)
    return figure


# ---- files ----------------------------------------------------------------------------------------------------------

FIGURES: dict[str, Callable[..., Any]] = {
    "real_vs_imagined": scatter, "reliability": reliability, "policy_ranking": ranking_figure,
    "per_task": per_task_figure,
}  # fmt: skip


# Of a run, which knows the networks behind its policies.
RUN_FIGURES = FIGURES | {"checkpoints": checkpoints}


def draw_all(drawings: dict[str, Callable[..., Any]], folder: str | Path, *tables: pd.DataFrame) -> None:
    """Draw figures that stand on `tables`: ranking, per task, agreement."""
    use_style()
    for name, draw in drawings.items():
        save(draw(*tables), folder, name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw the figures from the tables, each as SVG and PNG.",
        epilog="example:\n  python -m workflow_src.analysis.figures --config results/config/analysis.json "
        "--ranking results/tables/policy_ranking.csv --per-task results/tables/per_task.csv "
        "--agreement results/tables/agreement.csv --out-dir results/figures",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="stage file")
    parser.add_argument("--ranking", required=True, help="policy_ranking.csv")
    parser.add_argument("--per-task", required=True, help="per_task.csv")
    parser.add_argument("--agreement", required=True, help="agreement.csv")
    parser.add_argument("--validation", help="fidelity by horizon (columns horizon, psnr, ssim, psnr_frozen, ...)")
    parser.add_argument("--out-dir", required=True, help="folder for the figures")
    arguments = parser.parse_args()
    die_with_parent()
    tables = (
        read_table(arguments.ranking, ["policy", "family", "success_imagined", "success_real", "group_imagined"]),
        read_table(arguments.per_task, ["policy", "task", "success_imagined", "success_real"]),
        read_table(arguments.agreement, ["scope", "statistic", "value"]),
    )
    draw_all(RUN_FIGURES, arguments.out_dir, *tables)
    if arguments.validation:
        save(fidelity(read_table(arguments.validation, ["horizon", "psnr"])), arguments.out_dir, "fidelity")


if __name__ == "__main__":
    run_cli(main)
