"""Turn a published WorldGym checkpoint into our artefact.

The checkpoint is a `torch.save` file: weights under `ema` if present, else under `model`, else bare. It is loaded without
running code (`weights_only`), its sizes are read off the weights, and every parameter has to fit. What the weights do not
say (spatial rotary embedding, guidance, frames in view) comes from the options or is known by the published files' names;
in the workflow it comes from the configuration, which has to agree with the weights.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from workflow_src import embodiments
from workflow_src.common import sections
from workflow_src.common.config import load_stage
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.fetch import shown
from workflow_src.common.files import sha256_file
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import say
from workflow_src.common.provenance import record
from workflow_src.world_model import published
from workflow_src.world_model.artefact import Card, build_network, load_strictly, save_artefact
from workflow_src.world_model.tokenizer_sd3 import make_tokenizer

EXAMPLES = """examples:
  HF_TOKEN=… python -m workflow_src.world_model.import_worldgym \\
      mixed_openx_9robots_20frames_0p1actiondropout_580ksteps.pt --out results/worldgym/world_model
  python -m workflow_src.world_model.import_worldgym other.pt --out results/other --rope pixel --cfg 1 --vae sd3/vae
"""
WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|ema_model)\.)+")  # what DDP, torch.compile and averaging put first
IMAGE, LATENT = 256, 32  # pixels and latent cells per side of the published models
HEAD = 64  # features per attention head of the published networks
FLAGS = ("rope", "cfg", "heads", "context", "image", "embodiment")  # what a workflow's configuration says instead


@dataclass(frozen=True)
class Settings:
    """What the weights do not say; and, in a workflow, what they are expected to be."""

    rope: str
    sampler: sections.Sampler
    heads: int = 0  # 0: one per 64 features
    image: int = IMAGE  # pixels per side
    embodiment: str = "widowx"
    network: sections.Network | None = None  # None: whatever the weights are
    sha256: str = ""  # of the checkpoint; "": any
    origin: str = ""  # where it came from; "": its name says it


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="file written by torch.save")
    parser.add_argument("--out", type=Path, required=True, help="artefact folder to write")
    parser.add_argument(
        "--rope", choices=("standard", "pixel"), help="spatial rotary embedding (default: by file name)"
    )
    parser.add_argument("--cfg", type=float, help="guidance over actions when sampling (default: by file name)")
    parser.add_argument("--heads", type=int, help=f"attention heads (default: one per {HEAD} features)")
    parser.add_argument("--context", type=int, help=f"frames in view (default: {published.CONTEXT})")
    parser.add_argument("--image", type=int, help=f"pixels per side (default: {IMAGE})")
    parser.add_argument("--embodiment", help="whose metric actions it gets (default: widowx)")
    parser.add_argument(
        "--config", type=Path, help="stage file of a workflow (lab, world_model) instead of the six above"
    )
    parser.add_argument("--vae", default=published.HUB, help="Stable Diffusion 3: hub repository or local folder")
    parser.add_argument("--vae-revision", default="", help="commit of the hub repository")
    options = parser.parse_args()
    die_with_parent()
    settings = _configured(options) if options.config else _given(options)
    path = import_checkpoint(options.checkpoint, options.out, settings, options.vae, options.vae_revision)
    say(f"world model: {path.parent}")


def _given(options: argparse.Namespace) -> Settings:
    """The command line's settings, completed by what is known of the file's name."""
    known = published.known(options.checkpoint.name)
    rope = options.rope or (known and known.rope)
    cfg = options.cfg if options.cfg is not None else known and known.cfg
    for flag, value in (("--rope", rope), ("--cfg", cfg)):
        if value is None:
            raise UserError(
                f"{options.checkpoint.name}: not the name of a published file, so {flag} is needed; "
                f"known: {', '.join(published.CHECKPOINTS)}"
            )
    context = published.CONTEXT if options.context is None else options.context
    given = {name: getattr(options, name) for name in ("heads", "image", "embodiment")}
    return Settings(
        rope, sections.Sampler(window=context, guidance=cfg),
        **{name: value for name, value in given.items() if value is not None},
    )  # fmt: skip


def _configured(options: argparse.Namespace) -> Settings:
    """A workflow's settings."""
    for flag in FLAGS:
        if getattr(options, flag) is not None:
            raise UserError(f"--{flag}: stands in {options.config}; leave one of them out")
    stage = load_stage(options.config)
    lab, model = stage.lab, stage.world_model
    network = model.network
    return Settings(
        network.spatial_rope, model.sampler, network.heads, lab.image_size, lab.embodiment, network,
        model.source.sha256, shown(model.source.checkpoint),
    )  # fmt: skip


