"""Units and scales: metric robot actions ↔ world-model actions. The only place in the project where scaling lives.

A *metric action* is what policies speak: `[dx, dy, dz (m), droll, dpitch, dyaw (rad), gripper_open in [0, 1]]`,
optionally followed by `base (3)`. A *world-model action* is what the network is conditioned on: `world_vector (3) |
rotation_delta (3) | gripper_closedness (1) | base (3)`.

How one becomes the other is a property of the pair (embodiment, convention), and the convention is recorded in the
artefact.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import numpy as np

from workflow_src.common.errors import UserError

METRIC_DIM = 7
WORLD_MODEL_DIM = 10


@dataclass(frozen=True)
class Embodiment:
    """A robot as its actions describe it. Lengths in metres, angles in radians, rates in hertz."""

    name: str
    control_hz: float
    max_translation: float  # largest commanded step per axis
    max_rotation: float
    binary_gripper: bool  # the recorded command is 0 or 1, never in between
    lateral_axis: (
        int | None
    )  # 0 or 1: the axis (x or y) that points sideways in the image, for mirroring; None: unknown
    base: bool  # whether the base channels mean anything
    source: str


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
        name="widowx", control_hz=5.0, max_translation=0.05, max_rotation=0.25, binary_gripper=True,
        lateral_axis=1, base=False, source="BridgeData V2 as pre-processed for RT-1-X: base frame, x forward, y left",
    ),
    "tabletop": Embodiment(
        name="tabletop", control_hz=5.0, max_translation=0.05, max_rotation=0.25, binary_gripper=False,
        lateral_axis=0, base=False, source="workflow_src/tabletop: x to the right of the image, y away from the camera",
    ),
}  # fmt: skip

# The other robots of Open X-Embodiment and LIBERO: control rate in Hz, largest step (translation, rotation), the world
# model's range that it is mapped to (2.0 and 1.57: RT-1-X's tokens, for what its example takes as it is), whether the
# gripper command is binary, base, and where that is from. What is not said to be in metres is in the units of the robot's
# own controller, as it was recorded.
_OTHERS = (
    ("google_robot", 3.0, 2.0, 1.57, 2.0, 1.57, True, True, "RT-1: metres, radians, range of RT-1-X's tokens"),
    ("franka_taco", 15.0, 0.02, 0.05, 1.75, 1.4, True, False, "TACO Play: metres, radians; clipped at 1/50 and 1/20"),
    (
        "jaco",
        10.0,
        0.2,
        1.0,
        1.75,
        1.4,
        True,
        False,
        "Jaco Play: no rotation; OXE's example divides by deviations of 0.11",
    ),
    (
        "franka_cable",
        10.0,
        2.0,
        1.57,
        2.0,
        1.57,
        False,
        False,
        "Cable Routing: velocities, as they are in OXE's example",
    ),
    ("sawyer_roboturk", 10.0, 2.0, 1.57, 2.0, 1.57, False, False, "RoboTurk: as they are in OXE's example"),
    ("stretch_door", 3.0, 0.07, 0.07, 1.75, 1.4, True, False, "NYU door opening: both range to 0.07, OXE's example"),
    ("franka_viola", 20.0, 1.0, 0.4, 1.75, 1.4, True, False, "VIOLA: range to 1.0 and 0.4, OXE's example"),
    ("ur5_autolab", 5.0, 0.02, 0.07, 1.75, 1.4, True, False, "Autolab UR5: range to 0.02 and 0.07, OXE's example"),
    (
        "franka_toto",
        30.0,
        0.7,
        1.57,
        1.75,
        1.57,
        True,
        False,
        "TOTO: range to 0.7, rotations as they are, OXE's example",
    ),
    ("panda_libero", 20.0, 0.05, 0.25, 1.75, 1.4, True, False, "LIBERO: metres, radians; OSC_POSE moves 0.05 m at 1"),
)
EMBODIMENTS |= {
    name: Embodiment(name, hz, translation, rotation, binary, None, base, source)
    for name, hz, translation, rotation, _, _, binary, base, source in _OTHERS
}

_BRIDGE_WORLDGYM = Scale(
    35.0, 5.6, 1.74, 1.39,
    "RT-1-X's Bridge pre-processing (Open X-Embodiment, Minimal_Training_Example): ±0.05 m → ±1.75, ±0.25 rad → ±1.4, "
    "safety margin 0.01",
)  # fmt: skip
# The margin serves RT-1's token bins only. Without it a full 5 cm step survives the round trip exactly.
_BRIDGE_REHEARSAL = Scale(35.0, 5.6, 1.75, 1.40, "as worldgym, without RT-1's safety margin")

SCALES = {
    ("widowx", "worldgym"): _BRIDGE_WORLDGYM,
    ("widowx", "rehearsal"): _BRIDGE_REHEARSAL,
    ("tabletop", "worldgym"): _BRIDGE_WORLDGYM,
    ("tabletop", "rehearsal"): _BRIDGE_REHEARSAL,
}
SCALES |= {
    (name, "rehearsal"): Scale(far / translation, wide / rotation, far, wide, source)
    for name, _, translation, rotation, far, wide, _, _, source in _OTHERS
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


def to_world_model(actions: np.ndarray, embodiment: str, convention: str, steps: int = 1) -> np.ndarray:
    """Metric actions `(..., 7)`, or `(..., 10)` with base, to float32 world-model actions `(..., 10)`.

    An action that spans `steps` control steps may be that many times as large before it is clipped.

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
    result[..., 6] = 1.0 - 2.0 * ((opening > 0.5) if robot.binary_gripper else opening)
    if actions.shape[-1] > METRIC_DIM:
        result[..., 7:] = _base(actions[..., METRIC_DIM:], robot)
    return result


def from_world_model(actions: np.ndarray, embodiment: str, convention: str) -> np.ndarray:
    """World-model actions `(..., 10)` to float32 metric actions `(..., 7)`; the inverse within the clipped range."""
    robot, units = get(embodiment), scale(embodiment, convention)
    actions = _checked(actions, embodiment, (WORLD_MODEL_DIM,), "world-model action")
    _base(actions[..., METRIC_DIM:], robot)
    result = np.zeros((*actions.shape[:-1], METRIC_DIM), np.float32)
    result[..., :3] = actions[..., :3] / units.translation
    result[..., 3:6] = actions[..., 3:6] / units.rotation
    opening = np.clip((1.0 - actions[..., 6]) / 2.0, 0.0, 1.0)
    result[..., 6] = (opening > 0.5) if robot.binary_gripper else opening
    return result


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
    flipped = [robot.lateral_axis] + [3 + axis for axis in range(3) if axis != robot.lateral_axis]
    mirrored[..., flipped] *= -1
    return mirrored


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
