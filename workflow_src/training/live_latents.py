"""Latents encoded when they are trained on, instead of cached: no disk space, but the tokenizer runs at every step.

Threads decode the frames of the next step while this one is computed; the tokenizer runs on the training device. Nothing is
drawn at random here, and what is read follows from what is asked for: the number of threads changes no result.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch

from workflow_src.episodes.latents import statistics, to_float16
from workflow_src.episodes.store import EpisodeStore

THREADS = 4  # that decode, per process
SAMPLED = 2048  # frames that mean and deviation are taken from, at most
EPISODES = 64  # of them read at once


class LiveLatents:
    """Stands in for a cache, `episodes.latents.Latents`: same attributes, same `read`, up to the tokenizer's rounding.

    `tokenizer`: a loaded one, on the device where it is to run. Raises UserError for frames of different sizes.
    """

    mirrored = True

    def __init__(self, store: EpisodeStore, tokenizer, pool: ThreadPoolExecutor) -> None:
        self._store, self._encoder, self._pool = store, tokenizer, pool
        self._ahead: dict[tuple[int, ...], Future] = {}
        self.image, self.lengths = store.image_size(), store.lengths
        self.shape = tokenizer.shape(*self.image)
        self.tokenizer, self.episodes = tokenizer.digest, store.identity

    def of(self, store: EpisodeStore) -> LiveLatents:
        """Those of another store."""
        return LiveLatents(store, self._encoder, self._pool)

    @property
    def mean(self) -> np.ndarray:
        """Per channel, float32 (C,); like `std`, of frames that lie evenly over the whole store."""
        return self._statistics[0]

    @property
    def std(self) -> np.ndarray:
        return self._statistics[1]

    @cached_property
    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        if self._encoder.scaled:
            return np.zeros(self.shape[-1], np.float32), np.ones(self.shape[-1], np.float32)
        mean, std = statistics(self._sample())
        return mean.astype(np.float32), std.astype(np.float32)

    def prefetch(self, episode: np.ndarray, frames: np.ndarray) -> None:
        """Begin to decode the `frames (B, T)` of `episode (B,)`, which `read` will be asked for."""
        for clip in _clips(episode, frames):
            if clip not in self._ahead:
                self._ahead[clip] = self._pool.submit(self._store.read, clip[0], clip[1:])

    def read(self, episode: np.ndarray, frames: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        """Latents float16 (B, T, h, w, C) of the `frames (B, T)` of `episode (B,)`; `mirrored (B,)` bool."""
        self.prefetch(episode, frames)
        clips = _clips(episode, frames)
        decoded = {clip: self._ahead.pop(clip).result() for clip in dict.fromkeys(clips)}
        images = [decoded[clip][:, :, ::-1] if turned else decoded[clip] for clip, turned in zip(clips, mirrored)]
        return self._encode(np.concatenate(images)).reshape(*frames.shape, *self.shape)

    def _encode(self, images: np.ndarray) -> np.ndarray:
        # The tokenizer chooses its own number format, as it does for a cache, whatever the training computes in.
        with torch.autocast(self._encoder.device.type, enabled=False):
            return to_float16(self._encoder.encode(images), self._store)

    def _sample(self) -> Iterator[np.ndarray]:
        """Latents of evenly spaced frames: of all, where there are few."""
        ends = np.cumsum(self.lengths)
        frames = np.linspace(0, ends[-1] - 1, min(SAMPLED, ends[-1])).astype(np.int64)
        episodes = np.searchsorted(ends, frames, side="right")
        numbers = frames - (ends - self.lengths)[episodes]
        chosen = np.unique(episodes)
        for start in range(0, len(chosen), EPISODES):
            some = [(int(one), numbers[episodes == one]) for one in chosen[start : start + EPISODES]]
            yield self._encode(np.concatenate(list(self._pool.map(lambda one: self._store.read(*one), some))))


def _clips(episode: np.ndarray, frames: np.ndarray) -> list[tuple[int, ...]]:
    """Episode and frame numbers of every clip."""
    return [(one, *numbers) for one, numbers in zip(episode.tolist(), frames.tolist())]
