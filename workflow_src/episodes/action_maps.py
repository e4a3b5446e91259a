"""From a data set's recorded actions to metric actions: what is recorded where (data) and what it means (functions).

The result has T rows as the recording has steps: `[dx, dy, dz, droll, dpitch, dyaw, gripper_open in [0, 1]]`, and three
more for the base where there is one. The gripper entry is always absolute: 1 is open, 0 is closed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from workflow_src.common.errors import UserError

LAG = 5  # steps in which a gripper follows its command
ENOUGH = 20  # steps with a width, or episodes, below which nothing is decided
DECIDED = 0.2  # correlation, or distance of a share from one half, that decides about a sign


@dataclass(frozen=True)
class ActionMap:
    """Where a data set records its actions and what they mean.

    `translation`, `rotation`, `gripper`, `base`: paths of a step's features, `action[0:3]` for a part of one; empty: not
    recorded, zeros. Displacements are multiplied by `translation_scale` and `rotation_scale` to become metres and radians.
    """

    translation: str = ""
    rotation: str = ""
    gripper: str = ""
    base: tuple[str, ...] = ()
    translation_scale: float = 1.0
    rotation_scale: float = 1.0
    gripper_means: Literal["open", "closed", "signed_open", "signed_closed", "relative_closed", "none"] = "none"
    gripper_check: Literal["", "width", "start"] = ""  # how the gripper's sign is verified on the data, where in doubt
    gripper_width: str = ""  # what grows when the gripper opens, for the check `width`
    reason: str = ""  # why it is read like this

    def features(self) -> list[str]:
        """Paths of the features that are needed."""
        paths = [self.translation, self.rotation, self.gripper, *self.base, self.gripper_width]
        return sorted({_split(path)[0] for path in paths if path})


def opened(values: np.ndarray) -> np.ndarray:
    """1 open, 0 closed."""
    return np.clip(values, 0, 1)


def closed(values: np.ndarray) -> np.ndarray:
    """1 closed, 0 (or less) open."""
    return 1 - np.clip(values, 0, 1)


def signed_open(values: np.ndarray) -> np.ndarray:
    """+1 open, -1 closed."""
    return (np.clip(values, -1, 1) + 1) / 2


def signed_closed(values: np.ndarray) -> np.ndarray:
    """+1 closed, -1 open."""
    return (1 - np.clip(values, -1, 1)) / 2


def relative_closed(values: np.ndarray) -> np.ndarray:
    """+1 closes, -1 opens, 0 leaves it as it is. Before the first command: as it must have been for that to do something."""
    commands = np.flatnonzero(np.abs(values) > 0.1)
    if not len(commands):
        return np.ones(len(values))
    last = np.searchsorted(commands, np.arange(len(values)), side="right") - 1
    state = values[commands[np.maximum(last, 0)]] < 0
    return np.where(last < 0, ~state, state).astype(np.float64)


GRIPPERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "open": opened,
    "closed": closed,
    "signed_open": signed_open,
    "signed_closed": signed_closed,
    "relative_closed": relative_closed,
}


def metric(arrays: dict[str, Any], spec: ActionMap, flip: bool = False) -> np.ndarray:
    """Recorded `arrays` (T, ...) by path as metric actions, float32 (T, 7), or (T, 10) with base.

    `flip`: the data showed that the gripper's sign is the other one. Raises ValueError naming what is not finite.
    """
    count = len(read(arrays, spec.translation))
    parts = [_vector(arrays, path, count) * factor for path, factor in
             ((spec.translation, spec.translation_scale), (spec.rotation, spec.rotation_scale))]  # fmt: skip
    gripper = opening(arrays, spec, count)
    parts.append((1 - gripper if flip else gripper)[:, None])
    parts += [read(arrays, path).reshape(count, -1) for path in spec.base]
    return np.concatenate(parts, 1).astype(np.float32)


def opening(arrays: dict[str, Any], spec: ActionMap, count: int) -> np.ndarray:
    """How far the gripper is commanded to be open, float64 (T,); 0 where nothing is recorded."""
    if spec.gripper_means == "none":
        return np.zeros(count)
    return GRIPPERS[spec.gripper_means](read(arrays, spec.gripper).reshape(count, -1)[:, 0])


def read(arrays: dict[str, Any], path: str) -> np.ndarray:
    """What stands at `path`, float64 (T, ...). Raises ValueError where it is missing or not finite."""
    name, part = _split(path)
    if name not in arrays:
        raise ValueError(f"has no {name}")
    values = np.asarray(arrays[name], np.float64)
    if not np.isfinite(values).all():
        step = int(np.argmax(~np.isfinite(values.reshape(len(values), -1)).all(1)))
        raise ValueError(f"{name}[{step}] is not finite")
    return values[:, part] if part else values


def displacements(poses: np.ndarray, kind: str) -> np.ndarray:
    """What a robot did from step to step: poses (T, 6), position and `kind` of rotation -> (T-1, 6), metres and radians.

    `euler`: differences of roll, pitch and yaw, each within ±π, as Bridge's own actions are defined. `axis_angle`: the
    turn in the base's frame, as roll, pitch and yaw.
    """
    moved = np.diff(poses[:, :3], axis=0)
    if kind == "euler":
        turned = (np.diff(poses[:, 3:], axis=0) + np.pi) % (2 * np.pi) - np.pi
    else:
        from scipy.spatial.transform import Rotation

        rotations = Rotation.from_rotvec(poses[:, 3:])
        turned = (rotations[1:] * rotations[:-1].inv()).as_euler("xyz")
    return np.concatenate([moved, turned], 1)


def check_sign(spec: ActionMap, episodes: Sequence[dict[str, Any]]) -> tuple[bool, str]:
    """Whether the gripper's sign must be flipped, and why, judged by the arrays of some episodes.

    `width`: the gripper's width follows the command. `start`: episodes start with an open gripper. What the data does not
    decide stays as it is documented.
    """
    if not spec.gripper_check:
        return False, "as documented"
    commands = [opening(arrays, spec, len(read(arrays, spec.translation))) for arrays in episodes]
    if spec.gripper_check == "width":
        pairs = [(command[:-LAG], read(arrays, spec.gripper_width).reshape(len(command), -1)[LAG:, 0])
                 for command, arrays in zip(commands, episodes) if len(command) > LAG]  # fmt: skip
        command, width = (np.concatenate(values) for values in zip(*pairs)) if pairs else (np.zeros(1), np.zeros(1))
        count, varies = len(command), command.std() > 0 and width.std() > 0
        found = float(np.corrcoef(command, width)[0, 1]) if varies else 0.0
        what = f"correlation {found:+.2f} of opening command and gripper width {LAG} steps later"
    else:
        count = len(commands)
        found = float(np.mean([command[0] > 0.5 for command in commands])) - 0.5 if commands else 0.0
        what = f"{found + 0.5:.0%} of the episodes start with an open gripper"
    if count < ENOUGH or abs(found) < DECIDED:
        return False, f"undecided, as documented: {what}, {len(commands)} episodes"
    return found < 0, f"{'flipped' if found < 0 else 'as documented'}: {what}, {len(commands)} episodes"


def _vector(arrays: dict[str, Any], path: str, count: int) -> np.ndarray:
    if not path:
        return np.zeros((count, 3))
    values = read(arrays, path)
    if values.shape != (count, 3):
        raise ValueError(f"{path} has shape {values.shape} where ({count}, 3) is expected")
    return values


def _split(path: str) -> tuple[str, slice | None]:
    found = re.fullmatch(r"([^\[\]]+)(?:\[(\d+):(\d+)\])?", path)
    if not found:
        raise UserError(f"action: {path!r} is not a feature's path; write observation/state or action[0:3]")
    return found[1], slice(int(found[2]), int(found[3])) if found[2] else None
