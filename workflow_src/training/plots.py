"""Pictures of a training: its loss, and how far its replays stay from the recordings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from workflow_src.common.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Suffix of the columns in validation.csv → what it is and how it is drawn.
LINES = {
    "": ("world model", {"marker": "o", "markersize": 3.5, "color": "#3366aa", "zorder": 3}),
    "_tokenizer": ("tokenizer alone (the best possible)", {"linestyle": ":", "color": "0.45"}),
    "_shuffled": ("another episode's actions", {"linestyle": "-.", "color": "#bb7744"}),
    "_null": ("actions dropped", {"linestyle": (0, (5, 2)), "color": "#aa4488"}),
    "_still": ("standing still", {"linestyle": (0, (3, 1, 1, 1)), "color": "#559955"}),
    "_frozen": ("first frame, frozen", {"linestyle": "--", "color": "0.45"}),
}
METRICS = {
    "mse": ("MSE (intensities 0 to 1), lower is better", "log"),
    "psnr": ("PSNR (dB), higher is better", "linear"),
    "lpips": ("LPIPS, lower is better", "linear"),
}


def plot_loss(path: Path, history: list[dict[str, float]]) -> None:
    """Training loss against steps, logarithmic."""
    figure = _figure(6, 3.5)
    axes = figure.subplots()
    steps, losses = ([row[name] for row in history] for name in ("step", "loss"))
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="logged")
    if len(losses) > 20:
        width = len(losses) // 20
        axes.plot(steps[width - 1 :], np.convolve(losses, np.ones(width) / width, "valid"), label="running mean")
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.legend(frameon=False)
    _save(figure, path)


def plot_horizon(path: Path, rows: list[dict[str, float]]) -> None:
    """MSE, PSNR and, where it is known, LPIPS of replays by horizon (`rows` of validation.csv), beside the baselines."""
    metrics = [name for name in METRICS if name in rows[0]]
    figure = _figure(4.3 * len(metrics), 4.1)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics):
        _draw(axes, metric, rows)
    figure.suptitle("Held-out episodes replayed from their first frame", fontsize=11)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False
    )
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # a second of imports, which every process of a training would spend

    return Figure(figsize=(width, height), layout="constrained")


def _draw(axes: Axes, metric: str, rows: list[dict[str, float]]) -> None:
    horizon, (title, scale) = [row["horizon"] for row in rows], METRICS[metric]
    for suffix, (label, style) in LINES.items():
        if metric + suffix in rows[0]:
            axes.plot(horizon, [row[metric + suffix] for row in rows], label=label, linewidth=1.6, **style)
    axes.set(xlabel="steps after the first frame", yscale=scale, xlim=(0.5, max(horizon) + 0.5))
    axes.set_title(title, fontsize=10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
