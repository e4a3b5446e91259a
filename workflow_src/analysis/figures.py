"""The figures of a run: imagined against real success, reliability, the ranking, success per task, fidelity."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workflow_src.analysis import statistics as st
from workflow_src.analysis.labels import place_labels
from workflow_src.common import seeds
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
# Where all policies are of one family, each gets its own of the same author's colours.
POLICIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
IMAGINED_COLOUR, REAL_COLOUR = "#CC6677", "#332288"
SUCCESS_TICKS = np.linspace(0, 1, 6)
# More cells than this would hide each other behind their intervals.
CELLS_WITH_INTERVALS = 60
# Letters that fit above a panel of the figure per task.
TITLE_WIDTH = 27
BINS = np.linspace(0, 1, 6)
REPLICAS = 500


def has(table: pd.DataFrame, side: str) -> bool:
    """Whether there are results of this side, "real" or "imagined"."""
    return bool(table[f"success_{side}"].notna().all())


def has_both(table: pd.DataFrame) -> bool:
    """Whether there are real and imagined results to compare."""
    return has(table, "real") and has(table, "imagined")


def looks(ranking: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Policy → (colour, marker): its family's, or its own where all are of one family."""
    if ranking["family"].nunique() == 1 and len(ranking) <= len(POLICIES):
        return {policy: (colour, "o") for policy, colour in zip(sorted(ranking["policy"]), POLICIES)}
    return {policy: FAMILIES[family] for policy, family in zip(ranking["policy"], ranking["family"])}


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
    if not has_both(ranking):
        return _nothing(axes)
    _equality(axes)
    _cells(axes, ranking, per_task)
    families = sorted(set(ranking["family"]), key=list(FAMILIES).index)
    for family in families:
        rows = ranking[ranking["family"] == family]
        for i, policy in enumerate(rows["policy"]):
            label = family if len(families) > 1 and i == 0 else None
            _mean_with_intervals(axes, rows[rows["policy"] == policy], *looks(ranking)[policy], label)
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal", xticks=SUCCESS_TICKS, yticks=SUCCESS_TICKS,
             xlabel="success in reality", ylabel="success imagined by the world model")  # fmt: skip
    axes.set_title("Policies in reality and in imagination")
    # Below the plot: inside, it would hide policies, which may lie anywhere.
    _legend(axes, ncols=len(families) + 1, title="policies (faint: per task)")
    _write_agreement(axes, per_task, agreement)
    points = ranking[["success_real", "success_imagined"]].to_numpy(float)
    place_labels(axes, points, ranking["policy"].tolist(), _arm_ends(ranking))
    return figure


def _legend(axes: Axes, ncols: int, **options: Any) -> None:
    """A legend below the axes."""
    handles, names = axes.get_legend_handles_labels()
    # Only the markers: an interval's arms would be a stub in the legend.
    handles = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]
    axes.figure.legend(handles, names, loc="outside lower center", ncols=ncols, fontsize=9.5, title_fontsize=9.5,
                       **options)  # fmt: skip


def _nothing(axes: Axes) -> Figure:
    axes.figure.set_size_inches(6.8, 1.0)
    axes.text(0.5, 0.5, "nothing to compare: one side has no results", ha="center", va="center", color="#777777")
    axes.set(xticks=[], yticks=[])
    return axes.figure


def _equality(axes: Axes) -> None:
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=1, label="imagined = real")


def _cells(axes: Axes, ranking: pd.DataFrame, per_task: pd.DataFrame) -> None:
    """Every policy's tasks, faint, with faint intervals where they are few enough."""
    arms = len(per_task) <= CELLS_WITH_INTERVALS
    for policy, (colour, marker) in looks(ranking).items():
        rows = per_task[per_task["policy"] == policy]
        x, y = rows["success_real"].astype(float), rows["success_imagined"].astype(float)
        if arms:
            axes.errorbar(x, y, xerr=_arms(rows, "real"), yerr=_arms(rows, "imagined"), fmt="none", ecolor=colour,
                          elinewidth=0.7, alpha=0.1, zorder=1.5)  # fmt: skip
        axes.scatter(x, y, s=20, color=colour, alpha=0.34, marker=marker, linewidths=0, zorder=2)


