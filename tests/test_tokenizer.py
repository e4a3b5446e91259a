"""The tokenizer: shapes, learning, artefact, and its command line from episodes to weights."""

import json
import sys

import numpy as np
import pytest
import torch

from tests.stores import frames_of, make_store
from workflow_src.common import sections
from workflow_src.common.config import to_dict
from workflow_src.common.errors import UserError
from workflow_src.episodes.store import write_episode, write_table
from workflow_src.training import tokenizer as training
from workflow_src.training.replay import psnr, ssim
from workflow_src.world_model.tokenizer import ConvTokenizer, load_tokenizer

torch.set_num_threads(1)
CONFIG = sections.Tokenizer(
    channels=4, width=4, training=sections.Training(steps=60, batch=8, optimizer="muon", warmup=5, precision="fp32")
)


def moving_squares(episodes: int, frames: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 (N, F, 32, 32, 3) of a square moved by actions (N, F-1, 7): dx, dy of up to 0.05 m = 5 pixels."""
    rng = np.random.default_rng(seed)
    actions = np.zeros((episodes, frames - 1, 7), np.float32)
    actions[..., :2] = rng.uniform(-0.05, 0.05, (episodes, frames - 1, 2))
    moved = np.cumsum(actions[..., :2] * 100, 1)
    place = rng.uniform(6, 20, (episodes, 1, 2)) + np.pad(moved, ((0, 0), (1, 0), (0, 0)))
    rows, columns = np.mgrid[:32, :32]
    images = np.full((episodes, frames, 32, 32, 3), 90, np.uint8)
    inside = (abs(columns - place[..., :1, None].clip(3, 28)) < 4) & (abs(rows - place[..., 1:, None].clip(3, 28)) < 4)
    images[inside] = (220, 40, 30)
    return images, actions


def write_store(root, images: np.ndarray, actions: np.ndarray):
    """An episode store of these episodes; returns its table's path."""
    rows = []
    for index, (frames, commands) in enumerate(zip(images, actions)):
        sums = write_episode(root, index, frames, {"actions": commands}, fps=5)
        rows.append({"index": index, "frames": len(frames), "instruction": "move", "task": "move", "behaviour": "play",
                     "control_hz": 5.0, "embodiment": "tabletop", "action_semantics": "commanded", "source": "test",
                     "seed": index, "success": False, **sums})  # fmt: skip
    write_table(root / "episodes.parquet", rows)
    return root / "episodes.parquet"


def run_cli(monkeypatch, module, **flags) -> None:
    """Call a command line's `main` with `--flags`."""
    arguments = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    module.main()


@pytest.mark.parametrize("downsample", [8, 16])
def test_shapes_and_batches(downsample):
    model = ConvTokenizer(sections.Tokenizer(channels=6, downsample=downsample, width=4)).eval()
    images = np.random.default_rng(0).integers(0, 256, (5, 48, 64, 3), dtype=np.uint8)
    latents = model.encode(images)
    assert latents.shape == (5, 48 // downsample, 64 // downsample, 6) and latents.dtype == np.float32
    decoded = model.decode(latents)
    assert decoded.shape == images.shape and decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, model.decode(torch.from_numpy(latents)))
    assert model.decode(latents[:0]).shape == (0, 48, 64, 3)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"50x48 pixels.*divisible by 8"):
        ConvTokenizer(CONFIG).encode(np.zeros((1, 50, 48, 3), np.uint8))
    with pytest.raises(UserError, match=r"tokenizer.downsample: 12"):
        ConvTokenizer(sections.Tokenizer(downsample=12))
    with pytest.raises(UserError, match=r"tokenizer.downsample: 16 does not divide the 24x24"):
        images = np.zeros((2, 24, 24, 3), np.uint8)
        training.train(images, sections.Tokenizer(downsample=16), seed=0, state="", recipe="")


def test_from_episodes_to_a_tokenizer_that_reconstructs(tmp_path, monkeypatch):
    tables = {name: write_store(tmp_path / name, *moving_squares(n, 6, n)) for name, n in (("train", 12), ("held", 3))}
    config = tmp_path / "stage.json"
    config.write_text(json.dumps({"seed": 0, "tokenizer": to_dict(CONFIG)}))
    out = tmp_path / "tokenizer" / "model.safetensors"
    flags = dict(config=config, episodes=tables["train"], validation=tables["held"], out=out, state=tmp_path / "state")
    run_cli(monkeypatch, training, **flags)
    tokenizer = load_tokenizer(out.parent)
    images = moving_squares(3, 6, 3)[0].reshape(-1, 32, 32, 3)
    middle = np.broadcast_to(np.median(images, 0).astype(np.uint8), images.shape)
    assert psnr(tokenizer.decode(tokenizer.encode(images)), images).mean() > psnr(middle, images).mean() + 3
    mirrored = images[:, :, ::-1]
    assert psnr(tokenizer.decode(tokenizer.encode(mirrored)), mirrored).mean() > psnr(middle, images).mean() + 3
    assert {"metrics.csv", "reconstructions.png", "config.json"} <= {path.name for path in out.parent.iterdir()}
    first = out.read_bytes()
    out.unlink()
    run_cli(monkeypatch, training, **flags)  # the last checkpoint is there, so this retrains nothing
    assert out.read_bytes() == first and load_tokenizer(out.parent).digest == tokenizer.digest


def test_unequal_episodes_give_their_frames_too(tmp_path, monkeypatch):
    """All of them where they are few, and otherwise as many as fit, spread over all episodes."""
    episodes = frames_of([5, 3, 9])
    table = make_store(tmp_path, episodes).root / "episodes.parquet"
    every = np.concatenate(episodes)
    np.testing.assert_array_equal(training.load_frames(table), every)
    monkeypatch.setattr(training, "MOST", 5)
    np.testing.assert_array_equal(training.load_frames(table), every[[0, 4, 8, 12, 16]])


def test_missing_and_broken_artefacts_are_named(tmp_path):
    with pytest.raises(UserError, match=r"config.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not a usable tokenizer"):
        load_tokenizer(tmp_path)


def test_picture_scores():
    images = moving_squares(2, 3)[0]
    assert np.all(psnr(images, images) > 70) and np.allclose(ssim(images, images), 1)
    worse, bad = (np.clip(images.astype(int) + shift, 0, 255).astype(np.uint8) for shift in (4, 40))
    assert np.all(psnr(worse, images) > psnr(bad, images)) and np.all(ssim(worse, images) > ssim(bad, images))
    assert psnr(worse[:1, :1], images[:1, :1]).item() == pytest.approx(10 * np.log10(255**2 / 16), abs=1e-3)
