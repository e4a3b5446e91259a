"""Tokenizers: images to a small latent grid and back. What they all share, and the convolutional one.

    tokenizer = load_tokenizer("results/tokenizer")
    latents = tokenizer.encode(images)    # uint8 (N, H, W, 3) -> float32 (N, H/8, W/8, C)
    images = tokenizer.decode(latents)    # and back, uint8

Latents are raw; their mean and deviation per channel are kept with the latent cache and the world model.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from workflow_src.common import sections
from workflow_src.common.compute import autocast
from workflow_src.common.config import from_dict
from workflow_src.common.errors import UserError
from workflow_src.common.files import digest, sha256_file

STEM = 4  # the first pixel shuffle; the rest of the down-sampling follows in steps of two
FORMAT = "rehearsal-conv-tokenizer-1"


class ImageTokenizer:
    """Numpy in, numpy out, in slices that bound the memory.

    A tokenizer says how many pixels a latent cell is wide (`downsample`), its `channels`, how many images it takes at once
    (`at_once`) and on which `device`, and turns tensors into each other in `_encode` and `_decode`. `digest` identifies its
    weights; it is empty until they are loaded. `scaled`: networks see its latents as they are; otherwise standardised by the
    training data's statistics.
    """

    downsample: int
    channels: int
    at_once: int
    device: torch.device
    scaled = False
    digest = ""

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Latent shape (h, w, C) of images of this size. Raises UserError for a size that does not fit."""
        if height % self.downsample or width % self.downsample:
            raise UserError(
                f"images of {height}x{width} pixels: the tokenizer needs sides divisible by {self.downsample} "
                "(lab.image_size)"
            )
        return height // self.downsample, width // self.downsample, self.channels

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) -> float32 (N, h, w, C), raw."""
        latents = np.empty((len(images), *self.shape(*images.shape[1:3])), np.float32)
        for start in range(0, len(images), self.at_once):
            part = torch.as_tensor(np.ascontiguousarray(images[start : start + self.at_once]), device=self.device)
            with autocast(self.device):
                code = self._encode(to_signal(part))
            latents[start : start + self.at_once] = code.float().permute(0, 2, 3, 1).cpu().numpy()
        return latents

    @torch.inference_mode()
    def decode(self, latents: np.ndarray | Tensor) -> np.ndarray:
        """float (N, h, w, C), raw -> uint8 (N, H, W, 3)."""
        height, width = (side * self.downsample for side in latents.shape[1:3])
        images = np.empty((len(latents), height, width, 3), np.uint8)
        for start in range(0, len(latents), self.at_once):
            part = torch.as_tensor(latents[start : start + self.at_once], dtype=torch.float32, device=self.device)
            with autocast(self.device):
                signal = self._decode(part.permute(0, 3, 1, 2))
            images[start : start + self.at_once] = to_pixels(signal)
        return images

    def _encode(self, signal: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, C, h, w)."""
        raise NotImplementedError

    def _decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 3, H, W), about [-1, 1]."""
        raise NotImplementedError


class Residual(nn.Module):
    """x + mix(silu(spatial(silu(norm x)))): a 3x3 and a 1x1 convolution, small at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(max(1, width // 16), width)
        self.spatial = nn.Conv2d(width, width, 3, padding=1)
        self.mix = nn.Conv2d(width, width, 1)
        with torch.no_grad():
            self.mix.weight.mul_(0.1)
            self.mix.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.silu(self.spatial(F.silu(self.norm(x)))))


class ConvTokenizer(nn.Module, ImageTokenizer):
    """A deterministic autoencoder: `encoder` and `decoder` work on images (N, 3, H, W) in [-1, 1] and latents (N, C, h, w).

    All work happens on the H/4 grid and below, which a pixel shuffle reaches in one move: little memory traffic, so it
    trains fast on a CPU.
    """

    at_once = 256

    def __init__(self, config: sections.Tokenizer) -> None:
        super().__init__()
        if config.downsample < 2 * STEM or config.downsample & (config.downsample - 1):
            raise UserError(f"tokenizer.downsample: {config.downsample} must be a power of two, at least {2 * STEM}")
        self.config, self.downsample, self.channels = config, config.downsample, config.channels
        fine, coarse = 3 * config.width, 4 * config.width
        levels = (config.downsample // STEM).bit_length() - 1
        widths = [fine] + [coarse] * levels
        down: list[nn.Module] = [nn.PixelUnshuffle(STEM), nn.Conv2d(3 * STEM**2, fine, 3, padding=1)]
        up: list[nn.Module] = [nn.Conv2d(config.channels, coarse, 3, padding=1)]
        for outer, inner in pairwise(widths):
            down += [nn.PixelUnshuffle(2), nn.Conv2d(4 * outer, inner, 1), Residual(inner), Residual(inner)]
        # The decoder mirrors it, and works on the finest grid too: edges are made there.
        for outer, inner in reversed(list(pairwise(widths))):
            up += [Residual(inner), Residual(inner), nn.Conv2d(inner, 4 * outer, 1), nn.PixelShuffle(2)]
        up += [Residual(fine), Residual(fine), nn.Conv2d(fine, 3 * STEM**2, 3, padding=1), nn.PixelShuffle(STEM)]
        self.encoder = nn.Sequential(*down, nn.Conv2d(coarse, config.channels, 1))
        self.decoder = nn.Sequential(*up)
        self.to(memory_format=torch.channels_last)

    def hidden_matrices(self) -> list[str]:
        """Convolutions that Muon takes: all but those which meet pixels or latents."""
        ends = {f"encoder.{i}" for i in (1, len(self.encoder) - 1)} | {
            f"decoder.{i}" for i in (0, len(self.decoder) - 2)
        }
        return [
            name for name, value in self.named_parameters() if value.ndim == 4 and name.rpartition(".")[0] not in ends
        ]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _encode(self, signal: Tensor) -> Tensor:
        return self.encoder(signal)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents.contiguous(memory_format=torch.channels_last))


def to_signal(images: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) in [-1, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_pixels(signal: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] -> uint8 (N, H, W, 3)."""
    pixels = signal.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def load_tokenizer(folder: str | Path, device: torch.device | str = "cpu") -> ImageTokenizer:
    """Read a tokenizer folder (`config.json` and what its kind needs). Raises UserError naming the broken file."""
    folder = Path(folder)
    try:
        description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if description["tokenizer"]["kind"] == "sd3":
            from workflow_src.world_model.tokenizer_sd3 import load_sd3_tokenizer

            return load_sd3_tokenizer(folder, device)
        config = from_dict(sections.Tokenizer, description["tokenizer"], "tokenizer")
        if description["format"] != FORMAT:
            raise ValueError(f"format {description['format']!r} is not {FORMAT!r}")
        model = ConvTokenizer(config)
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        model.digest = digest([architecture(config), sha256_file(folder / "model.safetensors")])
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or error}: no such file; train the tokenizer first") from None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: not a usable tokenizer ({' '.join(str(error).split())[:200]}); train it again"
        ) from error
    return model.to(device).eval().requires_grad_(False)


def architecture(config: sections.Tokenizer) -> dict[str, int | str]:
    """The fields of `config` that decide the shape of the weights."""
    return {name: getattr(config, name) for name in ("kind", "channels", "downsample", "width")}
