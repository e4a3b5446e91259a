"""The scripted expert behind a learned eye: pixels → state (the cloning network's read-out) → expert action.

It shares its eye with the cloned policy of the same snapshot but not its decisions, so it fails in other ways.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from workflow_src.common import sections
from workflow_src.common.files import digest
from workflow_src.policies.adapter import Observation, check_options
from workflow_src.policies.tabletop_bc.adapter import OPTIONS, Network, perturb
from workflow_src.policies.wire import Metadata, WireError

REVISION = 1  # raise when the way from state to action changes


class Scripted:
    """The expert's actions in the states that the network reads from the images, perturbed as configured."""

    def __init__(self, network: Network, lab: sections.Lab, options: dict[str, float]):
        from workflow_src.embodiments import get
        from workflow_src.tabletop import expert, tasks

        self._network, self._options, self._scene, self._expert = network, options, lab.scene, expert.actions
        self._tasks = {tasks.TASKS[name].instruction: name for name in tasks.tasks_of(lab.scene)}
        sampling = bool(options["noise"] or options["gripper_flips"])
        revision = digest({"network": network.revision, "options": options, "revision": REVISION})
        self.metadata = Metadata(
            control_rate=get(lab.embodiment).control_hz, chunk=1, batched=True, batch=network.batch,
            image_size=network.image_size, revision=revision, extra={"sampling": sampling},
        )  # fmt: skip

    def act(self, observation: Observation) -> dict[str, np.ndarray]:
        _, states = self._network(observation.image, observation.prompt)
        chosen = [self._task(prompt) for prompt in observation.prompt]
        actions = np.zeros((len(observation), 7), np.float32)
        for task in sorted(set(chosen)):
            rows = [row for row, name in enumerate(chosen) if name == task]
            actions[rows] = self._expert(states[rows], task, self._scene)
        for action, seed, step in zip(actions, observation.seed, observation.step):
            perturb(action, self._options, int(seed), int(step))
        return {"actions": actions[:, None]}

    def _task(self, prompt: str) -> str:
        if prompt not in self._tasks:
            raise WireError(f"no script for the instruction {prompt!r}; known: {', '.join(sorted(self._tasks))}")
        return self._tasks[prompt]


def load(policy: sections.Policy, networks: Path, lab: sections.Lab, seed: int, batch: int) -> Scripted:
    """See `policies/adapter.py`. Rows bring their own seeds, so `seed` is not needed."""
    options = check_options(policy, OPTIONS)
    return Scripted(Network(policy, networks, lab, batch), lab, options)
