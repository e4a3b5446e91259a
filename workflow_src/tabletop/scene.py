"""The tabletop: bodies, state vector, random beginnings, mirror symmetry.

World frame: x to the right of the image, y away from the camera, z up, origin on the table below the middle of the
image. Everything is symmetric about the plane x = 0, so that mirrored images belong to mirrored states.

State vector, in the order of `state_layout(scene)` (metres; float32 in records, so that JSON and npz hold it exactly):

    gripper (3)          point between the fingertips' lower ends
    opening (1)          0: fingers touch, 1: 84 mm apart
    <block> (3)          centre of each block, then
    <block>_quaternion (4)   its orientation, w x y z
    plate (3), bowl (3)  centres of the visual-only targets
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from workflow_src.common.config import check_name

BLOCK_HALF = 0.025  # large for the image: 50 mm are about 7 of 48 pixels
PLATE_RADIUS = 0.060
BOWL_RADIUS = 0.058
MAX_OPENING = 0.042  # travel of each finger: ±17 mm of tolerance around a block
FINGER = (0.006, 0.014, 0.039)  # half sizes; long enough that the hand does not hide a held block

MAX_STEP = 0.05  # metres per axis and action
WORKSPACE_LOW = np.array([-0.18, -0.13, 0.004])
WORKSPACE_HIGH = np.array([0.18, 0.16, 0.18])
OBJECTS_LOW = np.array([-0.115, -0.07])
OBJECTS_HIGH = np.array([0.115, 0.10])
GRIPPER_LOW = np.array([-0.12, -0.06, 0.08])
GRIPPER_HIGH = np.array([0.12, 0.09, 0.12])
SPACING = 0.098
TARGET_SPACING = 0.125  # plates do not overlap
MAX_YAW = 0.2

BLOCKS = {"one_block": ("red_block",), "two_blocks": ("red_block", "blue_block")}
TARGETS = {"one_block": ("plate",), "two_blocks": ("plate", "bowl")}
COLOURS = {
    "table": (0.80, 0.77, 0.72),
    "red_block": (0.88, 0.12, 0.10),
    "blue_block": (0.10, 0.25, 0.85),
    "plate": (0.30, 0.66, 0.42),
    "bowl": (0.62, 0.40, 0.72),
    "hand": (0.22, 0.23, 0.27),
    "finger": (0.96, 0.76, 0.12),
}
STATIC_GROUP, MOVING_GROUP = 0, 1  # geom groups: what stands still during an episode, and what moves
STATIC_HEIGHT = 0.014  # nothing that stands still is higher


def check_scene(scene: str) -> None:
    """Raise `UserError` for an unknown scene."""
    check_name("lab.scene", scene, BLOCKS)


@lru_cache
def state_layout(scene: str) -> dict[str, slice]:
    """Name → slice of the state vector."""
    check_scene(scene)
    fields = [("gripper", 3), ("opening", 1)]
    for block in BLOCKS[scene]:
        fields += [(block, 3), (f"{block}_quaternion", 4)]
    fields += [(target, 3) for target in TARGETS[scene]]
    layout, start = {}, 0
    for name, width in fields:
        layout[name] = slice(start, start + width)
        start += width
    return layout


def state_size(scene: str) -> int:
    """Length S of the state vector: 14 for `one_block`, 24 for `two_blocks`."""
    return max(part.stop for part in state_layout(scene).values())


def sample_state(
    scene: str, rng: np.random.Generator, accept: Callable[[np.ndarray], bool] = lambda state: True
) -> np.ndarray:
    """A random beginning, float32 `(S,)`: things lie apart from each other, the open gripper hovers above.

    `accept` says whether a candidate suits the task (a push needs room).
    """
    layout = state_layout(scene)
    names = (*BLOCKS[scene], *TARGETS[scene])
    while True:
        # Crowded scenes refuse most draws, so candidates are drawn many at a time.
        candidates = rng.uniform(OBJECTS_LOW, OBJECTS_HIGH, (64, len(names), 2))
        for places in candidates[_apart(candidates, len(BLOCKS[scene]))]:
            state = np.zeros(state_size(scene))
            state[layout["gripper"]] = rng.uniform(GRIPPER_LOW, GRIPPER_HIGH)
            state[layout["opening"]] = 1.0
            for name, place in zip(names, places):
                state[layout[name]] = [*place, BLOCK_HALF if name in BLOCKS[scene] else 0.0]
            for block in BLOCKS[scene]:
                half = rng.uniform(-MAX_YAW, MAX_YAW) / 2
                state[layout[f"{block}_quaternion"]] = [np.cos(half), 0, 0, np.sin(half)]
            if accept(state):
                return state.astype(np.float32)


def _apart(places: np.ndarray, blocks: int) -> np.ndarray:
    """Which of `places (C, objects, 2)`, blocks first, keep the distances, bool `(C,)`."""
    gaps = np.linalg.norm(places[:, :, None] - places[:, None], axis=-1) + np.eye(places.shape[1])
    targets = gaps[:, blocks:, blocks:].min((1, 2))
    return (gaps.min((1, 2)) >= SPACING) & (targets >= TARGET_SPACING)


def mirror_state(state: np.ndarray, scene: str) -> np.ndarray:
    """The state `(..., S)` seen in a mirror at x = 0; its own inverse."""
    mirrored = np.array(state)
    layout = state_layout(scene)
    for name, part in layout.items():
        if name.endswith("_quaternion"):
            # A rotation's axis is an axial vector: its x component stays, y and z change sign.
            mirrored[..., part.start + 2 : part.stop] *= -1
        elif name != "opening":
            mirrored[..., part.start] *= -1
    return mirrored


def model_xml(scene: str) -> str:
    """The MuJoCo model. Numbers that matter for grasping carry their reason."""
    check_scene(scene)
    return f"""
