"""Attention over space, over time, or over both, with a cache of the frames already generated.

Small attentions run as plain batched matrix products: on a CPU the fused kernel costs more than it saves on the few
tokens of the tabletop. On a GPU, and for long sequences, the fused kernel is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workflow_src.world_model import kernels, rotary

FUSED_FROM = 128  # tokens: from this length on the fused kernel wins on a CPU too


class Cache:
    """Keys and values of context frames, per layer, in a ring of `slots` frames.

    `positions` are the absolute frame numbers held, by slot (-1: empty). A forward pass writes the frames it is given
    into the slots after the newest ones; they become context only when `keep` is called, else the next pass overwrites
    them.
    """

    def __init__(self, slots: int) -> None:
        self.slots, self.next, self.layers = slots, 0, {}
        self.positions = [-1] * slots

    def clear(self) -> None:
        """Forget all frames; the memory is kept."""
        self.next, self.positions = 0, [-1] * self.slots

    def layer(self, index: int) -> LayerCache:
        """The part of the cache that block `index` reads and writes."""
        return self.layers.setdefault(index, LayerCache())

    def place(self, frames: int) -> tuple[list[int], list[int]]:
        """Absolute positions and slots of the `frames` frames of the coming pass; their slots count as filled."""
        positions = list(range(self.next, self.next + frames))
        slots = [position % self.slots for position in positions]
        for position, slot in zip(positions, slots, strict=True):
            self.positions[slot] = position
        return positions, slots

    def keep(self, frames: int) -> None:
        """Make the first `frames` frames of the latest pass context."""
        self.next += frames
        self.positions = [position if position < self.next else -1 for position in self.positions]


@dataclass
class LayerCache:
    """Keys and values of one layer, (B, G, H, slots * M, E): G separate groups, M tokens of a group per frame."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, slots: list[int], total: int, filled: int) -> tuple[Tensor, Tensor]:
        """Write new frames into `slots` of `total` and return the first `filled` slots."""
        tokens = keys.shape[3] // len(slots)
        if self.keys is None or self.keys.shape[0] != keys.shape[0] or self.keys.dtype != keys.dtype:
            shape = (*keys.shape[:3], total * tokens, keys.shape[4])
            self.keys, self.values = keys.new_zeros(shape), values.new_zeros(shape)
        for index, slot in enumerate(slots):
            new, old = slice(index * tokens, (index + 1) * tokens), slice(slot * tokens, (slot + 1) * tokens)
            self.keys[..., old, :], self.values[..., old, :] = keys[..., new, :], values[..., new, :]
        return self.keys[..., : filled * tokens, :], self.values[..., : filled * tokens, :]


@dataclass
class Geometry:
    """Where the frames of one forward pass stand: made once per pass, shared by all layers."""

    tokens: int  # per frame
    slots: list[int] | None  # of the new frames in the cache
    total: int  # slots of the cache
    filled: int  # slots in use
    lag: Tensor  # (T, S) int64: frames from key to query; the query's own frame is 0
    visible: Tensor  # (T, S) bool: not in the future and within the window
    all_visible: bool
    spatial: Tensor | None  # rotary angles (N, E / 2)
    temporal: Tensor | None  # rotary angles (T, E / 2)
    masks: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(network: nn.Module, frames: int, cache: Cache | None, window: int, device: torch.device) -> Geometry:
        """For `frames` new frames of `network` behind those of `cache`, each seeing `window` frames at most."""
        config, head_dim = network.config, network.config.width // network.config.heads
        grid = network.height // config.patch, network.width // config.patch
        if cache is None:
            positions = known = list(range(frames))
            slots, total, filled = None, 0, frames
        else:
            positions, slots = cache.place(frames)
            total, filled = cache.slots, 1 + max(s for s in range(cache.slots) if cache.positions[s] >= 0)
            known = cache.positions[:filled]
        spatial = None
        if config.spatial_rope != "none":
            spatial = rotary.spatial_angles(*grid, head_dim, config.spatial_rope).to(device)
        query, key = torch.tensor(positions), torch.tensor(known)
        lag = query[:, None] - key[None]
        visible = (lag >= 0) & (lag < window) & (key >= 0)
        temporal = None
        if config.temporal == "rope":
            temporal = rotary.temporal_angles(query, head_dim).to(device)
        everything = bool(visible.all())
        lag, visible = lag.clamp(0, network.frames - 1).to(device), visible.to(device)
        return Geometry(grid[0] * grid[1], slots, total, filled, lag, visible, everything, spatial, temporal)

    def mask(self, over: str) -> Tensor | None:
        """Additive mask (T * M, S * M) of zeros and -inf, float32, or None when every key may be seen."""
        if self.all_visible:
            return None
        if over not in self.masks:
            mask = torch.zeros(self.visible.shape, device=self.visible.device).masked_fill_(~self.visible, -math.inf)
            self.masks[over] = self._spread(mask) if over == "both" else mask
        return self.masks[over]

    def _spread(self, table: Tensor) -> Tensor:
        """(..., T, S) of frames -> (..., T * N, S * N) of tokens."""
        return table.repeat_interleave(self.tokens, -1).repeat_interleave(self.tokens, -2)

    def bias(self, table: Tensor, over: str) -> Tensor:
        """Mask plus the learned `table (H, window)` of biases by lag, (H, T * M, S * M) float32."""
        by_frame = table[:, self.lag].masked_fill(~self.visible, -math.inf)
        return self._spread(by_frame) if over == "both" else by_frame


