"""RLDS directories (Open X-Embodiment) without TensorFlow: our TFRecord framing, `tensorflow_datasets` for the features.

A directory holds `dataset_info.json` (splits, shards and how many episodes each has), `features.json` and the shards. An
episode is one record. Only the features that are asked for are decoded.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from workflow_src.common.errors import UserError
from workflow_src.common.files import digest, sha256_file
from workflow_src.episodes.tfrecord import read_records


@dataclass(frozen=True)
class Shard:
    """One file of a split. Its episodes are numbered from `first` on within the split. `beside`: files that belong to it.

    `size`: its bytes, about, where it is fetched only to be read.
    """

    split: str
    path: Path
    first: int
    episodes: int
    beside: tuple[Path, ...] = ()
    size: int = 0

    @property
    def bytes(self) -> int:
        """Size of what is there of it, or what is said to be."""
        return self.size or sum(path.stat().st_size for path in (self.path, *self.beside) if path.is_file())


@dataclass(frozen=True)
class Steps:
    """One episode, or what is `wrong` with it. `read`: bytes of the shard up to and with it.

    `arrays`: by the path of their features, T steps stacked, `(T, ...)`; text as a list of str. `images`: T images as they
    were recorded: encoded, or uint8 `(H, W, 3)`.
    """

    record: int
    read: int
    arrays: dict[str, Any]
    images: list[bytes] | list[np.ndarray]
    wrong: str = ""


class Rlds:
    """Read access to the RLDS directory `root`. Raises UserError where it is none, or of another format."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        for name in ("dataset_info.json", "features.json"):
            if not (self.root / name).is_file():
                raise UserError(f"{self.root / name}: missing; give the folder that holds it and the .tfrecord files")
        self._builder = _open(self.root)
        self._info = self._builder.info
        if self._info.file_format and self._info.file_format.value != "tfrecord":
            raise UserError(f"{self.root}: holds {self._info.file_format.value} files; only tfrecord is read")

    @property
    def identity(self) -> str:
        """Digest of what describes the data."""
        return digest([sha256_file(self.root / name) for name in ("dataset_info.json", "features.json")])

    def shards(self) -> list[Shard]:
        """All shards: split by split in alphabetical order, then by number."""
        found = []
        for name, split in sorted(self._info.splits.items()):
            first = 0
            for file, episodes in zip(split.filenames, split.shard_lengths):
                found.append(Shard(name, self.root / file, first, episodes))
                first += episodes
        return found

    def num_bytes(self) -> int:
        """Bytes of all shards as dataset_info.json states them."""
        return sum(split.num_bytes for split in self._info.splits.values())

    def episodes(self, shard: Shard, features: Sequence[str], image: str = "") -> Iterator[Steps]:
        """The episodes of a shard, one in memory at a time.

        `features`: paths such as `action/world_vector`, within a step; those that the set does not have are not among the
        arrays. `image`: path of the images, which are not decoded. What cannot be read becomes an episode that says what is
        `wrong`, and so does everything that a shard should hold and does not.
        """
        parser = _Parser(self._info.features, [*features, image] if image else list(features), image, self.root)
        count = 0
        if shard.path.is_file():
            for record in read_records(shard.path):
                count = record.number + 1
                if record.wrong:
                    yield Steps(record.number, record.end, {}, [], record.wrong)
                    continue
                try:
                    yield Steps(record.number, record.end, *parser.parse(record.payload))
                except Exception as error:  # protobuf, TFDS and numpy raise many kinds for damaged records
                    yield Steps(record.number, record.end, {}, [], f"not an episode of this set ({line(error)})")
        for record in range(count, shard.episodes):
            there = shard.path.is_file()
            yield Steps(record, shard.bytes, {}, [], "missing from its file" if there else "its file is missing")


def decode_image(data: bytes | np.ndarray, size: int) -> np.ndarray:
    """An image, encoded or uint8 `(H, W, 3)`, as uint8 `(size, size, 3)` RGB.

    It is stretched to a square by an antialiased Lanczos filter. Raises ValueError for what is not a whole image.
    """
    from PIL import Image

    try:
        with Image.fromarray(data) if isinstance(data, np.ndarray) else Image.open(io.BytesIO(data)) as image:
            image = image.convert("RGB")
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.LANCZOS)
            return np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a whole image ({line(error)})") from error


class _Parser:
    """Decodes the wanted features of a record, leaving images encoded."""

    def __init__(self, features: Any, wanted: Sequence[str], image: str, root: Path) -> None:
        import tensorflow_datasets as tfds

        self._there = there(features, wanted, image, root)
        self._image = image
        tree = {path: get(features["steps"].feature, path) for path in self._there}
        if image:
            tree[image] = tfds.features.Text()  # bytes, which are decoded one at a time
        self._features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(_nest(tree))})

    def parse(self, payload: bytes) -> tuple[dict[str, Any], list[bytes]]:
        return columns(self._features.deserialize_example_np(payload)["steps"], self._there, self._image)


def there(features: Any, wanted: Sequence[str], image: str, root: Path) -> list[str]:
    """Those of the paths `wanted` that a step of the set has. Raises UserError where the images are not among them."""
    steps = features["steps"].feature
    found = [path for path in wanted if _has(steps, path)]
    if image and image not in found:
        raise UserError(f"{root / 'features.json'}: a step has no {image!r}; check the data set's image key")
    return found


def columns(steps: Iterable[dict[str, Any]], paths: Sequence[str], image: str) -> tuple[dict[str, Any], list[bytes]]:
    """An episode's steps as the `arrays` and `images` of `Steps`."""
    steps = list(steps)
    values = {path: [get(step, path) for step in steps] for path in paths}
    images = values.pop(image, [])
    text = {path for path, column in values.items() if column and isinstance(column[0], bytes)}
    arrays = {path: [one.decode(errors="replace") for one in column] if path in text else np.array(column)
              for path, column in values.items()}  # fmt: skip
    return arrays, images


@lru_cache(8)
def _open(root: Path) -> Any:
    import tensorflow_datasets as tfds

    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        return tfds.builder_from_directory(str(root))
    except Exception as error:  # TFDS raises many kinds for what it cannot read
        raise UserError(f"{root}: not a readable RLDS directory ({line(error)})") from error


def _nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """`{"a/b": leaf}` as `{"a": {"b": leaf}}`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = leaf
    return tree


def _has(features: Any, path: str) -> bool:
    for name in path.split("/"):
        if not hasattr(features, "keys") or name not in features:
            return False
        features = features[name]
    return True


def get(tree: Any, path: str) -> Any:
    """What stands at `a/b` of a tree of mappings."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


def line(error: BaseException) -> str:
    """An exception as one short line."""
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:160]
