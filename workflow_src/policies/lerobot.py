"""Any LeRobot checkpoint with one camera and end-effector displacements: ACT, Diffusion Policy, SmolVLA, pi0, ….

Its own pre- and post-processors normalise; what is done of a chunk is what its configuration says. Options state what the
data set's numbers mean: metres and radians per unit, and the gripper's command when it is open and when it is closed. Of a
checkpoint that wants the robot's state, `foreign` says what its numbers are: {state: observation.state, state_layout: [x, …]}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from workflow_src.common import sections
from workflow_src.common.errors import UserError
from workflow_src.common.seeds import derive
from workflow_src.embodiments import POSE
from workflow_src.policies import foreign, images, pretrained
from workflow_src.policies.adapter import Observation, in_batches
from workflow_src.policies.wire import Metadata, WireError

OPTIONS = {
    "translation_unit": (1.0, 1e-6, 1e3), "rotation_unit": (1.0, 1e-6, 1e3),
    "gripper_open": (1.0, -1e3, 1e3), "gripper_closed": (0.0, -1e3, 1e3),
}  # fmt: skip
STATE, IMAGES, CAMERA = "observation.state", "observation.images", "VISUAL"
DETERMINISTIC = ("act",)  # all others draw noise
DEAF = ("act", "diffusion")  # trained on one task, they take no instruction


class LeRobot:
    """A loaded checkpoint."""

    def __init__(self, policy: sections.Policy, lab: sections.Lab, batch: int):
        pretrained.refuse_other_dtypes(policy)
        self._torch = pretrained.import_torch()
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class, make_pre_post_processors

        where = pretrained.folder(policy, "")
        config = PreTrainedConfig.from_pretrained(where)
        self._layout = _state_layout(config, policy)
        self._needs_pose = bool(self._layout) and foreign.needs_pose(policy.foreign)
        config.device = str(pretrained.torch_device(policy))
        self._policy = get_policy_class(config.type).from_pretrained(where, config=config)
        overrides = {"device_processor": {"device": config.device}}
        self._before, self._after = make_pre_post_processors(config, where, preprocessor_overrides=overrides)
        self._config, self._options = config, pretrained.options(policy, OPTIONS)
        self._camera, self._size = _camera(config, policy)
        self._sampling = config.type not in DETERMINISTIC
        if config.n_obs_steps > 1 and config.type != "diffusion":
            raise UserError(
                f"adapter {policy.adapter}: {config.type} with {config.n_obs_steps} observations is not supported"
            )
        self._memory, self._batch = pretrained.Memory(config.n_obs_steps - 1), 1 if self._sampling else batch
        chunk, ensemble = _execution(config)
        self.metadata = Metadata(
            control_rate=pretrained.embodiments.get(lab.embodiment).control_hz, chunk=chunk, batched=True,
            batch=self._batch, history=config.n_obs_steps, ensemble=ensemble or 0.0,
            execution=policy.execution or ("all" if ensemble is None else "ensemble"),
            revision=pretrained.revision(policy, where),
            extra={"sampling": self._sampling, "deaf": config.type in DEAF, "state": list(self._layout),
                   "needs_pose": self._needs_pose},
        )  # fmt: skip

    def act(self, observation: Observation) -> dict[str, np.ndarray]:
        windows = self._windows(observation)

        def run(rows: np.ndarray) -> tuple[np.ndarray]:
            if self._sampling:  # one row at a time, so that its noise is its own
                row = rows[0]
                self._torch.manual_seed(derive(int(observation.seed[row]), "lerobot", int(observation.step[row])))
            prompts = [observation.prompt[row] for row in rows]
            seen = [
                self._prepared([windows[row][moment] for row in rows], prompts) for moment in range(len(windows[0]))
            ]
            with self._torch.inference_mode():
                answer = self._after(self._chunk(seen))
            return (answer.float().cpu().numpy()[:, : self.metadata.chunk],)

        (answers,) = in_batches(len(observation), self._batch, run)
        return {"actions": self._metric(answers)}

    def _windows(self, observation: Observation) -> list[list[dict[str, np.ndarray]]]:
        """For each row its last `n_obs_steps` images and states, oldest first; before the first stand copies of it."""
        windows, states = [], self._states(observation)
        for row, (episode, step) in enumerate(zip(observation.episode.tolist(), observation.step.tolist())):
            now = {self._camera: self._fitted(observation.image[row]), STATE: states[row]}
            window = [*self._memory.before(episode, step), now]
            self._memory.add(episode, step, now)
            windows.append([window[0]] * (self._config.n_obs_steps - len(window)) + window)
        return windows

    def _states(self, observation: Observation) -> np.ndarray:
        """The robot's states as the checkpoint has them, float32 (N, S)."""
        if not self._layout:
            return np.empty((len(observation), 0), np.float32)  # not looked at, but asked for its device
        if not self._needs_pose:
            return foreign.state_vector(self._layout, np.tile(foreign.NOWHERE, (len(observation), 1)))
        poses = np.atleast_2d(observation.extra.get("pose", ()))
        if poses.shape != (len(observation), len(POSE)):
            raise WireError(f"this policy needs the robot's `pose` (N, {len(POSE)}): {', '.join(POSE)}")
        return foreign.state_vector(self._layout, poses)

    def _fitted(self, image: np.ndarray) -> np.ndarray:
        """float32 (3, H, W), 0 to 1, at the policy's size; only squares are resized, since others would be distorted."""
        if image.shape[:2] != self._size:
            if image.shape[0] != image.shape[1] or self._size[0] != self._size[1]:
                raise WireError(
                    f"image of {image.shape[1]}x{image.shape[0]}; this policy sees {self._size[1]}x{self._size[0]}"
                )
            image = images.lanczos(image, self._size[0])
        return image.transpose(2, 0, 1).astype(np.float32) / 255.0

    def _prepared(self, moment: list[dict[str, np.ndarray]], prompts: list[str]) -> dict[str, Any]:
        """What rows saw at one moment, as the network takes it."""
        stacked = {key: self._torch.from_numpy(np.stack([row[key] for row in moment])) for key in moment[0]}
        return self._before({**stacked, "task": prompts})

    def _chunk(self, seen: list[dict[str, Any]]) -> Any:
        """Normalised actions (N, K, A)."""
        if self._config.type != "diffusion":
            return self._policy.predict_action_chunk(seen[-1])
        # Its own chunk method reads queues that belong to a single rollout.
        stack = self._torch.stack
        images_seen = stack([moment[self._camera] for moment in seen], 1)[:, :, None]
        given = {IMAGES: images_seen, STATE: stack([moment[STATE] for moment in seen], 1)}
        return self._policy.diffusion.generate_actions(given)

    def _metric(self, answers: np.ndarray) -> np.ndarray:
        """Actions (N, K, A) in the data set's units to metric ones (N, K, 7)."""
        if answers.shape[-1] != 7:
            raise WireError(
                f"this policy answers {answers.shape[-1]} numbers, not dx, dy, dz, droll, dpitch, dyaw, gripper"
            )
        unit, closed = self._options, self._options["gripper_closed"]
        actions = answers.astype(np.float32)
        actions[..., :3] *= unit["translation_unit"] * unit["commanded_gain"]
        actions[..., 3:6] *= unit["rotation_unit"] * unit["commanded_gain"]
        actions[..., 6] = np.clip((actions[..., 6] - closed) / (unit["gripper_open"] - closed), 0, 1)
        return actions


