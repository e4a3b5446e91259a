"""Export the splits of a store as one LeRobot v3.0 data set.

Videos are copied as they are, one file per episode. A frame's `action` is the metric one that leads on from it; the last
frame's, which leads nowhere, is zero and keeps the gripper. `observation.state` is what the store recorded of its robot; where
it recorded fewer than two numbers, zeros: LeRobot trains no policy without a state, and takes a vector of one for a number.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import atomic_path, copy_file, write_json
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import Progress
from workflow_src.episodes.actions import GRIPPER, metric_actions
from workflow_src.episodes.lerobot import TASK
from workflow_src.episodes.sources import LEROBOT_INFO
from workflow_src.episodes.store import EpisodeStore, episode_paths

EXAMPLES = """example:
  python -m workflow_src.episodes.export_lerobot results/episodes/viola/train results/episodes/viola/test --out viola_lerobot
"""
CAMERA, STATE = "observation.images.main", "observation.state"
FEWEST = 2  # numbers in a state
CHUNK = 1000  # files in a folder
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
NAMES = ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper_open", "base_x", "base_y", "base_yaw"]
COUNTERS = ("timestamp", "frame_index", "episode_index", "index", "task_index")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stores", type=Path, nargs="+", help="folders of a store's splits; their names become the splits'"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    die_with_parent()
    export([EpisodeStore(path) for path in arguments.stores], arguments.out)


def export(stores: list[EpisodeStore], out: Path) -> None:
    """Write the LeRobot data set `out`; `meta/info.json` comes last. Raises UserError for stores that do not go together."""
    hz, robot, size, width = _common(stores)
    texts = list(dict.fromkeys(text for store in stores for text in store.table["instruction"]))
    rows, splits, tables, first = [], {}, [], 0
    with Progress(sum(map(len, stores)), "export", "episode") as progress:
        for store in stores:
            splits[store.root.name] = f"{len(rows)}:{len(rows) + len(store)}"
            for i in range(len(store)):
                table = _frames(store, i, len(rows), first, hz, texts, width)
                rows.append(_episode(table, texts, hz))
                video = VIDEO_PATH.format(
                    video_key=CAMERA, chunk_index=len(tables) // CHUNK, file_index=len(tables) % CHUNK
                )
                copy_file(episode_paths(store.root, int(store.table["index"].iloc[i]))[0], out / video)
                tables.append(table)
                first += len(table)
                progress.update()
    frames = pd.concat(tables, ignore_index=True)
    for path, table in (("data/chunk-000/file-000", frames), ("meta/episodes/chunk-000/file-000", pd.DataFrame(rows))):
        with atomic_path(out / f"{path}.parquet") as temporary:
            table.to_parquet(temporary, index=False)
    with atomic_path(out / "meta" / "tasks.parquet") as temporary:
        pd.DataFrame({"task_index": range(len(texts))}, index=pd.Index(texts, name=TASK)).to_parquet(temporary)
    write_json(out / "meta" / "stats.json", _statistics(frames, stores))
    write_json(out / LEROBOT_INFO, {
        "codebase_version": "v3.0", "robot_type": robot, "total_episodes": len(rows), "total_frames": len(frames),
        "total_tasks": len(texts), "chunks_size": CHUNK, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200,
        "fps": int(hz) if hz == int(hz) else hz, "splits": splits, "data_path": DATA_PATH, "video_path": VIDEO_PATH,
        "features": _features(size, len(frames["action"][0]), len(frames[STATE][0]), hz),
    })  # fmt: skip


def _common(stores: list[EpisodeStore]) -> tuple[float, str, tuple[int, int], int]:
    """Rate, robot, size of the frames, and numbers in the robot's state (0: none is recorded)."""
    facts = {(float(row.control_hz), str(row.embodiment)) for store in stores for row in store.table.itertuples()}
    sizes = {store.image_size() for store in stores}
    states = {_width(store.arrays(0)) for store in stores}
    names = [store.root.name for store in stores]
    if len(facts) != 1 or len(sizes) != 1 or len(states) != 1 or len(set(names)) < len(names):
        raise UserError(
            f"{', '.join(str(store.root) for store in stores)}: robots and rates {sorted(facts)}, frames {sorted(sizes)}, "
            f"numbers in robot_state {sorted(states)}; give splits of one data set, each once"
        )
    ((hz, robot),) = facts
    return hz, robot, sizes.pop(), states.pop()