def import_checkpoint(checkpoint: Path, out: Path, settings: Settings, vae: str, revision: str = "") -> Path:
    """Write the artefact of `checkpoint` into the folder `out`, with the autoencoder `vae`; the path of its weights."""
    embodiments.get(settings.embodiment)
    window, multiple = settings.sampler.window, 2 * IMAGE // LATENT
    for name, value, divisor in (("image size", settings.image, multiple), ("frames in view", window, 1)):
        if value < 1 or value % divisor:
            raise UserError(f"{name}: {value} is impossible; it must be a positive multiple of {divisor}")
    weights = read_checkpoint(checkpoint)
    sha256 = _checked_sha256(checkpoint, settings.sha256)
    card = make_card(weights, checkpoint, settings, sha256)
    network = build_network(card)
    load_strictly(network, weights, checkpoint)
    card = replace(card, tokenizer=make_tokenizer(out / "tokenizer", vae, revision))
    return save_artefact(out, network, card, out / "tokenizer")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Parameters by their published names. Raises UserError where the file is not such a checkpoint."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        # The rest of torch's message says how to load it anyway.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise UserError(
            f"{path}: loading it would run code ({named[1] if named else 'pickled objects'}); it is not read. "
            "Ask for a file of plain tensors"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise UserError(
            f"{path}: not a file that today's torch.save wrote, or cut short; download it again, or save it anew"
        ) from error
    if isinstance(content, Mapping):
        for part in ("ema", "model"):
            if isinstance(content.get(part), Mapping):
                content = content[part]
                break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: holds no weights under `ema`, under `model`, or at its top")
    return {WRAPPERS.sub("", name): value for name, value in content.items()}


def make_card(weights: Mapping[str, Tensor], checkpoint: Path, settings: Settings, sha256: str) -> Card:
    """The artefact's description without its tokenizer; sizes are read off the weights.

    Raises UserError where they are no WorldGym network, or another one than expected.
    """
    for name, dimensions in (
        ("x_proj.weight", 4),
        ("action_embedder.weight", 2),
        ("blocks.0.s_block.ffwd.0.weight", 2),
    ):
        if name not in weights or weights[name].ndim != dimensions:
            raise UserError(
                f"{checkpoint}: {name} is {'absent' if name not in weights else 'misshapen'}; "
                "this is not a WorldGym network"
            )
    width, channels, patch, _ = weights["x_proj.weight"].shape
    depth = 1 + max(int(block[1]) for name in weights if (block := re.match(r"blocks\.(\d+)\.", name)))
    network = sections.Network(
        in_channels=channels, patch=patch, width=width, depth=depth, heads=settings.heads or max(1, width // HEAD),
        mlp_ratio=weights["blocks.0.s_block.ffwd.0.weight"].shape[0] / width,
        action_dim=weights["action_embedder.weight"].shape[1], spatial_rope=settings.rope,
    )  # fmt: skip
    wrong = [
        f"{path} is {expected!r}, the weights' {found!r}"
        for path, found, expected in published.differences(network, settings.network or network, "world_model.network")
    ]
    if wrong:
        raise UserError(f"{checkpoint}: is not the configured network: {'; '.join(wrong)}")
    side = settings.image * LATENT // IMAGE
    return Card(
        network=network, objective=published.OBJECTIVE, sampler=settings.sampler, latent=(side, side),
        frames=settings.sampler.window, image=(settings.image, settings.image), mean=(0.0,) * channels,
        std=(1.0,) * channels, embodiment=settings.embodiment, convention=published.CONVENTION,
        alignment=published.ALIGNMENT, actions=published.ACTIONS,
        provenance={"checkpoint": settings.origin or checkpoint.name, "sha256": sha256,
                    **{name: str(value) for name, value in record().items()}},
    )  # fmt: skip


def _checked_sha256(checkpoint: Path, expected: str) -> str:
    found = sha256_file(checkpoint)
    if expected and found != expected.lower():
        raise UserError(
            f"{checkpoint}: sha256 is {found}, not {expected} (world_model.source.sha256); correct that, or delete the "
            "file and it is fetched again"
        )
    say(f"{checkpoint}: sha256 {found}")
    return found


if __name__ == "__main__":
    run_cli(main)
