"""LeRobot data sets in and out: what a store exports comes back, versions 2 and 3, time stamps, damage."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from envs.build import interpreter
from tests.stores import frames_of, make_store
from workflow_src.common.errors import UserError
from workflow_src.common.video import write_video
from workflow_src.episodes.action_maps import ActionMap
from workflow_src.episodes.convert import convert
from workflow_src.episodes.export_lerobot import CAMERA, STATE, export
from workflow_src.episodes.lerobot import LeRobot
from workflow_src.episodes.merge import merge
from workflow_src.episodes.registry import Dataset
from workflow_src.episodes.sources import open_source
from workflow_src.episodes.store import EpisodeStore
from workflow_src.workflow import ROOT

ENTRY = Dataset(
    version="v3.0", splits={"train": 0, "test": 0}, image=CAMERA, instruction="task", control_hz=5.0, embodiment="tabletop",
    action=ActionMap(translation="action[0:3]", rotation="action[3:6]", gripper="action[6:7]", gripper_means="open",
                     reason="as exported"),
    licence="own", licence_source="own",
)  # fmt: skip


@pytest.fixture
def stores(tmp_path) -> list[EpisodeStore]:
    made = []
    for split, lengths in (("train", [5, 7, 4]), ("test", [6])):
        store = make_store(tmp_path / "store" / split, frames_of(lengths, seed=len(lengths)), seed=len(lengths))
        store.table["instruction"] = [f"{split} {i % 2}" for i in range(len(store))]
        made.append(store)
    return made


def bring(source: Path, folder: Path, entry: Dataset = ENTRY) -> dict[str, EpisodeStore]:
    out = folder / "groups" / "1-of-1.json"
    convert("mine", entry, open_source(source), (1, 1), 16, out)
    for split in entry.splits:
        merge([out], split, 0.0, folder / split / "episodes.parquet")
    return {split: EpisodeStore(folder / split) for split in entry.splits}


def test_what_is_exported_comes_back(tmp_path, stores):
    """Actions bit by bit, frames within what H.264 loses, instructions, numbering from one split to the next."""
    export(stores, tmp_path / "out")
    back = bring(tmp_path / "out", tmp_path / "back")
    assert back["train"].table["index"].tolist() == [0, 1, 2] and back["test"].table["index"].tolist() == [3]
    for store in stores:
        again = back[store.root.name]
        assert again.table["instruction"].tolist() == store.table["instruction"].tolist()
        for i in range(len(store)):
            np.testing.assert_array_equal(again.arrays(i)["actions"], store.arrays(i)["actions"])
    source = LeRobot(tmp_path / "out")
    images = [steps.images for shard in source.shards() for steps in source.episodes(shard, [], CAMERA)]
    originals = [store.frames(i) for store in (stores[1], stores[0]) for i in range(len(store))]
    for image, original in zip(images, originals, strict=True):
        np.testing.assert_array_equal(np.stack(image), original)


def test_the_export_describes_itself(tmp_path, stores):
    export(stores, tmp_path / "out")
    info = json.loads((tmp_path / "out" / "meta" / "info.json").read_text())
    assert (info["total_episodes"], info["total_frames"], info["fps"], info["robot_type"]) == (4, 22, 5, "tabletop")
    assert info["splits"] == {"train": "0:3", "test": "3:4"} and info["features"]["action"]["shape"] == [7]
    rows = pd.read_parquet(tmp_path / "out" / "meta" / "episodes")
    assert rows["length"].tolist() == [5, 7, 4, 6] and rows["dataset_from_index"].tolist() == [0, 5, 12, 16]
    table = pd.read_parquet(tmp_path / "out" / "data" / "chunk-000" / "file-000.parquet")
    assert table["index"].tolist() == list(range(22)) and table["timestamp"][1] == pytest.approx(0.2)
    stats = json.loads((tmp_path / "out" / "meta" / "stats.json").read_text())
    np.testing.assert_allclose(stats["action"]["mean"], np.stack(table["action"]).mean(0), rtol=1e-5)
    assert np.shape(stats[CAMERA]["mean"]) == (3, 1, 1) and 0 < np.min(stats[CAMERA]["mean"]) < 1


def test_recorded_states_are_exported_as_they_are(tmp_path):
    states = [np.random.default_rng(i).normal(size=(count, 5)).astype(np.float32) for i, count in enumerate((4, 6))]
    store = make_store(tmp_path / "train", frames_of([4, 6]), robot_state=states)
    store.table["instruction"] = "lift it"
    export([store], tmp_path / "out")
    back = bring(
        tmp_path / "out", tmp_path / "back", dataclasses.replace(ENTRY, splits={"train": 0}, robot_state=STATE)
    )
    for i, state in enumerate(states):
        np.testing.assert_array_equal(back["train"].arrays(i)["robot_state"], state)
    features = json.loads((tmp_path / "out" / "meta" / "info.json").read_text())["features"]
    assert features[STATE]["shape"] == [5] and len(features[STATE]["names"]) == 5

    odd = make_store(tmp_path / "odd" / "train", frames_of([4, 6]), robot_state=[states[0], states[1][:, :3]])
    odd.table["instruction"] = "lift it"
    with pytest.raises(UserError, match=r"000000001\.npz: robot_state has 3 numbers, in the first episode 5"):
        export([odd], tmp_path / "never")
    without = make_store(tmp_path / "test", frames_of([4]))
    with pytest.raises(UserError, match=r"numbers in robot_state \[0, 5\]; give splits of one data set"):
        export([store, without], tmp_path / "never")


def test_a_state_of_one_number_gets_a_zero_beside_it(tmp_path):
    """LeRobot would take a vector of one for a number."""
    state = np.random.default_rng(0).normal(size=(4, 1)).astype(np.float32)
    store = make_store(tmp_path / "train", frames_of([4]), robot_state=[state])
    store.table["instruction"] = "lift it"
    export([store], tmp_path / "out")
    table = pd.read_parquet(tmp_path / "out" / "data" / "chunk-000" / "file-000.parquet")
    np.testing.assert_array_equal(np.stack(table[STATE]), np.pad(state, ((0, 0), (0, 1))))


# What LeRobot's own class makes of a folder: every item of it.
LOAD = """
    import sys
    import numpy as np
    from workflow_src.policies.pretrained import import_torch
    import_torch()
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    data = LeRobotDataset("own/exported", root=sys.argv[1], video_backend="pyav")
    items = [data[i] for i in range(len(data))]
    arrays = {name: np.stack([item[name].numpy() for item in items]) for name in items[0] if name != "task"}
    np.savez(sys.argv[2], fps=data.fps, task=[item["task"] for item in items], mean=data.meta.stats["action"]["mean"], **arrays)
