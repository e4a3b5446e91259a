"""LeRobot data sets (v2.0, v2.1 and v3.0) as sources of conversion: parquet and video, without the `lerobot` package.

Features are a frame's columns, such as `action` and `observation.images.front`; `task` is its instruction. Frames are found by
the time stamps of the table, because a video's own rate may differ from the data set's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workflow_src.common.errors import UserError
from workflow_src.common.files import digest, sha256_file
from workflow_src.common.video import frame_times, read_frames
from workflow_src.episodes.rlds import Shard, Steps
from workflow_src.episodes.sources import LEROBOT_INFO

TASK = "task"


@dataclass(frozen=True)
class Place:
    """Where an episode is: the table `data` that holds its frames, how many, and its `row` among the episodes."""

    data: Path
    length: int
    row: dict[str, Any]


class LeRobot:
    """Read access to the LeRobot data set `root`, like `Rlds`. Raises UserError where it is none, or of another version."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        try:
            self._info = json.loads((self.root / LEROBOT_INFO).read_text(encoding="utf-8"))
            self._version = re.fullmatch(r"v?([23])\.\d+", str(self._info["codebase_version"]))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{self.root / LEROBOT_INFO}: not LeRobot's description of a data set ({error})") from error
        if not self._version:
            raise UserError(
                f"{self.root / LEROBOT_INFO}: codebase_version {self._info['codebase_version']!r} is not v2.x or v3.x"
            )

    @property
    def identity(self) -> str:
        """Digest of what describes the data."""
        return digest([[str(path.relative_to(self.root)), sha256_file(path)]
                       for path in sorted((self.root / "meta").rglob("*")) if path.is_file()])  # fmt: skip

    def shards(self) -> list[Shard]:
        """All files of frames, split by split in alphabetical order; an episode of v2 is a shard of its own."""
        found = []
        for split, (begin, end) in sorted(self._splits().items()):
            first = begin
            for index in range(begin, end):
                if index + 1 == end or self._places[index + 1].data != self._places[index].data:
                    videos = {self._video(key, i) for key in self._videos for i in range(first, index + 1)}
                    path = self._places[index].data
                    found.append(Shard(split, path, first, index + 1 - first, tuple(sorted(videos))))
                    first = index + 1
        return found

    def episodes(self, shard: Shard, features: Sequence[str], image: str = "") -> Iterator[Steps]:
        """The episodes of a shard; arguments and results as `Rlds.episodes`, but for images of videos, which are decoded."""
        if image and image not in self._info["features"]:
            raise UserError(
                f"{self.root / LEROBOT_INFO}: there is no feature {image!r}; check the data set's image key"
            )
        for record in range(shard.episodes):
            index, read = shard.first + record, round(shard.bytes * (record + 1) / shard.episodes)
            try:
                yield Steps(record, read, *self._episode(index, features, image))
            except (UserError, OSError, ValueError, KeyError, IndexError) as error:
                words = re.sub(r"\s+", " ", f"{error}")[:160]
                yield Steps(record, read, {}, [], words if shard.path.is_file() else "its file is missing")

    def _episode(self, index: int, features: Sequence[str], image: str) -> tuple[dict[str, Any], list]:
        place = self._places[index]
        table = _table(place.data)
        table = table[table["episode_index"] == index].sort_values("frame_index")
        if len(table) != place.length:
            raise ValueError(f"{len(table)} frames where the episode should have {place.length}")
        arrays: dict[str, Any] = {}
        for name in features:
            if name == TASK:
                arrays[name] = [self._tasks[int(number)] for number in table["task_index"]]
            elif name in table:
                arrays[name] = np.stack([np.asarray(value) for value in table[name]])
        if not image:
            return arrays, []
        if image not in self._videos:
            return arrays, [cell["bytes"] for cell in table[image]]
        start = float(place.row.get(f"videos/{image}/from_timestamp", 0.0))
        wanted = start + table["timestamp"].to_numpy(np.float64)
        return arrays, list(read_frames(self._video(image, index), _nearest(self._video(image, index), wanted)))

    def _splits(self) -> dict[str, tuple[int, int]]:
        splits = {}
        for name, span in self._info["splits"].items():
            found = re.fullmatch(r"(\d+):(\d+)", str(span))
            if not found or int(found[2]) > len(self._places):
                raise UserError(
                    f"{self.root / LEROBOT_INFO}: splits.{name} {span!r} is not a range of {len(self._places)} episodes"
                )
            splits[name] = int(found[1]), int(found[2])
        return splits

    def _video(self, key: str, index: int) -> Path:
        row, size = self._places[index].row, int(self._info["chunks_size"])
        place = {"video_key": key, "episode_index": index, "episode_chunk": index // size}
        place |= {name: int(row.get(f"videos/{key}/{name}", 0)) for name in ("chunk_index", "file_index")}
        return self.root / self._info["video_path"].format(**place)

    @cached_property
    def _videos(self) -> list[str]:
        return [name for name, feature in self._info["features"].items() if feature["dtype"] == "video"]

    @cached_property
    def _places(self) -> list[Place]:
        rows = self._meta("episodes").sort_values("episode_index").to_dict("records")
        if [row["episode_index"] for row in rows] != list(range(len(rows))):
            raise UserError(f"{self.root / 'meta'}: its episodes are not numbered from 0 without gaps")
        size = int(self._info["chunks_size"])
        return [
            Place(
                self.root / self._info["data_path"].format(
                    episode_index=i, episode_chunk=i // size, chunk_index=int(row.get("data/chunk_index", 0)),
                    file_index=int(row.get("data/file_index", 0)),
                ),
                int(row["length"]), row,
            )
            for i, row in enumerate(rows)
        ]  # fmt: skip

    @cached_property
    def _tasks(self) -> dict[int, str]:
        table = self._meta("tasks")
        if TASK not in table:  # v3 has the texts as the table's index
            table = table.reset_index(names=TASK)
        return {int(number): str(text) for number, text in zip(table["task_index"], table[TASK])}

    def _meta(self, name: str) -> pd.DataFrame:
        meta = self.root / "meta"
        try:
            if self._version[1] == "2":
                return pd.read_json(meta / f"{name}.jsonl", lines=True)
            if name == "tasks":
                return pd.read_parquet(meta / "tasks.parquet")
            return pd.concat([pd.read_parquet(path) for path in sorted((meta / name).rglob("*.parquet"))])
        except (OSError, ValueError) as error:
            raise UserError(f"{meta}: its {name} cannot be read ({error}); fetch the folder again") from error


def _nearest(path: Path, wanted: np.ndarray) -> np.ndarray:
    """Numbers of the frames shown at `wanted` seconds. Raises ValueError where none is within half a frame's time."""
    times = frame_times(path)
    numbers = np.abs(times[:, None] - wanted).argmin(0)
    apart = np.abs(times[numbers] - wanted)
    step = np.median(np.diff(times)) if len(times) > 1 else 0.1
    if len(late := np.flatnonzero(apart > step / 2 + 1e-4)):
        raise ValueError(f"{path.name} shows nothing at {wanted[late[0]]:.3f} s, frame {late[0]}")
    return numbers


@lru_cache(2)
def _table(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path)
