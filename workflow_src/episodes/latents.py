"""Latent cache: encode every frame of a split once, as it is and, where training mirrors clips, mirrored.

Writes beside `--out` (`latents.json`, last): `lengths.npy`, int64 (N,) frames of every episode, and shards
`plain_<number>.npy` and `mirrored_<number>.npy`, float16 (frames, h, w, C): whole episodes one after the other, in the order
of the episode table. Memory holds a few episodes at a time. Resumes by shards; another tokenizer or other episodes start it
anew.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from workflow_src.common.compute import configure_torch
from workflow_src.common.config import load_stage
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import Journal, atomic_path, create_array, digest, sha256_file, write_json
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import Progress
from workflow_src.episodes.store import EpisodeStore

EXAMPLES = """example:
  python -m workflow_src.episodes.latents --config results/config/latents.json \\
      --episodes results/episodes/tabletop/train/episodes.parquet --tokenizer results/tokenizer \\
      --out results/latents/tabletop/train/latents.json
"""
SHARD = 1 << 26  # bytes, about
BLOCK = 32  # episodes; a shard holds whole blocks, so frames meet in the same batches however the work was interrupted
BATCH = 256  # frames encoded at once
AHEAD = 4  # episodes read ahead
ROWS = 1 << 21  # latent cells per sum of the statistics
ORIENTATIONS = ("plain", "mirrored")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="stage file (seed, world_model)")
    parser.add_argument("--episodes", type=Path, required=True, help="episodes.parquet of the split, or its folder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder")
    parser.add_argument("--out", type=Path, required=True, help="latents.json to write")
    arguments = parser.parse_args()
    stage = load_stage(arguments.config)
    die_with_parent()
    device = configure_torch()
    from workflow_src.world_model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer, device)
    encode(EpisodeStore(arguments.episodes), tokenizer, arguments.out, stage.world_model.mirror)


# ---- writing ---------------------------------------------------------------------------------------------------------


def encode(store: EpisodeStore, tokenizer, out: Path, mirror: bool) -> None:
    """Encode all frames of `store` into the cache of `out`. Raises UserError naming an episode that cannot be used."""
    if not len(store):
        raise UserError(f"{store.root}: holds no episode; record or convert some")
    image = store.frames(0).shape[1:3]
    shape = tokenizer.shape(*image)
    key = digest([tokenizer.digest, store.identity, shape, mirror, SHARD, BLOCK])
    journal = Journal(out.with_name("journal.jsonl"), key)
    out.parent.mkdir(parents=True, exist_ok=True)
    for left_behind in out.parent.glob(".*.tmp.*"):  # by a run that was killed while writing
        left_behind.unlink()
    shards = _plan(store.lengths, shape)
    label = f"latents {'/'.join(out.parts[-3:-1])}"
    with Progress(int(store.lengths.sum()), label, "frame") as progress:
        for number, episodes in enumerate(shards):
            frames = int(store.lengths[episodes].sum())
            if _intact(journal, str(number), out.parent):
                progress.skip(progress.count + frames)
                continue
            files = [out.with_name(f"{name}_{number:05d}.npy") for name in ORIENTATIONS[: 1 + mirror]]
            _encode_shard(store, episodes, tokenizer, files, (frames, *shape), image)
            journal.record(str(number), sha256={file.name: sha256_file(file) for file in files})
            progress.update(frames)
    _write_card(out, store, tokenizer, journal, image, shape, mirror)


def _plan(lengths: np.ndarray, shape: tuple[int, ...]) -> list[range]:
    """Episodes of every shard: whole blocks, as many as make it large enough."""
    room = SHARD // (2 * int(np.prod(shape)))  # frames
    shards, begin, frames = [], 0, 0
    for block in range(0, len(lengths), BLOCK):
        end = min(block + BLOCK, len(lengths))
        frames += int(lengths[block:end].sum())
        if frames >= room or end == len(lengths):
            shards.append(range(begin, end))
            begin, frames = end, 0
    return shards


def _intact(journal: Journal, item: str, folder: Path) -> bool:
    if item not in journal:
        return False
    files = {folder / name: expected for name, expected in journal.done[item]["sha256"].items()}
    return all(path.is_file() and sha256_file(path) == expected for path, expected in files.items())


def _encode_shard(
    store: EpisodeStore, episodes: range, tokenizer, files: list[Path], shape: tuple[int, ...], image: tuple[int, ...]
) -> None:
    """Write one shard (frames, h, w, C) per orientation: the frames as they are and, with a second file, mirrored."""
    with ExitStack() as stack:
        arrays = [create_array(stack.enter_context(atomic_path(file)), shape, np.float16) for file in files]
        place = 0
        for images in _batches(store, episodes, image):
            for array, pixels in zip(arrays, (images, images[:, :, ::-1])):
                array[place : place + len(images)] = to_float16(tokenizer.encode(pixels), store)
            place += len(images)
        for array in arrays:
            array.flush()


def to_float16(latents: np.ndarray, store: EpisodeStore) -> np.ndarray:
    """Latents as they are cached. Raises UserError for numbers that float16 does not hold."""
    if not np.isfinite(latents).all() or np.abs(latents).max() > np.finfo(np.float16).max:
        raise UserError(f"tokenizer: latents of {store.root} are not finite in float16; train the tokenizer again")
    return latents.astype(np.float16)


def _batches(store: EpisodeStore, episodes: range, image: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Frames of `episodes`, uint8 (up to BATCH, H, W, 3); a batch ends where a block does."""
    waiting = np.empty((0, *image, 3), np.uint8)
    for i, frames in zip(episodes, _read_ahead(store, episodes)):
        if frames.shape[1:3] != image:
            raise store.other_size(i, frames.shape[1:3], image)
        if len(frames) != store.lengths[i]:
            raise UserError(f"{store.root}: episode {i} has {len(frames)} frames, its header says {store.lengths[i]}")
        waiting = np.concatenate([waiting, frames])
        ends = i % BLOCK == BLOCK - 1 or i == episodes[-1]
        while len(waiting) >= (1 if ends else BATCH):
            yield waiting[:BATCH]
            waiting = waiting[BATCH:]