"""


@pytest.mark.requires("lerobot")
def test_lerobot_itself_loads_the_export(tmp_path, stores):
    export(stores, tmp_path / "out")
    words = [interpreter("lerobot"), "-c", textwrap.dedent(LOAD), tmp_path / "out", tmp_path / "seen.npz"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = np.load(tmp_path / "seen.npz")
    assert seen["fps"] == 5 and seen["index"].tolist() == list(range(22))
    assert seen["episode_index"].tolist() == [0] * 5 + [1] * 7 + [2] * 4 + [3] * 6
    frame = 0
    for store in stores:
        for i in range(len(store)):
            count = int(store.lengths[i])
            actions = store.arrays(i)["actions"]
            np.testing.assert_array_equal(seen["action"][frame : frame + count - 1], actions)
            images = seen[CAMERA][frame : frame + count].transpose(0, 2, 3, 1)
            np.testing.assert_array_equal((images * 255).round().astype(np.uint8), store.frames(i))
            assert set(seen["task"][frame : frame + count]) == {store.table["instruction"][i]}
            frame += count
    np.testing.assert_allclose(seen["mean"], seen["action"].mean(0), rtol=1e-5)
    assert seen[STATE].shape == (22, 2) and not seen[STATE].any()  # these stores recorded none


def test_stores_that_do_not_go_together_are_refused(tmp_path, stores):
    other = make_store(tmp_path / "other", frames_of([3]), hz=7.0)
    with pytest.raises(UserError, match="give splits of one data set"):
        export([stores[0], other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def write_v2(root: Path, episodes: list[np.ndarray], *, video_fps: float = 5.0, repeat: int = 1) -> Path:
    """A v2.1 data set at 5 Hz; its videos show every frame `repeat` times at `video_fps`."""
    meta, rows, first = root / "meta", [], 0
    meta.mkdir(parents=True)
    for i, frames in enumerate(episodes):
        count = len(frames)
        table = pd.DataFrame({
            "action": list(np.full((count, 7), i, np.float32)), "timestamp": np.arange(count, dtype=np.float32) / 5,
            "frame_index": range(count), "episode_index": i, "index": range(first, first + count), "task_index": i % 2,
        })  # fmt: skip
        path = root / f"data/chunk-000/episode_{i:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path, index=False)
        write_video(root / f"videos/chunk-000/{CAMERA}/episode_{i:06d}.mp4", frames.repeat(repeat, 0), video_fps)
        rows.append({"episode_index": i, "tasks": [f"task {i % 2}"], "length": count})
        first += count
    (meta / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (meta / "tasks.jsonl").write_text(
        "".join(json.dumps({"task_index": n, "task": f"task {n}"}) + "\n" for n in (0, 1))
    )
    info = {"codebase_version": "v2.1", "fps": 5, "chunks_size": 1000, "splits": {"train": f"0:{len(episodes)}"},
            "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
            "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
            "features": {CAMERA: {"dtype": "video"}, "action": {"dtype": "float32"}}}  # fmt: skip
    (meta / "info.json").write_text(json.dumps(info))
    return root


V2 = dataclasses.replace(ENTRY, splits={"train": 0})


@pytest.mark.parametrize(("video_fps", "repeat"), [(5.0, 1), (30.0, 6)])
def test_version_2_whatever_the_rate_of_its_videos(tmp_path, video_fps, repeat):
    episodes = frames_of([4, 6, 5])
    source = write_v2(tmp_path / "v2", episodes, video_fps=video_fps, repeat=repeat)
    read = [
        steps
        for shard in LeRobot(source).shards()
        for steps in LeRobot(source).episodes(shard, ["action", "task"], CAMERA)
    ]
    for i, (steps, frames) in enumerate(zip(read, episodes, strict=True)):
        assert steps.wrong == "" and steps.arrays["task"] == [f"task {i % 2}"] * len(frames)
        np.testing.assert_array_equal(np.stack(steps.images), frames)
    store = bring(source, tmp_path / "back", V2)["train"]
    assert store.lengths.tolist() == [4, 6, 5] and store.table["file"][1] == "episode_000001.parquet"


def test_av1_is_read(tmp_path):
    """What community uploads use. Lossless here, if the encoder is there."""
    import av

    source = write_v2(tmp_path / "v2", [np.full((4, 64, 64, 3), 90, np.uint8)])
    path = source / f"videos/chunk-000/{CAMERA}/episode_000000.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libsvtav1", rate=5, options={"preset": "12"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for value in (20, 90, 160, 230):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), value, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (steps,) = LeRobot(source).episodes(LeRobot(source).shards()[0], [], CAMERA)
    assert [round(float(image.mean()), -1) for image in steps.images] == [20, 90, 160, 230]


def test_damage_is_listed(tmp_path):
    source = write_v2(tmp_path / "v2", frames_of([4, 6, 5]))
    (source / f"videos/chunk-000/{CAMERA}/episode_000001.mp4").write_bytes(b"no video")
    (source / "data/chunk-000/episode_000002.parquet").unlink()
    with pytest.raises(
        UserError, match=r"2 of 3 episodes of mine are damaged.*episode_000001.mp4: not a readable video"
    ):
        bring(source, tmp_path / "back", V2)
    rejected = pd.read_parquet(tmp_path / "back" / "train" / "rejected.parquet")
    assert rejected["index"].tolist() == [1, 2] and rejected["reason"][1] == "its file is missing"


def test_frames_that_the_video_does_not_show_are_noticed(tmp_path):
    source = write_v2(tmp_path / "v2", frames_of([4]))
    write_video(source / f"videos/chunk-000/{CAMERA}/episode_000000.mp4", frames_of([3])[0], 5.0)
    (steps,) = LeRobot(source).episodes(LeRobot(source).shards()[0], [], CAMERA)
    assert steps.wrong == "episode_000000.mp4 shows nothing at 0.600 s, frame 3"


def test_other_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"holds neither dataset_info.json \(RLDS\) nor meta/info.json \(LeRobot\)"):
        open_source(tmp_path)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text('{"codebase_version": "v1.6"}')
    with pytest.raises(UserError, match=r"codebase_version 'v1.6' is not v2.x or v3.x"):
        open_source(tmp_path)
