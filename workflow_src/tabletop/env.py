"""The lab as a Gymnasium vector environment; importing this module registers `Tabletop-v0`.

    gymnasium.make_vec("workflow_src.tabletop.env:Tabletop-v0", num_envs=8, scene="one_block", workers=2)

Results do not depend on the number of workers, nor on which trials are simulated side by side.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from workflow_src.common.errors import UserError
from workflow_src.common.seeds import derive, rng
from workflow_src.embodiments import get as get_embodiment
from workflow_src.tabletop import expert as scripted
from workflow_src.tabletop import tasks as language
from workflow_src.tabletop.scene import check_scene, mirror_state, sample_state, state_size
from workflow_src.tabletop.worker import Bench

ACTION_DIM = 7


class TabletopVectorEnv(VectorEnv):
    """N tabletops. Observation `{"image": uint8 (N, H, W, 3)}`, action float32 `(N, 7)` metric, autoreset disabled.

    Arguments: `scene` one_block or two_blocks; `tasks` the K tasks of the lab; `image_size` pixels, square;
    `supersample` rays per pixel side; `horizon` steps until `truncated`; `workers` processes (0 or 1: in this
    process); `expert` adds expert actions to `info`. `info` of reset and step: `success (N,) bool`, `partial (N,)
    float32`, `state (N, S) float32`, and with `expert` `expert (N, K, 7) float32`. Reward is `success` as a number.
    Nothing terminates: success must still hold at the end.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "autoreset_mode": AutoresetMode.DISABLED, "render_fps": 5}

    def __init__(
        self,
        num_envs: int = 1,
        scene: str = "one_block",
        tasks: tuple[str, ...] = ("put_on_plate", "lift", "push_left"),
        image_size: int = 48,
        supersample: int = 2,
        horizon: int = 18,
        workers: int = 1,
        expert: bool = False,
        render_mode: str | None = None,
    ):
        check_scene(scene)
        self.scene, self.tasks, self.horizon, self.expert = scene, tuple(tasks), horizon, expert
        for task in self.tasks:
            language.get(task, scene)
        if num_envs < 1 or image_size < 1 or supersample < 1 or horizon < 1:
            raise UserError(
                f"Tabletop-v0: num_envs {num_envs}, image_size {image_size}, supersample {supersample} and "
                f"horizon {horizon} must all be at least 1"
            )
        self.num_envs, self.render_mode = num_envs, render_mode
        self.control_hz = get_embodiment("tabletop").control_hz
        self._make_spaces(image_size)
        self._fleet = _Fleet(scene, image_size, supersample, num_envs, min(workers, num_envs))
        self._trials: list[language.Task] = []
        self._start = self._state = np.zeros((num_envs, state_size(scene)), np.float32)
        self._steps, self._render = 0, True

    def _make_spaces(self, size: int) -> None:
        image = gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.single_observation_space = gymnasium.spaces.Dict({"image": image})
        limits = np.array([0.05] * 3 + [0.25] * 3, np.float32)
        low, high = np.append(-limits, 0).astype(np.float32), np.append(limits, 1).astype(np.float32)
        self.single_action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None):
        """Begin one trial per environment.

        `options["trials"]`: one mapping per environment with `task`, and `initial_state` (S numbers) or `seed`, from
        which a beginning is drawn. Without trials, tasks and beginnings are drawn from `seed`. `options["render"] =
        False` leaves images black until the next reset.
        """
        options = options or {}
        self._render = bool(options.get("render", True))
        trials = options.get("trials")
        if trials is None:
            trials = self._draw_trials(seed)
        if len(trials) != self.num_envs:
            raise UserError(
                f"Tabletop-v0: got {len(trials)} trials for {self.num_envs} environments; pad or cut the batch"
            )
        self._trials = [language.get(trial["task"], self.scene) for trial in trials]
        self._start = np.stack([self._beginning(trial, task) for trial, task in zip(trials, self._trials)])
        self._steps = 0
        self._state = self._fleet.reset(self._start, self._render)
        return self._observation(), self._info()

    def step(self, actions: np.ndarray):
        """One control step of 0.2 s for all. Raises `UserError` for actions of another shape or with NaN."""
        actions = np.asarray(actions, np.float32)
        if actions.shape != (self.num_envs, ACTION_DIM) or not np.isfinite(actions).all():
            raise UserError(f"Tabletop-v0: actions {actions.shape} must be finite and ({self.num_envs}, {ACTION_DIM})")
        if not self._trials:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        self._state = self._fleet.step(actions, self._render)
        self._steps += 1
        info = self._info()
        ends = np.full(self.num_envs, self._steps >= self.horizon)
        return self._observation(), info["success"].astype(np.float64), np.zeros(self.num_envs, bool), ends, info

    def expert_actions(self, states: np.ndarray, tasks: list[str]) -> np.ndarray:
        """What the expert would do in `states (N, S)`, real or supposed, each for its own task: float32 `(N, 7)`.

        Any task of the scene, not only the lab's. Recorders use it for disturbed behaviours and for play.
        """
        result = np.zeros((len(states), ACTION_DIM), np.float32)
        names = np.array(tasks)
        for name in set(tasks):
            rows = names == name
            result[rows] = scripted.actions(states[rows], name, self.scene)
        return result

    def known_tasks(self) -> tuple[str, ...]:
        """All tasks that `expert_actions` accepts, the lab's among them."""
        return language.tasks_of(self.scene)

    def label(self, states: np.ndarray, starts: np.ndarray, task: str) -> np.ndarray:
        """Success of `states (..., S)` of episodes that began in `starts (..., S)`, bool `(...)`."""
        return language.get(task, self.scene).success(states, starts, self.scene)

    def instruction(self, task: str) -> str:
        """The sentence that names the task."""
        return language.get(task, self.scene).instruction

    def partial_credit_criteria(self, task: str) -> str:
        """What `info["partial"]` gives credit for, in words."""
        return language.get(task, self.scene).partial_credit_criteria

    def mirror_state(self, states: np.ndarray) -> np.ndarray:
        """`states (..., S)` as seen in a mirror; their images mirror exactly."""
        return mirror_state(states, self.scene)

    def render(self):
        """The current images, as a tuple of uint8 `(H, W, 3)`."""
        return tuple(self._fleet.images.copy())

    def close_extras(self, **_: Any) -> None:
        self._fleet.close()

    def _draw_trials(self, seed: int | list[int] | None) -> list[dict[str, Any]]:
        if seed is None:
            seed = int(np.random.SeedSequence().entropy % 2**63)
        seeds = [derive(seed, i) for i in range(self.num_envs)] if isinstance(seed, int | np.integer) else list(seed)
        return [{"task": self.tasks[int(rng(s, "task").integers(len(self.tasks)))], "seed": s} for s in seeds]

    def _beginning(self, trial: dict[str, Any], task: language.Task) -> np.ndarray:
        state = trial.get("initial_state")
        if state is None:
            return sample_state(self.scene, rng(trial["seed"], "beginning"), lambda s: task.accepts(s, self.scene))
        state = np.asarray(state, np.float32)
        if state.shape != (state_size(self.scene),) or not np.isfinite(state).all():
            raise UserError(
                f"initial_state of shape {state.shape}: scene {self.scene!r} needs "
                f"{state_size(self.scene)} finite numbers"
            )
        return state

    def _observation(self) -> dict[str, np.ndarray]:
        return {"image": self._fleet.images.copy()}

    def _info(self) -> dict[str, np.ndarray]:
        success, partial = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, np.float32)
        for task in set(self._trials):
            rows = np.array([other is task for other in self._trials])
            success[rows] = task.success(self._state[rows], self._start[rows], self.scene)
            partial[rows] = task.partial(self._state[rows], self._start[rows], self.scene)
        info = {"success": success, "partial": partial, "state": self._state.copy()}
        if self.expert:
            info["expert"] = scripted.all_actions(self._state, self.tasks, self.scene)
        return info


