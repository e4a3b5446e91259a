"""Clips per second, share of the hardware's arithmetic (MFU) and memory of a training step of the world model.

A step is what `training/engine.py` does on one device: loss, gradients, clipping, AdamW and the moving average, here with
random weights, noise and data. The clips are latents that lie in memory (`cached`) or images that the frozen tokenizer
encodes first (`on the fly`). Each measurement is a process of its own. Prints a Markdown table; MFU is the counted
floating-point operations of the network's matrix products, forward and backward, over the measured seconds, as a share of
one large matrix product's speed here, or of `--peak`. Encoding is not counted, since it trains nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import CPU_ATTENTION, PRESETS, in_own_process, memory, peak, print_head, print_row, wait
from workflow_src.common import sections
from workflow_src.common.compute import autocast, configure_torch
from workflow_src.training.distributed import Processes
from workflow_src.training.optimizers import Optimizers
from workflow_src.world_model.diffusion import Objective
from workflow_src.world_model.network import WorldModelNetwork
from workflow_src.world_model.tokenizer import ConvTokenizer, ImageTokenizer

EXAMPLES = """examples:
  python benchmarks/training.py                                            # small network, batches 4 and 16
  python benchmarks/training.py --preset medium --batches 4 --steps 5
  python benchmarks/training.py --preset paper --batches 4 16 --compile    # the published 608 M network; for a GPU
  python benchmarks/training.py --preset paper --batches 16 --compile --peak 989    # MFU of an H100's data sheet
"""
WARM_UP = 2  # steps
COLUMNS = "batch", "latents", "clips/s", "frames/s", "GFLOP / clip", "MFU", "memory"
DOWNSAMPLE = 8  # pixels of an image per row of its latent, of both tokenizers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="small", help="(default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16], help="clips (default: 4 16)")
    parser.add_argument("--frames", type=int, default=10, help="of a clip (default: %(default)s, as published)")
    parser.add_argument("--steps", type=int, default=10, help="that are timed (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile each block")
    parser.add_argument("--peak", type=float, help="TFLOP/s that MFU is a share of (default: measured)")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default: %(default)s)")
    parser.add_argument("--one", nargs=2, metavar=("LATENTS", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options, options.one[0], int(options.one[1]))))
        return
    print_head(COLUMNS)
    for batch in options.batches:
        for latents in ("cached", "on the fly"):
            row = in_own_process(__file__, latents, batch)
            print_row([
                batch, latents, f"{row['speed']:.3g}", f"{row['speed'] * options.frames:.3g}", f"{row['flop'] / 1e9:.3g}",
                f"{row['speed'] * row['flop'] / row['peak']:.0%}", f"{row['memory']:.2f} GB",
            ])  # fmt: skip


def measure(options: argparse.Namespace, latents: str, batch: int) -> dict[str, float]:
    """Training at one batch: steps to warm up, then timed ones."""
    device = configure_torch(options.threads)
    config, side = PRESETS[options.preset]
    torch.manual_seed(0)
    network = WorldModelNetwork(config, side, side, options.frames).to(device).train()
    if options.compile:
        for block in network.blocks:
            block.compile(dynamic=False)
    step = trainer(network, options.precision)
    read = clips(options.preset, batch, options.frames, side, device, encoded=latents == "on the fly")
    for number in range(options.steps + WARM_UP):
        if number == WARM_UP:
            wait(device)
            began = time.perf_counter()
        step(read(), number)
    wait(device)
    seconds = time.perf_counter() - began
    return {
        "speed": batch * options.steps / seconds, "flop": count(config, side, options.frames), "memory": memory(device),
        "peak": options.peak * 1e12 if options.peak else peak(device, options.precision),
    }  # fmt: skip


def trainer(network: WorldModelNetwork, precision: str) -> Callable[[Tensor, int], None]:
    """One step on standardised latents `(B, T, h, w, C)`, as the training engine takes it."""
    config = sections.Training(optimizer="adamw")
    alone = Processes(0, 1, next(network.parameters()).device)
    objective, optimizers = Objective(sections.Objective()), Optimizers(network, config, alone)
    average, parameters = copy.deepcopy(network).requires_grad_(False), list(network.parameters())

    def step(latents: Tensor, number: int) -> None:
        for parameter in parameters:
            parameter.grad = None
        with autocast(latents.device, precision):
            loss(network, objective, latents).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip, foreach=True)
        optimizers.step(number)
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), parameters, 1 - config.ema)

    return step


def loss(network: WorldModelNetwork, objective: Objective, latents: Tensor) -> Tensor:
    """Mean training loss of a batch with random actions, noise and levels."""
    batch, frames, device = *latents.shape[:2], latents.device
    levels = objective.sample_levels(torch.rand(batch, frames, 2, device=device))
    actions = torch.randn(batch, frames, network.config.action_dim, device=device)
    return objective.training_loss(network, latents, actions, noise=torch.randn_like(latents), levels=levels).mean()


def clips(
    preset: str, batch: int, frames: int, side: int, device: torch.device, *, encoded: bool
) -> Callable[[], Tensor]:
    """A function that brings clips `(batch, frames, side, side, 16)` float32 to the device."""
    if not encoded:
        latents = torch.randn(batch, frames, side, side, 16, dtype=torch.float32).half()  # as latent caches are stored
        latents = latents.pin_memory() if device.type == "cuda" else latents
        return lambda: latents.to(device, non_blocking=True).float()
    images = torch.randint(256, (batch * frames, side * DOWNSAMPLE, side * DOWNSAMPLE, 3), dtype=torch.uint8).numpy()
    encode = tokenizer(preset, device).encode
    return lambda: torch.from_numpy(encode(images)).to(device).unflatten(0, (batch, frames))


def tokenizer(preset: str, device: torch.device) -> ImageTokenizer:
    """With random weights: the tabletop's, or for the published network the autoencoder of Stable Diffusion 3."""
    if preset != "paper":
        return ConvTokenizer(sections.Tokenizer(downsample=DOWNSAMPLE)).to(device).eval()
    from diffusers import AutoencoderKL

    from workflow_src.world_model.tokenizer_sd3 import StableDiffusionTokenizer

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
        block_out_channels=(128, 256, 512, 512), latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return StableDiffusionTokenizer(vae.to(device).eval().requires_grad_(False), "random")


def count(config: sections.Network, side: int, frames: int) -> float:
    """Floating-point operations of the matrix products of one clip, forward and backward.

    Counted at two blocks and at one, on the CPU: the others are like the second.
    """
    counts = []
    for depth in (1, 2):
        network = WorldModelNetwork(replace(config, depth=depth), side, side, frames)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            loss(network, Objective(sections.Objective()), torch.randn(1, frames, side, side, 16)).backward()
        counts.append(counter.get_total_flops())
    return counts[0] + (config.depth - 1) * (counts[1] - counts[0])


if __name__ == "__main__":
    main()
