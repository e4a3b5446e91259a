"""The scripted expert: a function of the current state alone, without phases or memory.

So a policy that sees one frame can imitate it, and it can say what to do in any state, however that state came about.
Everything works on batches: states `(N, S)` in, metric actions `(N, 7)` out.
"""

from __future__ import annotations

import numpy as np

from workflow_src.tabletop.scene import BLOCK_HALF, MAX_STEP
from workflow_src.tabletop.tasks import DIRECTIONS, ON_TARGET, PUSH_GOAL, Parts, Task, get

GRASP = 0.010  # fingertip height for grasping and pushing
HOVER = 0.072  # fingertips pass over a block
LIFT = 0.10
ALIGNED = 0.014  # the fingers leave 17 mm on either side of a block
CLEARANCE = 0.056  # between the centres of a block and of the closed gripper before it touches


def actions(states: np.ndarray, task: str, scene: str) -> np.ndarray:
    """What to do next for `task`, float32 `(N, 7)`, in `states (N, S)`."""
    states = np.atleast_2d(np.asarray(states, np.float64))
    description = get(task, scene)
    goal, opening = _KINDS[description.kind](description, Parts(states, scene))
    result = np.zeros((len(states), 7), np.float32)
    result[:, :3] = np.clip(goal - Parts(states, scene)["gripper"], -MAX_STEP, MAX_STEP)
    result[:, 6] = opening
    return result


def all_actions(states: np.ndarray, tasks: tuple[str, ...], scene: str) -> np.ndarray:
    """Expert actions for each of K tasks, float32 `(N, K, 7)`."""
    return np.stack([actions(states, task, scene) for task in tasks], axis=1)


def _place(task: Task, now: Parts) -> tuple[np.ndarray, np.ndarray]:
    hand, block, target = now["gripper"], now[task.block], now[task.target]
    rest = BLOCK_HALF if task.kind == "place" else 3 * BLOCK_HALF
    held = _held(now, task.block)
    off = np.linalg.norm(block[:, :2] - target[:, :2], axis=1)
    over = off < (0.016 if task.kind == "place" else 0.010)
    low = block[:, 2] < rest + 0.006
    # How far the block must rise before it may travel, and how high it travels.
    crowded = task.kind == "stack" or now.blocks > 1
    carry = rest + (0.056 if task.kind == "place" else 0.014) if crowded else rest + 0.020
    goal, opening = _pick(now, task.block)
    shift = hand[:, :2] + (target - block)[:, :2]
    rise = block[:, 2] < carry
    # Among other blocks it rises first; a visual-only plate can be approached while rising.
    across = np.where((rise & crowded)[:, None], hand[:, :2], shift)
    goal = _choose(held, goal, _at(across, hand[:, 2] + carry + 0.02 - block[:, 2]))
    goal = _choose(held & over, goal, _at(shift, hand[:, 2] + rest - 0.001 - block[:, 2]))
    opening = np.where(held, 0.0, opening)
    opening = np.where(held & over & low, 1.0, opening)
    goal = _choose(held & over & low, goal, hand)
    # Done: let go upwards. The margin inside the success region keeps it from going back and forth.
    done = low & (off < (ON_TARGET - 0.01 if task.kind == "place" else 0.018)) & (block[:, 2] > rest - 0.01) & ~held
    return _choose(done, goal, _at(hand[:, :2], np.full(len(hand), rest + LIFT - BLOCK_HALF))), np.where(
        done, 1.0, opening
    )


def _lift(task: Task, now: Parts) -> tuple[np.ndarray, np.ndarray]:
    hand, held = now["gripper"], _held(now, task.block)
    goal, opening = _pick(now, task.block)
    return _choose(held, goal, _at(hand[:, :2], np.full(len(hand), LIFT))), np.where(held, 0.0, opening)


