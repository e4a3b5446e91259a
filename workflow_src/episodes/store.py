"""The episode store: `<root>/<index:09d>.mp4` + `.npz` per episode; `episodes.parquet` with their SHA-256 comes last.

Frames are addressed by index, never by seconds; the lab's are lossless, converted ones H.264 with a keyframe every few
frames. Arrays of an episode of F frames (float32):

    actions (F-1, 7)    commanded metric action; `actions[t]` leads from frame t to frame t+1
    reached (F-1, 7)    what the robot really did, in the same layout
    expert  (F, K, 7)   what the expert would do at every frame, for each of the lab's K tasks
    state   (F, S)      physical state, see `tabletop/scene.py`
    robot_state (F, R)  what a converted data set records about its robot, as it is

WorldGym's folders (mp4 + npz with `arr_0`, no parquet) are readable as they are: their only array is `actions` (F, 10), in
world-model units, of which the last one leads nowhere.

A store may hold more than fits into memory: `frames`, `read` and `arrays` take one episode. `load_all` is for small stores of
equally long episodes.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from workflow_src.common.errors import UserError
from workflow_src.common.files import atomic_path, digest, sha256_file
from workflow_src.common.video import probe_video, read_frames, read_video, write_video

TABLE = "episodes.parquet"
JOURNAL = "journal.jsonl"  # of the recorder; without a table beside it, the recording is not finished
COLUMNS = ("index", "frames", "instruction", "task", "behaviour", "control_hz", "embodiment", "action_semantics",
           "source", "seed", "success", "sha256_video", "sha256_arrays")  # fmt: skip
PROVENANCE = ("instructions", "file", "record")  # besides, of converted episodes: all texts, and where it came from
KEYFRAMES = 8  # of converted videos: at most so many frames are decoded to read one
ARRAYS = ("actions", "reached", "expert", "state")


@dataclass(frozen=True)
class Arrays:
    """All episodes of a store of equal-length episodes, stacked: N episodes, F frames. Absent arrays are None."""

    images: np.ndarray  # uint8 (N, F, H, W, 3)
    actions: np.ndarray  # float32 (N, F-1, 7)
    reached: np.ndarray | None  # float32 (N, F-1, 7)
    expert: np.ndarray | None  # float32 (N, F, K, 7)
    state: np.ndarray | None  # float32 (N, F, S)
    table: pd.DataFrame


def episode_paths(root: str | Path, index: int) -> tuple[Path, Path]:
    """Video and array file of an episode."""
    stem = Path(root) / f"{index:09d}"
    return stem.with_suffix(".mp4"), stem.with_suffix(".npz")


def write_episode(
    root: str | Path, index: int, frames: np.ndarray, arrays: dict[str, np.ndarray], fps: float, lossless: bool = True
) -> dict:
    """Write one episode; returns `{"sha256_video", "sha256_arrays"}`. The same content gives the same bytes."""
    video, data = episode_paths(root, index)
    write_video(video, frames, fps, lossless, 0 if lossless else KEYFRAMES)
    with atomic_path(data) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, **{name: np.asarray(values, np.float32) for name, values in arrays.items()})
    return {"sha256_video": sha256_file(video), "sha256_arrays": sha256_file(data)}


def write_table(path: str | Path, rows: list[dict]) -> None:
    """Write `episodes.parquet`, which makes the store complete. Rows hold `COLUMNS`, of converted episodes `PROVENANCE`."""
    columns = [*COLUMNS, *(name for name in PROVENANCE if rows and name in rows[0])]
    table = pd.DataFrame(rows, columns=columns).sort_values("index", ignore_index=True)
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False)


class EpisodeStore:
    """Read access to a store, given its folder or its `episodes.parquet`. Position i counts rows of `table`."""

    def __init__(self, root: str | Path):
        root = Path(root)
        self.root = root.parent if root.suffix == ".parquet" else root
        if not self.root.is_dir():
            raise UserError(f"{self.root}: no such episode store; record or import it first")
        path = self.root / TABLE
        if not path.is_file() and (root.suffix == ".parquet" or (self.root / JOURNAL).is_file()):
            raise UserError(f"{path}: missing, the recording was not finished; start it again, it continues")
        self.table = _read_table(path) if path.is_file() else _legacy_table(self.root)

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the table, which lists all files' own. Without a table: digest of names, videos' sizes and arrays."""
        path = self.root / TABLE
        if path.is_file():
            return sha256_file(path)
        files = [episode_paths(self.root, self._index(i)) for i in range(len(self))]
        return digest([[video.name, video.stat().st_size, sha256_file(data)] for video, data in files])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Frames of every episode, int64 (N,)."""
        stated = self.table["frames"].to_numpy(np.int64)
        return stated if stated.all() else self._probed[:, 0]

    def image_size(self) -> tuple[int, int]:
        """Rows and columns of the frames. Raises `UserError` naming the first video of another size than the others."""
        sizes = self._probed[:, 1:]
        if len(odd := np.flatnonzero((sizes != sizes[0]).any(1))):
            raise self.other_size(int(odd[0]), tuple(sizes[odd[0]]), tuple(sizes[0]))
        return int(sizes[0, 0]), int(sizes[0, 1])

    def other_size(self, i: int, found: tuple[int, ...], expected: tuple[int, ...]) -> UserError:
        """What to raise for an episode whose frames have another size (rows, columns) than the first episode's."""
        path = episode_paths(self.root, self._index(i))[0]
        return UserError(f"{path}: frames of {found[0]}x{found[1]} pixels where the store's first episode has "
                         f"{expected[0]}x{expected[1]}; resize them all to one size")  # fmt: skip

    @cached_property
    def _probed(self) -> np.ndarray:
        """Number of frames, rows and columns of every video, int64 (N, 3), from the videos' headers."""
        paths = [episode_paths(self.root, self._index(i))[0] for i in range(len(self))]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return np.array(list(pool.map(probe_video, paths)), np.int64).reshape(-1, 3)

    def frames(self, i: int) -> np.ndarray:
        """uint8 `(F, H, W, 3)`. Raises `UserError` naming a missing or damaged file."""
        path = episode_paths(self.root, self._index(i))[0]
        self._verify(path, i, "sha256_video")
        frames = read_video(path)
        expected = int(self.table["frames"].iloc[i])
        if expected and len(frames) != expected:
            raise UserError(f"{path}: {len(frames)} frames instead of {expected}; delete it and record again")
        return frames

    def read(self, i: int, numbers: Sequence[int]) -> np.ndarray:
        """The frames numbered `numbers` of an episode, uint8 `(n, H, W, 3)`; for a few frames faster than `frames`."""
        path = episode_paths(self.root, self._index(i))[0]
        self._verify(path, i, "sha256_video")
        return read_frames(path, numbers)

    def arrays(self, i: int) -> dict[str, np.ndarray]:
        """The arrays by name, float32. Raises `UserError` naming a missing or damaged file."""
        path = episode_paths(self.root, self._index(i))[1]
        self._verify(path, i, "sha256_arrays")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name].astype(np.float32, copy=False) for name in file.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: not a readable npz file ({error}); delete it and record again") from error
        return {"actions": arrays["arr_0"]} if "arr_0" in arrays else arrays

    def load_all(self) -> Arrays:
        """Everything at once, verified. Episodes must be equally long.

        Decoded frames are kept beside the table in a file named by the episodes' hashes, so that later stages read
        one array.
        """
        if self.table.empty:
            raise UserError(f"{self.root}: holds no episode")
        # One after the other: npz headers are parsed by `ast`, which is not safe in threads before Python 3.11.8
        # (gh-106905, "AST constructor recursion depth mismatch").
        arrays = [self.arrays(i) for i in range(len(self))]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            images = self._images(pool)
        stacked = {name: self._stack([a.get(name) for a in arrays], name) for name in ARRAYS}
        return Arrays(images=images, table=self.table, **stacked)

    def _images(self, pool: ThreadPoolExecutor) -> np.ndarray:
        hashes = self.table["sha256_video"].tolist()
        cache = self.root / f".decoded-{digest(hashes)}.npy" if all(hashes) else None
        if cache is not None and cache.is_file():
            # The videos are what counts: one that was damaged since must be reported, not papered over.
            list(
                pool.map(
                    lambda i: self._verify(episode_paths(self.root, self._index(i))[0], i, "sha256_video"),
                    range(len(self)),
                )
            )
            return np.load(cache)
        images = self._stack(list(pool.map(self.frames, range(len(self)))), "frames")
        if cache is not None:
            for outdated in self.root.glob(".decoded-*.npy"):
                outdated.unlink(missing_ok=True)
            with atomic_path(cache) as temporary:
                np.save(temporary, images)
        return images

    def _stack(self, values: list[np.ndarray | None], name: str) -> np.ndarray | None:
        if values[0] is None:
            return None
        for i, value in enumerate(values):
            if value is None or value.shape != values[0].shape:
                shape = None if value is None else value.shape
                path = episode_paths(self.root, self._index(i))[name != "frames"]
                raise UserError(f"{path}: {name} of shape {shape} where the first episode has {values[0].shape}; "
                                "episodes of one store must be equally long")  # fmt: skip
        return np.stack(values)

    def _index(self, i: int) -> int:
        return int(self.table["index"].iloc[i])

    def _verify(self, path: Path, i: int, column: str) -> None:
        if not path.is_file():
            raise UserError(f"{path}: missing, though {TABLE} lists it; delete {TABLE} and record again")
        expected = self.table[column].iloc[i]
        if expected and sha256_file(path) != expected:
            raise UserError(f"{path}: damaged (its SHA-256 is not the one in {TABLE}); delete {TABLE} and record again")


