"""What validation measures and draws: errors by horizon, LPIPS with weights from files, dropped actions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.test_tokenizer import moving_squares
from workflow_src.common import sections
from workflow_src.common.errors import UserError
from workflow_src.training import plots, replay
from workflow_src.training.lpips import BACKBONE, CONVOLUTIONS, HEADS, LPIPS, VARIABLE, load_lpips
from workflow_src.world_model.artefact import Card, WorldModel, build_network
from workflow_src.world_model.environment import imagine

torch.set_num_threads(1)
CPU = torch.device("cpu")


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A folder with random weights in the published layout, named by the environment variable."""
    draw = torch.Generator().manual_seed(0)
    backbone, heads = {"classifier.1.weight": torch.zeros(1)}, {}
    for index, (place, inputs, outputs, kernel, *_) in enumerate(CONVOLUTIONS):
        deviation = (inputs * kernel**2) ** -0.5
        shape = (outputs, inputs, kernel, kernel)
        backbone[f"features.{place}.weight"] = deviation * torch.randn(shape, generator=draw)
        backbone[f"features.{place}.bias"] = 0.1 * torch.randn(outputs, generator=draw)
        heads[f"lin{index}.model.1.weight"] = torch.rand((1, outputs, 1, 1), generator=draw)
    torch.save(backbone, tmp_path / BACKBONE)
    torch.save(heads, tmp_path / HEADS)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


def images(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 48, 48, 3), dtype=np.uint8)


def test_lpips_is_what_the_published_package_gives(weights):
    metric = load_lpips(CPU)
    one, two = images(0, 2, 3), images(1, 2, 3)
    found = metric(one, two)
    assert found.shape == (2, 3)
    # From the package lpips 0.1.4 with these weights.
    np.testing.assert_allclose(found[0], [0.94469625, 0.91573024, 0.94398481], rtol=1e-5)
    np.testing.assert_allclose(metric(two, one), found, rtol=1e-6)
    assert (metric(one, one) == 0).all()


def test_lpips_needs_weights_that_fit(weights, monkeypatch):
    (weights / HEADS).write_bytes(b"no weights")
    with pytest.raises(UserError, match=rf"{HEADS}: cannot be read \(.*\); {VARIABLE} must name a folder with it"):
        load_lpips(CPU)
    torch.save({"lin0.model.1.weight": torch.zeros(1, 3, 1, 1)}, weights / HEADS)
    with pytest.raises(UserError, match=rf"{HEADS}: holds no lin0.model.1.weight of shape \(1, 64, 1, 1\)"):
        load_lpips(CPU)
    (weights / BACKBONE).unlink()
    with pytest.raises(UserError, match=rf"{BACKBONE}: cannot be read \(No such file"):
        load_lpips(CPU)
    monkeypatch.delenv(VARIABLE)
    assert load_lpips(CPU) is None


def test_errors_are_means_by_horizon():
    truth = np.full((2, 3, 48, 48, 3), 100, np.uint8)
    worse = truth.copy()
    worse[:, 1] += 16
    worse[0, 2] += 32
    rows = replay.compare(truth, {"": worse, "_same": truth}, LPIPS())
    assert [row["horizon"] for row in rows] == [1, 2, 3]
    assert [row["mse"] for row in rows] == pytest.approx([0, (16 / 255) ** 2, (32 / 255) ** 2 / 2], rel=1e-5)
    assert rows[1]["psnr"] == pytest.approx(20 * np.log10(255 / 16), rel=1e-5)
    assert rows[2]["ssim_same"] == 1 and rows[2]["mse_same"] == 0
    assert {"lpips", "lpips_same"} <= rows[0].keys() and "lpips" not in replay.compare(truth, {"": worse})[0]
    assert replay.summary(rows)["mse"] == pytest.approx(np.mean([row["mse"] for row in rows]))


def test_the_picture_shows_every_line_there_is(tmp_path):
    rows = [
        {"horizon": step} | {f"{metric}{suffix}": step / 7 for metric in plots.METRICS for suffix in plots.LINES}
        for step in (1, 2, 3)
    ]
    plots.plot_horizon(tmp_path / "all.png", rows)
    few = [{name: value for name, value in row.items() if "lpips" not in name} for row in rows]
    plots.plot_horizon(tmp_path / "few.png", few)
    wide, narrow = (Image.open(tmp_path / name) for name in ("all.png", "few.png"))
    assert wide.width * 2 == narrow.width * 3
    seen = {tuple(pixel) for pixel in np.asarray(wide)[..., :3].reshape(-1, 3)}
    for colour in ("#3366aa", "#bb7744", "#aa4488", "#559955"):
        assert tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5)) in seen


class Pixels:
    """A tokenizer whose latents are the picture, sixteen times smaller."""

    def encode(self, frames: np.ndarray) -> np.ndarray:
        return frames[:, ::16, ::16].astype(np.float32) / 255

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return (latents.clip(0, 1) * 255).astype(np.uint8).repeat(16, 1).repeat(16, 2)


@pytest.mark.parametrize("learned_null", [True, False])
def test_without_guidance_a_replay_knows_nothing_of_the_actions(learned_null):
    """What the column `_null` of validation.csv rests on."""
    frames, actions = moving_squares(3, 4, 0)
    side = frames.shape[2] // 16
    card = Card(
        network=sections.Network(in_channels=3, patch=1, width=16, depth=1, heads=2, learned_null=learned_null),
        objective=sections.Objective(action_dropout=0.1),
        sampler=sections.Sampler(steps=2, window=3, guidance=0.0),
        latent=(side, side), frames=3, image=frames.shape[2:4], mean=(0.5,) * 3, std=(0.3,) * 3, embodiment="tabletop",
    )  # fmt: skip
    torch.manual_seed(0)
    network = build_network(card).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    told = replace(card, sampler=replace(card.sampler, guidance=1.0))
    one, other, with_actions = (
        imagine(WorldModel(some, network, Pixels(), ""), frames[:, 0], acts, 0, range(3))
        for some, acts in ((card, actions), (card, actions[::-1].copy()), (told, actions))
    )
    np.testing.assert_array_equal(one, other)
    assert not np.array_equal(one, with_actions)