def _read_ahead(store: EpisodeStore, episodes: range) -> Iterator[np.ndarray]:
    """The frames of one episode after the other; threads decode the next ones meanwhile."""
    with ThreadPoolExecutor(AHEAD) as pool:
        reading: deque = deque()
        for i in episodes:
            reading.append(pool.submit(store.frames, i))
            if len(reading) > AHEAD:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()


def _write_card(
    out: Path, store: EpisodeStore, tokenizer, journal: Journal, image: tuple[int, ...], shape: tuple[int, ...],
    mirror: bool,
) -> None:  # fmt: skip
    lengths = out.with_name("lengths.npy")
    with atomic_path(lengths) as temporary:
        np.save(temporary, store.lengths)
    hashes = {name: sha for entry in journal.done.values() for name, sha in entry["sha256"].items()}
    for outdated in set(out.parent.glob("*_*.npy")) - {out.with_name(name) for name in hashes}:
        outdated.unlink()
    mean, std = np.zeros(shape[-1]), np.ones(shape[-1])
    if not tokenizer.scaled:
        blocks = _blocks(store.lengths, [out.with_name(name) for name in sorted(hashes) if name.startswith("plain")])
        mean, std = statistics(blocks)
    write_json(out, {"shape": list(shape), "image": list(image), "mirrored": mirror, "tokenizer": tokenizer.digest,
                     "episodes": store.identity, "mean": mean.tolist(), "std": std.tolist(),
                     "sha256": {lengths.name: sha256_file(lengths)} | dict(sorted(hashes.items()))})  # fmt: skip


