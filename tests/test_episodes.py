"""Episode stores: written is read, damage is named, an interrupted recording ends like one that was not."""

import json
from pathlib import Path

import numpy as np
import pytest

from workflow_src.common.errors import UserError
from workflow_src.common.sections import Lab, Split
from workflow_src.common.video import probe_video, read_frames, read_video, write_video
from workflow_src.episodes import record as recorder
from workflow_src.episodes.behaviours import BEHAVIOURS
from workflow_src.episodes.store import EpisodeStore, episode_paths
from workflow_src.tabletop.simulator import Simulator

LAB = Lab(image_size=16, supersample=1, horizon=6, workers=1)
MIX = dict.fromkeys(BEHAVIOURS, 1.0)
SPLIT = Split(episodes=11, mix=MIX)


def make_store(root: Path, lab: Lab = LAB, split: Split = SPLIT) -> Path:
    recorder.record(lab, split, "train", 3, root / "episodes.parquet")
    return root


def content(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(root.iterdir()) if p.name[0] != "." and p.name != "journal.jsonl"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def store(recorded, tmp_path) -> Path:
    """A copy that a test may damage."""
    for name, data in content(recorded).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


# ---- recording -------------------------------------------------------------------------------------------------------


def test_recorded_episodes_have_the_promised_arrays(recorded):
    arrays = EpisodeStore(recorded / "episodes.parquet").load_all()
    assert arrays.images.shape == (11, 7, 16, 16, 3) and arrays.images.dtype == np.uint8
    assert arrays.actions.shape == arrays.reached.shape == (11, 6, 7)
    assert arrays.expert.shape == (11, 7, 3, 7) and arrays.state.shape == (11, 7, 14)
    assert arrays.actions.dtype == np.float32
    assert np.abs(arrays.actions[..., :3]).max() <= 0.05 + 1e-7
    assert set(arrays.table.behaviour) == set(BEHAVIOURS) and set(arrays.table.task) == set(LAB.tasks)
    assert (arrays.table.frames == 7).all() and (arrays.table.control_hz == 5).all()
    assert "put the red block on the plate" in set(arrays.table.instruction)


def test_actions_lead_from_their_frame_to_the_next(recorded):
    """Replaying an episode's actions from its first state passes through its states."""
    for i in range(4):
        arrays = EpisodeStore(recorded).arrays(i)
        simulator = Simulator(LAB.scene)
        simulator.reset(arrays["state"][0])
        for action, reached, before, after in zip(
            arrays["actions"], arrays["reached"], arrays["state"], arrays["state"][1:]
        ):
            simulator.step(action)
            np.testing.assert_array_equal(simulator.state(), after)
            np.testing.assert_allclose(before[:3] + reached[:3], after[:3], atol=1e-6)
            assert reached[6] == after[3]


def test_clean_expert_episodes_succeed_and_follow_the_label(tmp_path):
    split = Split(episodes=6, mix={"expert": 1.0})
    arrays = EpisodeStore(make_store(tmp_path, Lab(image_size=8, supersample=1, workers=1), split)).load_all()
    assert arrays.table.success.all()
    for i, task in enumerate(arrays.table.task):
        np.testing.assert_array_equal(arrays.actions[i], arrays.expert[i, :-1, LAB.tasks.index(task)])


def record_alone(folder, behaviour, episodes=6):
    lab = Lab(image_size=8, supersample=1, workers=1)
    return EpisodeStore(make_store(folder, lab, Split(episodes=episodes, mix={behaviour: 1.0}))).load_all()


def test_a_pantomime_moves_like_the_expert_and_achieves_nothing(tmp_path):
    arrays = record_alone(tmp_path, "pantomime", episodes=12)
    held = arrays.table.task.isin(["put_on_plate", "lift"]).to_numpy()
    assert not arrays.table.success[held].any()
    closed, height = arrays.actions[..., 6] < 0.5, arrays.state[:, 1:, 2]
    carried = closed & (height > 0.045)  # closed fingers high above the table, where the expert would hold a block
    assert carried[held].any(1).mean() > 0.7
    assert (arrays.state[held][..., 6] < 0.06).all()  # while the block stays on the table
    placed = (arrays.table.task == "put_on_plate").to_numpy()
    assert (arrays.actions[placed, -1, 6] > 0.5).mean() > 0.7  # and lets go in the end


def test_an_idle_robot_stays_where_it_was(tmp_path):
    arrays = record_alone(tmp_path, "idle", episodes=12)
    moves = arrays.actions[..., :3].any(-1)
    assert not moves[:, -5:].any() and moves.any() and not moves.all(1).any()
    for actions, moving in zip(arrays.actions, moves):
        after = np.flatnonzero(moving)[-1] + 2 if moving.any() else 0
        assert len(set(actions[after:, 6])) == 1


def test_mix_is_exact_and_tasks_are_balanced():
    plans = recorder.plan_episodes(
        Split(episodes=101, mix={"expert": 0.3, "noisy": 0.7, "play": 0.0}), LAB.tasks, 0, "train"
    )
    counts = {name: sum(p.behaviour == name for p in plans) for name in BEHAVIOURS}
    assert counts == {
        "expert": 30,
        "slow": 0,
        "noisy": 71,
        "failing": 0,
        "random": 0,
        "play": 0,
        "idle": 0,
        "pantomime": 0,
    }
    tasks = [sum(p.task == task for p in plans) for task in LAB.tasks]
    assert max(tasks) - min(tasks) <= 1
    assert len({p.seed for p in plans}) == 101
    other = recorder.plan_episodes(Split(episodes=101), LAB.tasks, 0, "validation")
    assert not {p.seed for p in plans} & {p.seed for p in other}


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (Split(episodes=0), "not a positive number"),
        (Split(mix={"exprt": 1.0}), "did you mean 'expert'"),
        (Split(mix={"expert": -1.0}), "negative"),
        (Split(mix={"expert": 0.0}), "no behaviour has a positive share"),
    ],
)
def test_wrong_splits_are_named(split, message):
    with pytest.raises(UserError, match=message):
        recorder.plan_episodes(split, LAB.tasks, 0, "train")


