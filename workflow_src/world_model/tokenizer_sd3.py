"""The Stable Diffusion 3 autoencoder as a tokenizer, frozen, as the published world models use it.

    make_tokenizer(folder, "stabilityai/stable-diffusion-3-medium-diffusers", revision="…")
    tokenizer = load_sd3_tokenizer(folder, device)
    latents = tokenizer.encode(images)    # uint8 (N, H, W, 3) -> float32 (N, H/8, W/8, 16), times the scaling factor
    images = tokenizer.decode(latents)    # and back, uint8

The scaling factor is read from the autoencoder's own configuration. Its shift is *not* applied: WorldGym's checkpoints were
trained without it (WG-code: latents are scaled only), and the description says so. Encoding takes the mode of the
posterior, so equal images give equal latents. A tokenizer folder holds a copy of the autoencoder, so it is whole.

As a program: make a tokenizer folder. Its licence has to be accepted on the hub; the token comes from `HF_TOKEN`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.fetch import fetch
from workflow_src.common.files import copy_file, digest, sha256_file, write_json
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import say
from workflow_src.world_model.published import autoencoder
from workflow_src.world_model.tokenizer import ImageTokenizer

EXAMPLES = """examples:
  HF_TOKEN=… python -m workflow_src.world_model.tokenizer_sd3 stabilityai/stable-diffusion-3-medium-diffusers \\
      --out results/tokenizer
  python -m workflow_src.world_model.tokenizer_sd3 sd3/vae --out results/tokenizer
"""
KIND = "sd3"
FORMAT = "rehearsal-sd3-tokenizer-1"
FILES = ("config.json", "diffusion_pytorch_model.safetensors")  # of an autoencoder
COPY = "vae"  # folder of the autoencoder inside the tokenizer's


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="hub repository (its folder vae/), or local folder of diffusers' AutoencoderKL")
    parser.add_argument("--revision", default="", help="commit of the hub repository")
    parser.add_argument("--out", type=Path, required=True, help="tokenizer folder; its config.json is written last")
    options = parser.parse_args()
    die_with_parent()
    say(f"tokenizer: {options.out}, digest {make_tokenizer(options.out, options.source, options.revision)}")


class StableDiffusionTokenizer(ImageTokenizer):
    """`vae`: a diffusers `AutoencoderKL`; `digest` identifies it. Latents are the posterior's mode, scaled."""

    at_once = 16  # 256x256 pixels take about 1 GB

    scaled = True

    def __init__(self, vae, identity: str) -> None:
        self.vae, self.digest = vae, identity
        self.scaling = float(vae.config.scaling_factor)
        self.channels = int(vae.config.latent_channels)
        self.downsample = 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def _encode(self, signal: Tensor) -> Tensor:
        return self.vae.encode(signal).latent_dist.mode().float() * self.scaling

    def _decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.scaling).sample


def make_tokenizer(folder: str | Path, source: str, revision: str = "") -> str:
    """Copy the autoencoder `source`, a local folder or a hub's repository, into `folder` and describe it.

    Returns the tokenizer's digest. A download that was cut continues. Raises UserError where there is no autoencoder, or
    where the hub does not let us have it.
    """
    folder, where = Path(folder), autoencoder(source, revision)
    for name in FILES:
        if where.startswith("hf://"):
            fetch(f"{where}/{name}", folder / COPY / name)
        elif (Path(where) / name).is_file():
            copy_file(Path(where) / name, folder / COPY / name)
        else:
            raise UserError(f"{Path(where) / name}: no such file; give a folder of diffusers' AutoencoderKL")
    content = _content(folder / COPY)
    write_json(folder / "config.json", {
        "format": FORMAT, "tokenizer": {"kind": KIND}, "source": COPY, "subfolder": "", "revision": content,
        "latents": "mode of the posterior times scaling_factor; shift_factor not applied", "origin": where,
    })  # fmt: skip
    return _identity(content)


def _content(folder: Path) -> str:
    """Digest of an autoencoder's files."""
    return digest([sha256_file(folder / name) for name in FILES])


def _identity(content: str) -> str:
    return digest([KIND, COPY, "", content])


def load_sd3_tokenizer(folder: str | Path, device: torch.device | str = "cpu") -> StableDiffusionTokenizer:
    """Read what `make_tokenizer` wrote. Raises UserError naming what is missing: the file, the package, the weights."""
    path, copy = Path(folder) / "config.json", Path(folder) / COPY
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise ValueError(f"format {description['format']!r} is not {FORMAT!r}")
        if _content(copy) != description["revision"]:
            raise ValueError(f"{COPY}/ is not what was copied there")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a usable tokenizer ({error}); make or import it again") from error
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError(
            f"{path}: needs the package diffusers; install it with `pip install 'rehearsal[published]'`"
        ) from None
    try:
        vae = AutoencoderKL.from_pretrained(str(copy), use_safetensors=True, torch_dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{copy}: not an autoencoder that can be loaded ({reason})") from error
    return StableDiffusionTokenizer(vae.to(device).eval().requires_grad_(False), _identity(description["revision"]))


if __name__ == "__main__":
    run_cli(main)
