"""Imagined and real rollouts of the same policy from the same first frame, side by side with their verdicts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workflow_src.analysis.records import IMAGINED, KEY, LAB, TRUTH, check_judged, load_judgements, load_rollouts
from workflow_src.common.video import enlarge, read_video

if TYPE_CHECKING:
    import pandas as pd

OUTCOMES = ("success", "failure", "only imagined", "only real", "unjudged")
GAP = 8  # pixels between imagined and real
GROUND = 255


@dataclass(frozen=True)
class Pair:
    """One imagined rollout and, where there is a lab, the real one of the same trial and repeat."""

    policy: str
    task: str
    trial_id: str
    repeat: int
    instruction: str
    control_hz: float
    imagined_video: str
    real_video: str | None
    imagined: bool | None  # verdict of the primary judge; None: no valid judgement
    real: bool | None  # the lab's truth

    @property
    def outcome(self) -> str:
        """One of `OUTCOMES`; without a lab the imagined verdict alone."""
        if self.imagined is None:
            return "unjudged"
        if self.real is None or self.imagined == self.real:
            return "success" if self.imagined else "failure"
        return "only imagined" if self.imagined else "only real"

    def frames(self, height: int) -> np.ndarray:
        """Imagined left, real right, enlarged to about `height` pixels: uint8 `(T, H, W, 3)` with even H and W."""
        clips = [enlarge(read_video(video), height) for video in (self.imagined_video, self.real_video) if video]
        length = max(map(len, clips))
        # A policy that terminated early leaves fewer frames: its last one is held.
        clips = [np.concatenate([clip, clip[-1:].repeat(length - len(clip), 0)]) for clip in clips]
        if len(clips) == 1:
            return clips[0]
        bar = np.full((length, clips[0].shape[1], GAP, 3), GROUND, np.uint8)
        return np.concatenate([clips[0], bar, clips[1]], axis=2)


def load_pairs(stage: Any, rollouts: Iterable[str | Path], judgements: Iterable[str | Path]) -> list[Pair]:
    """All pairs, in the configured order of policies and tasks, then by trial and repeat."""
    records, verdicts = load_rollouts(rollouts), load_judgements(judgements)
    check_judged(records, verdicts)
    imagined = _verdicts(verdicts, IMAGINED, stage.judges.primary)
    real = _verdicts(verdicts, LAB, TRUTH)
    lab = records[records["world"] == LAB].set_index(KEY[1:])["video"].to_dict()
    pairs = []
    for row in records[records["world"] == IMAGINED].itertuples():
        key = (row.policy, row.trial_id, row.repeat)
        pairs.append(Pair(row.policy, row.task, row.trial_id, int(row.repeat), row.instruction, float(row.control_hz),
                          row.video, lab.get(key), imagined.get(key), real.get(key)))  # fmt: skip
    policies, tasks = list(stage.policies), list(stage.lab.tasks)
    known = [pair for pair in pairs if pair.policy in policies and pair.task in tasks]
    return sorted(known, key=lambda p: (policies.index(p.policy), tasks.index(p.task), p.trial_id, p.repeat))


def _verdicts(table: pd.DataFrame, world: str, judge: str) -> dict[tuple, bool]:
    rows = table[(table["world"] == world) & (table["judge"] == judge) & table["valid"]]
    return {key: bool(value >= 0.5) for key, value in rows.set_index(KEY[1:])["success_at_end"].items()}


def by_imagined_success(pairs: Sequence[Pair]) -> list[str]:
    """Policies from best to worst imagined success; ties in the order of `pairs`."""
    verdicts = defaultdict(list)
    for pair in pairs:
        verdicts[pair.policy].append(bool(pair.imagined))
    return sorted(verdicts, key=lambda policy: -np.mean(verdicts[policy]))


def spread(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """At most `count` of one policy's pairs, in turn from its (outcome, task) groups, so that rare ones are shown."""
    groups: dict[tuple, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.outcome, pair.task].append(pair)
    queues = [groups[key] for key in sorted(groups, key=lambda key: (OUTCOMES.index(key[0]), key[1]))]
    turns = [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
    chosen = set(map(id, turns[:count]))
    return [pair for pair in pairs if id(pair) in chosen]
