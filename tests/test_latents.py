"""The latent cache: right latents of unequal episodes, in shards, and nothing trusted that a crash cut short."""

import numpy as np
import pytest

from tests.stores import Cells, frames_of, make_store
from workflow_src.common.errors import UserError
from workflow_src.common.files import Journal
from workflow_src.common.video import write_video
from workflow_src.episodes import latents as cache
from workflow_src.episodes.store import EpisodeStore

LENGTHS = [3, 9, 1, 4, 12] * 14  # 70 episodes: two blocks and a piece


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A store of unequal episodes and its frames."""
    frames = frames_of(LENGTHS)
    return make_store(tmp_path_factory.mktemp("store"), frames), frames


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "SHARD", 24 * 200)  # bytes; a frame has 24, a block of episodes about 185 frames


def latents_of(frames):
    return Cells().encode(frames)


def test_any_frame_of_any_episode_is_read_in_both_orientations(recorded, tmp_path):
    store, frames = recorded
    out = tmp_path / "latents.json"
    cache.encode(store, Cells(), out, mirror=True)
    loaded = cache.load_latents(out)
    assert len(loaded.shards) == 4 and loaded.shape == (2, 2, 3) and loaded.image == (16, 16)
    assert loaded.lengths.tolist() == LENGTHS
    rng = np.random.default_rng(1)
    episode = rng.integers(0, 70, 300)
    numbers = (rng.random((300, 5)) * np.array(LENGTHS)[episode][:, None]).astype(int)
    turned = rng.random(300) < 0.5
    read = loaded.read(episode, numbers, turned)
    assert read.dtype == np.float16 and read.shape == (300, 5, 2, 2, 3)
    for one, clip, mirrored, found in zip(episode, numbers, turned, read):
        pixels = frames[one][clip]
        np.testing.assert_array_equal(found, latents_of(pixels[:, :, ::-1] if mirrored else pixels).astype(np.float16))


def test_statistics_are_those_of_all_plain_latents(recorded, tmp_path):
    store, frames = recorded
    cache.encode(store, Cells(), tmp_path / "latents.json", mirror=False)
    loaded = cache.load_latents(tmp_path / "latents.json")
    everything = np.concatenate([latents_of(one) for one in frames]).astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(loaded.mean, everything.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(loaded.std, everything.std((0, 1, 2)), rtol=1e-6)
    assert not loaded.mirrored and len(loaded.shards) == 2
    assert (loaded.tokenizer, loaded.episodes) == ("cells", store.identity)


def test_latents_that_are_already_scaled_are_left_alone(recorded, tmp_path):
    tokenizer = Cells()
    tokenizer.scaled = True
    cache.encode(recorded[0], tokenizer, tmp_path / "latents.json", mirror=False)
    loaded = cache.load_latents(tmp_path / "latents.json")
    assert loaded.mean.tolist() == [0, 0, 0] and loaded.std.tolist() == [1, 1, 1]


def test_memory_holds_a_batch_whatever_the_length_of_the_episodes(tmp_path):
    tokenizer = Cells()
    store = make_store(tmp_path / "store", frames_of([600, 3, 300], size=(8, 8)))
    cache.encode(store, tokenizer, tmp_path / "latents.json", mirror=False)
    assert tokenizer.batches == [256, 256, 256, 135]


def test_an_interrupted_cache_continues_to_the_same_bytes(recorded, tmp_path, monkeypatch):
    record = Journal.record

    def die_at_the_second_shard(journal, item, **fields):
        if item != "0":
            raise KeyboardInterrupt
        record(journal, item, **fields)

    cut, whole = tmp_path / "cut" / "latents.json", tmp_path / "whole" / "latents.json"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", die_at_the_second_shard)
        with pytest.raises(KeyboardInterrupt):
            cache.encode(recorded[0], Cells(), cut, mirror=True)
    assert not cut.exists()
    (cut.parent / ".plain_00001.abc.tmp.npy").write_bytes(b"piece")  # of a killed writer
    again, first = Cells(), Cells()
    cache.encode(recorded[0], again, cut, mirror=True)
    cache.encode(recorded[0], first, whole, mirror=True)
    assert 0 < sum(again.batches) < sum(first.batches)
    assert {p.name: p.read_bytes() for p in cut.parent.iterdir()} == {
        p.name: p.read_bytes() for p in whole.parent.iterdir()
    }


def test_another_tokenizer_other_episodes_or_a_damaged_shard_is_encoded_anew(recorded, tmp_path):
    store, _ = recorded
    out = tmp_path / "latents.json"
    cache.encode(store, Cells(), out, mirror=True)
    other = Cells()
    other.digest = "other"
    cache.encode(store, other, out, mirror=True)
    assert sum(other.batches) == 2 * sum(LENGTHS) and cache.load_latents(out).tokenizer == "other"
    other.batches.clear()
    (tmp_path / "plain_00001.npy").unlink()
    cache.encode(store, other, out, mirror=True)
    assert 0 < sum(other.batches) < 2 * sum(LENGTHS)
    damaged = tmp_path / "plain_00000.npy"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\1\2\3\4")
    cache.encode(store, other, out, mirror=True)
    cache.load_latents(out)
    fewer = make_store(tmp_path / "fewer", frames_of([5, 6]))
    cache.encode(fewer, other, out, mirror=False)
    assert cache.load_latents(out).lengths.tolist() == [5, 6]
    assert sorted(p.name for p in tmp_path.glob("*.npy")) == ["lengths.npy", "plain_00000.npy"]


def test_a_damaged_cache_is_named_by_whichever_process_looks_at_that_file(recorded, tmp_path):
    out = tmp_path / "latents.json"
    cache.encode(recorded[0], Cells(), out, mirror=True)
    mirrored = tmp_path / "mirrored_00001.npy"
    mirrored.write_bytes(mirrored.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(UserError, match=r"mirrored_00001\.npy.*delete"):
        cache.load_latents(out)
    complaints = 0
    for rank in range(3):
        try:
            cache.load_latents(out, rank, 3)
        except UserError:
            complaints += 1
    assert complaints == 1
    mirrored.unlink()
    with pytest.raises(UserError, match=r"mirrored_00001\.npy: no such file"):
        cache.load_latents(out)
    out.write_text("{}")
    with pytest.raises(UserError, match=r"latents\.json: damaged latent cache"):
        cache.load_latents(out)


def test_frames_of_another_size_and_latents_out_of_range_are_named(tmp_path):
    store = make_store(tmp_path / "store", [*frames_of([3, 3]), *frames_of([3], size=(16, 24))])
    with pytest.raises(UserError, match=r"000000002\.mp4: frames of 16x24 pixels where .* 16x16; resize"):
        cache.encode(store, Cells(), tmp_path / "latents.json", mirror=False)

    class Broken(Cells):
        def encode(self, images):
            return super().encode(images) * 1e6

    with pytest.raises(UserError, match="not finite in float16"):
        cache.encode(make_store(tmp_path / "fine", frames_of([3])), Broken(), tmp_path / "latents.json", mirror=False)
    assert not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob(".*"))


def test_folders_of_worldgym_are_encoded_as_they_are(tmp_path):
    frames = frames_of([5, 3, 8])
    for index, one in zip((0, 4, 7), frames):
        write_video(tmp_path / "store" / f"{index:09d}.mp4", one, 20)
        np.savez(tmp_path / "store" / f"{index:09d}.npz", np.zeros((len(one), 10), np.float32))
    store = EpisodeStore(tmp_path / "store")
    cache.encode(store, Cells(), tmp_path / "latents.json", mirror=False)
    loaded = cache.load_latents(tmp_path / "latents.json")
    assert loaded.lengths.tolist() == [5, 3, 8]
    read = loaded.read(np.array([2]), np.array([[0, 7]]), np.array([False]))[0]
    np.testing.assert_array_equal(read, latents_of(frames[2][[0, 7]]).astype(np.float16))
