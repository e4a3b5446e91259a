"""The figures of a run: imagined against real success, the ranking, success per task, fidelity over horizon."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workflow_src.analysis.labels import place_labels
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import atomic_path
from workflow_src.common.process import die_with_parent

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too; a marker per family besides, for grey print.
FAMILIES = {
    "trained": ("#0072B2", "o"), "perturbed": ("#D55E00", "s"), "scripted": ("#009E73", "D"), "random": ("#7F7F7F", "X")
}  # fmt: skip
IMAGINED_COLOUR, REAL_COLOUR = "#CC6677", "#332288"
SUCCESS_TICKS = np.linspace(0, 1, 6)


def has_real(table: pd.DataFrame) -> bool:
    """Whether there are real results beside the imagined ones."""
    return bool(table["success_real"].notna().all())


def set_style() -> None:
    """One look for all figures: white, quiet grid, letters that stay readable at the width of a README."""
    import matplotlib
    import seaborn as sns

    sns.set_theme(context="notebook", style="whitegrid", font_scale=1.0)
    matplotlib.rcParams.update({
        "font.family": "DejaVu Sans", "axes.edgecolor": "#444444", "grid.color": "#E6E6E6", "svg.fonttype": "path",
        "svg.hashsalt": "rehearsal", "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "legend.frameon": False, "savefig.dpi": 150,
    })  # fmt: skip


# ---- real against imagined ------------------------------------------------------------------------------------------


def scatter(ranking: pd.DataFrame, per_task: pd.DataFrame, agreement: pd.DataFrame) -> Figure:
    """Imagined against real success: policy means with intervals, their tasks faint behind, the line of equality."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.8, 6.7), layout="constrained")
    if not has_real(ranking):
        axes.text(0.5, 0.5, "no real results to compare with", ha="center", color="#777777")
        axes.set(xticks=[], yticks=[])
        return figure
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=1, label="imagined = real")
    for name, rows in per_task.groupby("family"):
        colour, marker = FAMILIES[name]
        axes.scatter(rows["success_real"], rows["success_imagined"], s=20, color=colour, alpha=0.28, marker=marker,
                     linewidths=0, zorder=2)  # fmt: skip
    for name in FAMILIES:
        rows = ranking[ranking["family"] == name]
        if len(rows):
            _means_with_intervals(axes, rows, name)
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal", xticks=SUCCESS_TICKS, yticks=SUCCESS_TICKS,
             xlabel="success in reality", ylabel="success imagined by the world model")  # fmt: skip
    axes.set_title("Policies in reality and in imagination")
    handles, names = axes.get_legend_handles_labels()
    # Only the markers: an interval's arms would be a stub in the legend.
    handles = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]
    # Below the plot: inside, it would hide policies, which may lie anywhere.
    axes.figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=9.5,
                       title="policies (faint: per task)", title_fontsize=9.5)  # fmt: skip
    axes.text(0.02, 0.98, _agreement_text(agreement), transform=axes.transAxes, va="top", fontsize=10, linespacing=1.5,
              bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 3}, zorder=6)  # fmt: skip
    points = ranking[["success_real", "success_imagined"]].to_numpy(float)
    place_labels(axes, points, ranking["policy"].tolist(), _arm_ends(ranking))
    return figure


def _means_with_intervals(axes: Axes, rows: pd.DataFrame, name: str) -> None:
    colour, marker = FAMILIES[name]
    axes.errorbar(
        rows["success_real"], rows["success_imagined"], xerr=_arms(rows, "real"), yerr=_arms(rows, "imagined"),
        fmt=marker, color=colour, markersize=8, markeredgecolor="white", markeredgewidth=0.9, elinewidth=1.1,
        ecolor=colour, alpha=0.95, label=name, zorder=4,
    )  # fmt: skip


def _arms(rows: pd.DataFrame, side: str) -> np.ndarray:
    value, low, high = (rows[f"success_{side}{end}"].to_numpy(float) for end in ("", "_low", "_high"))
    return np.maximum([value - low, high - value], 0)


def _arm_ends(ranking: pd.DataFrame) -> np.ndarray:
    """The intervals as lines `(2 n, 2 ends, xy)`, for the labels to keep clear of."""
    real, imagined = (ranking[f"success_{side}"].to_numpy(float) for side in ("real", "imagined"))
    lines = []
    for end in ("_low", "_high"):
        x, y = (ranking[f"success_{side}{end}"].to_numpy(float) for side in ("real", "imagined"))
        lines.append((np.stack([x, imagined], -1), np.stack([real, y], -1)))
    (west, south), (east, north) = lines
    return np.concatenate([np.stack([west, east], 1), np.stack([south, north], 1)])


