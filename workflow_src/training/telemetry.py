"""How fast a training is (frames per second, model FLOP utilisation), and its curves for TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from workflow_src.common.compute import uses_bf16

# Dense bfloat16 peak in FLOP/s by a part of the device's name, from NVIDIA's data sheets; the first that fits counts.
PEAKS = {
    "B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12,
    "H800": 989e12, "A100": 312e12, "A800": 312e12, "A10G": 70e12, "A10": 125e12, "RTX A6000": 155e12, "A40": 150e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
SIDE = 1024  # of the matrices that stand for a processor's peak
TRY = 0.05  # seconds of trying


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that `device` can reach: by its data sheet, or on a CPU measured in a product of two large matrices.

    None where neither says: a GPU that is not in the table, or float32 training on a GPU.
    """
    bf16 = uses_bf16(device, precision)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for part, peak in PEAKS.items() if part in name), None) if bf16 else None
    matrix = torch.ones(SIDE, SIDE, dtype=torch.bfloat16 if bf16 else torch.float32)
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < TRY:
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2 * SIDE**3 / best


def count_flops(model: nn.Module, forward: Callable[[], object]) -> int:
    """FLOPs of an update through `model` for the samples of `forward`, by convention three times the forward pass's.

    Recomputed activations are not counted: they are a price, not a use.
    """
    model.eval()
    # The plain attention kernel is made of matrix products; not every fused one is known to the counter.
    plain, counter = sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), plain, counter:
        forward()
    model.train()
    return 3 * counter.get_total_flops()


class Speed:
    """Turns steps and seconds into `frames_per_second` and `mfu`, over all processes.

    `frames`, `flops`: of one step. `peak`: FLOP/s of all devices together; None: unknown, and so is `mfu`.
    """

    def __init__(self, frames: int, flops: float, peak: float | None) -> None:
        self.frames, self.flops, self.peak = frames, flops, peak

    def of(self, steps: int, seconds: float) -> dict[str, float | None]:
        rate = steps / max(seconds, 1e-9)
        mfu = None if self.peak is None else round(self.flops * rate / self.peak, 5)
        return {"frames_per_second": round(self.frames * rate, 2), "mfu": mfu}


def speed_note(row: Mapping[str, float | None]) -> str:
    """The speed in a row of the history, for a progress line."""
    mfu = row.get("mfu")
    note = f"{row['frames_per_second']:.4g} frames/s" if "frames_per_second" in row else ""
    return note if mfu is None else f"{note}  MFU {100 * mfu:.0f}%"


class Events:
    """Scalars for TensorBoard in a folder of their own (`tensorboard --logdir`); without a folder, nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.writer = folder, None

    def open(self, step: int) -> None:
        """Go on at `step`: what an interrupted run wrote from there on is hidden. At 0 older files are removed."""
        if self.folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        for path in self.folder.glob("events.out.tfevents.*") if step == 0 else []:
            path.unlink()
        self.writer = SummaryWriter(self.folder, purge_step=step)

    def add(self, step: int, group: str, values: Mapping[str, float | None]) -> None:
        """Write `<group>/<name>` for every value but `step` and those unknown; on disk when this returns."""
        if self.writer is None:
            return
        for name, value in values.items():
            if value is not None and name != "step":
                self.writer.add_scalar(f"{group}/{name}", value, step)
        self.writer.flush()
