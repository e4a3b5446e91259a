"""Training clips and the latent cache: every frame is reachable, actions stand beside the right frame, and nothing is
trusted that another tokenizer made or a crash cut short."""

import numpy as np
import pytest

from workflow_src.common.errors import UserError
from workflow_src.common.files import Journal
from workflow_src.episodes import latents as cache
from workflow_src.episodes.clips import Clips, aligned_actions, contact_weight
from workflow_src.training import randomness


class FakeTokenizer:
    """Latents are the mean colour of 8x8 cells, so mirroring and order can be read off them."""

    digest = "fake"

    def __init__(self) -> None:
        self.calls = 0

    def shape(self, height, width):
        return height // 8, width // 8, 3

    def encode(self, images):
        self.calls += 1
        n, h, w, c = images.shape
        return images.reshape(n, h // 8, 8, w // 8, 8, c).mean((2, 4)).astype(np.float32)


def images(episodes=70, frames=3):
    return np.random.default_rng(0).integers(0, 256, (episodes, frames, 16, 16, 3), dtype=np.uint8)


def test_every_frame_is_reachable_and_openings_are_frequent():
    clips = Clips(episodes=5, length=9, frames=4, mirror=True)
    choice = clips.choose(randomness.uniform(0, 0, range(4000), 3))
    frames = clips.frame_numbers(choice)
    assert set(zip(choice.episode.repeat(4), frames.ravel())) == {(e, f) for e in range(5) for f in range(9)}
    assert np.all(np.diff(frames, axis=1) == 1) and frames.min() == 0 and frames.max() == 8
    assert (choice.start == 0).mean() > 1.5 / 6
    assert 0.4 < choice.mirrored.mean() < 0.6
    assert not Clips(5, 9, 4, mirror=False).choose(randomness.uniform(0, 0, range(100), 3)).mirrored.any()


def test_a_clip_as_long_as_the_episode_starts_at_its_first_frame():
    assert not Clips(2, 4, 4, False).choose(randomness.uniform(0, 0, range(50), 3)).start.any()


def test_clips_with_contact_are_drawn_more_often_and_the_others_still_reachable():
    moved = np.zeros((2, 8), bool)
    moved[1, 4:7] = True
    weight = contact_weight(moved, frames=4, weight=3.0)
    assert weight.shape == (2, 6)
    assert weight[0].tolist() == [1] * 6
    assert weight[1].tolist() == [1, 1, 2, 3, 4, 3]
    choice = Clips(2, 9, 4, False, weight).choose(randomness.uniform(0, 0, range(6000), 3))
    drawn = np.zeros((2, 6))
    np.add.at(drawn, (choice.episode, choice.start), 1)
    assert (drawn > 0).all()
    assert drawn[1, 4] / drawn[0, 4] == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("episodes, frames", [(0, 4), (3, 10), (3, 1)])
def test_impossible_clips_are_refused_before_training(episodes, frames):
    with pytest.raises(UserError, match=r"clip_frames|episodes"):
        Clips(episodes, 9, frames, True)


def test_actions_stand_beside_the_frame_they_lead_to():
    actions = np.arange(1, 7, dtype=np.float64).reshape(1, 3, 2)
    assert aligned_actions(actions, "leads_to")[0].tolist() == [[0, 0], [1, 2], [3, 4], [5, 6]]
    assert aligned_actions(actions, "worldgym_train")[0].tolist() == [[1, 2], [3, 4], [5, 6], [0, 0]]
    with pytest.raises(UserError, match="alignment"):
        aligned_actions(actions, "lead_to")


def test_latents_hold_both_orientations_and_their_statistics(tmp_path):
    out, frames, tokenizer = tmp_path / "latents.json", images(), FakeTokenizer()
    cache.encode(frames, tokenizer, out, source="s")
    loaded = cache.load_latents(out)
    expected = tokenizer.encode(frames.reshape(-1, 16, 16, 3)).reshape(70, 3, 2, 2, 3)
    np.testing.assert_allclose(loaded.plain, expected, rtol=1e-3)
    np.testing.assert_allclose(loaded.mirrored, expected[:, :, :, ::-1], rtol=1e-3)
    np.testing.assert_allclose(loaded.mean, expected.mean((0, 1, 2, 3)), rtol=1e-3)
    np.testing.assert_allclose(loaded.std, expected.std((0, 1, 2, 3)), rtol=1e-2)
    assert (loaded.tokenizer, loaded.episodes) == ("fake", "s")


def test_an_interrupted_cache_continues(tmp_path, monkeypatch):
    frames, record = images(), Journal.record

    def die_at_the_second_block(journal, item, **fields):
        if item != "0":
            raise KeyboardInterrupt
        record(journal, item, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", die_at_the_second_block)
        with pytest.raises(KeyboardInterrupt):
            cache.encode(frames, FakeTokenizer(), tmp_path / "cut" / "latents.json", "s")
    assert not (tmp_path / "cut" / "latents.json").exists()
    again, whole = FakeTokenizer(), FakeTokenizer()
    cache.encode(frames, again, tmp_path / "cut" / "latents.json", "s")
    cache.encode(frames, whole, tmp_path / "whole" / "latents.json", "s")
    assert again.calls == whole.calls - 2
    for name in ("latents.npy", "latents_mirrored.npy", "latents.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_tokenizer_or_a_lost_file_starts_the_cache_anew(tmp_path):
    out, frames = tmp_path / "latents.json", images(40)
    cache.encode(frames, FakeTokenizer(), out, "s")
    other = FakeTokenizer()
    other.digest = "other"
    cache.encode(frames, other, out, "s")
    assert other.calls == 4 and cache.load_latents(out).tokenizer == "other"
    (tmp_path / "latents.npy").unlink()
    cache.encode(frames, other, out, "s")
    assert other.calls == 8
    cache.load_latents(out)


def test_a_damaged_cache_is_named(tmp_path):
    out = tmp_path / "latents.json"
    cache.encode(images(4), FakeTokenizer(), out, "s")
    mirrored = tmp_path / "latents_mirrored.npy"
    mirrored.write_bytes(mirrored.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(UserError, match=r"latents_mirrored.npy.*delete"):
        cache.load_latents(out)
    mirrored.unlink()
    with pytest.raises(UserError, match=r"latents_mirrored.npy"):
        cache.load_latents(out)