def _blocks(lengths: np.ndarray, shards: list[Path]) -> Iterator[np.ndarray]:
    """Latents of block after block of episodes, each in one shard."""
    arrays = (np.load(path, mmap_mode="r") for path in shards)
    array, place = next(arrays), 0
    for block in range(0, len(lengths), BLOCK):
        if place == len(array):
            array, place = next(arrays), 0
        frames = int(lengths[block : block + BLOCK].sum())
        yield array[place : place + frames]
        place += frames


def statistics(blocks: Iterator[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel of latents (…, C), float64 (C,), over all blocks and in bounded memory."""
    total, squares, count = 0.0, 0.0, 0
    for block in blocks:
        cells = block.reshape(-1, block.shape[-1])
        for start in range(0, len(cells), ROWS):
            part = cells[start : start + ROWS].astype(np.float64)
            total, squares, count = total + part.sum(0), squares + (part**2).sum(0), count + len(part)
    mean = total / count
    # A channel that never varies carries nothing; dividing by a tiny deviation would blow up its rounding.
    return mean, np.maximum(np.sqrt(np.maximum(squares / count - mean**2, 0)), 1e-3)


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latents:
    """A latent cache, mapped into memory.

    `shape` (h, w, C); `image`: rows and columns of the frames; `lengths` int64 (N,); `mean` and `std` float32 (C,);
    `tokenizer`, `episodes`: what it was made with and from; `shards`: plain ones, then mirrored ones, if there are any.
    """

    shape: tuple[int, int, int]
    image: tuple[int, int]
    lengths: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    tokenizer: str  # digest of the tokenizer's weights
    episodes: str  # identity of the episode store
    mirrored: bool
    shards: list[np.ndarray]

    @cached_property
    def _offsets(self) -> np.ndarray:
        """Where every episode begins among all frames."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def _first(self) -> np.ndarray:
        """Number of every plain shard's first frame."""
        frames = [len(shard) for shard in self.shards[: len(self.shards) // (1 + self.mirrored)]]
        return np.cumsum(frames) - frames

    def read(self, episode: np.ndarray, frames: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        """Latents float16 (B, T, h, w, C) of the `frames (B, T)` of `episode (B,)`; `mirrored (B,)` bool."""
        frame = (self._offsets[episode][:, None] + frames).ravel()
        shard = np.searchsorted(self._first, frame, side="right") - 1
        row = frame - self._first[shard]
        shard += np.repeat(mirrored, frames.shape[1]) * len(self._first)
        latents = np.empty((len(frame), *self.shape), np.float16)
        for number in np.unique(shard):
            here = shard == number
            latents[here] = self.shards[number][row[here]]
        return latents.reshape(*frames.shape, *self.shape)


def load_latents(path: str | Path, rank: int = 0, size: int = 1) -> Latents:
    """Open the cache that `path` (`latents.json`) describes. Raises UserError naming what is missing or damaged.

    Of `size` processes that all open it, each checks a part of the files' hashes: there may be hundreds of gigabytes.
    """
    path = Path(path)
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        names = list(card["sha256"])
        arrays = {name: np.load(path.with_name(name), mmap_mode="r") for name in names}
        for name in names[rank::size]:
            if sha256_file(path.with_name(name)) != card["sha256"][name]:
                raise UserError(f"{path.with_name(name)}: does not match {path}; delete {path} and run again")
        shards = [np.asarray(arrays[n]) for prefix in ORIENTATIONS for n in sorted(names) if n.startswith(prefix)]
        return Latents(
            tuple(card["shape"]), tuple(card["image"]), np.asarray(arrays["lengths.npy"]),
            *(np.asarray(card[name], np.float32) for name in ("mean", "std")),
            card["tokenizer"], card["episodes"], card["mirrored"], shards,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename}: no such file; run `episodes.latents`, or delete {path} and run again"
        ) from None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged latent cache ({error}); delete it and run again") from error


if __name__ == "__main__":
    run_cli(main)