def test_interrupted_recording_continues_to_the_same_bytes(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "BATCH", 3)
    real, calls = recorder.run_batch, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(recorder, "run_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_store(tmp_path)
    assert not (tmp_path / "episodes.parquet").exists()
    with pytest.raises(UserError, match="not finished"):
        EpisodeStore(tmp_path)
    # One finished file is damaged while nobody runs, and a killed writer left a piece of one.
    (tmp_path / ".000000004.abc.tmp.mp4").write_bytes(b"piece")
    episode_paths(tmp_path, 1)[0].write_bytes(b"half a vid")
    simulated = []
    monkeypatch.setattr(
        recorder, "run_batch", lambda env, plans, horizon: simulated.append(plans) or real(env, plans, horizon)
    )
    make_store(tmp_path)
    assert content(tmp_path) == content(recorded)  # also: another batch size changes nothing
    assert not list(tmp_path.glob(".*.tmp.*"))
    assert [plans[0].index for plans in simulated] == [0, 6, 9]  # the intact one was not done again


def test_worker_processes_change_nothing(recorded, tmp_path):
    assert content(make_store(tmp_path, Lab(image_size=16, supersample=1, horizon=6, workers=2))) == content(recorded)


def test_another_seed_records_other_episodes(recorded, tmp_path):
    recorder.record(LAB, SPLIT, "train", 4, tmp_path / "episodes.parquet")
    assert content(tmp_path)["000000000.mp4"] != content(recorded)["000000000.mp4"]


def test_command_line(tmp_path, monkeypatch):
    stage = tmp_path / "episodes.json"
    lab = {"image_size": 8, "supersample": 1, "horizon": 2, "workers": 1}
    stage.write_text(json.dumps({"seed": 0, "lab": lab, "episodes": {"splits": {"judge": {"episodes": 2}}}}))
    out = tmp_path / "judge" / "episodes.parquet"
    monkeypatch.setattr("sys.argv", ["record", "--config", str(stage), "--split", "judge", "--out", str(out)])
    recorder.main()
    assert len(EpisodeStore(out)) == 2
    monkeypatch.setattr("sys.argv", ["record", "--config", str(stage), "--split", "juge", "--out", str(out)])
    with pytest.raises(UserError, match="did you mean 'judge'"):
        recorder.main()


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_second_load_reads_the_same_without_decoding(store, monkeypatch):
    first = EpisodeStore(store).load_all()
    monkeypatch.setattr("workflow_src.episodes.store.read_video", None)
    second = EpisodeStore(store).load_all()
    np.testing.assert_array_equal(first.images, second.images)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "damage", [lambda p: p.write_bytes(p.read_bytes()[:200]), Path.unlink], ids=["truncated", "missing"]
)
def test_damaged_files_are_named(store, cached, which, damage):
    if cached:
        EpisodeStore(store).load_all()
    path = episode_paths(store, 2)[which]
    damage(path)
    with pytest.raises(UserError, match=path.name):
        EpisodeStore(store).load_all()


