"""RLDS directories through TensorFlow: TFDS's own `as_dataset`, in the environment of envs/tfds.yaml.

It gives the episodes that `rlds.Rlds` gives, much slower: for whoever trusts TFDS more than our reader, and to compare the two.
Damage costs more, because TensorFlow stops at it: the rest of the shard is reported as unreadable.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from workflow_src.common.errors import UserError
from workflow_src.episodes.rlds import Rlds, Shard, Steps, columns, line, there


class TensorflowRlds(Rlds):
    """Read access to the RLDS directory `root`, like `Rlds`. Raises UserError where there is no TensorFlow."""

    def __init__(self, root: str | Path) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        try:
            import tensorflow as tf
        except ImportError as error:
            raise UserError(
                f"--reader tensorflow: {error}; run it in the environment of envs/tfds.yaml, or leave it out"
            ) from None
        tf.config.set_visible_devices([], "GPU")  # reading needs none, and TensorFlow would take all of its memory
        super().__init__(root)

    def episodes(self, shard: Shard, features: Sequence[str], image: str = "") -> Iterator[Steps]:
        """The episodes of a shard; arguments and results as `Rlds.episodes`."""
        paths = there(self._info.features, [*features, image] if image else list(features), image, self.root)
        count, wrong = 0, "its file is missing"
        if shard.path.is_file():
            wrong = "missing from its file"
            try:
                for episode in self._dataset(shard):
                    steps = Steps(count, self._read(shard, count), *columns(episode, paths, image))
                    count += 1
                    yield steps
            except Exception as error:  # TensorFlow raises many kinds for damaged files
                wrong = f"TensorFlow reads no further ({line(error)})"
        for record in range(count, shard.episodes):
            yield Steps(record, shard.bytes, {}, [], wrong)

    def _dataset(self, shard: Shard) -> Iterator[Any]:
        """The steps of each episode of a shard, in order, with images as they were encoded."""
        import tensorflow_datasets as tfds

        whole = self._builder.as_dataset(
            split=f"{shard.split}[{shard.first}:{shard.first + shard.episodes}]",
            shuffle_files=False,
            decoders={"steps": _encoded(self._info.features["steps"].feature)},
            read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
        )
        return (episode["steps"].as_numpy_iterator() for episode in whole)

    @staticmethod
    def _read(shard: Shard, record: int) -> int:
        return round(shard.bytes * (record + 1) / shard.episodes)


def _encoded(features: Any) -> Any:
    """A tree of decoders that leaves all images encoded."""
    import tensorflow_datasets as tfds

    tree = {}
    for name, feature in features.items():
        if isinstance(feature, tfds.features.Image):
            tree[name] = tfds.decode.SkipDecoding()
        elif hasattr(feature, "items"):
            tree[name] = _encoded(feature)
    return tree
