"""RLDS directories behind an address, read shard by shard: of each reader, one shard at a time lies on the disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from workflow_src.common.fetch import fetch
from workflow_src.episodes.download import DESCRIPTIONS, damage
from workflow_src.episodes.rlds import Rlds, Shard, Steps


class Streamed(Rlds):
    """Read access to the RLDS directory at `address`, like `Rlds`. `folder` keeps its description and the newest shard.

    Raises UserError where something cannot be fetched; retries and continuation are `fetch`'s.
    """

    def __init__(self, address: str, folder: Path, pause: float = 1.0) -> None:
        for file in DESCRIPTIONS:
            if not (folder / file).is_file():
                fetch(f"{address}/{file}", folder / file, pause=pause)
        super().__init__(folder)
        self.address, self._pause = address, pause

    def shards(self) -> list[Shard]:
        """All shards, each with an equal part of its split's bytes as its size."""
        sizes = {name: -(-split.num_bytes // len(split.shard_lengths)) for name, split in self._info.splits.items()}
        return [replace(shard, size=max(1, sizes[shard.split])) for shard in super().shards()]

    def episodes(self, shard: Shard, features: Sequence[str], image: str = "") -> Iterator[Steps]:
        """The episodes of a shard; arguments and results as `Rlds.episodes`. What came damaged is fetched once more."""
        if not shard.path.is_file():
            for other in self.root.glob("*.tfrecord*"):
                other.unlink()
            self._fetch(shard)
            if damage(shard):
                shard.path.unlink()
                self._fetch(shard)
        yield from super().episodes(shard, features, image)

    def _fetch(self, shard: Shard) -> None:
        fetch(f"{self.address}/{shard.path.name}", shard.path, pause=self._pause)
