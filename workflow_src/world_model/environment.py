"""The learned world as a Gymnasium vector environment, interchangeable with the lab.

    env = gymnasium.make_vec("workflow_src.world_model.environment:WorldModel-v0", num_envs=51,
                             model="results/world_model", seed=0, horizon=18)
    obs, info = env.reset(seed=[trial seeds], options={"trials": [{"image": ..., "repeat": 0, "trial_id": ...}, ...]})
    obs, reward, terminated, truncated, info = env.step(actions)     # float32 (N, 7) metric

`obs["image"]` is uint8 (N, H, W, 3). All N places are always computed at one batch shape; noise is a function of (world
seed, trial seed, repeat, frame number), so what a trial shows depends neither on its neighbours nor on its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from workflow_src import embodiments
from workflow_src.common.compute import autocast
from workflow_src.common.errors import UserError
from workflow_src.common.seeds import rng
from workflow_src.world_model.artefact import WorldModel, load_artefact


class WorldModelEnv(VectorEnv):
    """N imagined places. `model`: artefact folder; `seed`: of the world's noise; `horizon`: steps until `truncated`.

    `precision` as in `sections.Training`. Attributes: `card` (of the artefact), `digest` (of its weights), `chunk`
    (frames that `step_chunk` generates at once).
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED, "render_modes": []}  # noqa: RUF012 (Gymnasium's interface)

    def __init__(
        self,
        num_envs: int,
        model: str | Path | WorldModel,
        seed: int = 0,
        horizon: int = 18,
        precision: str = "auto",
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model if isinstance(model, WorldModel) else load_artefact(model, self.device)
        self.card, self.digest = self.model.card, self.model.digest
        self.num_envs, self.seed, self.horizon, self.precision = num_envs, seed, horizon, precision
        self.chunk = self.card.sampler.horizon
        self.sampler = self.model.sampler()
        image = gymnasium.spaces.Box(0, 255, (*self.card.image, 3), np.uint8)
        self.single_observation_space = gymnasium.spaces.Dict({"image": image})
        # dx, dy, dz (m), droll, dpitch, dyaw (rad), gripper_open [0, 1]; a robot that drives: and base (3)
        self.width = embodiments.METRIC_DIM + 3 * embodiments.get(self.card.embodiment).base
        self.single_action_space = gymnasium.spaces.Box(-np.inf, np.inf, (self.width,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.steps = -1  # frames generated since reset; -1: not reset yet

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start every place from its trial's first frame, `options["trials"][i]["image"]` uint8 (H, W, 3).

        `seed`: one per trial (or one for all); `repeat` (default 0) and `embodiment` (default: the model's) may stand
        in a trial.
        """
        trials = (options or {}).get("trials")
        if trials is None or len(trials) != self.num_envs:
            found = "none" if trials is None else len(trials)
            raise UserError(f"reset: options['trials'] must hold {self.num_envs} trials, one per place, not {found}")
        seeds = [0 if seed is None else seed] * self.num_envs if seed is None or np.isscalar(seed) else list(seed)
        if len(seeds) != self.num_envs:
            raise UserError(f"reset: {len(seeds)} seeds for {self.num_envs} places; give one per trial")
        images = np.stack([self._first_frame(trial) for trial in trials])
        self.keys = [(int(one), int(trial.get("repeat", 0))) for one, trial in zip(seeds, trials, strict=True)]
        self.names = [str(trial.get("trial_id", place)) for place, trial in enumerate(trials)]
        self.embodiments = [trial.get("embodiment") or self.card.embodiment for trial in trials]
        self.openings = np.ones(self.num_envs, np.float32)
        self.steps = 0
        with torch.inference_mode():
            latents = torch.from_numpy(self.model.tokenizer.encode(images)).to(self.device)
            frames = self.model.standardise(latents)[:, None]
        opening = torch.zeros(self.num_envs, 1, self.card.network.action_dim, device=self.device)
        self.sampler.reset(frames, opening, context_noise=self._noise(0, 1)[1])
        return {"image": images}, {}

    def step(self, actions: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict]:
        """Imagine the frame that metric `actions` float32 (N, 7) lead to. Reward 0; truncated at the horizon.

        (N, 10) with base where the model's embodiment has one, which then stands still in (N, 7).
        """
        frames = self._advance(np.asarray(actions)[:, None])
        return {"image": frames[:, 0]}, *self._outcome()

    def step_chunk(self, actions: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict]:
        """Imagine the frames that `actions` float32 (N, K, 7) lead to at once: images (N, K, H, W, 3), K <= `chunk`."""
        frames = self._advance(np.asarray(actions))
        return {"image": frames}, *self._outcome()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _advance(self, actions: np.ndarray) -> np.ndarray:
        """Generate and decode the frames of `actions (N, K, 7)`, uint8 (N, K, H, W, 3)."""
        self._check(actions)
        new = actions.shape[1]
        noise, context_noise = self._noise(self.steps + 1, new)
        with torch.inference_mode(), autocast(self.device, self.precision):
            latents = self.sampler.generate(self._convert(actions), noise, context_noise=context_noise)
        images = self.model.tokenizer.decode(self.model.restore(latents).flatten(0, 1).cpu().numpy())
        self.steps += new
        return images.reshape(self.num_envs, new, *images.shape[1:])

    def _outcome(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        zeros = np.zeros(self.num_envs, bool)
        return zeros.astype(np.float64), zeros, np.full(self.num_envs, self.steps >= self.horizon), {}

    def _check(self, actions: np.ndarray) -> None:
        if self.steps < 0:
            raise UserError("step: the world was not reset; call reset(options={'trials': [...]}) first")
        widths = (embodiments.METRIC_DIM, self.width)
        if actions.ndim != 3 or actions.shape[0] != self.num_envs or actions.shape[2] not in widths:
            raise UserError(f"step: actions of shape {actions.shape}, not ({self.num_envs}, K, {self.width})")
        if not 1 <= actions.shape[1] <= self.chunk:
            raise UserError(f"step_chunk: {actions.shape[1]} frames at once; this world model makes 1 to {self.chunk}")
        bad = ~np.isfinite(actions).all((1, 2))
        if bad.any():
            place = int(bad.argmax())
            raise UserError(f"step {self.steps}: trial {self.names[place]!r} got an action that is not finite")

    def _convert(self, actions: np.ndarray) -> Tensor:
        """Metric actions in world-model units (N, K, A), each place by its embodiment."""
        converted = np.zeros((*actions.shape[:2], self.card.network.action_dim), np.float32)
        for embodiment in set(self.embodiments):
            rows = [place for place, name in enumerate(self.embodiments) if name == embodiment]
            steps = self.card.steps(embodiment)
            converted[rows] = embodiments.to_world_model(
                actions[rows], embodiment, self.card.convention, steps, self.openings[rows]
            )
        self.openings = actions[:, -1, embodiments.METRIC_DIM - 1]
        return torch.from_numpy(converted).to(self.device)

    def _noise(self, frame: int, frames: int) -> tuple[Tensor, Tensor]:
        """Gaussian noise of frames `frame`… : to generate them from, and to show them with as context."""
        shape = (2, *self.card.latent, self.card.network.in_channels)
        drawn = np.stack([
            [rng(self.seed, "imagine", *key, number).standard_normal(shape, np.float32) for key in self.keys]
            for number in range(frame, frame + frames)
        ])  # fmt: skip
        noise = torch.from_numpy(drawn).to(self.device).permute(2, 1, 0, 3, 4, 5)
        return noise[0].contiguous(), noise[1].contiguous()

    def _first_frame(self, trial: Mapping[str, Any]) -> np.ndarray:
        image = np.asarray(trial.get("image"))
        if image.dtype != np.uint8 or image.shape != (*self.card.image, 3):
            raise UserError(
                f"trial {trial.get('trial_id', '?')!r}: first frame is {image.dtype} {image.shape}, the world model "
                f"was trained on uint8 {(*self.card.image, 3)}"
            )
        return image


def imagine(model: WorldModel, first: np.ndarray, actions: np.ndarray, seed: int, trials: Sequence[int]) -> np.ndarray:
    """Roll `actions (N, T, 7)`, metric, out from frames `first` uint8 (N, H, W, 3): frames uint8 (N, T, H, W, 3).

    `seed`: of the world; `trials`: the seed of each trial, which with equal ones share their noise.
    """
    world = WorldModelEnv(len(first), model, seed=seed, horizon=actions.shape[1])
    world.reset(seed=list(trials), options={"trials": [{"image": image} for image in first]})
    frames = [world.step(actions[:, step])[0]["image"] for step in range(actions.shape[1])]
    world.close()
    return np.stack(frames, axis=1)


gymnasium.register(id="WorldModel-v0", vector_entry_point="workflow_src.world_model.environment:WorldModelEnv")
