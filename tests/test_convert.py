"""Converting RLDS directories into stores: every registered schema, damage, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.chain import copy_project
from tests.rlds import jpeg, steps_of, write_rlds
from tests.stores import write_tokenizer
from tests.test_datasets import GOLDEN, REGISTRY
from tests.test_tokenizer import run_cli
from workflow_src.common import sections
from workflow_src.common.config import to_dict
from workflow_src.common.errors import UserError
from workflow_src.common.video import read_frames, read_video
from workflow_src.episodes import convert as conversion
from workflow_src.episodes import merge as merging
from workflow_src.episodes.actions import metric_actions
from workflow_src.episodes.convert import convert
from workflow_src.episodes.merge import merge
from workflow_src.episodes.rlds import Rlds, decode_image
from workflow_src.episodes.store import KEYFRAMES, EpisodeStore
from workflow_src.training import world_model
from workflow_src.workflow import ROOT
from workflow_src.world_model.artefact import read_card

SIZE = 32
SAME = ("libero_goal", "libero_object", "libero_spatial")  # as libero_10
SCHEMAS = [name for name, entry in REGISTRY.items() if not entry.files and name not in SAME]


def make_source(root: Path, name: str = "viola", shards: int = 3, each: int = 2) -> Path:
    """A small copy of a registered set: `shards` of `each` episodes in train, one in every other split."""
    entry, seed, splits = REGISTRY[name], 0, {}
    for split in entry.splits:
        count = shards if split == "train" else 1
        splits[split] = []
        for _ in range(count):
            splits[split].append([])
            for _ in range(each):
                seed += 1
                splits[split][-1].append(steps_of(name, entry, GOLDEN[name][0], 4 + seed, seed))
    return write_rlds(root, splits, name)


def run(source: Path, folder: Path, name: str = "viola", groups: int = 2, tolerate: float = 0.0) -> dict:
    """Convert and merge everything; the stores by split."""
    entry, results = REGISTRY[name], []
    for number in range(1, groups + 1):
        results.append(folder / "groups" / f"{number}-of-{groups}.json")
        convert(name, entry, Rlds(source), (number, groups), SIZE, results[-1])
    splits = {row["split"] for path in results for row in json.loads(path.read_text())["episodes"]}
    for split in splits:
        merge(results, split, tolerate, folder / split / "episodes.parquet")
    return {split: EpisodeStore(folder / split) for split in splits}


def content(folder: Path) -> dict[str, bytes]:
    """Everything that makes the stores, by path; not the notes of how it was done."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.parent.name != "groups"}  # fmt: skip


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A folder with the stores of a small copy of every schema, by name."""
    folder = tmp_path_factory.mktemp("converted")
    for name in SCHEMAS:
        run(make_source(folder / "sources" / name, name, shards=1, each=3), folder / name, name, groups=1)
    return folder


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_registered_schema_converts(converted, name):
    entry = REGISTRY[name]
    assert all((converted / name / split / "episodes.parquet").is_file() for split in entry.splits)
    store = EpisodeStore(converted / name / "train")
    assert store.table["index"].tolist() == [0, 1, 2] and store.image_size() == (SIZE, SIZE)
    expected = GOLDEN[name][1]
    for i in range(3):
        count = 5 + i - entry.skip_first
        assert store.lengths[i] == count == len(store.frames(i))
        row, arrays = store.table.iloc[i], store.arrays(i)
        actions = metric_actions(store, i, arrays, count)
        over = expected[(np.arange(count - 1) + entry.skip_first) % 3]
        if entry.action.gripper_means == "relative_closed":  # what was recorded over and over keeps its state
            over, actions = np.delete(over, 6, 1), np.delete(actions, 6, 1)
        np.testing.assert_allclose(actions, over, rtol=1e-5)
        assert (row["instruction"], row["control_hz"], row["embodiment"]) == (
            f"task {i + 1}",
            entry.control_hz,
            entry.embodiment,
        )
        assert (row["file"], row["record"]) == (f"{name}-train.tfrecord-00000-of-00001", i)
        assert ("reached" in arrays) == bool(entry.pose) and ("robot_state" in arrays) == bool(entry.robot_state)
    if entry.more_instructions:
        assert list(store.table["instructions"][0]) == ["task 1", "lift_red"]
    facts = json.loads((converted / name / "train" / "provenance.json").read_text())
    assert facts["entry"]["licence"] == entry.licence and facts["episodes"] == 3
    assert ("as documented" in facts["gripper"]) or facts["gripper"].startswith("flipped")


def test_a_step_is_trained_on_all_of_them_at_once(converted, tmp_path, monkeypatch):
    """Every robot, rate and schema side by side in one batch, found by name and encoded on the fly."""
    network = sections.Network(in_channels=4, width=16, depth=1, heads=2, attention="joint", temporal="relative_bias",
                               spatial_rope="none", learned_null=True)  # fmt: skip
    training = sections.Training(steps=1, batch=2 * len(SCHEMAS), precision="fp32")
    config = sections.WorldModel(network=network, clip_frames=3, mirror=False, training=training,
                                 sampler=sections.Sampler(steps=1, window=3))  # fmt: skip
    (tmp_path / "stage.json").write_text(json.dumps({"seed": 0, "world_model": to_dict(config)}))
    flags = {"config": tmp_path / "stage.json", "tokenizer": write_tokenizer(tmp_path / "tokenizer"),
             "out": tmp_path / "model" / "model.safetensors", "state": tmp_path / "state"}  # fmt: skip
    names = sorted(SCHEMAS, key=lambda name: name != "viola")  # the first one is validated on
    run_cli(monkeypatch, world_model, **flags, dataset_dir=converted, subset_names=",".join(names))
    card = read_card(tmp_path / "model")
    assert [(source.dataset, source.embodiment) for source in card.sources] == [
        (name, REGISTRY[name].embodiment) for name in names
    ]


def test_frames_are_those_that_were_recorded_at_every_index(tmp_path):
    store = run(make_source(tmp_path / "source", shards=1), tmp_path / "viola")["train"]
    steps = next(
        Rlds(tmp_path / "source").episodes(Rlds(tmp_path / "source").shards()[1], [], "observation/agentview_rgb")
    )
    frames = store.frames(0)
    expected = np.stack([decode_image(image, SIZE) for image in steps.images])
    errors = np.abs(frames[:, None].astype(int) - expected[None]).mean((2, 3, 4))
    assert errors.diagonal().max() < 8  # random saturated colours, every second one of which 4:2:0 drops
    assert abs((frames.astype(int) - expected).mean()) < 2  # but neither brighter nor darker
    assert errors.argmin(1).tolist() == list(range(len(frames)))
    path = tmp_path / "viola" / "train" / "000000000.mp4"
    for number in range(len(frames)):
        np.testing.assert_array_equal(read_frames(path, [number])[0], frames[number])


def test_videos_play_at_the_control_rate_and_have_keyframes(tmp_path):
    import av

    frames = np.stack([decode_image(jpeg(0), SIZE)] * 3 * KEYFRAMES)
    from workflow_src.episodes.store import write_episode

    write_episode(tmp_path, 0, frames, {}, 3.0, lossless=False)
    with av.open(str(tmp_path / "000000000.mp4")) as container:
        assert container.streams.video[0].average_rate == 3
        keys = [n for n, packet in enumerate(container.demux(video=0)) if packet.size and packet.is_keyframe]
    assert keys == [0, KEYFRAMES, 2 * KEYFRAMES]
    assert len(read_video(tmp_path / "000000000.mp4")) == len(frames)


def test_numbering_and_bytes_depend_on_the_data_alone(tmp_path):
    source = make_source(tmp_path / "source")
    run(source, tmp_path / "one", groups=1)
    run(source, tmp_path / "many", groups=5)
    assert content(tmp_path / "one") == content(tmp_path / "many")
    assert EpisodeStore(tmp_path / "one" / "train").table["index"].tolist() == list(range(6))


def test_every_nth_episode_is_held_out_where_nothing_is(tmp_path):
    stores = run(make_source(tmp_path / "source", "libero_10", shards=3, each=8), tmp_path / "libero", "libero_10")
    assert stores["validation"].table["index"].tolist() == [19]
    assert stores["train"].table["index"].tolist() == [*range(19), 20, 21, 22, 23]


def test_reached_is_kept_beside_commanded(tmp_path):
    """Ten times commanded what is reached; both can be asked for."""
    entry, recorded = REGISTRY["bridge_v2"], GOLDEN["bridge_v2"][0]
    steps = steps_of("bridge_v2", entry, recorded, 7, 1)
    for t, step in enumerate(steps):
        step["observation"]["state"] = np.float32([0.001 * t, 0, 0, 0, 0, 0, 1])
    source = write_rlds(tmp_path / "source", {"train": [[steps]], "val": [[steps]]}, "bridge_v2")
    store = run(source, tmp_path / "bridge_v2", "bridge_v2")["train"]
    arrays = store.arrays(0)
    assert arrays["actions"].shape == arrays["reached"].shape == (5, 7) and arrays["robot_state"].shape == (6, 7)
    np.testing.assert_allclose(arrays["reached"][:, :6], [[0.001, 0, 0, 0, 0, 0]] * 5, atol=1e-7)
    np.testing.assert_array_equal(arrays["reached"][:, 6], arrays["actions"][:, 6])


# ---- what cannot be used --------------------------------------------------------------------------------------------


def broken(kind: str) -> list[dict]:
    steps = steps_of("viola", REGISTRY["viola"], GOLDEN["viola"][0], 6, 77)
    if kind == "nan":
        steps[2]["action"]["world_vector"] = np.float32([0, np.nan, 0])
    elif kind == "jpeg":
        steps[3]["observation"]["agentview_rgb"] = jpeg(1)[:-200]
    elif kind == "instruction":
        for step in steps:
            step["observation"]["natural_language_instruction"] = "  "
    return steps[:1] if kind == "short" else steps


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nan", r"action/world_vector\[2\] is not finite"),
        ("jpeg", r"frame 3 is not a whole image"),
        ("instruction", "has no instruction"),
        ("short", "has 1 frames; an action needs two"),
        ("checksum", "the record's checksum is wrong"),
    ],
)
def test_what_cannot_be_used_is_listed_with_its_reason(tmp_path, kind, reason):
    good = [steps_of("viola", REGISTRY["viola"], GOLDEN["viola"][0], 5, n) for n in (1, 2)]
    source = write_rlds(
        tmp_path / "source", {"train": [[good[0], broken(kind), good[1]]], "test": [[good[0]]]}, "viola"
    )
    shard = source / "viola-train.tfrecord-00000-of-00001"
    if kind == "checksum":
        first = int.from_bytes(shard.read_bytes()[:8], "little") + 16
        data = bytearray(shard.read_bytes())
        data[first + 50] ^= 1
        shard.write_bytes(data)
    with pytest.raises(
        UserError, match=r"rejected.parquet: 1 of 3 episodes of viola are damaged, more than 0.00%.*" + reason
    ):
        run(source, tmp_path / "viola")
    assert not (tmp_path / "viola" / "train" / "episodes.parquet").exists()
    store = run(source, tmp_path / "viola", tolerate=0.4)["train"]
    assert store.table["index"].tolist() == [0, 2]
    rejected = pd.read_parquet(tmp_path / "viola" / "train" / "rejected.parquet")
    assert rejected[["index", "file", "record"]].values.tolist() == [[1, shard.name, 1]]
    assert rejected["reason"].str.contains(reason).all()


def test_mismatched_lengths_are_rejected(tmp_path):
    from workflow_src.episodes.rlds import Steps

    arrays = {"action/world_vector": np.zeros((3, 3)), "observation/natural_language_instruction": ["a"] * 4}
    job = conversion.Job("viola", REGISTRY["viola"], SIZE, False, "")
    with pytest.raises(ValueError, match=r"lengths differ: action/world_vector 3, observation/agentview_rgb 4, .* 4"):
        conversion.convert_episode(Steps(0, 0, arrays, [jpeg(0)] * 4), job)


def test_missing_labels_are_no_damage_where_they_are_usual(tmp_path):
    entry = REGISTRY["bridge_v2"]
    episodes = [steps_of("bridge_v2", entry, GOLDEN["bridge_v2"][0], 5, n) for n in range(3)]
    for step in episodes[1]:
        step["language_instruction"] = ""
    source = write_rlds(tmp_path / "source", {"train": [episodes], "val": [episodes[:1]]}, "bridge_v2")
    assert len(run(source, tmp_path / "bridge_v2", "bridge_v2")["train"]) == 2


def test_a_copy_of_another_set_is_refused(tmp_path):
    source = make_source(tmp_path / "source", "libero_10", shards=1)
    with pytest.raises(UserError, match=r"holds the splits train where the registry says train, test for viola"):
        run(source, tmp_path / "viola")


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    source = make_source(tmp_path / "source")
    monkeypatch.setattr(conversion, "BYTES_PER_PIXEL", 1e15)
    with pytest.raises(UserError, match=r"GB are needed and .* GB free"):
        run(source, tmp_path / "viola")
    assert not list(tmp_path.glob("viola/*/*.mp4"))


# ---- interruption ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [1, 4, 9, 14, 17, 21])
def test_interrupted_anywhere_and_started_again_gives_the_same_bytes(tmp_path, monkeypatch, calls):
    """Ended right after the n-th file got its name: in the midst of a shard, between shards, groups and tables."""
    source, rename, count = make_source(tmp_path / "source"), os.replace, 0
    run(source, tmp_path / "whole")

    def replace(one, other):
        nonlocal count
        rename(one, other)
        count += 1
        if count == calls:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "viola")
    left = tmp_path / "viola" / "train"
    if left.is_dir():
        (left / ".000000001.deadbeef.tmp.mp4").write_bytes(b"killed while writing")
    if left.is_dir() and not (left / "episodes.parquet").exists():
        with pytest.raises(UserError, match="not finished"):
            EpisodeStore(left)
    run(source, tmp_path / "viola")
    assert content(tmp_path / "viola") == content(tmp_path / "whole")


@pytest.mark.parametrize("victim", ["*/train/000000003.mp4", "*/train/000000002.npz"])
def test_killed_and_started_again_gives_the_same_bytes(tmp_path, victim):
    """kill -9 between the two files of an episode, and between two episodes of a shard."""
    source, project = make_source(tmp_path / "source"), copy_project(tmp_path / "project")
    run(source, tmp_path / "whole", groups=1)
    out = tmp_path / "viola" / "groups" / "1-of-1.json"
    words = [sys.executable, "-m", "workflow_src.episodes.convert", "--dataset", "viola", "--source", str(source),
             "--size", str(SIZE), "--out", str(out)]  # fmt: skip
    faults = {**os.environ, "PYTHONPATH": str(project), "KILL_AFTER": victim, "KILL_WHOM": "self"}
    killed = subprocess.run(words, cwd=project, env=faults, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    run(source, tmp_path / "viola", groups=1)
    assert content(tmp_path / "viola") == content(tmp_path / "whole")


def test_finished_shards_are_not_converted_again(tmp_path, monkeypatch):
    source = make_source(tmp_path / "source")
    run(source, tmp_path / "viola")
    before = content(tmp_path / "viola")
    (tmp_path / "viola" / "train" / "000000003.npz").write_bytes(b"damaged")
    written = []
    real = conversion.write_episode
    monkeypatch.setattr(conversion, "write_episode", lambda *a, **k: written.append(a[1]) or real(*a, **k))
    run(source, tmp_path / "viola")
    assert written == [2, 3] and content(tmp_path / "viola") == before


def test_command_lines(tmp_path, monkeypatch):
    source, out = make_source(tmp_path / "source"), tmp_path / "viola" / "groups" / "1-of-1.json"
    words = [sys.executable, "-m", "workflow_src.episodes.convert", "--dataset", "viola", "--source", str(source),
             "--size", "32", "--out", str(out)]  # fmt: skip
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "viola 1/1: 4 shards, " in done.stderr and " MB free" in done.stderr
    run_cli(monkeypatch, merging, groups=out, split="test", out=tmp_path / "viola" / "test" / "episodes.parquet")
    assert len(EpisodeStore(tmp_path / "viola" / "test")) == 2
    with pytest.raises(UserError, match=r"--out: .* is not called episodes\.parquet"):
        run_cli(monkeypatch, merging, groups=out, split="train", out=tmp_path / "x")
