"""Genuine RLDS directories in small, made without TensorFlow: TFDS serialises, our TFRecord writer frames."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from workflow_src.episodes.tfrecord import write_records


def jpeg(seed: int, size: tuple[int, int] = (24, 32)) -> bytes:
    """A smooth random image, encoded; `size`: rows, columns."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def features_of(step: dict[str, Any]) -> dict[str, Any]:
    """TFDS features that hold such a step."""
    import tensorflow_datasets as tfds

    found: dict[str, Any] = {}
    for name, value in step.items():
        if isinstance(value, dict):
            found[name] = features_of(value)
        elif isinstance(value, bytes):
            found[name] = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg", dtype=np.uint8)
        elif isinstance(value, str):
            found[name] = tfds.features.Text()
        else:
            value = np.asarray(value)
            found[name] = tfds.features.Tensor(shape=value.shape, dtype=value.dtype.type)
    return found


def write_rlds(root: Path, splits: dict[str, list[list[list[dict[str, Any]]]]], name: str = "toy") -> Path:
    """An RLDS directory of `splits`: name → shards → episodes → steps."""
    import tensorflow_datasets as tfds

    root.mkdir(parents=True)
    example = next(iter(splits.values()))[0][0][0]
    features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(features_of(example))})
    features.save_config(str(root))
    infos = []
    for split, shards in splits.items():
        sizes = []
        for number, episodes in enumerate(shards):
            path = root / f"{name}-{split}.tfrecord-{number:05d}-of-{len(shards):05d}"
            payloads = [features.serialize_example(features.encode_example({"steps": steps})) for steps in episodes]
            write_records(path, payloads)
            sizes.append(path.stat().st_size)
        infos.append({
            "name": split, "numBytes": str(sum(sizes)), "shardLengths": [str(len(episodes)) for episodes in shards],
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        })  # fmt: skip
    info = {"name": name, "version": "0.1.0", "fileFormat": "tfrecord", "splits": infos}
    (root / "dataset_info.json").write_text(json.dumps(info))
    return root


# What a step holds besides its actions, and actions that nothing reads, by data set: feature → width, or a text.
EXTRAS: dict[str, dict[str, Any]] = {
    "bridge": {"observation/state": 7},
    "bridge_v2": {"observation/state": 7},
    "taco_play": {"observation/robot_obs": 15, "observation/structured_language_instruction": "lift_red",
                  "action/actions": 7},
    "jaco_play": {"observation/end_effector_cartesian_pos": 7},
    "berkeley_cable_routing": {"observation/robot_state": 7},
    "viola": {"observation/ee_states": 16},
    "berkeley_autolab_ur5": {"observation/robot_state": 15},
    "toto": {"observation/state": 7},
} | {f"libero_{suite}": {"observation/state": 8} for suite in ("10", "goal", "object", "spatial")}  # fmt: skip


def steps_of(name: str, entry: Any, recorded: dict[str, np.ndarray], count: int, seed: int) -> list[dict[str, Any]]:
    """An episode of `count` steps in the schema of a registered set: `recorded` actions over and over, noise as state."""
    rng, steps = np.random.default_rng(seed), []
    for t in range(count):
        leaves: dict[str, Any] = {path: values[t % len(values)] for path, values in recorded.items()}
        leaves |= {entry.image: jpeg(1000 * seed + t), entry.instruction: f"task {seed}", "is_last": t == count - 1}
        for path, extra in EXTRAS.get(name, {}).items():
            leaves[path] = extra if isinstance(extra, str) else rng.normal(size=extra).astype(np.float32)
        step: dict[str, Any] = {}
        for path, leaf in leaves.items():
            *parents, last = path.split("/")
            branch = step
            for parent in parents:
                branch = branch.setdefault(parent, {})
            branch[last] = leaf
        steps.append(step)
    return steps
