"""The one closed loop: policies act, a world answers, and the loop cannot tell which world it is.

Trials run side by side at one batch shape. What happens to a trial depends on (trial, repeat, step) alone: which others
run beside it, in which shard, or after which interruption changes nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from workflow_src.common.errors import UserError
from workflow_src.common.seeds import derive
from workflow_src.embodiments import dead_reckon
from workflow_src.rollouts.trials import Trial

ACTION = 7  # dx, dy, dz (m), droll, dpitch, dyaw (rad), gripper_open [0, 1]


class Client(Protocol):
    """What the loop needs of a policy: `policies.client.PolicyClient`."""

    metadata: Any  # with `.name`, `.execution`, `.ensemble`, `.extra`: `policies.wire.Metadata`

    def infer(self, observation: dict[str, Any]) -> dict[str, np.ndarray]:
        """N rows of `image`, `prompt`, `episode`, `step`, `seed`, maybe `pose` (N, 7).

        Returns checked `actions` (N, K, 7), maybe `base`, `terminate`.
        """
        ...


@dataclass(frozen=True)
class Item:
    """One rollout to be done."""

    trial: Trial
    repeat: int

    @property
    def name(self) -> str:
        """Unique among the rollouts of a policy in a world."""
        return f"{self.trial.trial_id}#{self.repeat}"

    @property
    def episode(self) -> int:
        """Number by which a policy tells its rollouts apart."""
        return derive(0, "episode", self.trial.trial_id, self.repeat)

    @property
    def seed(self) -> int:
        """Seed of the policy's randomness: the same in both worlds, another one for every repeat."""
        return derive(self.trial.seed, "policy", self.repeat)


@dataclass(frozen=True)
class Rollout:
    """What happened. T is the horizon; after the policy terminated, everything is held as it was."""

    item: Item
    frames: np.ndarray  # uint8 (T+1, H, W, 3)
    actions: np.ndarray  # float32 (T, 7) metric, (T, 10) with base; after termination: no motion, last gripper
    steps: int  # environment steps the policy made, 1..T
    terminated: bool  # by the policy
    seconds: float  # wall time, the rollout's share of its batch
    states: np.ndarray | None  # float32 (T+1, S), where the world knows its state
    success: np.ndarray | None  # bool (T+1,), where the world knows
    partial: np.ndarray | None  # float32 (T+1,), where the world knows


def roll_out(
    env: Any, client: Client, items: Sequence[Item], horizon: int, stepped: Callable[[int], None] = lambda running: None
) -> Iterator[list[Rollout]]:
    """Roll all `items` out in `env` (a `VectorEnv`), batch by batch; yield the finished rollouts of each batch.

    `stepped(n)` is called after every environment step with the number of rollouts that it advanced.
    Of an answered chunk, the policy's `metadata.execution` says what is executed: `all` of it before the next query; its
    `first` action; or, with a query every step, the `ensemble` of what all chunks so far foretold for this step, weighted
    by exp(-m i) with m = `metadata.ensemble` and i = 0 for the oldest (ACT, arXiv 2304.13705).
    Raises `UserError` naming policy, trial and step when the policy fails, hangs or answers what is no action.
    """
    for start in range(0, len(items), env.num_envs):
        yield _Batch(env, client, items[start : start + env.num_envs], horizon).run(stepped)


