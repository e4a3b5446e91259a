"""What the benchmarks share: networks to measure, one process per measurement, memory, and the speed of the hardware."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from workflow_src.common import sections

# network, rows and columns of its latents
PRESETS = {
    "small": (sections.Network(width=128, depth=4, heads=4), 8),  # 16 tokens per frame
    "medium": (sections.Network(width=256, depth=8, heads=8), 16),  # 64
    "paper": (sections.Network(), 32),  # 256; the published 608 M parameters, for a GPU
}
REPEATS = 8  # matrix products timed, of which the fastest counts


def in_own_process(script: str, *arguments: object) -> dict[str, float]:
    """What `script` prints as its last line, JSON, with the present options and `--one *arguments`."""
    command = [sys.executable, script, *sys.argv[1:], "--one", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def print_row(cells: Sequence[object]) -> None:
    """One row of a Markdown table, at once."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def print_head(columns: Sequence[str]) -> None:
    """The head of a Markdown table."""
    print_row(columns)
    print_row(["---"] * len(columns))


def peak(device: torch.device, precision: str) -> float:
    """Floating-point operations per second of one large matrix product: what the hardware gives a program like this."""
    size = 8192 if device.type == "cuda" else 2048
    one = torch.randn(size, size, device=device).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    best = 0.0
    for _ in range(REPEATS):
        wait(device)
        began = time.perf_counter()
        one @ one
        wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def memory(device: torch.device) -> float:
    """Peak gigabytes of this process on the device, weights included; on a CPU all of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _attention(queries: Sequence[int], keys: Sequence[int], *_: object, **__: object) -> int:
    """Floating-point operations of fused attention, given shapes (..., L, E) and (..., S, E): two products."""
    return 4 * math.prod(queries) * keys[-2]


def _attention_backward(_: object, queries: Sequence[int], keys: Sequence[int], *__: object, **___: object) -> int:
    """Of its backward pass: one product again, and four for the gradients."""
    return 10 * math.prod(queries) * keys[-2]


# The counter of torch knows the fused kernels of a GPU only.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
