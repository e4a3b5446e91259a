"""Who acts in recorded episodes: the expert and its disturbed relatives.

A world model that only ever saw success imagines success. So most episodes go wrong in one way or another, in the
ways in which imperfect policies go wrong, and the expert says at every frame what would have been right.

An actor sees a state, may ask the expert about that state or a supposed one, and acts. States are read by the fields
that every lab shares: `[0:3]` gripper, `[3]` opening, `[4:7]` first object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

MAX_STEP = 0.05  # metres per axis
GRIPPER, OPENING, OBJECT = slice(0, 3), 3, slice(4, 7)


class Actor:
    """One episode's behaviour. `task` is the episode's, `known` all that the expert can do, `rng` its own generator."""

    def __init__(self, task: str, known: Sequence[str], rng: np.random.Generator):
        self.task, self.known, self.rng = task, known, rng

    def ask(self, step: int, state: np.ndarray) -> tuple[np.ndarray, str]:
        """The state `(S,)` and the task that the expert is asked about."""
        return state, self.task

    def act(self, step: int, state: np.ndarray, advice: np.ndarray) -> np.ndarray:
        """The metric action `(7,)`, given what the expert answered."""
        return advice


class Slow(Actor):
    """The expert at an even, slower pace: what a cautious policy does, where an action moves little."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.gain = self.rng.uniform(0.3, 0.8)

    def act(self, step, state, advice):
        action = advice.copy()
        action[:3] *= self.gain
        return action


class Noisy(Actor):
    """The expert with a tremor, at times slow, at times with a slipping gripper (as in DART, arXiv 1703.09327)."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.noise = self.rng.uniform(0.003, 0.021)
        self.gain = self.rng.uniform(0.3, 1.0) if self.rng.random() < 0.6 else 1.0
        self.flips = self.rng.uniform(0.03, 0.18) if self.rng.random() < 0.4 else 0.0

    def act(self, step, state, advice):
        action = advice.copy()
        action[:3] = self.gain * action[:3] + self.rng.normal(0, self.noise, 3)
        if self.rng.random() < self.flips:
            action[6] = 1.0 - action[6]
        return action


class Failing(Actor):
    """The expert with one systematic fault."""

    FAULTS = ("near_miss", "beside", "early_release", "misses_target", "stops_short", "never_closes", "closes_early")
    PUSH_FAULTS = ("near_miss", "beside", "stops_short", "rides_over")

    def __init__(self, *arguments):
        super().__init__(*arguments)
        faults = self.PUSH_FAULTS if self.task.startswith("push") else self.FAULTS
        self.fault = faults[self.rng.integers(len(faults))]
        angle = self.rng.uniform(0, 2 * np.pi)
        length = {"near_miss": (0.018, 0.036), "beside": (0.04, 0.075), "misses_target": (0.06, 0.11)}
        self.offset = np.zeros(3)
        self.offset[:2] = self.rng.uniform(*length.get(self.fault, (0, 0))) * np.array([np.cos(angle), np.sin(angle)])
        if self.fault == "rides_over":
            self.offset[2] = -self.rng.uniform(0.03, 0.05)
        self.patience = int(self.rng.integers(1, 5))
        self.moment = int(self.rng.integers(4, 12))
        self.carrying = 0

    def ask(self, step, state):
        # The gripper believes to be elsewhere. Missing the target, it does so only with the block in hand.
        if self.fault == "misses_target" and self.carrying < 2:
            return state, self.task
        supposed = state.copy()
        supposed[GRIPPER] += self.offset
        if self.fault == "misses_target":
            supposed[OBJECT] += self.offset
        return supposed, self.task

    def act(self, step, state, advice):
        held = state[OBJECT][2] > 0.035 and 0.5 < state[OPENING] < 0.7
        self.carrying = self.carrying + 1 if held else min(self.carrying, 2)
        action = advice.copy()
        if self.fault == "early_release" and self.carrying >= self.patience:
            action[6] = 1.0
        if self.fault == "never_closes":
            action[6] = 1.0
        if self.fault == "closes_early" and step >= self.moment // 3:
            action[6] = 0.0
        if self.fault == "stops_short" and step >= self.moment:
            action[:3] = self.rng.normal(0, 0.002, 3)
        return action


class Random(Actor):
    """A smooth random walk; half of the episodes keep near the object, where something can happen."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.smooth, self.scale = self.rng.uniform(0.3, 0.9), self.rng.uniform(0.015, 0.04)
        self.drawn = self.rng.random() < 0.6
        self.changes = self.rng.uniform(0.02, 0.25)
        self.velocity = self.rng.normal(0, 1, 3)
        self.opening = 1.0
        self.aim = self.rng.uniform([-0.06, -0.06, -0.02], [0.06, 0.06, 0.05])

    def act(self, step, state, advice):
        self.velocity = self.smooth * self.velocity + np.sqrt(1 - self.smooth**2) * self.rng.normal(0, 1, 3)
        if self.rng.random() < self.changes:
            self.opening = 1.0 - self.opening
        if self.rng.random() < 0.15:
            self.aim = self.rng.uniform([-0.06, -0.06, -0.02], [0.06, 0.06, 0.05])
        action = np.zeros(7)
        action[:3] = self.scale * self.velocity
        if self.drawn:
            action[:3] += 0.4 * (state[OBJECT] + self.aim - state[GRIPPER])
        action[6] = self.opening
        return action


