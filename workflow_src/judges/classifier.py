"""The learned judge: probability of success from (first frame, present frame)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from workflow_src.common.config import check_name
from workflow_src.judges.interface import Clip, Judgement, opinion
from workflow_src.judges.network import JudgeNetworks, per_clip


class ClassifierJudge:
    """`success_at_end` from the last frame, `success_ever` from any frame, each at a calibrated probability of 1/2."""

    name = "classifier"

    def __init__(self, networks: JudgeNetworks, config: dict[str, Any], batch: int) -> None:
        self.network, self.config, self.batch = networks.classifier, config, batch
        self.device = next(self.network.parameters()).device

    def judge(self, clips: Sequence[Clip]) -> list[Judgement]:
        """One judgement per clip, in the same order."""
        names = self.config["tasks"]
        for clip in clips:
            check_name(f"task of trial {clip.trial_id!r}", clip.task, names)
        logits = per_clip(self.network.logits, [clip.frames for clip in clips], self.batch, self.device)
        # Frame 0 is nobody's doing.
        own = [values[1:, names.index(clip.task)].astype(np.float64) for clip, values in zip(clips, logits)]
        return [judged(self.name, clip, calibrated(one, self.config["calibration"])) for clip, one in zip(clips, own)]


def calibrated(logits: np.ndarray, calibration: dict[str, float]) -> np.ndarray:
    """Logits that mean what they say: Platt's line through held-out episodes."""
    return calibration["slope"] * logits + calibration["intercept"]


def judged(judge: str, clip: Clip, logits: np.ndarray) -> Judgement:
    """The judgement that calibrated logits (T,) of frames 1…T amount to.

    The last frame alone decides the end, as in the lab: averaging the last two or three was no more often right, and
    misses successes of the last step.
    """
    end = float(logits[-1])
    score = float(1 / (1 + np.exp(-np.clip(end, -50, 50))))
    return opinion(judge, clip, success_at_end=end > 0, success_ever=bool((logits > 0).any()), score=score)


def fit_calibration(logits: np.ndarray, labels: np.ndarray, iterations: int = 50) -> dict[str, float]:
    """Platt's line: slope and intercept for which sigmoid(slope * logit + intercept) fits the bool labels.

    Targets are Platt's (n₊+1)/(n₊+2) and 1/(n₋+2), so perfectly separated examples keep a finite line.
    Platt, "Probabilistic outputs for support vector machines", 1999.
    """
    logits, labels = np.ravel(logits).astype(float), np.ravel(labels)
    positive, negative = labels.sum(), (~labels).sum()
    target = np.where(labels, (positive + 1) / (positive + 2), 1 / (negative + 2))
    x = np.stack([logits, np.ones_like(logits)], 1)
    line = np.array([1.0, 0.0])
    for _ in range(iterations):
        p = 1 / (1 + np.exp(-np.clip(x @ line, -50, 50)))
        # A little ridge towards the uncalibrated line keeps the step bounded where p saturates.
        gradient = x.T @ (p - target) + 1e-2 * (line - [1.0, 0.0])
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-2 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        line = line - step * min(1.0, 2.0 / (np.abs(step).max() + 1e-12))
    if line[0] <= 0:
        # A classifier that learned nothing; turning its opinions round would be no calibration.
        return {"slope": 1.0, "intercept": 0.0}
    return {"slope": float(line[0]), "intercept": float(line[1])}
