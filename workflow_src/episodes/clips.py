"""Training clips: which frames of which episode, and the actions that led to them.

A clip is `frames` consecutive frames of one episode. Clips start everywhere from frame 0 to the last frame that leaves
room, so every frame is reachable; clips that open an episode, as every rollout does, are drawn more often.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workflow_src.common.errors import UserError

OPENING_SHARE = 0.15  # of the clips start at frame 0 on top of those that do so by chance


@dataclass(frozen=True)
class Choice:
    """B chosen clips: `episode`, `start` int64 (B,) and `mirrored` bool (B,).

    `own` int64 (B,): where in the model's own rollout of the episode the clip begins; -1: only recorded frames.
    """

    episode: np.ndarray
    start: np.ndarray
    mirrored: np.ndarray
    own: np.ndarray | None = None


class Clips:
    """Clips of `frames` frames from `episodes` episodes of `length` frames each; `mirror`: half of them mirrored.

    `weight (episodes, starts)`, positive: how often each clip is drawn relative to others; None: equally often.
    """

    def __init__(self, episodes: int, length: int, frames: int, mirror: bool, weight: np.ndarray | None = None) -> None:
        if episodes < 1:
            raise UserError("world_model: the training split holds no episode; raise episodes.splits.train.episodes")
        if not 2 <= frames <= length:
            raise UserError(
                f"world_model.clip_frames: {frames} does not fit episodes of {length} frames; choose 2 to {length}"
            )
        self.episodes, self.starts, self.frames, self.mirror = episodes, length - frames + 1, frames, mirror
        weight = np.ones((episodes, self.starts)) if weight is None else weight
        self.reach = np.cumsum(weight) / weight.sum()

    def choose(self, draws: np.ndarray) -> Choice:
        """The clips that uniform `draws (B, 3)` in [0, 1) point at; a pure function, so resume and ranks agree."""
        clip = np.minimum(np.searchsorted(self.reach, draws[:, 0], side="right"), len(self.reach) - 1)
        episode, start = np.divmod(clip, self.starts)
        start = np.where(draws[:, 1] < OPENING_SHARE, 0, start)
        return Choice(episode, start, (draws[:, 2] < 0.5) & self.mirror)

    def frame_numbers(self, choice: Choice) -> np.ndarray:
        """Frame numbers int64 (B, frames) of the chosen clips."""
        return choice.start[:, None] + np.arange(self.frames)


def aligned_actions(actions: np.ndarray, alignment: str) -> np.ndarray:
    """The action beside every frame: `actions (N, F-1, A)` -> float32 (N, F, A).

    `leads_to`: frame t stands beside action t-1, which led to it; frame 0 beside zeros ("episode start").
    `worldgym_train`: frame t stands beside action t, the last frame beside zeros.
    """
    if alignment not in ("leads_to", "worldgym_train"):
        raise UserError(f"world_model.alignment: {alignment!r} is not one of leads_to, worldgym_train")
    before = (1, 0) if alignment == "leads_to" else (0, 1)
    return np.pad(actions.astype(np.float32), ((0, 0), before, (0, 0)))


def contact_weight(moved: np.ndarray, frames: int, weight: float) -> np.ndarray:
    """Weights (N, starts) of clips: 1, plus `weight` times the share of the clip's steps in which an object moved.

    `moved (N, F-1)` bool says so for every step of every episode.
    """
    windows = np.lib.stride_tricks.sliding_window_view(moved.astype(np.float64), frames - 1, axis=1)
    return 1 + weight * windows.mean(-1)