def _read_table(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path)
    except Exception as error:  # pyarrow raises many kinds for damaged files
        raise UserError(f"{path}: not a readable parquet file ({error}); delete it and record again") from error
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise UserError(f"{path}: has no column {missing[0]!r}; it is not an episode table")
    return table.sort_values("index", ignore_index=True)


def _legacy_table(root: Path) -> pd.DataFrame:
    stems = sorted(path.stem for path in root.glob("*.mp4") if path.stem.isdigit() and len(path.stem) == 9)
    if not stems:
        raise UserError(f"{root}: holds neither {TABLE} nor 000000000.mp4 + .npz pairs; the recording was not finished")
    broken = [stem for stem in stems if not (root / f"{stem}.npz").is_file()]
    if broken:
        raise UserError(f"{root}: {', '.join(f'{stem}.mp4' for stem in broken[:5])} without an npz of the same name")
    # Such folders say nothing about their episodes: 0 frames means unknown, and there is nothing to verify against.
    known = {"frames": 0, "instruction": "", "task": "", "behaviour": "", "control_hz": 5.0, "embodiment": "widowx",
             "action_semantics": "worldgym", "source": "worldgym", "seed": 0, "success": None, "sha256_video": "",
             "sha256_arrays": ""}  # fmt: skip
    return pd.DataFrame([{"index": int(stem), **known} for stem in stems], columns=list(COLUMNS))
