"""Rollout records: a video and an npz per rollout, a journal while they are made, and `rollouts.parquet` written last.

Only the parquet file is declared to Snakemake, so an interrupted job finds its finished rollouts again; it trusts them
only if the journal was written for the same inputs and the files still have the checksums noted there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workflow_src.common.errors import UserError
from workflow_src.common.files import Journal, atomic_path, sha256_file
from workflow_src.common.video import read_video, write_video
from workflow_src.rollouts.loop import Item, Rollout

# Column → pandas type. Nullable types, because the world model has no truth and the lab has no model digest.
COLUMNS = {
    "trial_id": "string", "task": "string", "instruction": "string", "partial_credit_criteria": "string",
    "policy": "string", "world": "string", "repeat": "int64", "seed": "int64", "steps": "int64",
    "control_hz": "float64", "terminated": "bool", "video": "string", "sha256": "string", "arrays": "string",
    "sha256_arrays": "string", "seconds": "float64", "model_digest": "string", "policy_digest": "string",
    "success_at_end": "boolean", "success_ever": "boolean", "partial": "Float64", "robot_state": "string",
}  # fmt: skip
LATER = ("robot_state",)  # columns that older records lack


@dataclass(frozen=True)
class Source:
    """What all rollouts of one record have in common."""

    policy: str
    world: str  # "lab" or "world_model"
    control_hz: float
    policy_digest: str
    model_digest: str | None  # of the world model; None in the lab
    robot_state: str | None = None  # what the policy was told of the robot: "dead_reckoned", or None for nothing


class Recorder:
    """The folder of one (world, policy, shard). `key` is the digest of everything its rollouts depend on."""

    def __init__(self, table: Path, source: Source, key: str):
        self.table, self.folder, self.source = table, table.parent, source
        self.folder.mkdir(parents=True, exist_ok=True)
        # An old table must not vouch for files that are being replaced.
        table.unlink(missing_ok=True)
        self._journal = Journal(self.folder / "journal.jsonl", key)

    def missing(self, items: Iterable[Item]) -> list[Item]:
        """Those of `items` that have no finished rollout, or one whose files were lost or damaged."""
        return [item for item in items if not self._finished(item)]

    def _finished(self, item: Item) -> bool:
        row = self._journal.done.get(item.name)
        if row is None:
            return False
        files = {row["video"]: row["sha256"], row["arrays"]: row["sha256_arrays"]}
        return all((self.folder / f).is_file() and sha256_file(self.folder / f) == sha for f, sha in files.items())

    def write(self, rollout: Rollout) -> None:
        """Write one rollout's files, then note it in the journal."""
        item, source = rollout.item, self.source
        stem = f"{item.trial.trial_id.replace('/', '__')}__r{item.repeat}"
        video, arrays = self.folder / f"{stem}.mp4", self.folder / f"{stem}.npz"
        write_video(video, rollout.frames, source.control_hz)
        _write_arrays(arrays, rollout)
        self._journal.record(
            item.name,
            trial_id=item.trial.trial_id, task=item.trial.task, instruction=item.trial.instruction,
            partial_credit_criteria=item.trial.partial_credit_criteria, policy=source.policy, world=source.world,
            repeat=item.repeat, seed=item.trial.seed, steps=rollout.steps, control_hz=source.control_hz,
            terminated=rollout.terminated, video=video.name, sha256=sha256_file(video), arrays=arrays.name,
            sha256_arrays=sha256_file(arrays), seconds=round(rollout.seconds, 4), model_digest=source.model_digest,
            policy_digest=source.policy_digest, robot_state=source.robot_state, **_truth(rollout),
        )  # fmt: skip

    def finish(self, items: Iterable[Item]) -> None:
        """Write the table of all `items`, in their order. With no item at all: a table without rows."""
        rows = [self._journal.done[item.name] for item in items]
        table = pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)
        with atomic_path(self.table) as temporary:
            table.to_parquet(temporary, index=False)


def _truth(rollout: Rollout) -> dict[str, Any]:
    """Success and partial credit as the world itself knows them. Frame 0 is not the policy's doing: not counted."""
    if rollout.success is None:
        return {"success_at_end": None, "success_ever": None, "partial": None}
    return {
        "success_at_end": bool(rollout.success[-1]),
        "success_ever": bool(rollout.success[1:].any()),
        "partial": None if rollout.partial is None else float(rollout.partial[-1]),
    }


def _write_arrays(path: Path, rollout: Rollout) -> None:
    arrays = {"actions": rollout.actions}
    if rollout.states is not None:
        arrays["state"] = rollout.states.astype(np.float32)
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)


# ---- reading --------------------------------------------------------------------------------------------------------


def read_records(table: str | Path) -> pd.DataFrame:
    """A `rollouts.parquet` with `video` and `arrays` as full paths. Raises `UserError` naming an unreadable file."""
    table = Path(table)
    try:
        rows = pd.read_parquet(table)
    except (OSError, ValueError) as error:
        raise UserError(f"{table}: not a readable table of rollouts ({error}); delete it and run again") from None
    for column in LATER:
        if column not in rows:
            rows[column] = pd.array([None] * len(rows), COLUMNS[column])
    if absent := sorted(set(COLUMNS) - set(rows)):
        raise UserError(f"{table}: lacks the column(s) {', '.join(absent)}; delete it and run again")
    for column in ("video", "arrays"):
        rows[column] = [str(table.parent / name) for name in rows[column]]
    return rows


def read_frames(rows: pd.DataFrame) -> Iterator[tuple[Any, np.ndarray]]:
    """Every row of `read_records` with its verified frames, uint8 (T+1, H, W, 3)."""
    records = list(rows.itertuples(index=False))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        yield from zip(records, pool.map(_verified_frames, records))


def _verified_frames(row: Any) -> np.ndarray:
    if not Path(row.video).is_file() or sha256_file(row.video) != row.sha256:
        raise UserError(f"{row.video}: missing or damaged; delete rollouts.parquet beside it and run again")
    return read_video(row.video)
