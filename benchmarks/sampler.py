"""Frames per second, memory and counted work of generation: everything recomputed, cached exactly, cached streaming.

    python benchmarks/sampler.py                                  # a small network, batches 1, 4, 16, on what is there
    python benchmarks/sampler.py --preset paper --batches 1 8 32  # the published 608 M network; for a GPU

One rollout of `--frames` frames from one first frame, with the published sampler's settings (window 20, 10 steps, guidance 3,
horizon 1). Each measurement is a process of its own, so that its peak memory is its own. Prints a Markdown table:
frame-forwards per new frame, counted floating-point operations of the matrix products, frames/s, the share of the floor (those
operations at the speed of one large matrix product here), memory, and the speed-up over recomputation.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from workflow_src.common import sections
from workflow_src.common.compute import autocast, configure_torch
from workflow_src.world_model.diffusion import Objective
from workflow_src.world_model.network import WorldModelNetwork
from workflow_src.world_model.sampler import make_sampler

WINDOW, STEPS, GUIDANCE = 20, 10, 3.0
# network, rows and columns of the latent
PRESETS = {
    "small": (sections.Network(width=128, depth=4, heads=4), 8),
    "paper": (sections.Network(), 32),
}
SAMPLERS = {
    "recomputed": {"cached": False, "mode": "exact"},
    "cached, exact": {"cached": True, "mode": "exact"},
    "cached, streaming": {"cached": True, "mode": "streaming"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--frames", type=int, default=40, help="new frames per rollout (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--one", nargs=2, metavar=("SAMPLER", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options, options.one[0], int(options.one[1]))))
        return
    print("| batch | sampler | frame-forwards / frame | TFLOP / frame | frames/s | of the floor | memory | speed-up |")
    print("|---|---|---|---|---|---|---|---|")
    for batch in options.batches:
        slow = None
        for name in SAMPLERS:
            row = _in_own_process(name, batch)
            slow = slow or row["frames_per_second"]
            print(
                f"| {batch} | {name} | {row['forwards']:.1f} | {row['tflop']:.3g} | {row['frames_per_second']:.3g} "
                f"| {row['floor']:.0%} | {row['memory']:.2f} GB | {row['frames_per_second'] / slow:.1f}× |",
                flush=True,
            )


def _in_own_process(name: str, batch: int) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name, str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def measure(options: argparse.Namespace, name: str, batch: int) -> dict[str, float]:
    """One sampler at one batch: a short rollout to warm up, a counted one, a timed one."""
    device = configure_torch()
    config, side = PRESETS[options.preset]
    torch.manual_seed(0)
    network = WorldModelNetwork(config, side, side, WINDOW).to(device).eval()
    settings = sections.Sampler(steps=STEPS, window=WINDOW, guidance=GUIDANCE, **SAMPLERS[name])
    with autocast(device, options.precision):
        roll_out(network, settings, batch, 2, side)
        seen = []
        handle = network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2].numel()))
        with FlopCounterMode(display=False) as counter:
            roll_out(network, settings, batch, options.frames, side)
        handle.remove()
        seconds = roll_out(network, settings, batch, options.frames, side)
    generated, used = batch * options.frames, memory(device)  # before `peak` makes its own matrices
    work = counter.get_total_flops() / generated
    return {
        "forwards": sum(seen) / generated, "tflop": work / 1e12, "frames_per_second": generated / seconds,
        "floor": work * generated / seconds / peak(device, options.precision), "memory": used,
    }  # fmt: skip


def roll_out(network: WorldModelNetwork, settings: sections.Sampler, batch: int, frames: int, side: int) -> float:
    """Generate `frames` frames of `batch` trials from one first frame; seconds."""
    device, channels = next(network.parameters()).device, network.config.in_channels
    sampler = make_sampler(network, Objective(sections.Objective()), settings)
    noise = torch.randn(batch, 1, side, side, channels, device=device)
    actions = torch.randn(batch, 1, network.config.action_dim, device=device)
    _wait(device)
    began = time.perf_counter()
    sampler.reset(noise, actions)
    for _ in range(frames):
        sampler.generate(actions, noise)
    _wait(device)
    return time.perf_counter() - began


def peak(device: torch.device, precision: str) -> float:
    """Floating-point operations per second of one large matrix product: what the hardware gives a program like this."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    one = torch.randn(size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(8):
        _wait(device)
        began = time.perf_counter()
        one @ one
        _wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def memory(device: torch.device) -> float:
    """Peak gigabytes of this process on the device, weights included; on a CPU all of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
