"""Clips with known labels that a careless judge gets wrong, made from lab rollouts and the states recorded with them.

    recorded   as it was
    clipped    a success cut off some time before it happened: a near miss
    swapped    a success under the instruction of another task: the wrong thing done well
    reversed   a success played backwards: it ends where it began
    shuffled   a success with its frames in random order

The lab's own predicate labels each from the states of the frames it shows, so labels are exact. Judges that do not look at the
order of frames, or credit the attempt instead of the outcome, call reversed and clipped successes successes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workflow_src.common.errors import UserError
from workflow_src.common.seeds import rng
from workflow_src.judges.interface import Clip
from workflow_src.rollouts.records import read_frames, read_records
from workflow_src.tabletop import tasks

KINDS = ("recorded", "clipped", "swapped", "reversed", "shuffled")


@dataclass(frozen=True)
class Probe:
    """A clip and whether it shows success at its end."""

    kind: str
    clip: Clip
    label: bool


def make_probes(tables: Sequence[Path], scene: str, names: Sequence[str], count: int, seed: int) -> list[Probe]:
    """Probes from `count` lab rollouts, half of them successes as far as there are as many.

    `scene` and `names`: the lab's scene and its tasks. Raises `UserError` without a rollout that has states.
    """
    rows = _choose(pd.concat([read_records(table) for table in tables], ignore_index=True), count, seed)
    if rows.empty:
        raise UserError(f"{tables[0]}: no lab rollout with known truth; probes cannot be made")
    return [probe for row, frames in read_frames(rows) for probe in _probes_of(row, frames, scene, names, seed)]


def _choose(rows: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    known = rows[rows["success_at_end"].notna()].sort_values(["policy", "trial_id", "repeat"], ignore_index=True)
    mixed = known.iloc[rng(seed, "probes").permutation(len(known))]
    success = mixed["success_at_end"].astype(bool)
    good, bad = mixed[success], mixed[~success]
    of_each = [max(count // 2, count - len(bad)), max(count - count // 2, count - len(good))]
    return pd.concat([good.head(of_each[0]), bad.head(of_each[1])], ignore_index=True)


def _probes_of(row: Any, frames: np.ndarray, scene: str, names: Sequence[str], seed: int) -> Iterator[Probe]:
    states = _states(row, len(frames))
    criteria = None if pd.isna(row.partial_credit_criteria) else row.partial_credit_criteria
    clip = Clip(row.trial_id, row.policy, row.world, row.repeat, row.task, row.instruction, criteria, frames, None)
    dice = rng(seed, "probe", row.policy, row.trial_id, int(row.repeat))

    def probe(kind: str, order: np.ndarray, name: str = row.task) -> Probe:
        seen, changed = states[order], replace(clip, frames=frames[order])
        if name != row.task:
            task = tasks.get(name, scene)
            # Partial credit stays out: nobody said what of the other task would deserve it.
            changed = replace(changed, task=name, instruction=task.instruction, partial_credit_criteria=None)
        return Probe(kind, changed, bool(tasks.get(name, scene).success(seen[-1:], seen[:1], scene)[0]))

    whole = np.arange(len(frames))
    yield probe("recorded", whole)
    if not row.success_at_end:
        return
    first = int(tasks.get(row.task, scene).success(states, states[:1], scene)[1:].argmax()) + 1
    if first > 1:
        yield probe("clipped", whole[: dice.integers(first // 2, first) + 1])
    others = [name for name in names if name != row.task]
    if others:
        yield probe("swapped", whole, others[dice.integers(len(others))])
    yield probe("reversed", whole[::-1])
    yield probe("shuffled", dice.permutation(whole))


def _states(row: Any, length: int) -> np.ndarray:
    """States (T+1, S) of a lab rollout's frames."""
    try:
        with np.load(row.arrays) as arrays:
            states = arrays["state"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{row.arrays}: holds no states ({error}); probes need a lab that records them") from None
    if len(states) != length:
        raise UserError(f"{row.arrays}: {len(states)} states for {length} frames; roll out again")
    return states