class _Batch:
    """The rollouts that run side by side. Row r of every array belongs to `items[r]`; rows beyond are padding."""

    def __init__(self, env: Any, client: Client, items: Sequence[Item], horizon: int):
        self.env, self.client, self.items, self.horizon = env, client, items, horizon
        self.queues: list[deque[tuple[np.ndarray, np.bool_]]] = [deque() for _ in items]
        self.chunks: list[deque[np.ndarray]] = [deque() for _ in items]  # of an ensemble, oldest first
        self.steps = np.zeros(len(items), int)
        self.terminated = np.zeros(len(items), bool)
        self.actions = np.zeros((horizon, env.num_envs, *env.single_action_space.shape), np.float32)
        # Reckoned: worlds of images do not say where the gripper is.
        reckoned = client.metadata.extra.get("needs_pose")
        self.poses = np.array([item.trial.initial_state for item in items], float) if reckoned else None
        self.frames: list[np.ndarray] = []
        self.truth: dict[str, list[np.ndarray]] = {"state": [], "success": [], "partial": []}

    def run(self, stepped: Callable[[int], None]) -> list[Rollout]:
        began = time.monotonic()
        # A short batch repeats its first item, so that the world always computes at one shape.
        padded = [*self.items, *[self.items[0]] * (self.env.num_envs - len(self.items))]
        observation, info = self.env.reset(
            seed=[item.trial.seed for item in padded],
            options={"trials": [item.trial.options(item.repeat) for item in padded]},
        )
        self._keep(observation, info)
        for step in range(self.horizon):
            running = np.flatnonzero(~self.terminated)
            if not len(running):
                break
            self._ask(step, [row for row in running if not self.queues[row]])
            self._act(step, running)
            observation, _, _, _, info = self.env.step(self.actions[step])
            self._keep(observation, info, held=np.setdiff1d(np.arange(len(self.items)), running))
            stepped(len(running))
        return self._finish((time.monotonic() - began) / len(self.items))

    # ---- the policy's side

    def _ask(self, step: int, rows: list[int]) -> None:
        """Query the policy for the rows whose queue is empty; queue what it answers."""
        if not rows:
            return
        items = [self.items[row] for row in rows]
        observation = {
            "image": self.frames[-1][rows],
            "prompt": [item.trial.instruction for item in items],
            "episode": np.array([item.episode for item in items], np.int64),
            "step": np.full(len(rows), step, np.int64),
            "seed": np.array([item.seed for item in items], np.int64),
        }
        if self.poses is not None:
            observation["pose"] = self.poses[rows]
        try:
            reply = self.client.infer(observation)
        except UserError as error:
            # The client has checked shapes and numbers; only this loop knows which rollout a row is.
            known = getattr(error, "row", None)
            raise UserError(f"{_where(items, known)}, step {step}: {error}") from error
        base = reply.get("base", np.zeros((*reply["actions"].shape[:2], 3), np.float32))
        if np.any(base) and self.actions.shape[-1] == ACTION:
            raise UserError(
                f"{_where(items, None)}, step {step}: policy {self.client.metadata.name!r} moves the robot's base, "
                "and this world's robot has a fixed one; choose a policy without"
            )
        answers = np.concatenate([reply["actions"], base], -1)[..., : self.actions.shape[-1]]
        terminate = reply.get("terminate", np.zeros(reply["actions"].shape[:2], bool))
        for row, actions, ends in zip(rows, answers, terminate):
            self.queues[row].extend(self._executed(row, actions, ends))

    def _executed(self, row: int, actions: np.ndarray, ends: np.ndarray) -> list[tuple[np.ndarray, np.bool_]]:
        """What is done before the next query, of a chunk of actions (K, A) with their `terminate` (K,)."""
        if self.client.metadata.execution == "all":
            return list(zip(actions, ends))
        if self.client.metadata.execution == "first":
            return [(actions[0], ends[0])]
        chunks = self.chunks[row]
        chunks.append(actions)
        if len(chunks) > len(actions):
            chunks.popleft()
        foretold = np.stack([chunk[age] for age, chunk in zip(reversed(range(len(chunks))), chunks)])
        weights = np.exp(-self.client.metadata.ensemble * np.arange(len(chunks)))
        return [((weights / weights.sum() @ foretold).astype(np.float32), ends[0])]

    def _act(self, step: int, running: np.ndarray) -> None:
        """Take one action from every running row's queue; finished and padding rows stand still, gripper as it was."""
        if step:
            self.actions[step, :, 6] = self.actions[step - 1, :, 6]
        for row in running:
            self.actions[step, row], ends = self.queues[row].popleft()
            self.steps[row] = step + 1
            # The action that carries `terminate` is still executed, as in SimplerEnv; then the last frame is held.
            self.terminated[row] = ends
            if self.poses is not None:
                self.poses[row] = dead_reckon(self.poses[row], self.actions[step, row])
        self.actions[step, len(self.items) :] = self.actions[step, 0]

    # ---- the world's side

    def _keep(self, observation: dict[str, Any], info: dict[str, Any], held: np.ndarray | None = None) -> None:
        """Note what the world showed; rows in `held` finished before and keep what they had."""
        frames = np.array(observation["image"][: len(self.items)])
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"the world showed {frames.dtype} {frames.shape}, not uint8 (N, H, W, 3)")
        if held is not None:
            frames[held] = self.frames[-1][held]
        self.frames.append(frames)
        for key, kept in self.truth.items():
            if key in info:
                values = np.array(info[key][: len(self.items)])
                if held is not None:
                    values[held] = kept[-1][held]
                kept.append(values)

    def _finish(self, seconds: float) -> list[Rollout]:
        # If all rows terminated early, the world stood still from there on.
        missing = self.horizon + 1 - len(self.frames)
        stood = len(self.frames) - 1
        self.actions[stood:] = 0
        self.actions[stood:, :, 6] = self.actions[stood - 1, :, 6]
        frames = np.stack(self.frames + self.frames[-1:] * missing, 1)
        truth = {key: np.stack(kept + kept[-1:] * missing, 1) if kept else None for key, kept in self.truth.items()}
        return [
            Rollout(
                item, frames[row], self.actions[:, row].copy(), int(self.steps[row]), bool(self.terminated[row]),
                seconds, *(None if values is None else values[row] for values in truth.values()),
            )
            for row, item in enumerate(self.items)
        ]  # fmt: skip


def _where(items: Sequence[Item], row: int | None) -> str:
    """Which rollout: the row's where it is known, else all that were asked about at once."""
    if row is not None or len(items) == 1:
        return f"trial {items[row or 0].name!r}"
    return f"trials {items[0].name!r} … {items[-1].name!r}"
