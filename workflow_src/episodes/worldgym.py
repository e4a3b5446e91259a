"""WorldGym's folders as sources of conversion: `<split>/<index:09d>.mp4` and `.npz` with `arr_0` (T, 10), a row per frame.

Features are `actions`, in the units that WorldGym trains on, and `video`. There are no instructions. The container's rate says
nothing: WorldGym writes all videos at 20 frames a second.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from workflow_src.common.errors import UserError
from workflow_src.common.files import digest
from workflow_src.common.video import read_video
from workflow_src.episodes.rlds import Shard, Steps

ACTIONS, VIDEO = "actions", "video"


class WorldGym:
    """Read access to the folder `root`, like `Rlds`. An episode is a shard, and its number that of its file."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @property
    def identity(self) -> str:
        """Digest of what describes the data: the names of its files. What is in them is the shards' own."""
        return digest([str(shard.path.relative_to(self.root)) for shard in self.shards()])

    def shards(self) -> list[Shard]:
        """All episodes, split by split in alphabetical order."""
        videos = sorted(path for path in self.root.glob("*/*.mp4") if path.stem.isdigit())
        return [
            Shard(path.parent.name, path, int(path.stem), 1, (path.with_suffix(".npz"),)) for path in videos
        ]  # fmt: skip

    def episodes(self, shard: Shard, features: Sequence[str], image: str = "") -> Iterator[Steps]:
        """The one episode of a shard; arguments and results as `Rlds.episodes`, but for images, which are decoded."""
        try:
            with np.load(shard.beside[0], allow_pickle=False) as file:
                arrays = {ACTIONS: file["arr_0"]} if ACTIONS in features else {}
            yield Steps(0, shard.bytes, arrays, list(read_video(shard.path)) if image else [])
        except (UserError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            words = " ".join(str(error).split())[:160]
            yield Steps(0, shard.bytes, {}, [], f"{shard.path.stem}: not a readable pair of mp4 and npz ({words})")
