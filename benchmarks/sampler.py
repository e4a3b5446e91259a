"""Frames per second, memory and counted work of generation: everything recomputed, cached exactly, cached streaming.

One rollout of `--frames` frames from one first frame, with random weights and the published sampler's settings (window 20,
10 steps, guidance 3, horizon 1), or those of `--config`. Each measurement is a process of its own, so that its peak memory
is its own. Prints a Markdown table: frame-forwards and counted floating-point operations of the matrix products per new
frame, the frames/s which these operations would take at the speed of one large matrix product here (the floor), the measured
frames/s, their share of the floor, peak memory, and the speed-up over recomputation.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import CPU_ATTENTION, PRESETS, in_own_process, memory, peak, print_head, print_row, wait
from workflow_src.common import sections
from workflow_src.common.compute import autocast, configure_torch
from workflow_src.common.config import load
from workflow_src.world_model.diffusion import Objective
from workflow_src.world_model.network import WorldModelNetwork
from workflow_src.world_model.sampler import Sampler, make_sampler

EXAMPLES = """examples:
  python benchmarks/sampler.py                                            # small network, batches 1, 4, 16
  python benchmarks/sampler.py --preset medium --batches 1                # arithmetic dominates, on a CPU too
  python benchmarks/sampler.py --samplers streaming streaming-compiled    # a C++ compiler has to be there
  python benchmarks/sampler.py --config config/config.yaml --batches 34 --frames 18     # the tabletop's own
  python benchmarks/sampler.py --preset paper --batches 1 8 32 64         # the published 608 M network; for a GPU
"""
WINDOW, STEPS, GUIDANCE = 20, 10, 3.0
SAMPLERS = {
    "recomputed": {"cached": False},
    "exact": {},
    "streaming": {"mode": "streaming"},
    "exact-compiled": {"compile": True},
    "streaming-compiled": {"mode": "streaming", "compile": True},
}
COLUMNS = (
    "batch", "sampler", "frame-forwards / frame", "GFLOP / frame", "floor, frames/s", "frames/s", "of the floor", "memory",
    "speed-up",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="small", help="(default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="(default: 1 4 16)")
    parser.add_argument("--config", type=Path, help="network and sampler of a configuration of the workflow instead")
    parser.add_argument(
        "--samplers", nargs="+", choices=SAMPLERS, metavar="SAMPLER",
        help=f"of {', '.join(SAMPLERS)} (default: the first three, with a GPU all)",
    )  # fmt: skip
    parser.add_argument("--frames", type=int, default=40, help="new frames per rollout (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default: %(default)s)")
    parser.add_argument("--one", nargs=2, metavar=("SAMPLER", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options, options.one[0], int(options.one[1]))))
        return
    print_head(COLUMNS)
    for batch in options.batches:
        slow = None
        for name in options.samplers or list(SAMPLERS)[: None if torch.cuda.is_available() else 3]:
            row = in_own_process(__file__, name, batch)
            slow = row["speed"] if name == "recomputed" else slow
            print_row([
                batch, name, f"{row['forwards']:.1f}", f"{row['flop'] / 1e9:.3g}", f"{row['floor']:.3g}",
                f"{row['speed']:.3g}", f"{row['speed'] / row['floor']:.0%}", f"{row['memory']:.2f} GB",
                f"{row['speed'] / slow:.1f}×" if slow else "—",
            ])  # fmt: skip


@torch.inference_mode()
def measure(options: argparse.Namespace, name: str, batch: int) -> dict[str, float]:
    """One sampler at one batch: its work per frame, then a rollout to warm up and a timed one."""
    device = configure_torch(options.threads)
    torch.manual_seed(0)
    config, side, objective, settings = subject(options)
    settings = replace(settings, **{"mode": "exact", "cached": True} | SAMPLERS[name])
    network = WorldModelNetwork(config, side, side, settings.window).to(device).eval()
    forwards, flop = count(network, objective, settings, options.frames)
    sampler = make_sampler(network, objective, settings)
    with autocast(device, options.precision):
        # Compiled shapes come up one after the other until the window slides.
        roll_out(sampler, batch, min(options.frames, settings.window + 1) if settings.compile else 2)
        wait(device)
        began = time.perf_counter()
        roll_out(sampler, batch, options.frames)
        wait(device)
        seconds = time.perf_counter() - began
    used = memory(device)  # before `peak` makes its own matrices
    return {
        "forwards": forwards, "flop": flop, "speed": batch * options.frames / seconds, "memory": used,
        "floor": peak(device, options.precision) / flop,
    }  # fmt: skip


def subject(options: argparse.Namespace) -> tuple[sections.Network, int, Objective, sections.Sampler]:
    """Network, rows and columns of its latents, objective, and sampler."""
    if options.config is None:
        published = sections.Sampler(steps=STEPS, window=WINDOW, guidance=GUIDANCE)
        return *PRESETS[options.preset], Objective(sections.Objective()), published
    config = load(options.config)
    model = config.world_model
    return (
        model.network,
        config.lab.image_size // config.tokenizer.downsample,
        Objective(model.objective),
        model.sampler,
    )


def roll_out(sampler: Sampler, batch: int, frames: int) -> None:
    """Generate `frames` frames of `batch` trials from one first frame."""
    network = sampler.network
    noise = torch.randn(batch, 1, network.height, network.width, network.config.in_channels, device=sampler.device)
    actions = torch.randn(batch, 1, network.config.action_dim, device=sampler.device)
    sampler.reset(noise, actions, context_noise=noise)
    for _ in range(frames):
        sampler.generate(actions, noise, context_noise=noise)


def count(
    network: WorldModelNetwork, objective: Objective, settings: sections.Sampler, frames: int
) -> tuple[float, float]:
    """Network evaluations of single frames, and floating-point operations, per frame of a rollout of `frames` frames.

    Of every shape that calls have, one is run and counted.
    """
    known: dict[object, tuple[int, Tensor]] = {}
    done, flop, real = 0, 0, network.forward

    def counted(x: Tensor, *others: Tensor, cache: object = None, **given: object) -> Tensor:
        nonlocal done, flop
        shape = x.shape[1], None if cache is None else (cache.geometry.lag.shape, cache.last_geometry.lag.shape)
        if shape not in known:
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                out = real(x, *others, cache=cache, **given)
            known[shape] = counter.get_total_flops(), out
        done, flop = done + x.shape[0] * x.shape[1], flop + known[shape][0]
        return known[shape][1]

    network.forward = counted
    roll_out(make_sampler(network, objective, replace(settings, compile=False)), 1, frames)
    del network.forward
    return done / frames, flop / frames


if __name__ == "__main__":
    main()
