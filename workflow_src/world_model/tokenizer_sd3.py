"""The Stable Diffusion 3 autoencoder as a tokenizer, frozen, as the published world models use it.

    write_description(folder, "stabilityai/stable-diffusion-3-medium-diffusers", subfolder="vae", revision="…")
    tokenizer = load_sd3_tokenizer(folder, device)
    latents = tokenizer.encode(images)    # uint8 (N, H, W, 3) -> float32 (N, H/8, W/8, 16), times the scaling factor
    images = tokenizer.decode(latents)    # and back, uint8

The scaling factor is read from the autoencoder's own configuration. Its shift is *not* applied: WorldGym's checkpoints were
trained without it (WG-code, `facts`: latents are scaled only), and the description says so. Encoding takes the mode of the
posterior, so equal images give equal latents. Weights on a hub are referred to by name and revision, since their licence
has to be accepted there; a local folder is copied, so that the artefact is whole.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workflow_src.common.compute import autocast
from workflow_src.common.errors import UserError
from workflow_src.common.files import copy_file, digest, sha256_file, write_json
from workflow_src.world_model.tokenizer import to_pixels, to_signal

KIND = "sd3"
FORMAT = "rehearsal-sd3-tokenizer-1"
HUB = "stabilityai/stable-diffusion-3-medium-diffusers"
FILES = ("config.json", "diffusion_pytorch_model.safetensors")  # of an autoencoder
COPY = "vae"  # folder of a copied autoencoder inside the tokenizer's
SLICE = 16  # images per forward pass: 256x256 pixels take about 1 GB


class StableDiffusionTokenizer:
    """`vae`: a diffusers `AutoencoderKL`; `digest` identifies it."""

    scaled = True

    def __init__(self, vae, identity: str) -> None:
        self.vae, self.digest = vae, identity
        self.scaling = float(vae.config.scaling_factor)
        self.channels = int(vae.config.latent_channels)
        self.downsample = 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Latent shape (h, w, C) of images of this size. Raises UserError for a size that does not fit."""
        if height % self.downsample or width % self.downsample:
            raise UserError(
                f"images of {height}x{width} pixels: the tokenizer needs sides divisible by {self.downsample}"
            )
        return height // self.downsample, width // self.downsample, self.channels

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) -> float32 (N, h, w, C), scaled."""
        latents = np.empty((len(images), *self.shape(*images.shape[1:3])), np.float32)
        for start in range(0, len(images), SLICE):
            part = torch.as_tensor(np.ascontiguousarray(images[start : start + SLICE]), device=self.device)
            with autocast(self.device):
                code = self.vae.encode(to_signal(part)).latent_dist.mode()
            latents[start : start + SLICE] = (code.float() * self.scaling).permute(0, 2, 3, 1).cpu().numpy()
        return latents

    @torch.inference_mode()
    def decode(self, latents: np.ndarray | Tensor) -> np.ndarray:
        """float (N, h, w, C), scaled -> uint8 (N, H, W, 3)."""
        height, width = (side * self.downsample for side in latents.shape[1:3])
        images = np.empty((len(latents), height, width, 3), np.uint8)
        for start in range(0, len(latents), SLICE):
            part = torch.as_tensor(latents[start : start + SLICE], dtype=torch.float32, device=self.device)
            with autocast(self.device):
                signal = self.vae.decode(part.permute(0, 3, 1, 2) / self.scaling).sample
            images[start : start + SLICE] = to_pixels(signal)
        return images


def write_description(folder: str | Path, source: str, subfolder: str = "", revision: str = "") -> str:
    """Describe the autoencoder `source` in `folder`: a local folder, which is copied, or a hub's repository.

    Returns the tokenizer's digest.
    """
    folder, local = Path(folder), Path(source) / subfolder
    if local.is_dir():
        for name in FILES:
            if not (local / name).is_file():
                raise UserError(f"{local / name}: no such file; give a folder of diffusers' AutoencoderKL")
            copy_file(local / name, folder / COPY / name)
        source, subfolder, revision = COPY, "", _content(folder / COPY)
    elif source.startswith((".", "/", "~")):
        raise UserError(f"{source}: no such folder; give a folder of diffusers' AutoencoderKL or a hub repository")
    elif not revision:
        raise UserError(
            f"--vae-revision: needed with the hub repository {source}, so that the same weights are meant later: a commit"
        )
    write_json(folder / "config.json", {
        "format": FORMAT, "tokenizer": {"kind": KIND}, "source": source, "subfolder": subfolder, "revision": revision,
        "latents": "mode of the posterior times scaling_factor; shift_factor not applied",
    })  # fmt: skip
    return digest([KIND, source, subfolder, revision])


def _content(folder: Path) -> str:
    """Digest of a copied autoencoder."""
    return digest([sha256_file(folder / name) for name in FILES])


def load_sd3_tokenizer(folder: str | Path, device: torch.device | str = "cpu") -> StableDiffusionTokenizer:
    """Read what `write_description` wrote. Raises UserError naming what is missing: the file, the package, the weights."""
    path = Path(folder) / "config.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise ValueError(f"format {description['format']!r} is not {FORMAT!r}")
        source, subfolder, revision = (description[name] for name in ("source", "subfolder", "revision"))
        if source == COPY and _content(Path(folder) / COPY) != revision:
            raise ValueError(f"{COPY}/ is not what was copied there")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a usable tokenizer description ({error}); import the checkpoint again") from error
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError(
            f"{path}: needs the package diffusers; install it with `pip install 'rehearsal[published]'`"
        ) from None
    where = str(Path(folder) / COPY) if source == COPY else source
    asked = {} if source == COPY else {"subfolder": subfolder or None, "revision": revision or None}
    try:
        vae = AutoencoderKL.from_pretrained(where, use_safetensors=True, torch_dtype=torch.float32, **asked)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: the autoencoder {where} cannot be loaded ({reason}); accept its licence and log in to the hub, "
            "or import again with --vae and a local folder"
        ) from error
    return StableDiffusionTokenizer(
        vae.to(device).eval().requires_grad_(False), digest([KIND, source, subfolder, revision])
    )
