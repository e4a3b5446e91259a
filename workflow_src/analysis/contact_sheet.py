"""Imagined beside real at a glance: a contact sheet and GIFs of the best, a middling and the worst policy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from workflow_src.analysis.pairs import Pair, by_imagined_success, load_pairs
from workflow_src.common.config import load_stage
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import atomic_path
from workflow_src.common.process import die_with_parent

if TYPE_CHECKING:
    from PIL import Image

KINDS = {"success": ("success",), "failure": ("failure",), "disagreement": ("only imagined", "only real")}
COLUMNS = 7  # frames of a strip
SIZE = 96  # pixels of a frame in sheet and montage
MARGIN = 12
INK, FAINT, GOOD, BAD = (34, 34, 34), (120, 120, 120), (0, 120, 90), (190, 60, 20)
PLAYED = 192  # pixels of a frame in a single rollout's GIF
HELD = 5  # times the last frame is shown, so that the end of a loop is seen


def choose(pairs: Sequence[Pair]) -> list[tuple[str, str, Pair | None]]:
    """(policy, kind, pair) for best, middle and worst imagined policy by success, failure, disagreement.

    The pair is None where a policy has none of that kind. Tasks take turns, so that the sheet shows several.
    """
    order = by_imagined_success(pairs)
    if not order:
        raise UserError("rollouts: no imagined rollout of a configured policy; nothing can be shown")
    policies = list(dict.fromkeys([order[0], order[len(order) // 2], order[-1]]))
    tasks = list(dict.fromkeys(pair.task for pair in pairs))
    chosen = []
    for row, policy in enumerate(policies):
        for column, (kind, outcomes) in enumerate(KINDS.items()):
            turn = tasks[(row + column) % len(tasks) :] + tasks[: (row + column) % len(tasks)]
            fitting = [pair for pair in pairs if pair.policy == policy and pair.outcome in outcomes]
            chosen.append((policy, kind, min(fitting, key=lambda pair: turn.index(pair.task), default=None)))
    return chosen


# ---- drawing --------------------------------------------------------------------------------------------------------


def sheet(shown: Sequence[Pair]) -> Image.Image:
    """One row per pair: who and what on the left, frames over time, imagined above real."""
    from PIL import Image, ImageDraw

    rows = 2 if any(pair.real_video for pair in shown) else 1
    left, top, pitch = 216, 34, rows * (SIZE + 2) + MARGIN
    canvas = Image.new("RGB", (left + COLUMNS * (SIZE + 2) + MARGIN, top + len(shown) * pitch), "white")
    draw = ImageDraw.Draw(canvas)
    for index, pair in enumerate(shown):
        y = top + index * pitch
        frames = pair.frames(SIZE)
        steps = np.linspace(0, len(frames) - 1, COLUMNS).round().astype(int)
        for column, step in enumerate(steps):
            x = left + column * (SIZE + 2)
            for row, tile in enumerate(_split(frames[step], rows)):
                canvas.paste(_fit(tile), (x, y + row * (SIZE + 2)))
            if index == 0:
                draw.text((x + SIZE / 2, top - 8), f"step {step}", fill=FAINT, font=_font(12), anchor="mb")
        _describe(draw, pair, y)
    return canvas


def _describe(draw, pair: Pair, y: int) -> None:
    draw.text((MARGIN, y + 6), pair.policy, fill=INK, font=_font(16))
    draw.text((MARGIN, y + 28), pair.task.replace("_", " "), fill=FAINT, font=_font(13))
    draw.text((MARGIN, y + SIZE - 8), f"imagined: {_word(pair.imagined)}", fill=_colour(pair.imagined), font=_font(13),
              anchor="ls")  # fmt: skip
    if pair.real_video:
        draw.text((MARGIN, y + SIZE + 24), f"real: {_word(pair.real)}", fill=_colour(pair.real), font=_font(13),
                  anchor="ls")  # fmt: skip


def montage(chosen: Sequence[tuple[str, str, Pair | None]]) -> list[Image.Image]:
    """All chosen pairs playing at once: a column per policy, a row per kind."""
    from PIL import Image, ImageDraw

    clips = {(policy, kind): pair.frames(SIZE) for policy, kind, pair in chosen if pair}
    policies, kinds = list(dict.fromkeys(policy for policy, *_ in chosen)), list(KINDS)
    width = max(clip.shape[2] for clip in clips.values())
    height = max(clip.shape[1] for clip in clips.values())
    pitch_x, pitch_y, top = width + 2 * MARGIN, height + 34, 54
    still = Image.new("RGB", (len(policies) * pitch_x, top + len(kinds) * pitch_y), "white")
    draw = ImageDraw.Draw(still)
    for column, policy in enumerate(policies):
        x = column * pitch_x + MARGIN
        draw.text((x + width / 2, 22), policy, fill=INK, font=_font(16), anchor="mm")
        draw.text((x + SIZE / 2, top - 10), "imagined", fill=FAINT, font=_font(12), anchor="mm")
        if width > SIZE + MARGIN:
            draw.text((x + width - SIZE / 2, top - 10), "real", fill=FAINT, font=_font(12), anchor="mm")
    for policy, kind, pair in chosen:
        x, y = policies.index(policy) * pitch_x + MARGIN, top + kinds.index(kind) * pitch_y
        _caption(draw, pair, kind, x, y, width, height)
    images = []
    for step in range(max(map(len, clips.values()))):
        canvas = still.copy()
        for (policy, kind), clip in clips.items():
            place = (policies.index(policy) * pitch_x + MARGIN, top + kinds.index(kind) * pitch_y)
            canvas.paste(Image.fromarray(clip[min(step, len(clip) - 1)]), place)
        images.append(canvas)
    return images


def _caption(draw, pair: Pair | None, kind: str, x: int, y: int, width: int, height: int) -> None:
    if pair is None:
        draw.text((x + width / 2, y + height / 2), f"no {kind}", fill=FAINT, font=_font(13), anchor="mm")
        return
    verdicts = [pair.imagined, pair.real] if pair.real_video else [pair.imagined]
    draw.text((x + width / 2, y + height + 12), pair.task.replace("_", " "), fill=FAINT, font=_font(11), anchor="mm")
    for place, anchor, verdict in zip((x, x + width), ("lm", "rm"), verdicts):
        draw.text((place, y + height + 12), _word(verdict), fill=_colour(verdict), font=_font(12), anchor=anchor)


def single(pair: Pair) -> list[Image.Image]:
    """One pair, large, with policy, task and verdicts above."""
    from PIL import Image, ImageDraw

    images = []
    for frame in pair.frames(PLAYED):
        canvas = Image.new("RGB", (frame.shape[1], frame.shape[0] + 44), "white")
        canvas.paste(Image.fromarray(frame), (0, 44))
        draw = ImageDraw.Draw(canvas)
        draw.text((4, 4), f"{pair.policy} · {pair.task.replace('_', ' ')}", fill=INK, font=_font(14))
        draw.text((4, 24), f"imagined: {_word(pair.imagined)}", fill=_colour(pair.imagined), font=_font(12))
        if pair.real_video:
            draw.text(
                (frame.shape[1] / 2 + 4, 24), f"real: {_word(pair.real)}", fill=_colour(pair.real), font=_font(12)
            )
        images.append(canvas)
    return images


def _split(frame: np.ndarray, rows: int) -> list[np.ndarray]:
    return [frame[:, : frame.shape[0]], frame[:, -frame.shape[0] :]] if rows == 2 else [frame]


def _fit(tile: np.ndarray) -> Image.Image:
    from PIL import Image

    image = Image.fromarray(tile)
    return image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _word(verdict: bool | None) -> str:
    return {True: "success", False: "failure", None: "not judged"}[verdict]


def _colour(verdict: bool | None) -> tuple[int, int, int]:
    return {True: GOOD, False: BAD, None: FAINT}[verdict]


# ---- files ----------------------------------------------------------------------------------------------------------


def save_sheet(path: Path, shown: Sequence[Pair]) -> None:
    """Write the contact sheet of `shown` as PNG."""
    with atomic_path(path) as temporary:
        sheet(shown).save(temporary, format="PNG", optimize=True)


def save_gif(path: Path, images: Sequence[Image.Image], control_hz: float) -> None:
    """Write an endless GIF at the true control rate that rests on its last frame; one palette, so nothing flickers."""
    from PIL import Image

    palette = images[len(images) // 2].quantize(255)
    flat = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [round(1000 / control_hz)] * (len(flat) - 1) + [round(1000 * HELD / control_hz)]
    with atomic_path(path) as temporary:
        flat[0].save(temporary, format="GIF", save_all=True, append_images=flat[1:], duration=durations, loop=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write contact_sheet.png, rollouts.gif (all at once) and one GIF per chosen rollout.",
        epilog="example:\n  python -m workflow_src.analysis.contact_sheet --config results/config/analysis.json "
        "--rollouts results/rollouts/*/*/*/rollouts.parquet --judgements results/judgements/*/*/*.parquet "
        "--out-dir results/figures",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="stage file")
    parser.add_argument("--rollouts", nargs="+", required=True, help="rollouts.parquet files")
    parser.add_argument("--judgements", nargs="+", required=True, help="parquet files written by judges.score")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder for the sheet and the GIFs")
    arguments = parser.parse_args()
    die_with_parent()
    chosen = choose(load_pairs(load_stage(arguments.config), arguments.rollouts, arguments.judgements))
    control_hz = next(pair.control_hz for *_, pair in chosen if pair)
    for old in arguments.out_dir.glob("rollout_*.gif"):
        old.unlink()
    for policy, kind, pair in chosen:
        if pair:
            save_gif(arguments.out_dir / f"rollout_{policy}_{kind}.gif", single(pair), pair.control_hz)
    save_gif(arguments.out_dir / "rollouts.gif", montage(chosen), control_hz)
    save_sheet(arguments.out_dir / "contact_sheet.png", [pair for *_, pair in chosen if pair])


if __name__ == "__main__":
    run_cli(main)
