"""Speak with an openpi server that has never heard of this project: its observation keys and its actions, as configured.

Such a server wants the robot's pose, as do checkpoints that our own servers load; a world of images has none, so it is reckoned
from the trial's `initial_state` and the actions since. `pose` float64 (7,): x, y, z (m), roll, pitch, yaw (rad), gripper
opening [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from workflow_src.common.config import check_name
from workflow_src.common.errors import UserError
from workflow_src.common.sections import Foreign, Policy
from workflow_src.embodiments import POSE, turn_to
from workflow_src.policies import images
from workflow_src.policies.wire import Metadata, WireError

STATE = (*POSE[:6], "opening", "closedness", "zero")  # what a state vector may be made of
ACTION = (*POSE[:6], "gripper", "_")  # "_": a number that is not looked at
NOWHERE = np.zeros(len(POSE))
DEAD_RECKONED = "dead_reckoned"  # in results: what stood for the robot's state


def needs_pose(foreign: Foreign) -> bool:
    """Whether the robot's pose has to be reckoned: something of it is sent, or absolute poses are measured from it."""
    return bool(foreign.state and set(foreign.state_layout) - {"zero"}) or foreign.actions == "absolute"


def check(path: str, foreign: Foreign) -> None:
    """Raise UserError for a mapping that contradicts itself; `path` is where it stands in the configuration."""
    if foreign.state and not foreign.state_layout:
        raise UserError(
            f"{path}.state_layout: is empty; say what the numbers of {foreign.state} are: {', '.join(STATE)}"
        )
    if not foreign.state and foreign.state_layout != Foreign().state_layout:
        raise UserError(f"{path}.state: is empty, so state_layout says nothing; name the key that wants these numbers")
    for key, allowed in (("state_layout", STATE), ("layout", ACTION)):
        for i, name in enumerate(getattr(foreign, key)):
            if not (foreign.actions == "joint" and key == "layout"):
                check_name(f"{path}.{key}[{i}]", name, allowed)
    named = [name for name in foreign.layout if name != "_"]
    if len(named) != len(set(named)):
        raise UserError(f"{path}.layout: {', '.join(foreign.layout)} names a number twice")
    if foreign.gripper_open == foreign.gripper_closed:
        raise UserError(f"{path}.gripper_open: {foreign.gripper_open:g} is gripper_closed as well; one must differ")
    for key in ("translation_unit", "rotation_unit"):
        if not getattr(foreign, key) > 0:
            raise UserError(f"{path}.{key}: {getattr(foreign, key):g} is not positive; what is one unit, in m or rad?")


def state_vector(layout: Sequence[str], poses: np.ndarray) -> np.ndarray:
    """State vectors float32 (..., S) of `poses` (..., 7); `layout` names their S numbers (names of STATE).

    Where nothing of the pose is in it (`needs_pose`), NOWHERE may stand for it.
    """
    named = dict(zip(POSE, np.moveaxis(np.asarray(poses, float), -1, 0)))
    named |= {"closedness": 1 - named["opening"], "zero": np.zeros_like(named["opening"])}
    return np.stack([named[name] for name in layout], -1).astype(np.float32)


def refusals(
    foreign: Foreign, trials: Sequence[tuple[str, Sequence[float] | None]], told: bool | None = False
) -> list[str]:
    """Why this policy cannot be rolled out at all, a line each. `trials`: name and `initial_state`; `told`: its server says
    that it needs the pose."""
    found = []
    if foreign.actions == "joint":
        found.append("it answers joint angles; a world model is moved by the gripper's displacement")
    if len(foreign.cameras) > 1:
        found.append(
            f"it looks through {len(foreign.cameras)} cameras ({', '.join(foreign.cameras)}); a rollout shows one"
        )
    without = [name for name, state in trials if state is None or len(state) != len(POSE)]
    if (told or needs_pose(foreign)) and without:
        found.append(
            f"it needs the robot's state, and {len(without)} of {len(trials)} trials have no initial_state of {len(POSE)} "
            f"numbers ({', '.join(POSE)}), the first is {without[0]}"
        )
    return found


def translator_of(policy: Policy) -> Translator | None:
    """What stands between the loop and this policy's server; None where it speaks as ours do."""
    return Translator(policy.foreign, policy.revision) if policy.foreign.cameras else None


class Translator:
    """Between the loop, which speaks metric actions, and the server."""

    def __init__(self, foreign: Foreign, revision: str):
        self._foreign, self._revision = foreign, revision

    def metadata(self, server: Metadata) -> Metadata:
        """What the loop and the doctor may rely on; what the server said about itself is kept in `extra`."""
        foreign = self._foreign
        said = {
            "server": server.to_wire(),
            "sampling": foreign.sampling,
            "needs_pose": needs_pose(foreign),
            "seeded": False,
        }
        return Metadata(
            name=server.name, control_rate=foreign.control_rate, execution=foreign.execution, revision=self._revision,
            extra=said,
        )  # fmt: skip

    def observation(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """One row of the loop's observation as the server names things."""
        foreign, image = self._foreign, row["image"]
        seen = images.pad(image, foreign.image_size) if foreign.image_size else image
        message = {foreign.cameras[0]: seen, foreign.prompt: row["prompt"]}
        if foreign.state:
            pose = row["pose"] if needs_pose(foreign) else NOWHERE
            message[foreign.state] = state_vector(foreign.state_layout, pose)
        return message

    def actions(self, answer: Mapping[str, Any], pose: np.ndarray | None) -> np.ndarray:
        """Metric actions float32 (K, 7) from the server's answer to that row. Raises WireError for another shape."""
        foreign, found = self._foreign, answer.get("actions")
        wanted = len(foreign.layout)
        if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu" or found.ndim not in (1, 2):
            raise WireError("malformed answer: `actions` is not an array (K, A) of numbers")
        found = np.atleast_2d(found).astype(np.float64)
        if found.shape[1] != wanted:
            raise WireError(f"wrong shape: {found.shape[1]} numbers per action, `layout` names {wanted}")
        named = {name: found[:, i] for i, name in enumerate(foreign.layout)}
        result = np.zeros((len(found), 7))
        for i, name in enumerate(POSE[:6]):
            if name in named:
                result[:, i] = named[name] * (foreign.translation_unit if i < 3 else foreign.rotation_unit)
        if foreign.actions == "absolute":
            given = [name in named for name in POSE[:6]]
            result[:, :6] = np.where(given, turn_to(np.concatenate([[pose[:6]], result[:-1, :6]]), result[:, :6]), 0)
        closed = foreign.gripper_closed
        opening = (named["gripper"] - closed) / (foreign.gripper_open - closed) if "gripper" in named else 1.0
        result[:, 6] = np.clip(opening, 0, 1)
        return result.astype(np.float32)
