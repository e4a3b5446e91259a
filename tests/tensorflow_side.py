"""What tests of the TensorFlow reader have done in its environment: sets written by TFDS itself, conversions by `as_dataset`.

    python tests/tensorflow_side.py FOLDER name=source …

Makes `FOLDER/written`, a copy of viola's schema by TFDS, and converts it and every source into `FOLDER/tensorflow/<name>`.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.rlds import features_of, steps_of
from workflow_src.episodes.convert import convert
from workflow_src.episodes.registry import lookup
from workflow_src.episodes.sources import open_source


def episode(seed: int) -> list[dict]:
    """Steps in viola's schema, images encoded."""
    recorded = {"action/world_vector": np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32),
                "action/rotation_delta": np.full((4, 3), 0.1 * seed, np.float32),
                "action/gripper_closedness_action": np.float32([0, 1, 0, -1])}  # fmt: skip
    return steps_of("viola", lookup("viola"), recorded, 3 + seed, seed)


def write(root: Path) -> Path:
    """A genuine RLDS directory: TFDS encodes its images, chooses its shards and writes its descriptions."""
    import tensorflow_datasets as tfds

    class Viola(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("0.1.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(features_of(episode(0)[0]))})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples(range(5)), "test": self._generate_examples(range(5, 7))}

        def _generate_examples(self, seeds):
            for seed in seeds:
                steps = episode(seed)
                for step in steps:
                    image = io.BytesIO(step["observation"]["agentview_rgb"])
                    step["observation"]["agentview_rgb"] = np.asarray(Image.open(image))
                yield seed, {"steps": steps}

    builder = Viola(data_dir=str(root), file_format="tfrecord")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    return Path(builder.data_dir)


def main() -> None:
    folder = Path(sys.argv[1])
    sources = dict(word.split("=", 1) for word in sys.argv[2:])
    written = write(folder / "tfds")
    written.rename(folder / "written")
    for name, source in [*sources.items(), ("viola", str(folder / "written"))]:
        reader = open_source(source, tensorflow=True)
        convert(name, lookup(name), reader, (1, 1), 32, folder / "tensorflow" / name / "groups" / "1-of-1.json")


if __name__ == "__main__":
    main()