class _Fleet:
    """All simulators: in this process, or spread over worker processes that share one image buffer."""

    def __init__(self, scene: str, size: int, supersample: int, count: int, workers: int):
        self._workers: list[tuple[subprocess.Popen, Connection, slice]] = []
        if workers <= 1:
            self.images = np.zeros((count, size, size, 3), np.uint8)
            self._bench = Bench(scene, size, supersample, self.images)
            return
        handle = _nameless_file(count * size * size * 3)
        self.images = np.frombuffer(mmap.mmap(handle, 0), np.uint8).reshape(count, size, size, 3)
        bounds = np.linspace(0, count, workers + 1).astype(int).tolist()
        for first, last in itertools.pairwise(bounds):
            process, connection = _start_worker(handle)
            self._workers.append((process, connection, slice(first, last)))
            connection.send(("open", scene, size, supersample, count, first, last))
        os.close(handle)
        self._collect()

    def reset(self, states: np.ndarray, render: bool) -> np.ndarray:
        return self._all("reset", states, render)

    def step(self, actions: np.ndarray, render: bool) -> np.ndarray:
        return self._all("step", actions, render)

    def _all(self, command: str, rows: np.ndarray, render: bool) -> np.ndarray:
        if not render:
            self.images[:] = 0
        if not self._workers:
            return getattr(self._bench, command)(rows, render)
        for _, connection, part in self._workers:
            with contextlib.suppress(OSError):  # a death is reported when the answer does not come
                connection.send((command, rows[part], render))
        return np.concatenate(self._collect())

    def _collect(self) -> list[Any]:
        answers = []
        for process, connection, _ in self._workers:
            try:
                answers.append(connection.recv())
            except (EOFError, OSError):
                answers.append(("error", f"simulation worker {process.pid} ended with status {process.wait(5)}"))
        for kind, answer in answers:
            if kind == "user_error":
                raise UserError(answer)
            if kind == "error":
                raise RuntimeError(answer)
        return [answer for _, answer in answers]

    def close(self) -> None:
        for _, connection, _ in self._workers:
            connection.close()
        for process, _, _ in self._workers:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._workers = []


def _nameless_file(size: int) -> int:
    """A descriptor of shared memory that vanishes with its last user, however that one ends."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("tabletop_images")
    else:
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    os.ftruncate(handle, size)
    return handle


def _start_worker(images: int) -> tuple[subprocess.Popen, Connection]:
    ours, theirs = Pipe()
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "workflow_src.tabletop.worker", str(theirs.fileno()), str(images)],
        pass_fds=(theirs.fileno(), images),
        # Workers are the parallelism; threads inside them would only get into each other's way.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    theirs.close()
    return process, ours


gymnasium.register(id="Tabletop-v0", vector_entry_point="workflow_src.tabletop.env:TabletopVectorEnv")
