"""How fast recorded data is read, on one core: RLDS by our reader and by TensorFlow's, and clips out of a converted store.

    python benchmarks/reading.py                                # made up, in Bridge V2's schema
    python benchmarks/reading.py data/viola --dataset viola     # the training split of a copy that is here
    $(python envs/build.py tfds) benchmarks/reading.py          # and through TFDS's own `as_dataset`

Each line: median and range of `--repeats` runs, the first of which, where caches and graphs are made, does not count.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.rlds import jpeg, steps_of, write_rlds
from workflow_src.common.video import read_frames
from workflow_src.episodes.convert import Job, convert_episode
from workflow_src.episodes.registry import Dataset, lookup
from workflow_src.episodes.rlds import Rlds, Steps, decode_image
from workflow_src.episodes.store import episode_paths, write_episode
from workflow_src.episodes.tensorflow_reader import TensorflowRlds

SIDE, STEPS, MADE = 256, 40, 60  # pixels, steps and episodes of what is made up, about Bridge V2's
CLIP, SIZES = 10, (64, 256)  # frames of a clip, and sizes of the stores that clips are read from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="RLDS folder (default: made up)")
    parser.add_argument("--dataset", default="bridge_v2", help="name in the registry")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        entry = lookup(arguments.dataset)
        source = arguments.source or make(Path(folder) / "made", arguments.dataset, entry)
        measure_reading(source, arguments.dataset, entry, arguments.episodes, arguments.repeats)
        measure_clips(source, entry, Path(folder), arguments.repeats)


def make(root: Path, name: str, entry: Dataset) -> Path:
    """A set in that schema with episodes of its usual size."""
    rng = np.random.default_rng(0)
    recorded = {path: rng.normal(size=(STEPS, 7 if path == "action" else 3)).astype(np.float32)
                for path in entry.action.features()}  # fmt: skip
    picture = jpeg(0, (SIDE, SIDE))
    episodes = []
    for seed in range(MADE):
        steps = steps_of(name, entry, recorded, STEPS, seed)
        for step in steps:
            parents, _, key = entry.image.rpartition("/")
            cameras = [key.replace("image_0", f"image_{i}") for i in range(4)]  # Bridge V2 has four, the others one
            (step[parents] if parents else step).update(dict.fromkeys(cameras, picture))
        episodes.append(steps)
    others = {split: [episodes[:1]] for split in entry.splits if split != "train"}
    return write_rlds(root, {"train": [episodes]} | others, name)


def measure_reading(source: Path, name: str, entry: Dataset, episodes: int, repeats: int) -> None:
    """Episodes per second: read, decoded, and as the converter has them before it encodes."""
    job = Job(name, entry, SIDE, False, "")

    def read(reader: Rlds) -> Iterator[Steps]:
        shards = (shard for shard in reader.shards() if shard.split == "train")
        found = (one for shard in shards for one in reader.episodes(shard, entry.features(), entry.image))
        return islice((one for one in found if not one.wrong), episodes)

    def decoded(reader: Rlds) -> int:
        return sum(len([decode_image(image, SIDE) for image in one.images]) > 0 for one in read(reader))

    ours = Rlds(source)
    report("ours: read, images encoded", "episodes/s", repeats, lambda: len(list(read(ours))))
    report("ours: read and decoded", "episodes/s", repeats, lambda: decoded(ours))
    report("ours: read, decoded, mapped", "episodes/s", repeats,
           lambda: sum(len(convert_episode(one, job)) > 0 for one in read(ours)))  # fmt: skip
    if importlib.util.find_spec("tensorflow") is None:
        print("no TensorFlow here: python envs/build.py tfds")
        return
    theirs = TensorflowRlds(source)
    report("as_dataset: images encoded", "episodes/s", repeats, lambda: len(list(read(theirs))))
    report("as_dataset: all decoded", "episodes/s", repeats, lambda: as_dataset(source, episodes))


def as_dataset(source: Path, episodes: int) -> int:
    """Read through TFDS at its defaults, which decode every feature."""
    import tensorflow_datasets as tfds

    dataset = tfds.builder_from_directory(str(source)).as_dataset(split="train").take(episodes)
    return sum(len(list(episode["steps"].as_numpy_iterator())) > 0 for episode in dataset)


def measure_clips(source: Path, entry: Dataset, folder: Path, repeats: int) -> None:
    """Clips per second out of a converted video: `CLIP` frames from anywhere in an episode."""
    reader = Rlds(source)
    images = next(reader.episodes(reader.shards()[-1], [], entry.image)).images
    starts = np.random.default_rng(0).integers(0, len(images) - CLIP, 50).tolist()
    for size in SIZES:
        frames = np.stack([decode_image(image, size) for image in images])
        write_episode(folder, size, frames, {}, entry.control_hz, lossless=False)
        video = episode_paths(folder, size)[0]

        def clips(video: Path = video) -> int:
            return sum(len(read_frames(video, range(start, start + CLIP))) == CLIP for start in starts)

        report(f"clips of {CLIP} frames, {size} pixels", "clips/s", repeats, clips)


def report(label: str, unit: str, repeats: int, work: Callable[[], int]) -> None:
    rates = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        done = work()
        rates.append(done / (time.perf_counter() - start))
    low, middle, high = min(rates[1:]), statistics.median(rates[1:]), max(rates[1:])
    print(f"{label:<32} {middle:9.1f} [{low:.1f}, {high:.1f}] {unit}, n = {repeats}", flush=True)


if __name__ == "__main__":
    main()
