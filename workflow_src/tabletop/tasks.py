"""Language tasks of the tabletop: instruction, success and partial credit, from state vectors alone.

All predicates take `state (..., S)` and the trial's first state `start (..., S)` and work on whole batches, so any
stored pair of frames can be labelled for any task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from workflow_src.common.config import check_name
from workflow_src.tabletop.scene import BLOCK_HALF, BLOCKS, TARGETS, state_layout

ON_TARGET = 0.045  # metres between a block's centre and its target's: the block's middle is well inside
LIFTED = 0.05
PUSHED = 0.06
STACKED = 0.022
RELEASED = 0.68  # opening beyond the width of a held block (0.60)
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "away": (0, 1), "closer": (0, -1)}
# Where the expert brings a pushed block, along the direction; a trial begins with the block this far from it at least.
PUSH_GOAL = {"left": 0.125, "right": 0.125, "away": 0.10, "closer": 0.075}
PUSH_ROOM = {"left": 0.10, "right": 0.10, "away": 0.08, "closer": 0.08}


@dataclass(frozen=True)
class Task:
    """One language task. `kind` and its objects tell the expert what to do."""

    name: str
    kind: str  # place, stack, lift or push
    block: str
    target: str  # target, lower block, or direction
    instruction: str
    partial_credit_criteria: str

    def success(self, state: np.ndarray, start: np.ndarray, scene: str) -> np.ndarray:
        """Whether the task is done, bool `(...)`."""
        return _SUCCESS[self.kind](self, Parts(state, scene), Parts(start, scene))

    def partial(self, state: np.ndarray, start: np.ndarray, scene: str) -> np.ndarray:
        """Credit in {0, 0.25, 0.5, 1}, float32 `(...)`; 1 exactly where `success`."""
        now, before = Parts(state, scene), Parts(start, scene)
        gap = np.abs(now[self.block] - now["gripper"])
        reached = (
            (gap[..., 0] < 0.06) & (gap[..., 1] < 0.06) & (now["gripper"][..., 2] < now[self.block][..., 2] + 0.01)
        )
        half = _HALFWAY[self.kind](self, now, before)
        done = _SUCCESS[self.kind](self, now, before)
        return np.select([done, half, reached], [1.0, 0.5, 0.25], 0.0).astype(np.float32)

    def accepts(self, state: np.ndarray, scene: str) -> bool:
        """Whether a trial may begin in `state (S,)`: a push needs room, and nothing in its way."""
        if self.kind != "push":
            return True
        parts, direction = Parts(state, scene), np.array(DIRECTIONS[self.target])
        for other in BLOCKS[scene]:
            apart = (parts[other] - parts[self.block])[:2]
            if other != self.block and abs(apart @ direction[::-1]) < 0.075 and apart @ direction > -0.125:
                return False
        return float(parts[self.block][:2] @ direction) <= PUSH_GOAL[self.target] - PUSH_ROOM[self.target]


class Parts:
    """Named parts of state vectors: `Parts(state, scene)["red_block"]` is `(..., 3)`."""

    def __init__(self, state: np.ndarray, scene: str):
        self._state, self._layout = np.asarray(state), state_layout(scene)
        self.blocks = len(BLOCKS[scene])

    def __getitem__(self, name: str) -> np.ndarray:
        return self._state[..., self._layout[name]]


def _over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a[..., :2] - b[..., :2], axis=-1)


def _placed(task: Task, now: Parts, start: Parts) -> np.ndarray:
    block = now[task.block]
    rests = block[..., 2] < BLOCK_HALF + 0.012
    return (_over(block, now[task.target]) < ON_TARGET) & rests & _released(task, now)


def _stacked(task: Task, now: Parts, start: Parts) -> np.ndarray:
    block, below = now[task.block], now[task.target]
    rests = np.abs(block[..., 2] - below[..., 2] - 2 * BLOCK_HALF) < 0.008
    return (_over(block, below) < STACKED) & rests & _released(task, now)


def _released(task: Task, now: Parts) -> np.ndarray:
    # Open, or away from the block: a hand that closes again later takes nothing back.
    away = np.linalg.norm(now["gripper"] - now[task.block], axis=-1) > 0.06
    return (now["opening"][..., 0] > RELEASED) | away


def _lifted(task: Task, now: Parts, start: Parts) -> np.ndarray:
    return now[task.block][..., 2] > BLOCK_HALF + LIFTED


def _moved(task: Task, now: Parts, start: Parts) -> np.ndarray:
    moved = now[task.block][..., :2] - start[task.block][..., :2]
    return moved @ np.array(DIRECTIONS[task.target], moved.dtype)


def _pushed(task: Task, now: Parts, start: Parts) -> np.ndarray:
    return (_moved(task, now, start) > PUSHED) & (now[task.block][..., 2] < BLOCK_HALF + 0.012)


def _carried(task: Task, now: Parts, start: Parts) -> np.ndarray:
    return (now[task.block][..., 2] > BLOCK_HALF + 0.03) | (_over(now[task.block], now[task.target]) < ON_TARGET)


_SUCCESS: dict[str, Callable] = {"place": _placed, "stack": _stacked, "lift": _lifted, "push": _pushed}
_HALFWAY: dict[str, Callable] = {
    "place": _carried,
    "stack": _carried,
    "lift": lambda task, now, start: now[task.block][..., 2] > BLOCK_HALF + 0.015,
    "push": lambda task, now, start: _moved(task, now, start) > PUSHED / 2,
}


def _words(name: str) -> str:
    return name.replace("_", " ")


def _place(name: str, block: str, target: str, preposition: str) -> Task:
    return Task(
        name, "place", block, target, f"put the {_words(block)} {preposition} the {_words(target)}",
        f"0.25 if the gripper reaches the {_words(block)}, 0.5 if it lifts it or brings it over the {_words(target)}",
    )  # fmt: skip


def _stack(name: str, block: str, below: str) -> Task:
    return Task(
        name, "stack", block, below, f"put the {_words(block)} on the {_words(below)}",
        f"0.25 if the gripper reaches the {_words(block)}, 0.5 if it lifts it or brings it over the {_words(below)}",
    )  # fmt: skip


def _lift(name: str, block: str) -> Task:
    return Task(
        name, "lift", block, "", f"lift the {_words(block)}",
        f"0.25 if the gripper reaches the {_words(block)}, 0.5 if it raises it by 1.5 cm (success: 5 cm)",
    )  # fmt: skip


def _push(name: str, block: str, direction: str) -> Task:
    where = {"left": "to the left", "right": "to the right", "away": "away", "closer": "closer"}[direction]
    return Task(
        name, "push", block, direction, f"push the {_words(block)} {where}",
        f"0.25 if the gripper reaches the {_words(block)}, 0.5 if it moves it by 3 cm that way (success: 6 cm)",
    )  # fmt: skip


_ALL = [
    _place("put_on_plate", "red_block", "plate", "on"),
    _lift("lift", "red_block"),
    *(_push(f"push_{direction}", "red_block", direction) for direction in DIRECTIONS),
    _place("put_blue_on_plate", "blue_block", "plate", "on"),
    _place("put_red_in_bowl", "red_block", "bowl", "in"),
    _place("put_blue_in_bowl", "blue_block", "bowl", "in"),
    _stack("put_red_on_blue", "red_block", "blue_block"),
    _stack("put_blue_on_red", "blue_block", "red_block"),
    _lift("lift_blue", "blue_block"),
    *(_push(f"push_blue_{direction}", "blue_block", direction) for direction in DIRECTIONS),
]
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def tasks_of(scene: str) -> tuple[str, ...]:
    """Names of the tasks whose objects are in the scene."""
    there = (*BLOCKS[scene], *TARGETS[scene], *DIRECTIONS, "")
    return tuple(task.name for task in _ALL if task.block in there and task.target in there)


def get(name: str, scene: str) -> Task:
    """The task of that name. Raises `UserError` with did-you-mean if the scene does not have it."""
    check_name("task", name, tasks_of(scene))
    return TASKS[name]


# Mirrored left to right, these tasks become each other; all others stay what they are.
MIRRORED = {
    "push_left": "push_right",
    "push_right": "push_left",
    "push_blue_left": "push_blue_right",
    "push_blue_right": "push_blue_left",
}
