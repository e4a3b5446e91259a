"""Which data sets a world model is trained on: how `world_model.data` and `world_model.frame_skip` are read.

data: "rt_1,bridge_v2"               every clip of every one of them is equally likely
data: {rt_1: 1.0, bridge_v2: 2.0}    a clip comes from bridge_v2 twice as often as from rt_1, however many each holds
data: ""                             the lab's own
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workflow_src.common.config import check_name
from workflow_src.common.errors import UserError


@dataclass(frozen=True)
class Mixture:
    """Data sets by `names`, the primary one first, and their `weights`; None: each counts by the clips it holds."""

    names: tuple[str, ...]
    weights: tuple[float, ...] | None

    def shares(self, clips: Sequence[int]) -> np.ndarray:
        """Share of the training clips that each data set gives, float64, where they hold `clips` usable clips each."""
        weights = np.asarray(clips if self.weights is None else self.weights, np.float64)
        return weights / weights.sum()


def read_mixture(data: str | dict[str, float], own: str) -> Mixture:
    """The mixture that `world_model.data` describes; `own`: name of the lab's data set.

    Of a list the first is the primary one; of weights, whose order in a file means nothing, the heaviest, then by name.
    """
    if isinstance(data, dict) and data:
        for name, weight in data.items():
            if not 0 < weight < float("inf"):
                raise UserError(
                    f"world_model.data.{name}: weight {weight} is not positive; leave the data set out instead"
                )
        names = sorted(data, key=lambda name: (-data[name], name))
        return Mixture(tuple(names), tuple(data[name] for name in names))
    names = [name.strip() for name in (data or own).split(",")]
    if "" in names or len(set(names)) < len(names):
        raise UserError(f"world_model.data: {data!r} names nothing or the same twice; write one,two")
    return Mixture(tuple(names), None)


def frame_skips(frame_skip: int | dict[str, int], names: Sequence[str]) -> list[int]:
    """For each of `names`, how many recorded frames lie from one frame of a clip to the next: 1 shows them all."""
    by_name = frame_skip if isinstance(frame_skip, dict) else dict.fromkeys(names, frame_skip)
    for name, skip in by_name.items():
        check_name("world_model.frame_skip", name, names)
        if skip < 1:
            raise UserError(f"world_model.frame_skip: {skip} for {name} is impossible; it must be at least 1")
    return [by_name.get(name, 1) for name in names]
