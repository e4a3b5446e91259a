"""What this machine computes with: device, threads, number format. Torch is imported inside."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def configure_torch(threads: int = 1) -> torch.device:
    """Set thread count and determinism; return `cuda` when a GPU is visible, else `cpu`.

    One thread by default, whatever the number of cores: the tabletop's networks are a few hundred small operations a step, and
    threads meet after each. Measured on two cores (tokenizer step, batch 32): one thread 36 ms, two threads 40 ms, two threads
    beside one other busy process 2,600 ms. Cores are used by processes instead, which meet once a step.
    """
    import torch

    _keep_freed_memory()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # On by default with the line above, to show up reads of memory nobody wrote; it costs 8 % of a training step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _keep_freed_memory() -> None:
    """Make glibc keep large blocks for the next operation instead of handing them back to the system.

    Measured on a training step of the world model: 9,500 page faults without, none with it, and 12 % less time.
    """
    mmap_threshold, trim_threshold = -3, -1  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 25)
        libc.mallopt(trim_threshold, 1 << 30)


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware (AVX512-bf16 or AMX)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            flags = next((line for line in handle if line.startswith("flags")), "")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def uses_bf16(device: torch.device, precision: str = "auto") -> bool:
    """Whether `precision` (`auto`, `bf16`, `fp32`) means bfloat16 on `device`."""
    if precision == "auto":
        return device.type == "cuda" or cpu_has_bf16()
    return precision == "bf16"


def autocast(device: torch.device, precision: str = "auto") -> contextlib.AbstractContextManager:
    """bfloat16 autocast where `uses_bf16`, otherwise nothing."""
    import torch

    if uses_bf16(device, precision):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
