"""Real against imagined success: the scatter of policies and tasks, and how reliable an imagined rate is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from workflow_src.analysis import statistics as st
from workflow_src.analysis.labels import place_labels
from workflow_src.analysis.style import FAMILIES, POLICIES, SUCCESS_TICKS, arms, has_both, legend, looks, nothing
from workflow_src.common import seeds

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More cells than this would hide each other behind their intervals.
CELLS_WITH_INTERVALS = 60
BINS = np.linspace(0, 1, 6)
REPLICAS = 500


def scatter(ranking: pd.DataFrame, per_task: pd.DataFrame, agreement: pd.DataFrame) -> Figure:
    """Imagined against real success: policy means with intervals, their tasks faint behind, the line of equality."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.8, 6.7), layout="constrained")
    if not has_both(ranking):
        return nothing(axes)
    ranking, per_task = (table.dropna(subset=["success_real"]) for table in (ranking, per_task))
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
    legend(axes, ncols=len(families) + 1, title="policies (faint: per task)")
    _write_agreement(axes, per_task, agreement)
    points = ranking[["success_real", "success_imagined"]].to_numpy(float)
    place_labels(axes, points, ranking["policy"].tolist(), _arm_ends(ranking))
    return figure


def _equality(axes: Axes) -> None:
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=1, label="imagined = real")


def _cells(axes: Axes, ranking: pd.DataFrame, per_task: pd.DataFrame) -> None:
    """Every policy's tasks, faint, with faint intervals where they are few enough."""
    few = len(per_task) <= CELLS_WITH_INTERVALS
    for policy, (colour, marker) in looks(ranking).items():
        rows = per_task[per_task["policy"] == policy]
        x, y = rows["success_real"].astype(float), rows["success_imagined"].astype(float)
        if few:
            axes.errorbar(x, y, xerr=arms(rows, "real"), yerr=arms(rows, "imagined"), fmt="none", ecolor=colour,
                          elinewidth=0.7, alpha=0.1, zorder=1.5)  # fmt: skip
        axes.scatter(x, y, s=20, color=colour, alpha=0.34, marker=marker, linewidths=0, zorder=2)


def _mean_with_intervals(axes: Axes, row: pd.DataFrame, colour: str, marker: str, label: str | None) -> None:
    axes.errorbar(
        row["success_real"], row["success_imagined"], xerr=arms(row, "real"), yerr=arms(row, "imagined"),
        fmt=marker, color=colour, markersize=8, markeredgecolor="white", markeredgewidth=0.9, elinewidth=1.1,
        ecolor=colour, alpha=0.95, label=label, zorder=4,
    )  # fmt: skip


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


# ---- reliability ----------------------------------------------------------------------------------------------------


def reliability(ranking: pd.DataFrame, per_task: pd.DataFrame, agreement: pd.DataFrame) -> Figure:
    """Whether an imagined rate can be taken at its word: real success of the cells with about the same imagined rate.

    The band is where a perfect replica of reality with as many trials would fall: noise alone flattens the curve.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 6.2), layout="constrained")
    if not has_both(per_task):
        return nothing(axes)
    per_task = per_task.dropna(subset=["success_real"])
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
    legend(axes, ncols=2)
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
