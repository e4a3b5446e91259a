"""Units and scales: metric robot actions ↔ world-model actions. The only place in the project where scaling lives.

A *metric action* is what policies speak: `[dx, dy, dz (m), droll, dpitch, dyaw (rad), gripper_open in [0, 1]]`,
optionally followed by `base (3)`. A *world-model action* is what the network is conditioned on: `world_vector (3) |
rotation_delta (3) | gripper_closedness (1) | base (3)`.

How one becomes the other is a property of the pair (embodiment, convention), and the convention is recorded in the
artefact. Policies always say how far the gripper is to be open. Robots whose recorded command is *relative* (1 closes, -1
opens, 0 changes nothing) get the difference: then the axis before the last is time, and the opening before the first of
the actions has to be known (`before`; a rollout begins with an open gripper).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from workflow_src.common.errors import UserError

METRIC_DIM = 7
POSE = ("x", "y", "z", "roll", "pitch", "yaw", "opening")  # of a gripper: m, rad, 0 (closed) to 1
WORLD_MODEL_DIM = 10


@dataclass(frozen=True)
class Embodiment:
    """A robot as its actions describe it. Lengths in metres, angles in radians, rates in hertz."""

    name: str
    control_hz: float
    max_translation: float  # largest commanded step per axis
    max_rotation: float
    binary_gripper: bool  # the recorded command is 0 or 1, never in between
    gripper: Literal["absolute", "relative"]  # the recorded command is a position, or a change of it
    lateral_axis: int | None  # 0 or 1: the axis (x or y) sideways in the image, for mirroring; None: unknown
    base: bool  # whether the base channels mean anything
    source: str
    translation_unit: float = 1.0  # metres that a recorded 1 stands for
    rotation_unit: float = 1.0  # radians


@dataclass(frozen=True)
class Scale:
    """World-model units per metric unit, and the range they are clipped to."""

    translation: float
    rotation: float
    translation_clip: float
    rotation_clip: float
    source: str


EMBODIMENTS = {
    "widowx": Embodiment(
        name="widowx", control_hz=5.0, max_translation=0.05, max_rotation=0.25, binary_gripper=True, gripper="absolute",
        lateral_axis=1, base=False, source="BridgeData V2 as pre-processed for RT-1-X: base frame, x forward, y left",
    ),
    "google_robot": Embodiment(
        name="google_robot", control_hz=3.0, max_translation=0.25, max_rotation=0.6, binary_gripper=True,
        gripper="relative", lateral_axis=1, base=True,
        source="RT-1 (fractal20220817_data): metres and radians as recorded, x forward, y left; the 1st to 99th percentile "
        "of a step is within 0.25 m and 0.6 rad; base (2 m, 1 rad) is live",
    ),
    "libero": Embodiment(
        name="libero", control_hz=20.0, max_translation=0.05, max_rotation=0.5, binary_gripper=True, gripper="absolute",
        lateral_axis=1, base=False,
        source="LIBERO on robosuite's OSC_POSE controller, whose full deflection is 0.05 m and 0.5 rad a step",
        translation_unit=0.05, rotation_unit=0.5,
    ),
    "droid": Embodiment(
        name="droid", control_hz=15.0, max_translation=0.05, max_rotation=0.25, binary_gripper=False, gripper="absolute",
        lateral_axis=1, base=False, source="Franka of DROID: end-effector displacement per step at 15 Hz in the base frame",
    ),
    "tabletop": Embodiment(
        name="tabletop", control_hz=5.0, max_translation=0.05, max_rotation=0.25, binary_gripper=False,
        gripper="absolute", lateral_axis=0, base=False,
        source="workflow_src/tabletop: x to the right of the image, y away from the camera",
    ),
}  # fmt: skip

# The other robots of Open X-Embodiment: control rate in Hz, largest step (translation, rotation), the world model's range that
# it is mapped to (2.0 and 1.57: RT-1-X's tokens, for what its example takes as it is), whether the gripper command is binary,
# and where that is from. What is not said to be in metres is in the units of the robot's own controller, as it was recorded.
_OTHERS = (
    ("franka_taco", 15.0, 0.02, 0.05, 1.75, 1.4, True, "TACO Play: metres, radians; clipped at 1/50 and 1/20"),
    ("jaco", 10.0, 0.2, 1.0, 1.75, 1.4, True, "Jaco Play: no rotation; OXE's example divides by deviations of 0.11"),
    ("franka_cable", 10.0, 2.0, 1.57, 2.0, 1.57, False, "Cable Routing: velocities, as they are in OXE's example"),
    ("sawyer_roboturk", 10.0, 2.0, 1.57, 2.0, 1.57, False, "RoboTurk: as they are in OXE's example"),
    ("stretch_door", 3.0, 0.07, 0.07, 1.75, 1.4, True, "NYU door opening: both range to 0.07, OXE's example"),
    ("franka_viola", 20.0, 1.0, 0.4, 1.75, 1.4, True, "VIOLA: range to 1.0 and 0.4, OXE's example"),
    ("ur5_autolab", 5.0, 0.02, 0.07, 1.75, 1.4, True, "Autolab UR5: range to 0.02 and 0.07, OXE's example"),
    ("franka_toto", 30.0, 0.7, 1.57, 1.75, 1.57, True, "TOTO: range to 0.7, rotations as they are, OXE's example"),
)  # fmt: skip
EMBODIMENTS |= {
    name: Embodiment(name, hz, translation, rotation, binary, "absolute", None, False, source)
    for name, hz, translation, rotation, _, _, binary, source in _OTHERS
}

_BRIDGE_WORLDGYM = Scale(
    35.0, 5.6, 1.74, 1.39,
    "RT-1-X's Bridge pre-processing (Open X-Embodiment, Minimal_Training_Example): ±0.05 m → ±1.75, ±0.25 rad → ±1.4, "
    "safety margin 0.01",
)  # fmt: skip
# The margin serves RT-1's token bins only. Without it a full 5 cm step survives the round trip exactly.
_BRIDGE_REHEARSAL = Scale(35.0, 5.6, 1.75, 1.40, "as worldgym, without RT-1's safety margin")

_RT1 = Scale(
    1.0,
    1.0,
    2.0,
    np.pi / 2,
    "WorldGym's converter leaves RT-1 data as recorded; the range is that of RT-1-X's action tokens",
)
_LIBERO_WORLDGYM = Scale(
    20.0, 2.0, 1.0, 1.0, "LIBERO's own commands, fractions of the controller's full deflection of 0.05 m and 0.5 rad"
)

SCALES = {
    ("widowx", "worldgym"): _BRIDGE_WORLDGYM,
    ("widowx", "rehearsal"): _BRIDGE_REHEARSAL,
    ("google_robot", "worldgym"): _RT1,
    ("google_robot", "rehearsal"): _RT1,
    ("libero", "worldgym"): _LIBERO_WORLDGYM,
    ("libero", "rehearsal"): Scale(
        35.0, 5.6, 1.75, 2.8, "metres and radians as on the WidowX; 0.5 rad is the largest turn"
    ),
    ("droid", "rehearsal"): _BRIDGE_REHEARSAL,
    ("tabletop", "worldgym"): _BRIDGE_WORLDGYM,
    ("tabletop", "rehearsal"): _BRIDGE_REHEARSAL,
}
SCALES |= {
    (name, "rehearsal"): Scale(far / translation, wide / rotation, far, wide, source)
    for name, _, translation, rotation, far, wide, _, source in _OTHERS
}


def get(embodiment: str) -> Embodiment:
    """The embodiment of that name. Raises `UserError` with did-you-mean."""
    if embodiment not in EMBODIMENTS:
        raise UserError(f"embodiment: {embodiment!r} is unknown; {_suggest(embodiment, EMBODIMENTS)}")
    return EMBODIMENTS[embodiment]


def scale(embodiment: str, convention: str) -> Scale:
    """The scaling of a pair. Raises `UserError` for a pair that is not in the table."""
    get(embodiment)
    if (embodiment, convention) not in SCALES:
        conventions = [c for e, c in SCALES if e == embodiment]
        raise UserError(f"convention: {convention!r} is unknown for {embodiment}; {_suggest(convention, conventions)}")
    return SCALES[embodiment, convention]


def to_world_model(
    actions: np.ndarray, embodiment: str, convention: str, steps: int = 1, before: np.ndarray | float = 1.0
) -> np.ndarray:
    """Metric actions `(..., 7)`, or `(..., 10)` with base, to float32 world-model actions `(..., 10)`.

    An action that spans `steps` control steps may be that many times as large before it is clipped. `before`: opening of a
    relative gripper before the first of `(..., T, 7)`, one for all or `(...,)`.

    Raises `UserError` for a wrong width, numbers that are not finite, and a base motion that the embodiment does not
    have (dropping it silently would imagine another episode than the policy asked for).
    """
    robot, units = get(embodiment), scale(embodiment, convention)
    actions = _checked(actions, embodiment, (METRIC_DIM, METRIC_DIM + 3), "metric action")
    result = np.zeros((*actions.shape[:-1], WORLD_MODEL_DIM), np.float32)
    far, wide = steps * units.translation_clip, steps * units.rotation_clip
    result[..., :3] = np.clip(actions[..., :3] * units.translation, -far, far)
    result[..., 3:6] = np.clip(actions[..., 3:6] * units.rotation, -wide, wide)
    opening = np.clip(actions[..., 6], 0.0, 1.0)
    if robot.gripper == "relative":
        result[..., 6] = _changes(opening > 0.5, np.asarray(before) > 0.5)
    else:
        result[..., 6] = 1.0 - 2.0 * ((opening > 0.5) if robot.binary_gripper else opening)
    if actions.shape[-1] > METRIC_DIM:
        result[..., 7:] = _base(actions[..., METRIC_DIM:], robot)
    return result


def from_world_model(
    actions: np.ndarray, embodiment: str, convention: str, before: np.ndarray | float = 1.0
) -> np.ndarray:
    """World-model actions `(..., 10)` to float32 metric actions: the inverse within the clipped range.

    `(..., 7)`, or `(..., 10)` for an embodiment with base. `before` as in `to_world_model`.
    """
    robot, units = get(embodiment), scale(embodiment, convention)
    actions = _checked(actions, embodiment, (WORLD_MODEL_DIM,), "world-model action")
    base = _base(actions[..., METRIC_DIM:], robot)
    result = np.zeros((*actions.shape[:-1], METRIC_DIM + 3 * robot.base), np.float32)
    result[..., :3] = actions[..., :3] / units.translation
    result[..., 3:6] = actions[..., 3:6] / units.rotation
    if robot.gripper == "relative":
        result[..., 6] = follow_gripper(actions[..., 6], before)
    else:
        opening = np.clip((1.0 - actions[..., 6]) / 2.0, 0.0, 1.0)
        result[..., 6] = (opening > 0.5) if robot.binary_gripper else opening
    if robot.base:
        result[..., METRIC_DIM:] = base
    return result


def from_recorded(actions: np.ndarray, embodiment: str) -> np.ndarray:
    """Actions `(..., 7)` in the units of the embodiment's data sets, as policies trained on them say them, to metric ones.

    float32; the gripper already is an opening.
    """
    robot = get(embodiment)
    units = np.float32([robot.translation_unit] * 3 + [robot.rotation_unit] * 3 + [1.0])
    return np.asarray(actions, np.float32) * units


def follow_gripper(closing: np.ndarray, before: np.ndarray | float = 1.0) -> np.ndarray:
    """Opening (0 or 1, same shape) after each of the relative commands `(..., T)`: beyond 0.5 closes, below -0.5 opens."""
    opening = np.empty(np.shape(closing), np.float32)
    now = np.broadcast_to(np.asarray(before) > 0.5, opening.shape[:-1])
    for step in range(opening.shape[-1] if opening.ndim else 0):
        command = closing[..., step]
        opening[..., step] = now = np.where(command > 0.5, False, np.where(command < -0.5, True, now))
    return opening if opening.ndim else follow_gripper(np.reshape(closing, 1), before)[0]


def dead_reckon(pose: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Poses `(..., 7)` after metric `actions (..., 7 or more)`, if the robot had done exactly what it was told.

    Angles add up, as in BridgeData, whose reached actions are differences of poses.
    """
    moved = turn_to(np.zeros(6), pose[..., :6] + actions[..., :6])
    return np.concatenate([moved, actions[..., 6:7]], -1)