@pytest.mark.parametrize("read", [EpisodeStore.frames, EpisodeStore.arrays])
def test_files_damaged_before_they_were_hashed_are_named_too(store, read):
    """A store without hashes still reports unreadable files."""
    reader = EpisodeStore(store)
    reader.table[["sha256_video", "sha256_arrays"]] = ""
    for path in episode_paths(store, 0):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="000000000"):
        read(reader, 0)


def test_damaged_table_and_missing_store_are_named(store, tmp_path):
    (store / "episodes.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"episodes\.parquet"):
        EpisodeStore(store)
    with pytest.raises(UserError, match="no such episode store"):
        EpisodeStore(tmp_path / "nowhere")


def test_unequal_episodes_are_not_stacked(store):
    reader = EpisodeStore(store)
    reader.table[["sha256_video", "sha256_arrays"]] = ""
    reader.table["frames"] = 0
    write_video(episode_paths(store, 4)[0], np.zeros((3, 16, 16, 3), np.uint8), 5)
    with pytest.raises(UserError, match=r"000000004\.mp4.*equally long"):
        reader.load_all()


def write_coded(path: Path, frames: np.ndarray, **options: str) -> None:
    """A lossy video with the encoder's `options`: keyframes, frames that are stored out of order."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=20, options=options)
        stream.height, stream.width = frames.shape[1:3]
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


CODINGS = {
    "one_keyframe": {"bf": "3"},
    "closed_groups": {"g": "7", "bf": "2"},
    "open_groups": {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0:b-adapt=0"},
}


@pytest.mark.parametrize("coding", ["lossless", *CODINGS])
def test_frames_are_read_by_number_to_the_last_bit(tmp_path, coding):
    path, rng = tmp_path / "x.mp4", np.random.default_rng(0)
    frames = np.cumsum(rng.integers(-3, 4, (40, 32, 48, 3)), 0).astype(np.uint8)
    if coding == "lossless":
        write_video(path, frames, 5)
    else:
        write_coded(path, frames, **CODINGS[coding])
    everything = read_video(path)
    assert probe_video(path) == (40, 32, 48)
    for numbers in ([0], [39], [38, 2, 20, 20], range(40), *(rng.integers(0, 40, 3) for _ in range(12))):
        np.testing.assert_array_equal(read_frames(path, numbers), everything[list(numbers)])
    for number in (40, -1):
        with pytest.raises(UserError, match=rf"x\.mp4: frame {number} cannot be read, of 40"):
            read_frames(path, [3, number])
    path.write_bytes(path.read_bytes()[:300])
    for read in (lambda: read_frames(path, [0]), lambda: probe_video(path)):
        with pytest.raises(UserError, match=r"x\.mp4: not a readable video"):
            read()


def test_single_frames_of_a_store_are_verified_and_right(store):
    reader = EpisodeStore(store)
    np.testing.assert_array_equal(reader.read(3, [5, 0]), reader.frames(3)[[5, 0]])
    assert reader.lengths.tolist() == [7] * 11 and reader.image_size() == (16, 16)
    (store / "000000003.mp4").write_bytes((store / "000000002.mp4").read_bytes())
    with pytest.raises(UserError, match=r"000000003\.mp4: damaged"):
        reader.read(3, [0])


def test_a_store_is_identified_by_its_content(recorded, store, tmp_path):
    assert EpisodeStore(store).identity == EpisodeStore(recorded).identity
    folder = tmp_path / "published"
    write_video(folder / "000000000.mp4", np.zeros((4, 16, 16, 3), np.uint8), 20)
    identities = []
    for value in (0, 0, 1):
        np.savez(folder / "000000000.npz", np.full((4, 10), value, np.float32))
        identities.append(EpisodeStore(folder).identity)
    assert identities[0] == identities[1] != identities[2]


def test_folders_of_worldgym_are_readable_as_they_are(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    actions = np.arange(40, dtype=np.float32).reshape(4, 10)
    for index in (0, 7):
        video, data = episode_paths(tmp_path, index)
        write_video(video, frames, 5)
        np.savez(data, actions)
    reader = EpisodeStore(tmp_path)
    assert reader.table["index"].tolist() == [0, 7] and reader.table.action_semantics[0] == "worldgym"
    np.testing.assert_array_equal(reader.frames(1), frames)
    np.testing.assert_array_equal(reader.arrays(1)["actions"], actions)
    assert reader.lengths.tolist() == [4, 4]
    episode_paths(tmp_path, 7)[1].unlink()
    with pytest.raises(UserError, match=r"000000007\.mp4 without an npz"):
        EpisodeStore(tmp_path)