def _width(arrays: dict[str, np.ndarray]) -> int:
    state = arrays.get("robot_state")
    return 0 if state is None else state.shape[1]


def _frames(
    store: EpisodeStore, i: int, episode: int, first: int, hz: float, texts: list[str], width: int
) -> pd.DataFrame:
    count, arrays = int(store.lengths[i]), store.arrays(i)
    if (found := _width(arrays)) != width:
        path = episode_paths(store.root, int(store.table["index"].iloc[i]))[1]
        raise UserError(
            f"{path}: robot_state has {found} numbers, in the first episode {width}; export stores of one robot"
        )
    state = arrays["robot_state"] if width else np.zeros((count, 0), np.float32)
    actions = metric_actions(store, i, arrays, count)
    last = np.zeros_like(actions[-1:])
    last[:, GRIPPER] = actions[-1, GRIPPER]
    return pd.DataFrame({
        "action": list(np.concatenate([actions, last])), STATE: list(np.pad(state, ((0, 0), (0, max(0, FEWEST - width))))),
        "timestamp": (np.arange(count) / hz).astype(np.float32), "frame_index": np.arange(count),
        "episode_index": episode, "index": first + np.arange(count),
        "task_index": texts.index(store.table["instruction"].iloc[i]),
    })  # fmt: skip


def _episode(table: pd.DataFrame, texts: list[str], hz: float) -> dict:
    number, first = int(table["episode_index"][0]), int(table["index"][0])
    return {
        "episode_index": number, "tasks": [texts[table["task_index"][0]]], "length": len(table),
        "data/chunk_index": 0, "data/file_index": 0, "dataset_from_index": first, "dataset_to_index": first + len(table),
        f"videos/{CAMERA}/chunk_index": number // CHUNK, f"videos/{CAMERA}/file_index": number % CHUNK,
        f"videos/{CAMERA}/from_timestamp": 0.0, f"videos/{CAMERA}/to_timestamp": len(table) / hz,
        "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0,
    }  # fmt: skip


def _features(size: tuple[int, int], width: int, state: int, hz: float) -> dict:
    height, columns = size
    video = {"video.height": height, "video.width": columns, "video.codec": "h264", "video.fps": hz, "video.channels": 3,
             "video.is_depth_map": False, "has_audio": False}  # fmt: skip
    counters = {name: {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1], "names": None}
                for name in COUNTERS}  # fmt: skip
    return {
        "action": {"dtype": "float32", "shape": [width], "names": NAMES[:width]},
        STATE: {"dtype": "float32", "shape": [state], "names": [f"state_{i}" for i in range(state)]},
        CAMERA: {
            "dtype": "video",
            "shape": [height, columns, 3],
            "names": ["height", "width", "channels"],
            "info": video,
        },
        **counters,
    }


def _statistics(frames: pd.DataFrame, stores: list[EpisodeStore]) -> dict:
    """Minimum, maximum, mean, standard deviation and count of every feature; images by the first frame of each episode."""
    columns = {name: frames[name].to_numpy(np.float64)[:, None] for name in COUNTERS}
    columns |= {name: np.stack(frames[name]).astype(np.float64) for name in ("action", STATE)}
    found = {name: _summary(values, 0) for name, values in columns.items()}
    images = np.concatenate([store.read(i, [0]) for store in stores for i in range(len(store))]) / 255
    found[CAMERA] = _summary(images.transpose(0, 3, 1, 2), (0, 2, 3)) | {"count": [len(images)]}
    return found


def _summary(values: np.ndarray, axes: int | tuple[int, ...]) -> dict[str, list]:
    keep = values.ndim == 4  # LeRobot has images' as (channels, 1, 1)
    parts = {name: getattr(values, name)(axis=axes, keepdims=keep) for name in ("min", "max", "mean", "std")}
    return {name: (part[0] if keep else part).tolist() for name, part in parts.items()} | {"count": [len(values)]}


if __name__ == "__main__":
    run_cli(main)