<mujoco model="tabletop_{scene}">
  <!-- elliptic cones with impratio 10 keep a squeezed block from creeping out of the fingers -->
  <option timestep="0.005" integrator="implicitfast" cone="elliptic" impratio="10"/>
  <default>
    <default class="seen"><geom contype="0" conaffinity="0" group="{STATIC_GROUP}"/></default>
    <default class="hand"><geom group="{MOVING_GROUP}" rgba="{_rgba("hand")}" contype="0" conaffinity="0"/></default>
    <default class="finger"><geom type="box" size="{_text(FINGER)}" group="{MOVING_GROUP}" rgba="{_rgba("finger")}"
      mass="0.1" friction="2 0.05 0.001" condim="4"/></default>
    <default class="block"><geom type="box" size="{_text([BLOCK_HALF] * 3)}" mass="0.06" friction="1.2 0.02 0.001"
      condim="4" solref="0.01 1" solimp="0.95 0.99 0.001" group="{MOVING_GROUP}"/></default>
  </default>
  <worldbody>
    <geom name="table" type="plane" size="2 2 0.1" rgba="{_rgba("table")}" group="{STATIC_GROUP}"
      friction="1 0.02 0.001" solref="0.01 1" solimp="0.95 0.99 0.001"/>
    {"".join(_target(name) for name in TARGETS[scene])}
    {_GRIPPER}
    {"".join(_block(name) for name in BLOCKS[scene])}
  </worldbody>
  <equality><joint joint1="left" joint2="right" polycoef="0 1 0 0 0"/></equality>
  <actuator>
    <position name="hand_x" joint="hand_x" kp="600" dampratio="1"/>
    <position name="hand_y" joint="hand_y" kp="600" dampratio="1"/>
    <position name="hand_z" joint="hand_z" kp="600" dampratio="1"/>
    <!-- force-limited: told to close on a block, the fingers squeeze it with 8 N and no more -->
    <position name="left" joint="left" kp="400" kv="10" forcerange="-8 8"/>
    <position name="right" joint="right" kp="400" kv="10" forcerange="-8 8"/>
  </actuator>
</mujoco>"""


_GRIPPER = f"""
    <body name="hand" gravcomp="1">
      <joint name="hand_x" type="slide" axis="1 0 0"/>
      <joint name="hand_y" type="slide" axis="0 1 0"/>
      <joint name="hand_z" type="slide" axis="0 0 1"/>
      <geom class="hand" type="box" size="0.055 0.014 0.009" pos="0 0 {2 * FINGER[2] + 0.009}" mass="0.7"/>
      <geom class="hand" type="cylinder" size="0.014 0.03" pos="0 0 {2 * FINGER[2] + 0.048}" mass="0.3"/>
      <body name="left_finger" pos="{-FINGER[0]} 0 {FINGER[2]}" gravcomp="1">
        <joint name="left" type="slide" axis="-1 0 0" range="0 {MAX_OPENING + 0.003}" limited="true"/>
        <geom class="finger"/>
      </body>
      <body name="right_finger" pos="{FINGER[0]} 0 {FINGER[2]}" gravcomp="1">
        <joint name="right" type="slide" axis="1 0 0" range="0 {MAX_OPENING + 0.003}" limited="true"/>
        <geom class="finger"/>
      </body>
    </body>"""


def _block(name: str) -> str:
    return f"""
    <body name="{name}"><freejoint name="{name}"/><geom name="{name}" class="block" rgba="{_rgba(name)}"/></body>"""


def _target(name: str) -> str:
    # Visual only: with a colliding plate pushed blocks tip over its edge. Mocap, because it moves between episodes
    # only.
    if name == "plate":
        geoms = _disc(PLATE_RADIUS, 0.001, _rgba(name)) + _disc(0.7 * PLATE_RADIUS, 0.0012, _rgba(name, 1.25))
    else:
        geoms = _disc(BOWL_RADIUS, 0.001, _rgba(name))
        count = 16
        width = BOWL_RADIUS * np.tan(np.pi / count)
        for angle in (np.arange(count) + 0.5) * 2 * np.pi / count:
            x, y = BOWL_RADIUS * np.cos(angle), BOWL_RADIUS * np.sin(angle)
            geoms += (
                f'<geom class="seen" type="box" size="0.003 {width} {STATIC_HEIGHT / 2}" '
                f'pos="{x} {y} {STATIC_HEIGHT / 2}" euler="0 0 {np.degrees(angle)}" rgba="{_rgba(name, 1.2)}"/>'
            )
    return f"""
    <body name="{name}" mocap="true">{geoms}</body>"""


def _disc(radius: float, half: float, rgba: str) -> str:
    return f'<geom class="seen" type="cylinder" size="{radius} {half}" pos="0 0 {half}" rgba="{rgba}"/>'


def _rgba(name: str, factor: float = 1.0) -> str:
    return _text([*(min(1.0, part * factor) for part in COLOURS[name]), 1])


def _text(numbers) -> str:
    return " ".join(repr(float(number)) for number in numbers)
