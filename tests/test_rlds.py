"""Reading RLDS directories: framing, checksums, the wanted features, damage."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from tests.rlds import jpeg, write_rlds
from workflow_src.common.errors import UserError
from workflow_src.episodes.rlds import Rlds, decode_image
from workflow_src.episodes.tfrecord import masked_crc, read_records, write_records

FEATURES = ["action/world_vector", "action/open_gripper", "observation/natural_language_instruction"]


def steps(count: int, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {"action": {"world_vector": rng.normal(size=3).astype(np.float32), "open_gripper": np.bool_(t % 2)},
         "observation": {"image": jpeg(seed + t), "natural_language_instruction": f"task {seed}"},
         "is_last": np.bool_(t == count - 1)}
        for t in range(count)
    ]  # fmt: skip


@pytest.fixture
def made(tmp_path):
    episodes = [steps(3 + n, 10 * n) for n in range(5)]
    root = write_rlds(tmp_path / "toy", {"train": [episodes[:2], episodes[2:4]], "test": [episodes[4:]]})
    return Rlds(root), episodes


def test_checksum_is_the_published_one():
    """CRC-32C of "123456789" is e3069283 (RFC 3720, B.4); masked as TFRecord does it."""
    crc = 0xE3069283
    assert masked_crc(b"123456789") == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def test_episodes_come_back_as_they_were_written(made):
    rlds, episodes = made
    shards = rlds.shards()
    assert [(s.split, s.first, s.episodes) for s in shards] == [("test", 0, 1), ("train", 0, 2), ("train", 2, 2)]
    order = [4, 0, 1, 2, 3]
    read = [episode for shard in shards for episode in rlds.episodes(shard, FEATURES, "observation/image")]
    for number, episode in zip(order, read, strict=True):
        assert episode.wrong == ""
        assert sorted(episode.arrays) == sorted(FEATURES)
        expected = np.stack([step["action"]["world_vector"] for step in episodes[number]])
        np.testing.assert_array_equal(episode.arrays["action/world_vector"], expected)
        assert episode.arrays["action/open_gripper"].tolist() == [bool(t % 2) for t in range(len(expected))]
        assert episode.arrays["observation/natural_language_instruction"] == [f"task {10 * number}"] * len(expected)
        assert episode.images == [step["observation"]["image"] for step in episodes[number]]


def test_reads_without_tensorflow(made):
    rlds, _ = made
    assert next(rlds.episodes(rlds.shards()[0], FEATURES)).images == []
    assert "tensorflow" not in sys.modules


def test_a_feature_that_is_not_there_is_left_out_but_images_are_needed(made):
    rlds, _ = made
    episode = next(rlds.episodes(rlds.shards()[0], [*FEATURES, "observation/state"], "observation/image"))
    assert "observation/state" not in episode.arrays
    with pytest.raises(UserError, match=r"features.json: a step has no 'observation/rgb'"):
        next(rlds.episodes(rlds.shards()[0], FEATURES, "observation/rgb"))


def test_a_damaged_payload_costs_one_record(made):
    rlds, episodes = made
    shard = rlds.shards()[1]
    data = bytearray(shard.path.read_bytes())
    data[100] ^= 1
    shard.path.write_bytes(data)
    first, second = rlds.episodes(shard, FEATURES, "observation/image")
    assert (first.record, first.wrong) == (0, "the record's checksum is wrong")
    assert (second.record, second.wrong, len(second.images)) == (1, "", len(episodes[1]))


def test_a_damaged_length_or_a_short_file_costs_the_rest(made):
    rlds, _ = made
    shard = rlds.shards()[1]
    data = shard.path.read_bytes()
    shard.path.write_bytes(b"\x01" + data[1:])
    wrongs = [episode.wrong for episode in rlds.episodes(shard, FEATURES)]
    assert "length is damaged, at byte 0" in wrongs[0] and wrongs[1] == "missing from its file"
    shard.path.write_bytes(data[:-10])
    first, second = rlds.episodes(shard, FEATURES)
    assert first.wrong == "" and "ends within the record" in second.wrong
    shard.path.unlink()
    assert [episode.wrong for episode in rlds.episodes(shard, FEATURES)] == ["its file is missing"] * 2


def test_what_is_no_episode_is_reported(made):
    rlds, _ = made
    shard = rlds.shards()[1]
    write_records(shard.path, [b"\xff\xff\xff", b""])
    wrongs = [episode.wrong for episode in rlds.episodes(shard, FEATURES)]
    assert all(wrong.startswith("not an episode of this set (") for wrong in wrongs), wrongs


def test_only_what_is_there_is_read(tmp_path):
    write_records(tmp_path / "x", [b"one", b"", b"three"])
    assert [record.payload for record in read_records(tmp_path / "x")] == [b"one", b"", b"three"]
    (tmp_path / "empty").write_bytes(b"")
    assert list(read_records(tmp_path / "empty")) == []


def test_images_are_averaged_when_they_shrink():
    """A fine checkerboard must become grey, not black or white: the filter is antialiased."""
    import io

    from PIL import Image

    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(board).save(buffer, "PNG")
    small = decode_image(buffer.getvalue(), 8)
    assert small.shape == (8, 8, 3) and small.dtype == np.uint8
    assert abs(small.astype(int) - 127).max() < 30
    with pytest.raises(ValueError, match="not a whole image"):
        decode_image(jpeg(0)[:200], 8)
    with pytest.raises(ValueError, match="not a whole image"):
        decode_image(b"", 8)


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(UserError, match=r"dataset_info.json: missing"):
        Rlds(tmp_path)
