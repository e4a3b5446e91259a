"""Fetch a public list of first frames: JSON with an image's address, an instruction and subtasks, as WorldGym publishes two.

    python -m workflow_src.rollouts.first_frames LIST --out results/downloads/first_frames/put_carrot_on_plate/frames.json

The first fetch notes the sha256 of the list and of every image in `sha256.jsonl` beside them; whatever comes later has to be
the same. Images that are here are not asked for again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.fetch import fetch, shown
from workflow_src.common.files import Journal, write_json
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import Progress
from workflow_src.rollouts.pictures import read_picture

CHECKSUMS = "sha256.jsonl"


def fetch_list(address: str, out: Path, pause: float = 1.0) -> list[dict[str, Any]]:
    """Fetch the list at `address` and its images into the folder of `out`, and write `out`, last: what each image is.

    `pause`: seconds before the first retry. Raises `UserError`, and what came is kept.
    """
    known = Journal(out.parent / CHECKSUMS, "first frames")
    _fetch(address, out.with_name("list.json"), known, pause, read_list)
    entries = read_list(out.with_name("list.json"))
    frames = []
    with Progress(len(entries), out.parent.name[:16], "image") as progress:
        for number, entry in enumerate(entries):
            path = out.with_name(f"{number:04d}{Path(entry['im_0_path']).suffix.lower() or '.jpg'}")
            sha256 = _fetch(entry["im_0_path"], path, known, pause, read_picture)
            # The first subtask done and the second not: half of the task.
            criteria = entry["subtasks"][0] if entry["subtasks"] else None
            frames.append({"file": path.name, "sha256": sha256, "instruction": entry["instruction"],
                           "partial_credit_criteria": criteria, "source": shown(entry["im_0_path"])})  # fmt: skip
            progress.update()
    write_json(out, {"list": shown(address), "frames": frames})
    return frames


def _fetch(address: str, path: Path, known: Journal, pause: float, read: Callable[[Path], Any]) -> str:
    """The file's sha256, which is the one of the first fetch or a UserError. What `read` refuses is not remembered."""
    first = known.done.get(shown(address), {}).get("sha256", "")
    sha256 = fetch(address, path, first, pause=pause)
    if not first:
        read(path)  # a page that says "not found" has a checksum too
        known.record(shown(address), sha256=sha256)
    return sha256


def read_list(path: Path) -> list[dict[str, Any]]:
    """Entries with `im_0_path`, `instruction` and `subtasks`. Raises `UserError` naming the entry and what it lacks."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: holds no list of first frames")
    for number, entry in enumerate(entries):
        for key in ("im_0_path", "instruction"):
            if not isinstance(entry, dict) or not isinstance(entry.get(key), str) or not entry[key].strip():
                raise UserError(f"{path}: entry {number} has no {key}")
        tasks = entry.setdefault("subtasks", [])
        if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
            raise UserError(f"{path}: entry {number}: subtasks is {tasks!r}, not a list of texts")
    return entries


def read_listing(path: Path) -> list[dict[str, Any]]:
    """The frames of a finished fetch. Raises `UserError` for a file that is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["frames"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a listing of fetched frames ({error!r}); delete it and fetch again") from None


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.rollouts.first_frames",
        description="Fetch a public list of first frames and its images.",
        epilog=__doc__.split("\n\n")[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("list", help="address of the JSON list: http(s)://…, hf://…")
    parser.add_argument("--out", type=Path, required=True, help="listing to write; the images go beside it")
    options = parser.parse_args()
    die_with_parent()
    fetch_list(options.list, options.out)


if __name__ == "__main__":
    run_cli(main)
