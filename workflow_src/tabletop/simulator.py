"""One tabletop in MuJoCo: reset to a state vector, step by metric actions."""

from __future__ import annotations

from functools import lru_cache

import mujoco
import numpy as np

from workflow_src.tabletop.scene import (
    BLOCKS,
    MAX_OPENING,
    MAX_STEP,
    TARGETS,
    WORKSPACE_HIGH,
    WORKSPACE_LOW,
    model_xml,
    state_layout,
    state_size,
)

SUBSTEPS = 40  # of 5 ms: one action lasts 0.2 s
# The commanded pose may lead the real one by this much. An unlimited lead would be hidden state: a hand pressed onto
# a block would have to be commanded up for several steps before it visibly moves.
MAX_LEAD = 0.01


@lru_cache
def load_model(scene: str) -> mujoco.MjModel:
    """The compiled model; shared, never written to."""
    return mujoco.MjModel.from_xml_string(model_xml(scene))


class Simulator:
    """Physics of one scene. Two simulators given the same state and actions pass through bitwise the same states."""

    def __init__(self, scene: str):
        self.scene = scene
        self.model = load_model(scene)
        self.data = mujoco.MjData(self.model)
        self.layout = state_layout(scene)
        self._target = np.zeros(3)
        self._blocks = {name: self.model.joint(name).qposadr[0] for name in BLOCKS[scene]}
        self._mocap = {name: self.model.body(name).mocapid[0] for name in TARGETS[scene]}

    def reset(self, state: np.ndarray) -> None:
        """Put everything where `state (S,)` says, at rest."""
        state = np.asarray(state, np.float64)
        data = self.data
        mujoco.mj_resetData(self.model, data)
        self._target = state[self.layout["gripper"]].copy()
        data.qpos[:3] = self._target
        data.qpos[3:5] = state[self.layout["opening"]] * MAX_OPENING
        for name, address in self._blocks.items():
            data.qpos[address : address + 3] = state[self.layout[name]]
            data.qpos[address + 3 : address + 7] = state[self.layout[f"{name}_quaternion"]]
        for name, index in self._mocap.items():
            data.mocap_pos[index] = state[self.layout[name]]
        mujoco.mj_kinematics(self.model, data)

    def step(self, action: np.ndarray) -> None:
        """Carry out one metric action `(7,)`. Rotations are ignored: the hand has three degrees of freedom."""
        data = self.data
        action = np.asarray(action, np.float64)
        hand = data.qpos[:3]
        lead = np.clip(self._target - hand, -MAX_LEAD, MAX_LEAD)
        self._target = np.clip(hand + lead + np.clip(action[:3], -MAX_STEP, MAX_STEP), WORKSPACE_LOW, WORKSPACE_HIGH)
        data.ctrl[:3] = self._target
        data.ctrl[3:5] = np.clip(action[6], 0.0, 1.0) * MAX_OPENING
        mujoco.mj_step(self.model, data, nstep=SUBSTEPS)
        # A step ends with the positions of its beginning; the renderer wants those of its end.
        mujoco.mj_kinematics(self.model, data)

    def state(self) -> np.ndarray:
        """The current state vector, float32 `(S,)`."""
        data, layout = self.data, self.layout
        state = np.empty(state_size(self.scene), np.float32)
        state[layout["gripper"]] = data.qpos[:3]
        state[layout["opening"]] = np.clip((data.qpos[3] + data.qpos[4]) / (2 * MAX_OPENING), 0.0, 1.0)
        for name, address in self._blocks.items():
            state[layout[name]] = data.qpos[address : address + 3]
            state[layout[f"{name}_quaternion"]] = data.qpos[address + 3 : address + 7]
        for name, index in self._mocap.items():
            state[layout[name]] = data.mocap_pos[index]
        return state
