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


def _standard(dim: int) -> Tensor:
    return THETA ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def temporal_angles(positions: Tensor, head_dim: int) -> Tensor:
    """Angles (len(positions), head_dim / 2) in radians of frames at integer `positions`."""
    return positions.float()[:, None] * _standard(head_dim).to(positions.device)


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
        rows, columns = torch.arange(height).float(), torch.arange(width).float()
    by_row = (rows[:, None] * frequencies)[:, None].expand(height, width, -1)
    by_column = (columns[:, None] * frequencies)[None].expand(height, width, -1)
    return torch.cat([by_row, by_column], -1).flatten(0, 1)


def rotate(features: Tensor, angles: Tensor) -> Tensor:
    """Rotate `features (..., L, D)` by `angles (L, D / 2)`, in float32, returned in the features' dtype."""
    even, odd = features.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(features)
