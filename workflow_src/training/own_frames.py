"""Rollouts of training episodes by the model itself, shown to it as context: it learns to continue what it will see.

Trained on recorded context alone, a world model drifts once it continues its own frames, for nobody showed it how such
frames go on (DAgger, arXiv 1011.0686; scheduled sampling, arXiv 1506.03099). So every `every` steps the moving average
rolls out the training episodes under their recorded actions, and some clips then show these frames where they would show
recorded context; what has to be predicted remains the recording.

The rollouts of a refresh are one file beside the checkpoints, so a training that was killed continues bit by bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from workflow_src.common.compute import autocast
from workflow_src.common.errors import UserError
from workflow_src.common.files import create_array
from workflow_src.common.sections import WorldModel
from workflow_src.common.seeds import rng
from workflow_src.episodes.clips import Choice
from workflow_src.training import randomness
from workflow_src.training.distributed import Processes
from workflow_src.world_model.artefact import Card
from workflow_src.world_model.diffusion import Objective
from workflow_src.world_model.sampler import make_sampler

BLOCK = 250  # episodes rolled out side by side; they share the frame where they begin
Read = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[Tensor, Tensor, Tensor]]


class OwnFrames:
    """Own rollouts of `episodes` episodes of `length` frames. `read(episode, frames, mirrored)` gives recorded clips.

    A refresh belongs to the step it is made at, a multiple of `every` from `begin` on: until the next one its rollouts are
    in use. They begin in the midst of episodes, behind as many recorded frames as the sampler's window takes. Their first frame
    is the recorded one, rounded to float16; shown as context it is not learned from, like the others.
    """

    def __init__(self, card: Card, config: WorldModel, read: Read, episodes: int, length: int, seed: int,
                 folder: Path, digest: str, processes: Processes) -> None:  # fmt: skip
        self.card, self.config, self.own, self.read = card, config, config.own_frames, read
        self.episodes, self.length, self.seed = episodes, length, seed
        self.folder, self.digest, self.processes = Path(folder), digest, processes
        self.begin = int(self.own.begin * config.training.steps)
        self.step, self.rolled = -1, None

    # -- in training -----------------------------------------------------------------------------------------------

    def exchange(self, step: int, samples: np.ndarray, choice: Choice) -> Choice:
        """Move a share of the chosen clips to where their episode's own rollout is."""
        if self.rolled is None:
            return choice
        draws = randomness.uniform(self.seed, step, samples, 2, "own")
        own = draws[:, 0] < self.own.share
        place = np.minimum((draws[:, 1] * self._places).astype(np.int64), self._places - 1)
        start, mirrored = (values[choice.episode // BLOCK] for values in self._blocks(self.step))
        return replace(
            choice,
            start=np.where(own, start + place, choice.start),
            mirrored=np.where(own, mirrored, choice.mirrored),
            own=np.where(own, place, -1),
        )

    def shown(self, choice: Choice, clean: Tensor) -> Tensor:
        """What context frames of the clips `clean (B, T, h, w, C)` show: own frames where `choice` says so."""
        if choice.own is None:
            return clean
        place = np.maximum(choice.own, 0)[:, None] + np.arange(clean.shape[1])
        rolled = torch.from_numpy(self.rolled[choice.episode[:, None], place]).to(clean)
        return torch.where(torch.from_numpy(choice.own >= 0).to(clean.device)[:, None, None, None, None], rolled, clean)

    @property
    def _places(self) -> int:
        return self.own.horizon + 2 - self.config.clip_frames

    # -- refreshing ------------------------------------------------------------------------------------------------

    def prepare(self, step: int, ema: nn.Module) -> None:
        """Before update number `step`, on every process: have the rollouts that belong to it."""
        refresh = step - (step - self.begin) % self.own.every if step >= self.begin else -1
        if refresh == self.step:
            return
        path = self.folder / f"own_frames_{self.digest[:12]}_{refresh:09d}.npy"
        if refresh == step:
            self._roll_out(path, step, ema)
            self._tidy(step)
        try:
            self.rolled = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: missing or damaged ({error}); delete {self.folder} to train from the start"
            ) from error
        self.step = refresh

    def _roll_out(self, path: Path, step: int, ema: nn.Module) -> None:
        """Write own frames float16 (N, horizon + 1, h, w, C), standardised; index 0 is recorded. Blocks go round."""
        shape = (self.episodes, self.own.horizon + 1, *self.card.latent, self.card.network.in_channels)
        partial = path.with_suffix(".part")
        if self.processes.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            create_array(partial, shape, np.float16)
        self.processes.barrier()
        rolled = np.lib.format.open_memmap(partial, "r+")
        blocks = range(0, self.episodes, BLOCK)
        for block in blocks[self.processes.rank :: self.processes.size]:
            episodes = np.arange(block, min(block + BLOCK, self.episodes))
            rolled[episodes] = self._imagine(step, episodes, ema)
        rolled.flush()
        self.processes.barrier()
        if self.processes.first:
            with open(partial, "rb") as handle:
                os.fsync(handle.fileno())
            partial.replace(path)
        self.processes.barrier()

    def _tidy(self, step: int) -> None:
        """Remove rollouts of other trainings, and those older than any checkpoint that is kept."""
        training = self.config.training
        oldest = step - training.keep * training.checkpoint_every - self.own.every
        if self.processes.first:
            for path in self.folder.glob("own_frames_*"):
                number = path.stem.rpartition("_")[2]
                mine = path.suffix == ".npy" and path.name.startswith(f"own_frames_{self.digest[:12]}_")
                if not mine or int(number) < oldest:
                    path.unlink(missing_ok=True)

    def _blocks(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the refresh at `step`, per block: frame where its rollouts begin, int64, and whether they are mirrored."""
        count = -(-self.episodes // BLOCK)
        draws = rng(self.seed, "own frames", step).random((2, count))
        return (draws[0] * (self.length - self.own.horizon)).astype(np.int64), (draws[1] < 0.5) & self.config.mirror

    @torch.inference_mode()
    def _imagine(self, step: int, episodes: np.ndarray, ema: nn.Module) -> np.ndarray:
        starts, mirrors = self._blocks(step)
        start, mirrored = starts[episodes[0] // BLOCK], np.full(len(episodes), mirrors[episodes[0] // BLOCK])
        # Weights differ at every refresh: compiling takes longer than these few steps.
        sampler = make_sampler(ema, Objective(self.card.objective), replace(self.card.sampler, compile=False))
        room = self.card.sampler.window - self.card.sampler.horizon
        opening = max(0, start + 1 - room)  # first of the recorded context frames
        numbers = np.arange(opening, start + self.own.horizon + 1)
        clean, first, actions = self.read(episodes, np.tile(numbers, (len(episodes), 1)), mirrored)
        context = start + 1 - opening
        noise, shown = (
            torch.from_numpy(
                randomness.normal(self.seed, step, episodes, tuple(clean.shape[1:]), f"own frames, {name}")
            ).to(clean.device)
            for name in ("noise", "context")
        )
        with autocast(clean.device, self.config.training.precision):
            sampler.reset(
                clean[:, :context], actions[:, :context], context_noise=shown[:, :context], opens=opening == 0,
                first=first if self.card.network.first_frame else None,
            )  # fmt: skip
            frames = [
                sampler.generate(actions[:, n : n + 1], noise[:, n : n + 1], context_noise=shown[:, n : n + 1])
                for n in range(context, clean.shape[1])
            ]
        return torch.cat([clean[:, context - 1 : context], *frames], 1).to(torch.float16).cpu().numpy()

    def clear(self) -> None:
        """Remove all rollouts: the training is over."""
        for path in self.folder.glob("own_frames_*"):
            path.unlink(missing_ok=True)
