"""Does the model follow actions? One axis at a time, from one frame: x, y, z both ways, gripper closing and opening.

WorldGym's qualitative test (its figure 3). Writes `sweep_<name>.gif` per sweep and one contact sheet, a row per sweep.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from workflow_src import embodiments
from workflow_src.common.compute import configure_torch
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import atomic_path
from workflow_src.common.process import die_with_parent
from workflow_src.common.video import write_gif
from workflow_src.world_model.artefact import load_artefact
from workflow_src.world_model.environment import imagine

EXAMPLES = """examples:
  python -m workflow_src.world_model.sweep --world-model results/world_model \\
      --frame results/trials/lift/0000.png --out results/figures/sweeps.png
  python -m workflow_src.world_model.sweep --world-model results/worldgym --frame im_0.jpg --steps 20 --out sweeps.png
"""
AXES = {"x": 0, "y": 1, "z": 2}
GRIPPER = 6
SHARE = 0.5  # of the largest step the robot is commanded to make: clearly visible, far from any limit
COLUMNS = 7  # frames shown in the contact sheet
PLAYED = 192  # pixels of a frame in a GIF, at least


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world-model", type=Path, required=True, help="artefact folder")
    parser.add_argument("--frame", type=Path, required=True, help="image to start from, or a folder: its first PNG")
    parser.add_argument("--out", type=Path, required=True, help="contact sheet to write (PNG), last; GIFs go beside it")
    parser.add_argument("--steps", type=int, default=12, help="steps of a sweep (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the model's noise (default: %(default)s)")
    options = parser.parse_args()
    if options.steps < 1:
        raise UserError(f"--steps: {options.steps} is impossible; it must be at least 1")
    die_with_parent()
    model = load_artefact(options.world_model, configure_torch())
    sweeps = sweep_actions(embodiments.get(model.card.embodiment), options.steps)
    frames = roll_out(model, read_frame(options.frame, model.card.image), sweeps, options.seed)
    scale = max(1, PLAYED // model.card.image[1])
    for name, video in frames.items():
        write_gif(options.out.with_name(f"sweep_{name}.gif"), video, model.card.control_hz, scale)
    draw(options.out, frames)


def sweep_actions(robot: embodiments.Embodiment, steps: int) -> dict[str, np.ndarray]:
    """Metric actions float32 (steps, 7) by name; the gripper stays open where it is not swept."""
    still = np.zeros((steps, embodiments.METRIC_DIM), np.float32)
    still[:, GRIPPER] = 1
    sweeps = {}
    for axis, place in AXES.items():
        for sign, word in ((1, "plus"), (-1, "minus")):
            sweeps[f"{axis}_{word}"] = still.copy()
            sweeps[f"{axis}_{word}"][:, place] = sign * SHARE * robot.max_translation
    sweeps["gripper_close_open"] = still.copy()
    sweeps["gripper_close_open"][: (steps + 1) // 2, GRIPPER] = 0
    return sweeps | {"still": still}


def read_frame(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The image uint8 (H, W, 3) at `path`, or the first PNG below it, resized to `size` where it differs."""
    from PIL import Image, UnidentifiedImageError

    if path.is_dir():
        found = sorted(path.rglob("*.png"))
        if not found:
            raise UserError(f"--frame: {path}: no PNG below this folder; name an image")
        path = found[0]
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"--frame: {path}: not a readable image ({error})") from error
    if image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.LANCZOS)
    return np.asarray(image)


def roll_out(model, frame: np.ndarray, sweeps: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Frames uint8 (steps + 1, H, W, 3) of every sweep, the given one first. All sweeps share their noise."""
    first = np.repeat(frame[None], len(sweeps), 0)
    frames = imagine(model, first, np.stack(list(sweeps.values())), seed, [seed] * len(sweeps))
    return dict(zip(sweeps, np.concatenate([first[:, None], frames], 1)))


def draw(path: Path, frames: dict[str, np.ndarray]) -> None:
    """Contact sheet: a row per sweep, a column per moment."""
    from matplotlib.figure import Figure

    length = len(next(iter(frames.values())))
    moments = np.unique(np.linspace(0, length - 1, min(COLUMNS, length)).round().astype(int))
    figure = Figure(figsize=(1.35 * len(moments) + 1.4, 1.38 * len(frames)), layout="constrained")
    grid = figure.subplots(len(frames), len(moments), squeeze=False)
    for axes, moment in zip(grid[0], moments):
        axes.set_title(f"step {moment}" if moment else "given", fontsize=9)
    for row, (name, video) in zip(grid, frames.items()):
        for axes, moment in zip(row, moments):
            axes.imshow(video[moment], interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        row[0].set_ylabel(name.replace("_", " "), rotation=0, ha="right", va="center", fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


if __name__ == "__main__":
    run_cli(main)
