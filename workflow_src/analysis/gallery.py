"""A gallery page where rollouts play, imagined beside real: one HTML file that needs nothing else, online or off.

The stored videos are lossless RGB 4:4:4, which browsers do not play. The page carries small yuv420p copies and poster
frames inside itself, so it can be mailed, archived and put into a Snakemake report as one declared output.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from workflow_src.analysis.pairs import OUTCOMES, Pair, by_imagined_success, load_pairs, spread
from workflow_src.common.config import load_stage
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import write_text
from workflow_src.common.process import die_with_parent
from workflow_src.common.video import write_video

PAGE = Path(__file__).with_name("gallery.html")
SIZE = 144  # pixels of a frame
BUDGET = 108  # pairs on the page, shared evenly by the policies
HOLD = 3  # times the last frame is shown, so that the outcome is seen before the loop starts over


def card(pair: Pair, video: Path) -> dict[str, Any]:
    """Everything the page shows of one pair, its media as data addresses; `video` is where the copy may be written."""
    frames = pair.frames(SIZE)
    write_video(video, np.concatenate([frames, frames[-1:].repeat(HOLD, 0)]), pair.control_hz, lossless=False)
    return {
        "policy": pair.policy, "task": pair.task, "outcome": pair.outcome,
        "trial": f"{pair.trial_id} · repeat {pair.repeat}",
        "instruction": pair.instruction, "imagined": pair.imagined, "real": pair.real,
        "compared": pair.real_video is not None, "width": frames.shape[2], "height": frames.shape[1],
        "poster": _address("image/jpeg", _jpeg(frames[-1])), "video": _address("video/mp4", video.read_bytes()),
    }  # fmt: skip


def _jpeg(frame: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def page(pairs: Sequence[Pair]) -> str:
    """The gallery as HTML: a bounded number of pairs per policy, spread over tasks and outcomes, best policy first."""
    policies = by_imagined_success(pairs)
    if not policies:
        raise UserError("rollouts: no imagined rollout of a configured policy; nothing can be shown")
    each = max(1, BUDGET // len(policies))
    shown = [pair for policy in policies for pair in spread([p for p in pairs if p.policy == policy], each)]
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / f"{i}.mp4" for i in range(len(shown))]
        # Decoding, scaling and encoding run outside Python's lock.
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            cards = list(pool.map(card, shown, files))
    data = {
        "lead": _lead(pairs, shown, each), "policy": policies, "task": list(dict.fromkeys(p.task for p in pairs)),
        "outcome": [name for name in OUTCOMES if any(pair.outcome == name for pair in shown)], "cards": cards,
    }  # fmt: skip
    # A `</script>` inside the data would end it early.
    return PAGE.read_text(encoding="utf-8").replace("/*DATA*/", json.dumps(data).replace("</", "<\\/"))


def _lead(pairs: Sequence[Pair], shown: Sequence[Pair], each: int) -> str:
    if any(pair.real_video for pair in shown):
        what = "Left: imagined by the world model. Right: the lab. Same first frame, same policy."
    else:
        what = "Imagined by the world model from a first frame and the policy's actions."
    return (
        f"{what} {len(shown)} of {len(pairs)} rollouts are here, at most {each} per policy, picked so that every task "
        "and outcome is seen: shares on this page are not success rates."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a self-contained page where rollouts play, imagined beside real.",
        epilog="example:\n  python -m workflow_src.analysis.gallery --config results/config/analysis.json "
        "--rollouts results/rollouts/*/*/*/rollouts.parquet --judgements results/judgements/*/*/*.parquet "
        "--out results/gallery/index.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="stage file")
    parser.add_argument("--rollouts", nargs="+", required=True, help="rollouts.parquet files")
    parser.add_argument("--judgements", nargs="+", required=True, help="parquet files written by judges.score")
    parser.add_argument("--out", required=True, help="HTML file to write")
    arguments = parser.parse_args()
    die_with_parent()
    pairs = load_pairs(load_stage(arguments.config), arguments.rollouts, arguments.judgements)
    write_text(arguments.out, page(pairs))


if __name__ == "__main__":
    run_cli(main)