def _push(task: Task, now: Parts) -> tuple[np.ndarray, np.ndarray]:
    hand, block = now["gripper"], now[task.block]
    direction = np.array(DIRECTIONS[task.target], float)
    side = direction[::-1]
    along = (block[:, :2] - hand[:, :2]) @ direction  # how far the hand is behind the block
    beside = np.abs((block[:, :2] - hand[:, :2]) @ side)
    left = PUSH_GOAL[task.target] + 0.005 - block[:, :2] @ direction
    behind = block[:, :2] - CLEARANCE * direction
    ready = (np.abs(along - CLEARANCE) < 0.016) & (beside < 0.012)
    pushing = (along > 0.030) & (along < CLEARANCE + 0.016) & (beside < 0.018) & (hand[:, 2] < 0.028)
    # First above the place behind the block, then down, then forward.
    goal = _at(behind, np.where(_clear(hand, behind), HOVER, np.maximum(HOVER, hand[:, 2])))
    goal = _choose(_clear(hand, behind), _at(hand[:, :2], np.full(len(hand), HOVER)), goal)
    goal = _choose(ready, goal, _at(behind, np.full(len(hand), GRASP)))
    forward = hand[:, :2] + np.maximum(left + along - 0.040, 0.0)[:, None] * direction
    forward += ((block[:, :2] - hand[:, :2]) @ side)[:, None] * side
    goal = _choose(pushing, goal, _at(forward, np.full(len(hand), GRASP)))
    done = left < 0.012
    goal = _choose(done, goal, _at(hand[:, :2], np.full(len(hand), LIFT)))
    # A block between the fingers must first be let go.
    around = _around(now, task.block)
    goal = _choose(around, goal, _at(hand[:, :2], np.full(len(hand), HOVER)))
    return goal, np.where(around, 1.0, 0.0)


_KINDS = {"place": _place, "stack": _place, "lift": _lift, "push": _push}


def _pick(now: Parts, block: str) -> tuple[np.ndarray, np.ndarray]:
    """Go above the block, down with open fingers, and close: the goal of the fingertips and the opening."""
    hand, place = now["gripper"], now[block]
    aligned = np.linalg.norm((place - hand)[:, :2], axis=1) < ALIGNED
    grasp = np.maximum(place[:, 2] - BLOCK_HALF + GRASP, GRASP)
    hover = place[:, 2] - BLOCK_HALF + HOVER
    clear = _clear(hand, place[:, :2], hover - 0.014)
    goal = _choose(clear, _at(hand[:, :2], hover), _at(place[:, :2], hover))
    goal = _choose(aligned, goal, _at(place[:, :2], grasp))
    # With the fingers not yet open, wait above.
    shut = aligned & (now["opening"][:, 0] < 0.72) & (hand[:, 2] > grasp + 0.035)
    goal = _choose(shut, goal, _at(place[:, :2], hover))
    down = aligned & (hand[:, 2] < grasp + 0.010)
    return goal, np.where(down, 0.0, 1.0)


def _held(now: Parts, block: str) -> np.ndarray:
    opening = now["opening"][:, 0]
    return _around(now, block) & (opening > 0.50) & (opening < 0.66)


def _around(now: Parts, block: str) -> np.ndarray:
    """Whether the block is between the fingers."""
    gap = now[block] - now["gripper"]
    return (np.abs(gap[:, 0]) < 0.018) & (np.abs(gap[:, 1]) < 0.025) & (gap[:, 2] > -0.02) & (gap[:, 2] < 0.045)


def _clear(hand: np.ndarray, place: np.ndarray, height: float | np.ndarray = HOVER - 0.014) -> np.ndarray:
    """Whether the hand may travel towards `place (N, 2)`: it is high, or so far away that it rises in time."""
    return (hand[:, 2] > height) | (np.abs(place - hand[:, :2]).max(1) > 0.11)


def _at(place: np.ndarray, height: np.ndarray) -> np.ndarray:
    return np.concatenate([place, height[:, None]], axis=1)


def _choose(condition: np.ndarray, otherwise: np.ndarray, then: np.ndarray) -> np.ndarray:
    return np.where(condition[:, None], then, otherwise)