class Play(Actor):
    """Does one thing for a while, then another; most are pushes, in any direction."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.pushes = [name for name in self.known if name.startswith("push")]
        self.others = [name for name in self.known if not name.startswith("push")]
        self.noise = self.rng.uniform(0.0, 0.012)
        self.doing = ""
        self._switch(0)

    def _switch(self, step: int) -> None:
        kinds = self.pushes if self.pushes and (not self.others or self.rng.random() < 0.7) else self.others
        kinds = [name for name in kinds if name != self.doing] or kinds
        self.doing = kinds[self.rng.integers(len(kinds))]
        self.until = step + int(self.rng.integers(4, 11))
        self.gain = self.rng.uniform(0.5, 1.0) if self.rng.random() < 0.3 else 1.0

    def ask(self, step, state):
        if step >= self.until:
            self._switch(step)
        return state, self.doing

    def act(self, step, state, advice):
        action = advice.copy()
        action[:3] = self.gain * action[:3] + self.rng.normal(0, self.noise, 3)
        return action


class Idle(Actor):
    """The expert up to some moment, often the first, then nothing more."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.moment = 0 if self.rng.random() < 0.4 else int(self.rng.integers(1, 13))
        self.opening = float(self.rng.random() < 0.7)

    def act(self, step, state, advice):
        if step < self.moment:
            self.opening = float(advice[6])
            return advice
        return np.array([0, 0, 0, 0, 0, 0, self.opening])


class Pantomime(Actor):
    """Does the whole task with a block that is not there, beside the real one.

    So motions that look like success stand beside episodes in which nothing happened: without them a model may believe the
    motion and not look at the block.
    """

    HELD = 0.58  # opening of fingers that hold a block
    REST = 0.025  # height of a block's centre on the table
    TABLE = np.array([0.19, 0.14])  # half its sides
    REACH = 0.06  # from the centre of the closed gripper to that of a block it pushes

    def __init__(self, *arguments):
        super().__init__(*arguments)
        angles, distance = self.rng.uniform(0, 2 * np.pi, 16), self.rng.uniform(0.07, 0.13)
        self.offsets = distance * np.stack([np.cos(angles), np.sin(angles)], 1)
        self.block: np.ndarray | None = None  # the one that is not there
        self.hand: np.ndarray | None = None  # one step ago
        self.grasp: np.ndarray | None = None  # from hand to block, while it is held
        self.closed = False  # the last command

    def ask(self, step, state):
        hand = state[GRIPPER].astype(float)
        self._move(hand, state)
        self.hand = hand
        supposed = state.copy()
        supposed[OBJECT] = self.block
        if self.grasp is not None:
            supposed[OPENING] = self.HELD
        return supposed, self.task

    def _move(self, hand: np.ndarray, state: np.ndarray) -> None:
        """Where the block would be now."""
        if self.block is None:
            self.block = state[OBJECT].astype(float)
            places = self.block[:2] + self.offsets
            edge = np.abs(places / self.TABLE).max(1)  # 1: on the edge of the table
            self.block[:2] = places[np.argmin(np.maximum(edge, 0.75))]  # the first that is well inside
            return
        gap = self.block - hand
        if self.grasp is None and self.closed and state[OPENING] < self.HELD and np.abs(gap).max() < 0.03:
            self.grasp = gap
        if self.grasp is not None and self.closed:
            self.block = hand + self.grasp
        elif self.grasp is not None:
            self.grasp, self.block[2] = None, self.REST
        elif state[OPENING] < 0.5 and hand[2] < 0.03 and np.linalg.norm(gap[:2]) < self.REACH:
            self.block[:2] += (hand - self.hand)[:2]

    def act(self, step, state, advice):
        self.closed = bool(advice[6] < 0.5)
        return advice


BEHAVIOURS: dict[str, type[Actor]] = {
    "expert": Actor,
    "slow": Slow,
    "noisy": Noisy,
    "failing": Failing,
    "random": Random,
    "play": Play,
    "idle": Idle,
    "pantomime": Pantomime,
}


def decide(
    actors: Sequence[Actor], step: int, states: np.ndarray, expert: Callable[[np.ndarray, list[str]], np.ndarray]
) -> np.ndarray:
    """One step of all actors, asking the expert once: metric actions float32 `(N, 7)` for `states (N, S)`."""
    questions = [actor.ask(step, state) for actor, state in zip(actors, states)]
    advice = expert(np.stack([state for state, _ in questions]), [task for _, task in questions])
    actions = np.stack([actor.act(step, *pair) for actor, *pair in zip(actors, states, advice)]).astype(np.float32)
    actions[:, :3] = np.clip(actions[:, :3], -MAX_STEP, MAX_STEP)
    actions[:, 6] = np.clip(actions[:, 6], 0.0, 1.0)
    return actions
