"""Rotary position embeddings: angles for frames (temporal) and for token grids (axial, two variants).

Pairs of neighbouring features (0, 1), (2, 3), … are rotated together. Source of the idea: RoFormer (arXiv 2104.09864);
the two sets of frequencies are those of language models (`standard`) and of image Fourier features (`pixel`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

THETA = 10000.0  # base of the standard frequencies
PIXEL_MAX_FREQUENCY = 256.0  # of the pixel frequencies: highest number of half turns over the grid


def _standard(dim: int, device: torch.device | None = None) -> Tensor:
    return THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)


def temporal_angles(frames: int, head_dim: int, device: torch.device | None = None) -> Tensor:
    """Angles (frames, head_dim / 2) in radians of frames 0, 1, 2, …

    In float64, so that far into a rollout a frame still stands at the right angle to its neighbours.
    """
    return torch.arange(frames, device=device)[:, None] * _standard(head_dim, device)


def spatial_angles(height: int, width: int, head_dim: int, kind: str) -> Tensor:
    """Angles (height * width, head_dim / 2) of a token grid, row-major: first half of the features by row, second by
    column.

    `standard`: coordinates 0, 1, 2, … and falling frequencies; `pixel`: coordinates from -1 to 1 and frequencies
    rising linearly from pi to 128 pi.
    """
    dim = head_dim // 2
    if kind == "pixel":
        frequencies = torch.linspace(1, PIXEL_MAX_FREQUENCY / 2, dim // 2) * math.pi
        rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    else:
        frequencies = _standard(dim)
        rows, columns = torch.arange(height), torch.arange(width)
    by_row = (rows[:, None] * frequencies)[:, None].expand(height, width, -1)
    by_column = (columns[:, None] * frequencies)[None].expand(height, width, -1)
    return torch.cat([by_row, by_column], -1).flatten(0, 1)


def factors(angles: Tensor) -> Tensor:
    """What `rotate` multiplies with: cosine and sine of `angles (..., E / 2)`, float32 (..., E / 2, 2)."""
    return torch.stack([angles.cos(), angles.sin()], -1).float()


def multiply(pairs: Tensor, factors: Tensor) -> Tensor:
    """Product of two broadcastable tensors (..., 2) as complex numbers, float32."""
    if not torch.compiler.is_compiling():  # several times faster on a CPU
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(factors))
    (even, odd), (cos, sin) = pairs.unbind(-1), factors.unbind(-1)  # a compiler fuses this, and has no complex numbers
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)


def rotate(features: Tensor, factors: Tensor) -> Tensor:
    """Rotate `features (..., E)` by `factors` (broadcastable to (..., E / 2, 2)) in float32, to the features' dtype."""
    return multiply(features.float().unflatten(-1, (-1, 2)), factors).flatten(-2).type_as(features)
