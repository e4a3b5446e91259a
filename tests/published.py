"""Published weights in small, with random numbers: a checkpoint in WorldGym's layout, and the autoencoder beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import parity


def weights(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """State dict under the published parameter names, and the settings it was made with."""
    arrays, meta, _ = parity.load(name)
    return {key[3:]: value.clone() for key, value in arrays.items() if key.startswith("sd.")}, meta


def write(folder: Path, content: object, name: str = "other.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def make_vae(folder: Path) -> Path:
    """A Stable Diffusion 3 autoencoder in small: three halvings, 16 channels, a scale and a shift."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=16,
            scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
    model.save_pretrained(folder)
    return folder