def _camera(config: Any, policy: sections.Policy) -> tuple[str, tuple[int, int]]:
    """Name and size (H, W) of the one camera. Raises UserError for none or several."""
    cameras = {name: feature.shape for name, feature in config.input_features.items() if feature.type == CAMERA}
    if len(cameras) != 1:
        raise UserError(
            f"adapter {policy.adapter}: the checkpoint looks through {len(cameras)} cameras "
            f"({', '.join(sorted(cameras)) or 'none'}); a rollout shows one"
        )
    ((name, shape),) = cameras.items()
    return name, (shape[1], shape[2])


def _state_layout(config: Any, policy: sections.Policy) -> tuple[str, ...]:
    """What the numbers of the state that the checkpoint wants are; empty: it wants none. Raises UserError where that is not
    configured, or not for as many numbers."""
    if STATE not in config.input_features:
        return ()
    (wanted,), layout = config.input_features[STATE].shape, policy.foreign.state_layout
    if policy.foreign.state != STATE:
        raise UserError(
            f"adapter {policy.adapter}: the checkpoint wants the robot's state, {wanted} numbers; say what they are: "
            f"foreign: {{state: {STATE}, state_layout: [{wanted} of {', '.join(foreign.STATE)}]}}"
        )
    if len(layout) != wanted:
        raise UserError(
            f"adapter {policy.adapter}: foreign.state_layout names {len(layout)} numbers ({', '.join(layout)}), and the "
            f"checkpoint wants {wanted}"
        )
    return layout


def _execution(config: Any) -> tuple[int, float | None]:
    """Actions per answer, and the weight of an ensemble (None: there is no ensemble) as the checkpoint was published."""
    ensemble = getattr(config, "temporal_ensemble_coeff", None)
    return (config.chunk_size if ensemble is not None else config.n_action_steps), ensemble


def load(policy: sections.Policy, networks: Path, lab: sections.Lab, seed: int, batch: int) -> LeRobot:
    """See `policies/adapter.py`. Rows bring their own seeds, so `seed` is not needed."""
    return LeRobot(policy, lab, batch)
