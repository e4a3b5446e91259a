"""What every judge of success gives and takes: clips in, one judgement per clip out.

A judge that cannot decide says so (`invalid`), a judge that broke says why (`error`); neither is ever a failure of the
policy, and such rows carry no success.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from workflow_src.common.files import atomic_path
from workflow_src.rollouts.records import read_frames, read_records


@dataclass(frozen=True)
class Clip:
    """One rollout as a judge may see it."""

    trial_id: str
    policy: str
    world: str  # "lab" or "world_model"
    repeat: int
    task: str
    instruction: str
    partial_credit_criteria: str | None
    frames: np.ndarray  # uint8 (T+1, H, W, 3); frame 0 is the trial's first frame
    truth: Truth | None  # what the world itself knows; for the judge `truth` alone


@dataclass(frozen=True)
class Truth:
    """The lab's own predicate over a rollout."""

    success_at_end: bool
    success_ever: bool
    partial: float | None


@dataclass(frozen=True)
class Judgement:
    """One judge's opinion of one rollout."""

    trial_id: str
    policy: str
    world: str
    repeat: int
    judge: str
    success_at_end: bool | None  # the ranking's figure; None: no valid opinion
    success_ever: bool | None
    partial: float | None = None  # partial credit, 0..1
    score: float | None = None  # probability of success at the end, where the judge has one
    votes: int = 1  # valid opinions that were asked for
    invalid: int = 0  # answers that could not be read
    error: str | None = None  # why there is no opinion, where asking failed
    rationale: str | None = None
    tie: bool = False  # as many votes for success as against it
    failed: int = 0  # votes that were asked for and never came
    cost: float | None = None  # of all votes, in the currency of the configured prices
    model: str | None = None  # as the server names what answered
    prompt: str | None = None  # version of the question
    weight: float | None = None  # rollouts that this one stands for, in a sample drawn for labelling


class Judge(Protocol):
    """Judges many clips at once: some batch on a device, others wait on a network."""

    name: str

    def judge(self, clips: Sequence[Clip]) -> list[Judgement]:
        """One judgement per clip, in the same order."""
        ...


def opinion(judge: str, clip: Clip, **values: Any) -> Judgement:
    """A judgement of `clip` by `judge`."""
    return Judgement(clip.trial_id, clip.policy, clip.world, clip.repeat, judge, **values)


# ---- rollouts in, tables out ----------------------------------------------------------------------------------------

KEY = ["world", "policy", "trial_id", "repeat"]  # what identifies a rollout

# Column → pandas type of a table of judgements.
COLUMNS = {
    "trial_id": "string", "policy": "string", "world": "string", "repeat": "int64", "judge": "string",
    "success_at_end": "boolean", "success_ever": "boolean", "partial": "Float64", "score": "Float64", "votes": "int64",
    "invalid": "int64", "error": "string", "rationale": "string", "tie": "bool", "failed": "int64", "cost": "Float64",
    "model": "string", "prompt": "string", "weight": "Float64",
}  # fmt: skip


def read_clips(table: str | Path) -> list[Clip]:
    """The rollouts of one `rollouts.parquet`, with verified frames. Raises `UserError` naming a damaged file."""
    clips = []
    for row, frames in read_frames(read_records(table)):
        known = not pd.isna(row.success_at_end)
        truth = Truth(bool(row.success_at_end), bool(row.success_ever), _number(row.partial)) if known else None
        criteria = None if pd.isna(row.partial_credit_criteria) else row.partial_credit_criteria
        clips.append(
            Clip(row.trial_id, row.policy, row.world, row.repeat, row.task, row.instruction, criteria, frames, truth)
        )
    return clips


def _number(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)


def write_judgements(path: str | Path, judgements: Sequence[Judgement]) -> None:
    """Write a table of judgements (parquet, columns as `Judgement`), atomically."""
    assert list(COLUMNS) == [field.name for field in fields(Judgement)]
    table = pd.DataFrame([asdict(judgement) for judgement in judgements], columns=list(COLUMNS)).astype(COLUMNS)
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False)
