"""Training checkpoints that are whole or not there: one safetensors file and one JSON file that vouches for it.

`step_000000250.safetensors` holds every tensor; `step_000000250.json`, written after it, holds step, recipe digest, the
tensors' sha256 and the history. No pickle: loading a checkpoint runs no code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from workflow_src.common.files import atomic_path, sha256_file, write_text
from workflow_src.common.progress import say


@dataclass(frozen=True)
class Checkpoint:
    """What a training continues from. `tensors` are on the CPU; `step` counts finished steps."""

    step: int
    tensors: dict[str, Tensor]
    history: list[dict[str, float]]


def save(folder: Path, digest: str, checkpoint: Checkpoint, keep: int) -> None:
    """Write a checkpoint atomically, then remove all but the newest `keep` of this `digest`, and those of any other."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step_*.tmp.*"):  # a killed process could not remove them
        leftover.unlink(missing_ok=True)
    weights = folder / f"step_{checkpoint.step:09d}.safetensors"
    with atomic_path(weights) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}, temporary)
        checksum = sha256_file(temporary)
    record = {"step": checkpoint.step, "digest": digest, "sha256": checksum, "history": checkpoint.history}
    # Losses may be NaN for metrics without a sample, so this is JSON as Python reads and writes it.
    write_text(weights.with_suffix(".json"), json.dumps(record))
    kept = 0
    for path in _records(folder):
        kept += (mine := _read(path).get("digest") == digest)
        if not mine or kept > max(1, keep):
            path.unlink(missing_ok=True)
            path.with_suffix(".safetensors").unlink(missing_ok=True)


def load_newest(folder: Path, digest: str) -> Checkpoint | None:
    """The newest checkpoint of `digest` that is whole; damaged ones are skipped with a warning that names the file."""
    for path in _records(folder):
        record = _read(path)
        if not record:
            _warn(f"{path} is damaged; trying an older checkpoint")
            continue
        if record["digest"] != digest:
            continue
        weights = path.with_suffix(".safetensors")
        try:
            if sha256_file(weights) != record["sha256"]:
                raise ValueError("its checksum differs")
            return Checkpoint(int(record["step"]), load_file(weights), record["history"])
        except (OSError, ValueError, SafetensorError) as error:
            _warn(f"{weights} is damaged ({error}); trying an older checkpoint")
    return None


def _records(folder: Path) -> list[Path]:
    """Checkpoint records, newest first."""
    return sorted(folder.glob("step_*.json"), reverse=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if {"step", "digest", "sha256", "history"} <= record.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _warn(text: str) -> None:
    say(f"warning: {text}")
