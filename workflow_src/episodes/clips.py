"""Training clips: which frames of which episode of which data set.

A clip is `frames` frames of one episode, every `skip`-th. Clips start everywhere from frame 0 to the last frame that leaves
room, so every frame is reachable (of an episode with fewer than `skip` such starts, those that its clips show); clips that
open an episode, as every rollout does, are drawn more often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workflow_src.common.errors import UserError

OPENING_SHARE = 0.15  # of the clips start at frame 0 on top of those that do so by chance


@dataclass(frozen=True)
class Choice:
    """B chosen clips: `episode`, `start` int64 (B,) and `mirrored` bool (B,).

    Episodes are numbered through over all data sets. `own` int64 (B,): where in the model's own rollout of the episode the
    clip begins; -1: only recorded frames.
    """

    episode: np.ndarray
    start: np.ndarray
    mirrored: np.ndarray
    own: np.ndarray | None = None


class Starts:
    """Where clips of `frames` frames can start in the episodes of one data set.

    `lengths` int64 (N,): frames of its episodes; `skip`: from one frame of a clip to the next. `count` int64 (N,): starts
    per episode, 0 where it is too short. Raises UserError where no clip fits anywhere.
    """

    def __init__(self, name: str, lengths: np.ndarray, frames: int, skip: int = 1) -> None:
        if not len(lengths):
            raise UserError(f"{name}: holds no episode; record more, or leave it out of world_model.data")
        self.frames, self.skip = frames, skip
        self.steps = (frames - 1) * skip  # from a clip's first frame to its last
        self.count = np.maximum(lengths - self.steps, 0)
        self._ends = np.cumsum(self.count)
        if frames < 2 or not self.count.any():
            every = f", every {skip}. one," if skip > 1 else ""
            raise UserError(
                f"world_model.clip_frames: {frames} frames{every} do not fit any of the {len(lengths)} episodes of {name}, of "
                f"up to {lengths.max()} frames; choose 2 to {1 + (lengths.max() - 1) // skip}, or leave it out"
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def too_short(self) -> int:
        """Episodes in which no clip fits."""
        return int((self.count == 0).sum())

    def locate(self, clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Episode and start of the clips numbered `clip`, int64 (B,): counted episode after episode."""
        episode = np.searchsorted(self._ends, clip, side="right")
        return episode, clip - (self._ends - self.count)[episode]


class Clips:
    """Clips of several data sets: one by its share, then one of its clips, equally often or by `weights`.

    `shares (D,)` add up to 1. `weights`: per data set, positive, one for each of its clips; None: equally often. `mirror`:
    half of the clips are mirrored.
    """

    def __init__(
        self, starts: Sequence[Starts], shares: np.ndarray, mirror: bool, weights: Sequence[np.ndarray] | None = None
    ) -> None:
        self.starts, self.shares, self.mirror = starts, shares, mirror
        weights = [np.ones(len(one)) for one in starts] if weights is None else weights
        self._reach = [np.cumsum(weight) / weight.sum() for weight in weights]
        self._bounds = np.concatenate([[0], np.cumsum(shares)])
        self._first = np.concatenate([[0], np.cumsum([len(one.count) for one in starts])])

    def choose(self, draws: np.ndarray) -> Choice:
        """The clips that uniform `draws (B, 3)` in [0, 1) point at; a pure function, so resume and ranks agree."""
        source = np.minimum(np.searchsorted(self._bounds[1:], draws[:, 0], side="right"), len(self.starts) - 1)
        episode, start = np.empty((2, len(draws)), np.int64)
        for number, (starts, reach) in enumerate(zip(self.starts, self._reach)):
            chosen = source == number
            within = (draws[chosen, 0] - self._bounds[number]) / self.shares[number]
            clip = np.minimum(np.searchsorted(reach, within, side="right"), len(reach) - 1)
            episode[chosen], start[chosen] = starts.locate(clip)
            episode[chosen] += self._first[number]
        start = np.where(draws[:, 1] < OPENING_SHARE, 0, start)
        return Choice(episode, start, (draws[:, 2] < 0.5) & self.mirror)

    def sources(self, episode: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Data set and number within it, int64, of episodes numbered through."""
        source = np.searchsorted(self._first, episode, side="right") - 1
        return source, episode - self._first[source]

    def frame_numbers(self, choice: Choice) -> np.ndarray:
        """Frame numbers int64 (B, frames) of the chosen clips."""
        skip = np.array([one.skip for one in self.starts])[self.sources(choice.episode)[0]]
        return choice.start[:, None] + skip[:, None] * np.arange(self.starts[0].frames)


def contact_weight(moved: np.ndarray, steps: int, weight: float) -> np.ndarray:
    """Weights (starts,) of an episode's clips: 1, plus `weight` times the share of the clip's steps in which an object moved.

    `moved (F-1,)` bool says so for every step; a clip spans `steps` of them, and there is none in shorter episodes.
    """
    if len(moved) < steps:
        return np.empty(0)
    return 1 + weight * np.lib.stride_tricks.sliding_window_view(moved.astype(np.float64), steps).mean(-1)
