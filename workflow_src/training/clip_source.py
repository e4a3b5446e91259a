"""What a world model is trained on: clips of latents and actions from one or several data sets.

Every data set keeps its own embodiment, control rate and frame skip; frames and latents of all have one size, and one mean
and deviation per channel standardises them. A clip is read by episode and frame numbers, so what a step sees does not
depend on who reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from workflow_src import embodiments
from workflow_src.common.errors import UserError
from workflow_src.common.progress import say
from workflow_src.common.sections import WorldModel
from workflow_src.episodes.actions import beside_frames, metric_actions
from workflow_src.episodes.clips import Choice, Clips, Starts, contact_weight
from workflow_src.episodes.mixture import read_mixture
from workflow_src.training.datasets import Dataset
from workflow_src.training.distributed import Processes
from workflow_src.training.live_latents import LiveLatents
from workflow_src.world_model.artefact import Source

OBJECT = slice(4, 7)  # of a recorded state: position of the first object, metres
MOVED = 0.002  # metres: less is settling, not contact


class ClipSource:
    """Clips of `datasets`, the primary one first; `clips` chooses them, and `mean` and `std` (C,) standardise latents.

    Raises UserError before anything is read: a data set in which no clip fits, actions that cannot be used.
    """

    def __init__(self, config: WorldModel, datasets: Sequence[Dataset], processes: Processes) -> None:
        self.datasets, self.device = datasets, processes.device
        self._first_frame = config.network.first_frame
        starts = [Starts(one.name, one.latents.lengths, config.clip_frames, one.skip) for one in datasets]
        for one, usable in zip(datasets, starts):
            if usable.too_short and processes.first:
                say(f"world model: {one.name}: {usable.too_short} of {len(usable.count)} episodes are too short for a clip of "
                    f"{config.clip_frames} frames and left out")  # fmt: skip
        self.shares = read_mixture(config.data, datasets[0].name).shares([len(one) for one in starts])
        read = [_actions_and_weights(*pair, config) for pair in zip(datasets, starts)]
        self.clips = Clips(starts, self.shares, config.mirror, [weights for _, weights in read])
        self._actions = [actions for actions, _ in read]
        self._offsets = [np.cumsum(one.latents.lengths) - one.latents.lengths for one in datasets]
        self.mean, self.std = (torch.from_numpy(value).to(self.device) for value in self._statistics())
        # Live statistics may differ in their rounding from one device to the next.
        processes.copy_from_first([self.mean, self.std])

    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of the mixture, float32 (C,): of its clips, not of all frames that the data sets hold."""
        means = np.stack([one.latents.mean for one in self.datasets]).astype(np.float64)
        deviations = np.stack([one.latents.std for one in self.datasets]).astype(np.float64)
        share = self.shares[:, None]
        mean = (share * means).sum(0)
        variance = (share * (deviations**2 + (means - mean) ** 2)).sum(0)
        return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)

    @property
    def live(self) -> bool:
        """Whether latents are encoded on the fly, so that `prefetch` saves time."""
        return isinstance(self.datasets[0].latents, LiveLatents)

    def equal_episodes(self) -> tuple[int, int]:
        """Number of episodes and frames of each, for own frames. Raises UserError where they have more than one length."""
        lengths = self.datasets[0].latents.lengths
        if self.live or len(self.datasets) > 1 or self.datasets[0].skip > 1 or (lengths != lengths[0]).any():
            raise UserError("world_model.own_frames.share: own frames need one data set of equally long episodes, cached and "
                            "without frame_skip; set it to 0")  # fmt: skip
        return len(lengths), int(lengths[0])

    @property
    def sources(self) -> tuple[Source, ...]:
        """The data sets as the artefact lists them."""
        return tuple(
            Source(one.name, one.embodiment, one.control_hz, one.skip, round(float(share), 6))
            for one, share in zip(self.datasets, self.shares)
        )

    @property
    def identity(self) -> list[str]:
        """What identifies the data: digests of the tokenizer and of every store."""
        return [self.datasets[0].latents.tokenizer, *(one.latents.episodes for one in self.datasets)]

    def read(
        self, episode: np.ndarray, frames: np.ndarray, mirrored: np.ndarray
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Standardised frames (B, T, h, w, C), their episodes' first frames (B, h, w, C), actions (B, T, 10).

        Of `episode (B,)`, numbered through, the frames numbered `frames (B, T)`, int64; `mirrored (B,)` bool. First frames
        are None for a network that does not look at them.
        """
        shape = (*frames.shape, *self.datasets[0].latents.shape)
        latents, first = np.empty(shape, np.float16), np.empty((len(frames), *shape[2:]), np.float16)
        actions = np.empty((*frames.shape, embodiments.WORLD_MODEL_DIM), np.float32)
        for number, here, mine in self._by_dataset(episode):
            data, turned = self.datasets[number], mirrored[here]
            latents[here] = data.latents.read(mine, frames[here], turned)
            if self._first_frame:
                first[here] = data.latents.read(mine, np.zeros((len(mine), 1), np.int64), turned)[:, 0]
            beside = self._actions[number][self._offsets[number][mine][:, None] + frames[here]]
            if turned.any():
                beside[turned] = embodiments.mirror_actions(beside[turned], data.embodiment)
            actions[here] = beside
        return self._standardise(latents), self._standardise(first) if self._first_frame else None, self.tensor(actions)

    def prefetch(self, choice: Choice) -> None:
        """Begin to decode clips that are to be read soon, of latents that are encoded on the fly."""
        frames = self.clips.frame_numbers(choice)
        for number, here, mine in self._by_dataset(choice.episode):
            latents = self.datasets[number].latents
            latents.prefetch(mine, frames[here])
            if self._first_frame:
                latents.prefetch(mine, np.zeros((len(mine), 1), np.int64))

    def describe(self, choice: Choice) -> dict[str, list]:
        """Where the chosen clips come from: `dataset`, number of the `episode`'s files, `start`, `mirrored`, `own`."""
        source, number = self.clips.sources(choice.episode)
        place = [(self.datasets[s], n) for s, n in zip(source, number)]
        rest = {name: value.tolist() for name, value in vars(choice).items() if value is not None}
        files = [int(one.store.table["index"].iloc[n]) for one, n in place]
        return rest | {"dataset": [one.name for one, _ in place], "episode": files}

    def tensor(self, value: np.ndarray) -> Tensor:
        """`value` on the device."""
        return torch.from_numpy(np.ascontiguousarray(value)).to(self.device, non_blocking=True)

    def _by_dataset(self, episode: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each data set among `episode (B,)`: its number, where it stands (B,) bool, and its episodes' own numbers."""
        source, number = self.clips.sources(episode)
        for one in np.unique(source):
            here = source == one
            yield int(one), here, number[here]

    def _standardise(self, latents: np.ndarray) -> Tensor:
        return (self.tensor(latents).float() - self.mean) / self.std


def _actions_and_weights(data: Dataset, starts: Starts, config: WorldModel) -> tuple[np.ndarray, np.ndarray]:
    """The action beside every frame, float32 (sum F, 10), episode after episode; how often each clip is drawn"""
    lengths = data.latents.lengths
    ends = np.cumsum(lengths)
    beside, weights = np.empty((ends[-1], embodiments.WORLD_MODEL_DIM), np.float32), []
    for i, (frames, end, count) in enumerate(zip(lengths.tolist(), ends.tolist(), starts.count.tolist())):
        arrays = data.store.arrays(i)
        actions = metric_actions(data.store, i, arrays, frames, config.actions)
        beside[end - frames : end] = beside_frames(
            actions,
            embodiment=data.embodiment,
            convention=config.convention,
            alignment=config.alignment,
            skip=data.skip,
        )
        weights.append(
            contact_weight(_object_moved(data, arrays), starts.steps, config.contact_weight)
            if config.contact_weight > 0
            else np.ones(count)
        )
    return beside, np.concatenate(weights)


def _object_moved(data: Dataset, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Whether the first object moved in each step, bool (F-1,), from recorded states."""
    if "state" not in arrays:
        raise UserError(f"world_model.contact_weight: {data.store.root} has no object states; set it to 0")
    return np.linalg.norm(np.diff(arrays["state"][:, OBJECT], axis=0), axis=-1) > MOVED
