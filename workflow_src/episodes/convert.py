"""Convert one group of a registered data set's shards (RLDS, LeRobot, WorldGym) into episodes of a store.

Episode `index` is the number of its record within the split, so it depends on nothing but the data. Episodes go to
`<folder>/<split>/`, the result of the group to `<folder>/groups/<i>-of-<n>.json`, last; `merge` makes the stores' tables of
all groups. What cannot be used is left out and listed with its reason. An interrupted conversion continues with the shard at
which it stopped and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import Journal, digest, sha256_file, write_if_changed, write_json
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import Progress, say
from workflow_src.episodes.action_maps import check_sign, displacements, metric, read
from workflow_src.episodes.registry import REGISTRY, Dataset, entry_dict, lookup
from workflow_src.episodes.rlds import Shard, Steps, decode_image
from workflow_src.episodes.sources import open_source
from workflow_src.episodes.store import JOURNAL, episode_paths, write_episode

if TYPE_CHECKING:
    from workflow_src.episodes.sources import Source

EXAMPLES = """example:
  python -m workflow_src.episodes.convert --dataset viola --shard-group 1/4 --source downloads/viola \\
      --out results/episodes/viola/groups/1-of-4.json
"""
RECIPE = 1  # raise when the conversion changed, so that what was converted otherwise is not continued
GRIPPER = 6
SAMPLE = 64  # episodes that decide about a gripper's sign
BYTES_PER_PIXEL = 0.1  # of the videos, about
ARRAY_BYTES = 300  # per frame, about
MEGABYTE = 1e6


@dataclass(frozen=True)
class Job:
    """How the episodes of a data set are converted. `flip`: the gripper's sign is the other one (`evidence`)."""

    name: str
    entry: Dataset
    size: int
    flip: bool
    evidence: str


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, help="name in the registry")
    parser.add_argument("--registry", default=str(REGISTRY), help="file of data sets (default: config/datasets.yaml)")
    parser.add_argument(
        "--source", required=True, help="folder of RLDS, LeRobot or WorldGym; or an address, read shard by shard"
    )
    parser.add_argument("--shard-group", default="1/1", help="which part of the shards: 1/8 to 8/8")
    parser.add_argument("--size", type=int, default=256, help="rows and columns of the frames, even")
    parser.add_argument(
        "--reader", choices=("own", "tensorflow"), default="own", help="of RLDS; tensorflow needs envs/tfds.yaml"
    )
    parser.add_argument("--out", type=Path, required=True, help="the group's result; episodes go to ../<split>/")
    arguments = parser.parse_args()
    die_with_parent()
    entry = lookup(arguments.dataset, arguments.registry)
    group = _read_group(arguments.shard_group)
    if arguments.size < 2 or arguments.size % 2:
        raise UserError(f"--size: {arguments.size} is not an even number of pixels; H.264 needs one")
    folder = arguments.out.with_suffix(".stream")
    source = open_source(arguments.source, folder, arguments.reader == "tensorflow")
    convert(arguments.dataset, entry, source, group, arguments.size, arguments.out)
    shutil.rmtree(folder, ignore_errors=True)


def convert(name: str, entry: Dataset, source: Source, group: tuple[int, int], size: int, out: Path) -> None:
    """Convert the shards of `group` (i, n): every n-th from the i-th on, and write `out`."""
    shards = source.shards()
    _check_splits(name, entry, shards, source.root)
    flip, evidence = _gripper(entry, source, shards)
    job = Job(name, entry, size, flip, evidence)
    key = digest([RECIPE, name, entry_dict(entry), source.identity, size, flip])
    journal = Journal(out.with_suffix(".jsonl"), key)
    root, mine = out.parent.parent, shards[group[0] - 1 :: group[1]]
    items = {_item(shard): shard for shard in mine}
    missing = {item: shard for item, shard in items.items() if not _intact(journal, item, root)}
    _estimate(f"{name} {group[0]}/{group[1]}", entry, source, list(missing.values()), size, root)
    total = sum(shard.bytes for shard in mine)
    with Progress(round(total / MEGABYTE), f"convert {name}"[:24], "MB") as progress:
        progress.skip(round((total - sum(shard.bytes for shard in missing.values())) / MEGABYTE))
        for item, shard in missing.items():
            journal.record(item, **_convert_shard(job, source, shard, root, progress))
    done = [journal.done[item] for item in items]
    write_json(out, {
        "key": key, "dataset": name, "entry": entry_dict(entry), "size": size, "gripper": evidence, "group": list(group),
        "episodes": [row for one in done for row in one["episodes"]],
        "rejected": [row for one in done for row in one["rejected"]],
    })  # fmt: skip


def _convert_shard(job: Job, source: Source, shard: Shard, root: Path, progress: Progress) -> dict[str, list[dict]]:
    """Write the usable episodes of a shard: table rows of them and of the others."""
    entry, episodes, rejected, before = job.entry, [], [], 0
    for steps in source.episodes(shard, entry.features(), entry.image):
        index = shard.first + steps.record
        split = entry.split_of(shard.split, index)
        place = {"index": index, "split": split, "file": shard.path.name, "record": steps.record}
        try:
            frames, arrays, texts = convert_episode(steps, job)
            if not texts and entry.instruction:
                raise ValueError("has no instruction")
        except ValueError as error:
            damaged = str(error) != "has no instruction" or not entry.unlabelled
            rejected.append({**place, "reason": str(error), "damaged": damaged})
        else:
            # Without a table yet, the mark keeps others from taking the folder for one of WorldGym's.
            write_if_changed(root / split / JOURNAL, json.dumps({"conversion": job.name}) + "\n")
            hashes = write_episode(root / split, index, frames, arrays, entry.control_hz, lossless=False)
            episodes.append({
                **place, "frames": len(frames), "instruction": (texts or [""])[0], "task": "", "behaviour": "",
                "control_hz": entry.control_hz, "embodiment": entry.embodiment, "action_semantics": "commanded",
                "source": f"{job.name} {entry.version}", "seed": 0, "success": None, "instructions": texts, **hashes,
            })  # fmt: skip
        now = round(steps.read / MEGABYTE)
        progress.update(now - before, f"{len(rejected)} rejected" if rejected else "")
        before = now
    return {"episodes": episodes, "rejected": rejected}


