"""A policy that sees nothing: a smooth random walk, the floor of every ranking."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from workflow_src.common import sections
from workflow_src.common.files import digest
from workflow_src.common.seeds import rng
from workflow_src.policies.adapter import Observation, check_options
from workflow_src.policies.wire import Metadata

OPTIONS = {"scale": (0.02, 0.0, 0.05), "smoothness": (0.7, 0.0, 0.99), "gripper_changes": (0.15, 0.0, 1.0)}
REVISION = 1  # raise when the walk changes


class RandomWalk:
    """Translations follow an autoregressive process of standard deviation `scale` m and correlation `smoothness` from
    step to step; the gripper changes between open and closed with probability `gripper_changes` per step."""

    def __init__(self, options: dict[str, float], control_rate: float, batch: int):
        self._options = options
        revision = digest({"adapter": "tabletop_random", "revision": REVISION, "options": options})
        self.metadata = Metadata(
            control_rate=control_rate,
            chunk=1,
            batched=True,
            batch=batch,
            revision=revision,
            extra={"blind": True, "sampling": True},
        )

    def act(self, observation: Observation) -> dict[str, np.ndarray]:
        walks = [self.action(int(seed), int(step)) for seed, step in zip(observation.seed, observation.step)]
        return {"actions": np.stack(walks)[:, None]}

    def action(self, seed: int, step: int) -> np.ndarray:
        """Action (7,) of one rollout at one step. The server keeps no state, so the walk is drawn anew up to `step`."""
        smooth = self._options["smoothness"]
        velocity, opening = np.zeros(3), 1.0
        for index, draw in enumerate(rng(seed, "random walk").standard_normal((step + 1, 3))):
            velocity = draw if index == 0 else smooth * velocity + np.sqrt(1 - smooth**2) * draw
        for change in rng(seed, "random gripper").random(step + 1):
            opening = 1.0 - opening if change < self._options["gripper_changes"] else opening
        translation = np.clip(self._options["scale"] * velocity, -0.05, 0.05)
        return np.array([*translation, 0, 0, 0, opening], dtype=np.float32)


def load(policy: sections.Policy, networks: Path, lab: sections.Lab, seed: int, batch: int) -> RandomWalk:
    """See `policies/adapter.py`. Rows bring their own seeds, so `seed` is not needed."""
    from workflow_src.embodiments import get

    return RandomWalk(check_options(policy, OPTIONS), get(lab.embodiment).control_hz, batch)
