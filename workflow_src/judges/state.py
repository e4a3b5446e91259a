"""The cross-check: read the scene's state from the pixels, then ask the lab's own predicates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from workflow_src.judges.interface import Clip, Judgement, opinion
from workflow_src.judges.network import JudgeNetworks, per_clip
from workflow_src.tabletop import tasks


class StateJudge:
    """Says of an estimated state what the lab would say of the true one. It has no probability to offer."""

    name = "state"

    def __init__(self, networks: JudgeNetworks, config: dict[str, Any], batch: int) -> None:
        self.reader, self.scene, self.batch = networks.reader, config["scene"], batch

    def judge(self, clips: Sequence[Clip]) -> list[Judgement]:
        """One judgement per clip, in the same order."""
        states = per_clip(self.reader.read, [clip.frames for clip in clips], self.batch, self.reader.mean.device)
        return [self._judge(clip, one) for clip, one in zip(clips, states)]

    def _judge(self, clip: Clip, states: np.ndarray) -> Judgement:
        task, start = tasks.get(clip.task, self.scene), states[:1]
        success = task.success(states[1:], start, self.scene)
        partial = task.partial(states[-1:], start, self.scene)
        end, ever = bool(success[-1]), bool(success.any())
        return opinion(self.name, clip, success_at_end=end, success_ever=ever, partial=float(partial[0]))