def convert_episode(steps: Steps, job: Job) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
    """One recorded episode as frames uint8 (F, size, size, 3), arrays as in `store.py`, and all its instructions.

    Raises ValueError that says why it cannot be used.
    """
    if steps.wrong:
        raise ValueError(steps.wrong)
    entry, lengths = job.entry, {name: len(values) for name, values in steps.arrays.items()}
    lengths[entry.image] = len(steps.images)
    if len(set(lengths.values())) > 1:
        raise ValueError("lengths differ: " + ", ".join(f"{name} {count}" for name, count in sorted(lengths.items())))
    recorded = {name: values[entry.skip_first :] for name, values in steps.arrays.items()}
    images = steps.images[entry.skip_first :]
    if len(images) < 2:
        raise ValueError(f"has {len(images)} frames; an action needs two")
    actions = metric(recorded, entry.action, job.flip)[:-1]  # the last one leads to no recorded frame
    arrays = {"actions": actions}
    if entry.pose:
        arrays["reached"] = actions.copy()  # the gripper as commanded: closing on an object, it reaches nothing
        arrays["reached"][:, :GRIPPER] = displacements(read(recorded, entry.pose), entry.pose_rotation)
    if entry.robot_state:
        arrays["robot_state"] = read(recorded, entry.robot_state).reshape(len(images), -1)
    frames = np.stack([_frame(image, number, job.size) for number, image in enumerate(images)])
    texts = [text.strip() for path in entry.instructions() for text in recorded.get(path, [])]
    return frames, arrays, list(dict.fromkeys(text for text in texts if text))


def _frame(image: bytes, number: int, size: int) -> np.ndarray:
    try:
        return decode_image(image, size)
    except ValueError as error:
        raise ValueError(f"frame {number} is {error}") from None


def _gripper(entry: Dataset, source: Source, shards: list[Shard]) -> tuple[bool, str]:
    """Whether the gripper's sign is the other one, by the first episodes of the training split: the same for all groups."""
    if not entry.action.gripper_check:
        return check_sign(entry.action, [])
    sample = islice(_readable(source, [shard for shard in shards if shard.split == "train"], entry), SAMPLE)
    flip, evidence = check_sign(entry.action, [steps.arrays for steps in sample])
    say(f"gripper: {evidence}")
    return flip, evidence


def _readable(source: Source, shards: list[Shard], entry: Dataset) -> Iterator[Steps]:
    for shard in shards:
        for steps in source.episodes(shard, entry.action.features()):
            try:
                metric(steps.arrays, entry.action)
            except ValueError:
                continue
            yield steps


def _estimate(label: str, entry: Dataset, source: Source, shards: list[Shard], size: int, root: Path) -> None:
    """Say what is to be read and written. Raises UserError where the disk does not hold it."""
    sample = (steps for shard in shards for steps in source.episodes(shard, [], entry.image) if not steps.wrong)
    first = next(sample, None)
    total = sum(shard.bytes for shard in shards)
    frames = total / first.read * len(first.images) * (first.record + 1) if first else 0
    needed = frames * (size * size * BYTES_PER_PIXEL + ARRAY_BYTES)
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    say(f"{label}: {len(shards)} shards, {total / MEGABYTE:.0f} MB to read, about {needed / MEGABYTE:.0f} MB to write, "
        f"{free / MEGABYTE:.0f} MB free")  # fmt: skip
    if needed > free:
        raise UserError(f"{root}: about {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free; "
                        "make room, choose a smaller --size, or another folder")  # fmt: skip


def _check_splits(name: str, entry: Dataset, shards: list[Shard], root: Path) -> None:
    found = {shard.split for shard in shards}
    if found != set(entry.splits):
        raise UserError(f"{root}: holds the splits {', '.join(sorted(found)) or 'none'} where the registry says "
                        f"{', '.join(entry.splits)} for {name}; give the folder of {name} {entry.version}")  # fmt: skip


def _item(shard: Shard) -> str:
    """Names a shard as it is: with another file in its place it is another item. Elsewhere, a version's files stay."""
    if shard.size:
        return f"{shard.split} {shard.first} {shard.path.name}"
    changed = [path.stat().st_mtime_ns for path in (shard.path, *shard.beside) if path.is_file()]
    return f"{shard.split} {shard.first} {shard.path.name} {shard.bytes} {max(changed, default='missing')}"


def _intact(journal: Journal, item: str, root: Path) -> bool:
    if item not in journal:
        return False
    for row in journal.done[item]["episodes"]:
        for path, column in zip(episode_paths(root / row["split"], row["index"]), ("sha256_video", "sha256_arrays")):
            if not path.is_file() or sha256_file(path) != row[column]:
                return False
    return True


def _read_group(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--shard-group: {text!r} is not a group; write 1/8 to 8/8")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    run_cli(main)
