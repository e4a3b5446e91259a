"""Held-out episodes for the replays that a world model is validated on, all cut to one length."""

from __future__ import annotations

import numpy as np

from workflow_src.common.errors import UserError
from workflow_src.common.sections import WorldModel
from workflow_src.embodiments import METRIC_DIM
from workflow_src.episodes.actions import compose, metric_actions
from workflow_src.episodes.store import Arrays
from workflow_src.training.datasets import Dataset


def choose_episodes(data: Dataset, most: int) -> tuple[np.ndarray, int]:
    """Up to `most` episodes, int64 (N,), and how many frames of each are shown: of every `skip`-th, from the first on.

    The first ones that are at least as long as half of all, so that each horizon is an average over the same episodes.
    Raises UserError for a split without any motion.
    """
    lengths = data.latents.lengths
    length = int(np.sort(lengths)[len(lengths) // 2])
    frames = 1 + (length - 1) // data.skip
    if frames < 2:
        raise UserError(f"{data.store.root}: half of the episodes have {length} frames or fewer; too short to replay")
    return np.flatnonzero(lengths >= length)[:most], frames


def read_held_out(data: Dataset, config: WorldModel, most: int) -> tuple[Arrays, np.ndarray]:
    """The chosen episodes as `Arrays`, and their latents, float16 (N, F, h, w, C).

    Actions (N, F-1, 7) are what led from each shown frame to the next. A motion of the base is left out: environments take
    none.
    """
    episodes, count = choose_episodes(data, most)
    numbers = np.arange(count) * data.skip
    images, actions, reached = [], [], []
    for i in episodes.tolist():
        images.append(data.store.read(i, numbers))
        for kind, found in (("commanded", actions), ("reached", reached)):
            if kind in ("commanded", config.actions):
                whole = metric_actions(data.store, i, data.store.arrays(i), int(data.latents.lengths[i]), kind)
                found.append(compose(whole, data.skip)[numbers[1:] - 1, :METRIC_DIM])
    latents = data.latents.read(episodes, np.tile(numbers, (len(episodes), 1)), np.zeros(len(episodes), bool))
    arrays = Arrays(
        images=np.stack(images), actions=np.stack(actions), reached=np.stack(reached) if reached else None, expert=None,
        state=None, table=data.store.table.iloc[episodes],
    )  # fmt: skip
    return arrays, latents
