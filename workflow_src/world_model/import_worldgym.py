"""Turn a published WorldGym checkpoint into our artefact.

The checkpoint is a `torch.save` file: weights under `ema` if present, else under `model`, else bare. It is loaded without
running code (`weights_only`), its sizes are read off the weights, and every parameter has to fit. What the weights do not
say comes from the options, or from the names of the published files (WG-code: README, notebook): spatial rotary embedding,
guidance, context.
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
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import sha256_file
from workflow_src.common.progress import say
from workflow_src.common.provenance import record
from workflow_src.world_model.artefact import Card, build_network, load_strictly, save_artefact
from workflow_src.world_model.tokenizer_sd3 import HUB, write_description

EXAMPLES = """examples:
  python -m workflow_src.world_model.import_worldgym mixed_openx_9robots_20frames_0p1actiondropout_580ksteps.pt \\
      --out results/worldgym --vae-revision COMMIT
  python -m workflow_src.world_model.import_worldgym bridge.pt --out results/bridge --rope pixel --cfg 1 --vae sd3/vae
"""
WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|ema_model)\.)+")  # what DDP, torch.compile and averaging put first
IMAGE, LATENT = 256, 32  # pixels and latent cells per side of the published models
CONTEXT = 20  # frames in view
DROPOUT = 0.1  # of the actions in training: guidance needs it


@dataclass(frozen=True)
class Known:
    """What is known of a published file."""

    rope: str
    cfg: float


# By a part of the file's name.
PUBLISHED = {"mixed_openx_9robots_20frames_0p1actiondropout": Known("standard", 3.0), "bridge_v2": Known("pixel", 1.0)}


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
    parser.add_argument("--heads", type=int, default=0, help="attention heads (default: one per 64 features)")
    parser.add_argument("--context", type=int, default=CONTEXT, help="frames in view (default: %(default)s)")
    parser.add_argument("--image", type=int, default=IMAGE, help="pixels per side (default: %(default)s)")
    parser.add_argument("--embodiment", default="widowx", help="whose metric actions it gets (default: %(default)s)")
    parser.add_argument("--vae", default=HUB, help="Stable Diffusion 3: hub repository or local folder")
    parser.add_argument("--vae-revision", default="", help="commit of the hub repository")
    options = parser.parse_args()
    path = import_checkpoint(options)
    say(f"world model: {path.parent}")


def import_checkpoint(options: argparse.Namespace) -> Path:
    """Write the artefact that `options` (the command line's) ask for; the path of its weights."""
    embodiments.get(options.embodiment)
    for flag, value, divisor in (("--image", options.image, 2 * IMAGE // LATENT), ("--context", options.context, 1)):
        if value < 1 or value % divisor:
            raise UserError(f"{flag}: {value} is impossible; it must be a positive multiple of {divisor}")
    weights = read_checkpoint(options.checkpoint)
    rope, cfg = _settings(options)
    card = make_card(weights, options, rope, cfg)
    network = build_network(card)
    load_strictly(network, weights, options.checkpoint)
    hub = not Path(options.vae).is_dir()
    identity = write_description(
        options.out / "tokenizer", options.vae, "vae" if hub else "", options.vae_revision if hub else ""
    )
    card = replace(card, tokenizer=identity)
    return save_artefact(options.out, network, card, options.out / "tokenizer")


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


def _settings(options: argparse.Namespace) -> tuple[str, float]:
    known = next((known for part, known in PUBLISHED.items() if part in options.checkpoint.name), None)
    rope = options.rope or (known and known.rope)
    cfg = options.cfg if options.cfg is not None else known and known.cfg
    for flag, value in (("--rope", rope), ("--cfg", cfg)):
        if value is None:
            raise UserError(
                f"{options.checkpoint.name}: not the name of a published file, so {flag} is needed; "
                f"known: {', '.join(PUBLISHED)}"
            )
    return rope, cfg


def make_card(weights: Mapping[str, Tensor], options: argparse.Namespace, rope: str, cfg: float) -> Card:
    """The artefact's description without its tokenizer; sizes are read off the weights."""
    for name, dimensions in (
        ("x_proj.weight", 4),
        ("action_embedder.weight", 2),
        ("blocks.0.s_block.ffwd.0.weight", 2),
    ):
        if name not in weights or weights[name].ndim != dimensions:
            raise UserError(
                f"{options.checkpoint}: {name} is {'absent' if name not in weights else 'misshapen'}; "
                "this is not a WorldGym network"
            )
    width, channels, patch, _ = weights["x_proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    network = sections.Network(
        in_channels=channels, patch=patch, width=width, depth=depth, heads=options.heads or max(1, width // 64),
        mlp_ratio=weights["blocks.0.s_block.ffwd.0.weight"].shape[0] / width,
        action_dim=weights["action_embedder.weight"].shape[1], spatial_rope=rope,
    )  # fmt: skip
    side = options.image * LATENT // IMAGE
    return Card(
        network=network, objective=sections.Objective(action_dropout=DROPOUT),
        sampler=sections.Sampler(window=options.context, guidance=cfg), latent=(side, side), frames=options.context,
        image=(options.image, options.image), mean=(0.0,) * channels, std=(1.0,) * channels,
        embodiment=options.embodiment, convention="worldgym", alignment="worldgym_train",
        provenance={"checkpoint": options.checkpoint.name, "sha256": sha256_file(options.checkpoint),
                    **{name: str(value) for name, value in record().items()}},
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
