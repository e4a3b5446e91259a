"""The look of all figures: colours, style, small pieces that several of them share, and how they become files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workflow_src.common.errors import UserError
from workflow_src.common.files import atomic_path

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


def use_style() -> None:
    """`set_style` for drawing into files, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    set_style()


# ---- pieces ---------------------------------------------------------------------------------------------------------


def legend(axes: Axes, ncols: int, **options: Any) -> None:
    """A legend below the axes."""
    handles, names = axes.get_legend_handles_labels()
    # Only the markers: an interval's arms would be a stub in the legend.
    handles = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]
    axes.figure.legend(handles, names, loc="outside lower center", ncols=ncols, fontsize=9.5, title_fontsize=9.5,
                       **options)  # fmt: skip


def nothing(axes: Axes, text: str = "nothing to compare: one side has no results") -> Figure:
    axes.figure.set_size_inches(6.8, 1.0)
    axes.text(0.5, 0.5, text, ha="center", va="center", color="#777777")
    axes.set(xticks=[], yticks=[])
    return axes.figure


def arms(rows: pd.DataFrame, side: str) -> np.ndarray:
    value, low, high = (rows[f"success_{side}{end}"].to_numpy(float) for end in ("", "_low", "_high"))
    return np.maximum([value - low, high - value], 0)


def counts(n: pd.Series) -> str:
    """A range of trial counts as text."""
    low, high = int(n.min()), int(n.max())
    return str(low) if low == high else f"{low}–{high}"


# ---- files ----------------------------------------------------------------------------------------------------------


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
