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
    lateral_axis: int  # 0 or 1: the axis (x or y) that points sideways in the image, for mirroring
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
    robot = get(embodiment)
    mirrored = np.array(actions)
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
