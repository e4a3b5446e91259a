"""A process that simulates some of the environment's tabletops, and the same work done in-process.

Started as `python -m workflow_src.tabletop.worker CONNECTION_FD IMAGES_FD` by `env.py`. A fresh interpreter instead
of a fork: forking a process that runs OpenMP threads may deadlock, and `multiprocessing` would import the caller's
main module, torch and all, once per worker. Images travel through shared memory without a name, so a killed run
leaves none behind.
"""

from __future__ import annotations

import mmap
import signal
import sys
import traceback
from multiprocessing.connection import Connection

import numpy as np

from workflow_src.common.errors import UserError
from workflow_src.common.process import die_with_parent
from workflow_src.tabletop.render import Renderer
from workflow_src.tabletop.simulator import Simulator


class Bench:
    """Simulators side by side that write their images into `images (n, H, W, 3)`."""

    def __init__(self, scene: str, size: int, supersample: int, images: np.ndarray):
        self.images = images
        self._simulators = [Simulator(scene) for _ in images]
        self._renderers = [Renderer(scene, size, supersample) for _ in images]

    def reset(self, states: np.ndarray, render: bool) -> np.ndarray:
        """Begin at float32 `states (n, S)`; returns the states."""
        for simulator, state in zip(self._simulators, states):
            simulator.reset(state)
        self._draw(render)
        # What was asked for, not what MuJoCo makes of it: a recorded first state must reset to itself.
        return states

    def step(self, actions: np.ndarray, render: bool) -> np.ndarray:
        """Carry out `actions (n, 7)`; returns the states `(n, S)`."""
        for simulator, action in zip(self._simulators, actions):
            simulator.step(action)
        self._draw(render)
        return np.stack([simulator.state() for simulator in self._simulators])

    def _draw(self, render: bool) -> None:
        if render:
            for image, simulator, renderer in zip(self.images, self._simulators, self._renderers):
                image[:] = renderer.render(simulator.data)


def main() -> None:
    die_with_parent()
    # Ctrl-C goes to the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection, shared = Connection(int(sys.argv[1])), mmap.mmap(int(sys.argv[2]), 0)
    bench = None
    while True:
        try:
            command, *arguments = connection.recv()
        except EOFError:
            return
        try:
            if command == "open":
                scene, size, supersample, total, first, last = arguments
                images = np.frombuffer(shared, np.uint8, total * size * size * 3).reshape(total, size, size, 3)
                bench = Bench(scene, size, supersample, images[first:last])
                reply = None
            else:
                reply = getattr(bench, command)(*arguments)
            connection.send(("done", reply))
        except UserError as error:
            connection.send(("user_error", str(error)))
        except Exception:
            connection.send(("error", traceback.format_exc()))


if __name__ == "__main__":
    main()
