"""Look at a store: a summary, a contact sheet, histograms of its actions, and whether frames and actions are aligned.

Prints the summary; writes `contact_sheet.png`, `actions.png` and `alignment.csv`. Alignment: how well the size of
`actions[t + shift]` says how much frame t+1 differs from frame t. A shift of 0 is what the store declares, and -1 a robot
that follows its commands late, as Bridge's does; where another shift is clearly better, the actions stand beside the wrong
frames.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from workflow_src import embodiments
from workflow_src.common.errors import run_cli
from workflow_src.common.files import atomic_path
from workflow_src.common.progress import say
from workflow_src.episodes.actions import metric_actions
from workflow_src.episodes.store import EpisodeStore

EXAMPLES = """example:
  python -m workflow_src.episodes.inspect results/episodes/viola/train --out viola
"""
SHIFTS = range(-3, 4)
PLAUSIBLE = (-1, 0)
CLEARLY, AT_ALL = 0.05, 0.2  # correlations: better by so much, and of at least so much
SAMPLE = 100  # episodes that are looked at, spread over the store
ROWS, COLUMNS = 10, 6  # of the contact sheet
CHANNELS = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper", "base x", "base y", "base yaw")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path, help="folder of a split, or its episodes.parquet")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the figures (default: here)")
    parser.add_argument("--convention", default="rehearsal", help="of the world-model units in the histograms")
    arguments = parser.parse_args()
    inspect(EpisodeStore(arguments.store), arguments.out, arguments.convention)


def inspect(store: EpisodeStore, out: Path, convention: str = "rehearsal") -> None:
    """Print and write everything about `store`."""
    chosen = spread(len(store), SAMPLE)
    actions = [metric_actions(store, i, store.arrays(i), int(store.lengths[i])) for i in chosen]
    motions = [_motion(store.frames(i)) for i in chosen]
    print(summary(store, np.concatenate(actions)))
    draw_contact_sheet(store, out / "contact_sheet.png")
    draw_actions(np.concatenate(actions), str(store.table["embodiment"].iloc[0]), convention, out / "actions.png")
    found = alignment(motions, actions)
    with atomic_path(out / "alignment.csv") as temporary:
        found.rename_axis("shift").to_csv(temporary)
    print(
        "\nalignment, correlation by shift: " + "  ".join(f"{shift:+d}: {value:.2f}" for shift, value in found.items())
    )
    if warning := judge_alignment(found):
        say(f"warning: {store.root}: {warning}")


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` positions, evenly spread."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def summary(store: EpisodeStore, actions: np.ndarray) -> str:
    """A table in text: what the store holds, and quantiles of its metric actions (N, A)."""
    table, lengths = store.table, store.lengths
    height, width = store.image_size()
    robots = ", ".join(
        f"{robot} at {hz:g} Hz" for robot, hz in sorted(set(zip(table["embodiment"], table["control_hz"])))
    )
    lines = [
        f"episodes      {len(store)}, of {lengths.min()} to {lengths.max()} frames, {lengths.sum()} in all",
        f"frames        {height} x {width} pixels",
        f"robots        {robots}",
        f"actions       {', '.join(sorted(set(table['action_semantics'])))}; also {_also(store)}",
        f"instructions  {table['instruction'].nunique()}, {int((table['instruction'] == '').sum())} episodes without",
        f"source        {', '.join(sorted(set(table['source'])))}",
        "",
        f"{'channel':<10}" + "".join(f"{name:>10}" for name in ("min", "1%", "median", "99%", "max")),
    ]
    quantiles = np.quantile(actions, [0, 0.01, 0.5, 0.99, 1], axis=0)
    lines += [
        f"{name:<10}" + "".join(f"{value:10.4f}" for value in column) for name, column in zip(CHANNELS, quantiles.T)
    ]
    return "\n".join(lines)


def alignment(motions: list[np.ndarray], actions: list[np.ndarray]) -> pd.Series:
    """Correlation, by shift, of how much a frame differs from the one before with the size of `actions[t + shift]`.

    Of episodes' `motions` (F-1,) and `actions` (F-1, A); both are standardised within each episode.
    """
    sizes = [np.linalg.norm(one[:, :6] / _deviation(actions)[:6], axis=1) for one in actions]
    found = {}
    for shift in SHIFTS:
        pairs = []
        for motion, size in zip(motions, sizes):
            begin, end = max(0, -shift), len(motion) - max(0, shift)
            if end - begin > 2:
                pairs.append(np.stack([_standard(motion)[begin:end], _standard(size)[begin + shift : end + shift]]))
        moved, commanded = np.concatenate(pairs, 1) if pairs else np.zeros((2, 1))
        varies = moved.std() > 0 and commanded.std() > 0
        found[shift] = float(np.corrcoef(moved, commanded)[0, 1]) if varies else 0.0
    return pd.Series(found, name="correlation")


def judge_alignment(found: pd.Series) -> str:
    """What contradicts the declared alignment; empty: nothing."""
    best, declared = int(found.idxmax()), max(found[shift] for shift in PLAUSIBLE)
    if best in PLAUSIBLE or found[best] < max(declared + CLEARLY, AT_ALL):
        return ""
    return (
        f"actions[t{best:+d}] explain what changes from frame t to t+1 better ({found[best]:.2f}) than actions[t] and "
        f"actions[t-1] do ({declared:.2f}); they may stand beside the wrong frames"
    )


def draw_contact_sheet(store: EpisodeStore, path: Path) -> None:
    """Frames of some episodes, one row each, under its instruction."""
    from PIL import Image, ImageDraw

    chosen, (height, width), line = spread(len(store), ROWS), store.image_size(), 12
    sheet = Image.new("RGB", (COLUMNS * width, len(chosen) * (height + line)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, i in enumerate(chosen):
        top = row * (height + line)
        text = f"{int(store.table['index'].iloc[i])}: {store.table['instruction'].iloc[i]}"
        pen.text((2, top), text.encode("ascii", "replace").decode(), fill="black")
        numbers = np.linspace(0, store.lengths[i] - 1, COLUMNS).round().astype(int).tolist()
        for column, frame in enumerate(store.read(i, numbers)):
            sheet.paste(Image.fromarray(frame), (column * width, top + line))
    with atomic_path(path) as temporary:
        sheet.save(temporary)


def draw_actions(actions: np.ndarray, embodiment: str, convention: str, path: Path) -> None:
    """Histograms of every channel of `actions` (N, A): metric above, in world-model units below."""
    from matplotlib.figure import Figure

    width = actions.shape[1]
    units = embodiments.to_world_model(actions, embodiment, convention)[:, :width]
    figure = Figure(figsize=(2 * width, 4), layout="constrained")
    axes = figure.subplots(2, width)
    for row, values, label in ((0, actions, "metric"), (1, units, "world-model units")):
        for channel in range(width):
            axes[row, channel].hist(values[:, channel], bins=40, log=True)
            axes[row, channel].set_title(CHANNELS[channel] if row == 0 else "", fontsize=9)
        axes[row, 0].set_ylabel(label)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)


def _also(store: EpisodeStore) -> str:
    return ", ".join(sorted(set(store.arrays(0)) - {"actions"})) or "nothing else"


def _motion(frames: np.ndarray) -> np.ndarray:
    """Mean absolute difference from frame to frame, float64 (F-1,)."""
    return np.array([np.abs(one.astype(np.int16) - two).mean() for one, two in zip(frames[1:], frames[:-1])])


def _deviation(actions: list[np.ndarray]) -> np.ndarray:
    deviation = np.concatenate(actions).std(0)
    return np.where(deviation > 0, deviation, 1)


def _standard(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / (values.std() or 1)


if __name__ == "__main__":
    run_cli(main)