def _agreement_text(agreement: pd.DataFrame) -> str:
    lines = []
    for scope, title in (("all policies", "all {} policies"), ("trained policies", "{} trained policies")):
        rows = agreement[agreement["scope"] == scope].set_index("statistic")
        if len(rows):
            pearson, mmrv, mae = (rows["value"].get(name, np.nan) for name in ("pearson", "mmrv", "mae"))
            lines.append(f"{title.format(int(rows['n'].iloc[0]))}:  r {pearson:.2f}   MMRV {mmrv:.3f}   MAE {mae:.2f}")
    return "\n".join(lines)


# ---- ranking --------------------------------------------------------------------------------------------------------


def ranking_figure(ranking: pd.DataFrame, per_task: pd.DataFrame, agreement: pd.DataFrame) -> Figure:
    """Policies from best to worst imagined, imagined and real success with intervals side by side."""
    import matplotlib.pyplot as plt

    rows, compared = len(ranking), has_real(ranking)
    figure, axes = plt.subplots(figsize=(8.0, 1.4 + 0.36 * rows), layout="constrained")
    height = np.arange(rows)[::-1]
    sides = [("imagined", IMAGINED_COLOUR, "o", 0.15 if compared else 0.0)]
    sides += [("real", REAL_COLOUR, "D", -0.15)] if compared else []
    for side, colour, marker, shift in sides:
        axes.errorbar(
            ranking[f"success_{side}"].astype(float), height + shift, xerr=_arms(ranking, side), fmt=marker,
            color=colour, markersize=6.5, elinewidth=1.8, markeredgecolor="white", markeredgewidth=0.8,
            label=f"{side} (n = {_counts(ranking[f'n_{side}'])} each)",
        )  # fmt: skip
    _rank_columns(axes, ranking, height, [side for side, *_ in sides])
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
    colours = {"imagined": IMAGINED_COLOUR, "real": REAL_COLOUR}
    for column, side in enumerate(reversed(sides)):
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "center", "va": "center"}
        offset = (-18 - 36 * column, 0)
        for y, rank in zip(height, ranking[f"rank_{side}"]):
            axes.annotate(str(int(rank)), (0, y), xytext=offset, color=colours[side], fontsize=10.5, **place)
        axes.annotate(f"rank\n{side}", (0, height[0] + 0.85), xytext=offset, fontsize=7.5, color=colours[side], **place)


def _counts(n: pd.Series) -> str:
    low, high = int(n.min()), int(n.max())
    return str(low) if low == high else f"{low}–{high}"


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
    sides = [("imagined", IMAGINED_COLOUR, 0.19)] + ([("real", REAL_COLOUR, -0.19)] if has_real(per_task) else [])
    for axes, task in zip(grid.flat, tasks):
        rows = per_task[per_task["task"] == task].set_index("policy").loc[order]
        for side, colour, shift in sides:
            axes.barh(height + shift, rows[f"success_{side}"].astype(float), height=0.36, color=colour, alpha=0.85,
                      label=side, xerr=_arms(rows, side),
                      error_kw={"elinewidth": 0.9, "ecolor": "#333333"})  # fmt: skip
        axes.set(xlim=(0, 1.02), xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"], ylim=(-0.6, len(order) - 0.4))
        axes.set_title(f"{task.replace('_', ' ')}  (n = {_counts(rows['n_imagined'])})", fontsize=11)
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
    "real_vs_imagined": scatter, "policy_ranking": ranking_figure, "per_task": per_task_figure
}  # fmt: skip


def save(figure: Figure, folder: str | Path, name: str) -> None:
    """Write `<folder>/<name>.svg` and `.png`. The same figure gives the same bytes: no time stamp inside."""
    import matplotlib.pyplot as plt

    for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        with atomic_path(Path(folder) / f"{name}.{suffix}") as temporary:
            figure.savefig(temporary, metadata=metadata, facecolor="white")
    plt.close(figure)


def read_table(path: str | Path, needed: list[str]) -> pd.DataFrame:
    """Read a CSV of the tables stage; raises `UserError` naming the file and what it lacks."""
    import pandas as pd

    try:
        table = pd.read_csv(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such table; run the workflow up to it") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not a readable table ({error}); delete it and run again") from error
    if missing := [column for column in needed if column not in table]:
        raise UserError(f"{path}: has no column {', '.join(missing)}; delete it and run again")
    return table


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
        read_table(arguments.ranking, ["policy", "family", "success_imagined", "success_real"]),
        read_table(arguments.per_task, ["policy", "task", "success_imagined", "success_real"]),
        read_table(arguments.agreement, ["scope", "statistic", "value"]),
    )
    import matplotlib

    matplotlib.use("Agg")
    set_style()
    for name, draw in FIGURES.items():
        save(draw(*tables), arguments.out_dir, name)
    if arguments.validation:
        save(fidelity(read_table(arguments.validation, ["horizon", "psnr"])), arguments.out_dir, "fidelity")


if __name__ == "__main__":
    run_cli(main)
