"""How fast an RLDS directory is read and converted, on one core: episodes and megabytes per second.

    python benchmarks/reading.py data/viola --dataset viola [--episodes 50] [--tensorflow]

`--tensorflow` reads the same episodes through TFDS's own `as_dataset`, where TensorFlow is installed, for comparison.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from workflow_src.episodes.convert import Job, convert_episode
from workflow_src.episodes.registry import lookup
from workflow_src.episodes.rlds import Rlds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--tensorflow", action="store_true")
    arguments = parser.parse_args()
    entry, rlds = lookup(arguments.dataset), Rlds(arguments.source)
    job = Job(arguments.dataset, entry, 256, False, "")
    shards = [shard for shard in rlds.shards() if shard.split == "train"]

    def ours(finish: Callable) -> int:
        steps = (
            one for shard in shards for one in rlds.episodes(shard, entry.features(), entry.image) if not one.wrong
        )
        return sum(len(finish(one)) for one in islice(steps, arguments.episodes))

    report("read, images encoded", arguments.episodes, lambda: ours(lambda one: one.images))
    report("read, decoded, resized", arguments.episodes, lambda: ours(lambda one: convert_episode(one, job)[0]))
    if arguments.tensorflow:
        import tensorflow_datasets as tfds

        dataset = tfds.builder_from_directory(str(arguments.source)).as_dataset("train").take(arguments.episodes)
        report(
            "TensorFlow",
            arguments.episodes,
            lambda: sum(len(list(one["steps"].as_numpy_iterator())) for one in dataset),
        )


def report(label: str, episodes: int, work: Callable[[], int]) -> None:
    start = time.perf_counter()
    frames = work()
    seconds = time.perf_counter() - start
    print(f"{label:<24} {episodes / seconds:8.2f} episodes/s {frames / seconds:10.1f} frames/s")


if __name__ == "__main__":
    main()