def _mean_with_intervals(axes: Axes, row: pd.DataFrame, colour: str, marker: str, label: str | None) -> None:
    axes.errorbar(
        row["success_real"], row["success_imagined"], xerr=_arms(row, "real"), yerr=_arms(row, "imagined"),
        fmt=marker, color=colour, markersize=8, markeredgecolor="white", markeredgewidth=0.9, elinewidth=1.1,
        ecolor=colour, alpha=0.95, label=label, zorder=4,
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


def _write_agreement(axes: Axes, per_task: pd.DataFrame, agreement: pd.DataFrame) -> None:
    """The statistics, in the corner where fewer cells lie."""
    x, y = (per_task[f"success_{side}"].to_numpy(float) for side in ("real", "imagined"))
    below = ((x > 0.35) & (y < 0.2)).sum() <= ((x < 0.65) & (y > 0.8)).sum()
    place = {"x": 0.98, "y": 0.02, "ha": "right", "va": "bottom"} if below else {"x": 0.02, "y": 0.98, "va": "top"}
    axes.text(s=_agreement_text(agreement), transform=axes.transAxes, fontsize=9.5, linespacing=1.5, zorder=6,
              bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 3}, **place)  # fmt: skip


def _agreement_text(agreement: pd.DataFrame) -> str:
    lines = []
    for scope, title in (("all policies", "all {} policies"), ("trained policies", "{} trained policies")):
        rows = agreement[agreement["scope"] == scope].set_index("statistic")
        if len(rows):
            pearson, mmrv, mae = (rows["value"].get(name, np.nan) for name in ("pearson", "mmrv", "mae"))
            lines.append(f"{title.format(int(rows['n'].iloc[0]))}:  r {pearson:.2f}   MMRV {mmrv:.3f}   MAE {mae:.2f}")
    rows = agreement[agreement["scope"] == "policy x task cells"].set_index("statistic")
    if len(rows):
        names = ("pearson", "pearson_trivial_real", "pearson_ceiling")
        pearson, trivial, ceiling = (rows["value"].get(name, np.nan) for name in names)
        lines.append(f"{int(rows['n'].iloc[0])} cells:  r {pearson:.2f}   (means alone {trivial:.2f}, "
                     f"perfect replica {ceiling:.2f})")  # fmt: skip
    return "\n".join(lines)


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
            ranking[f"success_{side}"].astype(float), height + shift, xerr=_arms(ranking, side), fmt=marker,
            color=colour, markersize=6.5, elinewidth=1.8, markeredgecolor="white", markeredgewidth=0.8,
            label=f"{side} (n = {_counts(ranking[f'n_{side}'])} each)",
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
    sides = [("imagined", IMAGINED_COLOUR, 0.19), ("real", REAL_COLOUR, -0.19)]
    sides = [side for side in sides if has(per_task, side[0])]
    for axes, task in zip(grid.flat, tasks):
        rows = per_task[per_task["task"] == task].set_index("policy").loc[order]
        for side, colour, shift in sides:
            axes.barh(height + shift, rows[f"success_{side}"].astype(float), height=0.36, color=colour, alpha=0.85,
                      label=side, xerr=_arms(rows, side),
                      error_kw={"elinewidth": 0.9, "ecolor": "#333333"})  # fmt: skip
        axes.set(xlim=(0, 1.02), xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"], ylim=(-0.6, len(order) - 0.4))
        title = f"{task.replace('_', ' ')} (n\u00a0=\u00a0{_counts(rows[f'n_{sides[0][0]}'])})"
        axes.set_title(textwrap.fill(title, TITLE_WIDTH), fontsize=10.5)
        axes.set_yticks(height, order)
        axes.grid(axis="y", visible=False)
    for axes in list(grid.flat)[len(tasks) :]:
        axes.set_visible(False)
    figure.supxlabel("success rate with its interval", fontsize=11)
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower right", ncols=2, fontsize=10)
    return figure


# ---- reliability ----------------------------------------------------------------------------------------------------


def reliability(ranking: pd.DataFrame, per_task: pd.DataFrame, agreement: pd.DataFrame) -> Figure:
    """Whether an imagined rate can be taken at its word: real success of the cells with about the same imagined rate.

    The band is where a perfect replica of reality with as many trials would fall: noise alone flattens the curve.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 6.2), layout="constrained")
    if not has_both(per_task):
        return _nothing(axes)
    imagined, real, n_imagined, n_real = (
        per_task[name].to_numpy(float) for name in ("success_imagined", "success_real", "n_imagined", "n_real")
    )
    _equality(axes)
    replica = st.replica_draws(real, n_real, n_imagined, REPLICAS, seeds.rng(0, "reliability"))
    band = np.array([_binned(*pair) for pair in zip(*replica)])
    band = band[..., ~np.isnan(band).all((0, 1))]
    low, high = np.nanquantile(band[:, 1], [0.025, 0.975], axis=0)
    axes.fill_between(
        np.nanmean(band[:, 0], 0), low, high, color="#DDDDDD", zorder=0.5, label="a perfect replica (95 %)"
    )
    axes.scatter(
        imagined, real, s=20, color=POLICIES[0], alpha=0.34, linewidths=0, zorder=2, label="policy × task cells"
    )
    centre, mean = _binned(imagined, real)
    trials = np.array([n_real[where].sum() for where in _bins(imagined)])
    low, high = st.wilson(mean, np.maximum(trials, 1))
    axes.errorbar(centre, mean, yerr=np.maximum([mean - low, high - mean], 0), fmt="o-", color=POLICIES[1], markersize=8,
                  markeredgecolor="white", elinewidth=1.3, linewidth=1.3, zorder=4,
                  label="mean real success, with interval")  # fmt: skip
    for x, top, where in zip(centre, high, _bins(imagined)):
        if where.any():
            axes.annotate(f"{where.sum()}", (x, top), xytext=(-9, 4), textcoords="offset points", ha="center",
                          fontsize=8.5, color=POLICIES[1])  # fmt: skip
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal", xticks=SUCCESS_TICKS, yticks=SUCCESS_TICKS,
             xlabel="imagined success rate", ylabel="real success rate")  # fmt: skip
    axes.set_title("Can imagined rates be taken at their word?")
    _legend(axes, ncols=2)
    return figure


def _bins(imagined: np.ndarray) -> list[np.ndarray]:
    """Which cells fall into each fifth of the imagined rates; the last one holds 1."""
    number = np.clip(np.digitize(imagined, BINS) - 1, 0, len(BINS) - 2)
    return [number == i for i in range(len(BINS) - 1)]


def _binned(imagined: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean imagined and mean real rate of the cells in every bin; NaN for an empty one."""
    parts = [
        (imagined[where].mean(), real[where].mean()) if where.any() else (np.nan,) * 2 for where in _bins(imagined)
    ]
    return tuple(np.array(parts).T)


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


def draw_all(folder: str | Path, *tables: pd.DataFrame) -> None:
    """Draw every figure that stands on `tables`: ranking, per task, agreement."""
    use_style()
    for name, draw in FIGURES.items():
        save(draw(*tables), folder, name)


def use_style() -> None:
    """`set_style` for drawing into files, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    set_style()


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
        read_table(arguments.ranking, ["policy", "family", "success_imagined", "success_real", "group_imagined"]),
        read_table(arguments.per_task, ["policy", "task", "success_imagined", "success_real"]),
        read_table(arguments.agreement, ["scope", "statistic", "value"]),
    )
    draw_all(arguments.out_dir, *tables)
    if arguments.validation:
        save(fidelity(read_table(arguments.validation, ["horizon", "psnr"])), arguments.out_dir, "fidelity")


if __name__ == "__main__":
    run_cli(main)