class Attention(nn.Module):
    """Multi-head attention. `over`: "space" (within a frame), "time" (same place, causal), "both" (block-causal)."""

    def __init__(self, width: int, heads: int, over: str, frames: int, relative_bias: bool) -> None:
        super().__init__()
        self.heads, self.over = heads, over
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width)
        if relative_bias and over != "space":
            self.relative_bias = nn.Parameter(torch.zeros(heads, frames))

    def forward(self, x: Tensor, geometry: Geometry, cache: LayerCache | None) -> Tensor:
        """`x (B, T, N, D)` -> same shape."""
        b, t, n, d = x.shape
        qkv = self.qkv_proj(x).view(b, t, n, 3, self.heads, d // self.heads)
        if self.over == "space":
            queries, keys, values = qkv.permute(3, 0, 1, 4, 2, 5)  # (B, T, H, N, E)
        elif self.over == "time":
            queries, keys, values = qkv.permute(3, 0, 2, 4, 1, 5)  # (B, N, H, T, E)
        else:
            queries, keys, values = qkv.flatten(1, 2)[:, None].permute(3, 0, 1, 4, 2, 5)  # (B, 1, H, T * N, E)
        queries, keys = self._rotate(queries, geometry), self._rotate(keys, geometry)
        if cache is not None:
            keys, values = cache.update(keys, values, geometry.slots, geometry.total, geometry.filled)
        out = attend(queries, keys, values, self._bias(geometry))
        if self.over == "space":
            out = out.transpose(2, 3)
        elif self.over == "time":
            out = out.permute(0, 3, 1, 2, 4)
        else:
            out = out.squeeze(1).transpose(1, 2)
        return self.out_proj(out.reshape(b, t, n, d))

    def _rotate(self, features: Tensor, geometry: Geometry) -> Tensor:
        angles = None
        if self.over != "time" and geometry.spatial is not None:
            angles = (
                geometry.spatial
                if self.over == "space"
                else geometry.spatial.repeat(features.shape[3] // geometry.tokens, 1)
            )
        if self.over != "space" and geometry.temporal is not None:
            temporal = geometry.temporal
            if self.over == "both":
                temporal = temporal.repeat_interleave(geometry.tokens, 0)
            angles = temporal if angles is None else angles + temporal
        return features if angles is None else rotary.rotate(features, angles)

    def _bias(self, geometry: Geometry) -> Tensor | None:
        if self.over == "space":
            return None
        if hasattr(self, "relative_bias"):
            return geometry.bias(self.relative_bias, self.over)
        return geometry.mask(self.over)


def attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention of `queries (B, G, H, L, E)` to `keys`, `values (B, G, H, S, E)`, with `bias` ([H,] L, S)."""
    if queries.is_cuda or queries.shape[3] >= FUSED_FROM:
        mask = None if bias is None else bias.to(queries.dtype)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    return kernels.attention(queries, keys, values, bias)