def turn_to(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Displacements `(..., 6)` from pose to pose; of an angle the short way round."""
    way = after - before
    way[..., 3:] = (way[..., 3:] + np.pi) % (2 * np.pi) - np.pi
    return way


def mirror_actions(actions: np.ndarray, embodiment: str = "tabletop") -> np.ndarray:
    """Actions as the left-right mirrored image would show them; same shape and type. Its own inverse.

    Works on metric `(..., 7)` and world-model `(..., 10)` actions alike, because scales are symmetric. Mirroring
    flips the sideways translation. Rotations are axial vectors: the one *about* the sideways axis stays (its axis
    flips and so does its sense), the other two change sign. With x sideways (tabletop): dx, dpitch, dyaw. With y
    sideways (WidowX): dy, droll, dyaw.
    """
    robot, mirrored = get(embodiment), np.array(actions)
    if robot.lateral_axis is None:
        raise UserError(f"world_model.mirror: how a mirrored {embodiment} would move is not known; set it to false")
    width = mirrored.shape[-1]
    if width not in (METRIC_DIM, WORLD_MODEL_DIM):
        raise UserError(f"actions of width {width} cannot be mirrored; metric ones have 7 numbers, world-model ones 10")
    if width == WORLD_MODEL_DIM:
        _base(mirrored[..., METRIC_DIM:], robot)
        if robot.base:
            mirrored[..., [7 + robot.lateral_axis, 9]] *= -1  # it turns about the vertical
    flipped = [robot.lateral_axis] + [3 + axis for axis in range(3) if axis != robot.lateral_axis]
    mirrored[..., flipped] *= -1
    return mirrored


def _changes(opened: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Relative commands that lead to `opened (..., T)` bool: 1 where the gripper closes, -1 where it opens, else 0."""
    if opened.ndim == 0:
        return before.astype(float) - opened
    first = np.broadcast_to(before, opened.shape[:-1])[..., None]
    return -np.diff(np.concatenate([first, opened], -1).astype(float), axis=-1)


def _checked(actions: np.ndarray, embodiment: str, widths: tuple[int, ...], kind: str) -> np.ndarray:
    actions = np.asarray(actions, np.float64)
    if actions.ndim == 0 or actions.shape[-1] not in widths:
        allowed = " or ".join(map(str, widths))
        raise UserError(f"{kind} for {embodiment}: shape {actions.shape} does not end in {allowed} numbers")
    if not np.isfinite(actions).all():
        raise UserError(f"{kind} for {embodiment}: holds NaN or infinity; the policy or the data is broken")
    return actions


def _base(base: np.ndarray, robot: Embodiment) -> np.ndarray:
    if not robot.base and np.any(base != 0):
        raise UserError(
            f"base motion {np.round(base[np.any(base != 0, -1)][0], 4).tolist()} for {robot.name}, which has a "
            "fixed base; use an embodiment with base channels or send zeros"
        )
    return base


def _suggest(word: str, allowed) -> str:
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + f"Allowed: {', '.join(sorted(allowed))}"
