"""Attention over space, over time, or over both, with a cache of the frames already generated.

On a GPU, and where there is neither bias nor gradient, the fused kernel runs. Other attention on a CPU runs as plain
batched matrix products up to `FUSED_FROM` tokens: there the fused kernel costs more than it saves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workflow_src.world_model import kernels, rotary

FUSED_FROM = 128  # tokens: from this length on the fused kernel wins on a CPU too


@dataclass
class Geometry:
    """Where the frames of one forward pass stand: made once per pass, shared by all layers."""

    frames: int  # new ones
    group: int  # tokens of a frame that attend together over time: all of them in joint attention, else one
    slots: int  # frames there is room for among the keys
    filled: int  # the slots in use; with static shapes all of them
    lag: Tensor  # (T, S) int64: frames from key to query, S = `filled`; the query's own frame is 0
    visible: Tensor  # (T, S) bool: not in the future and within the window
    mask: Tensor | None  # (T * group, S * group) of zeros and -inf, float32; None where every key may be seen
    places: list[tuple[slice, slice]] | Tensor  # where new tokens go in the cache, see `_places`
    rotations: dict[str, Tensor] = field(default_factory=dict)  # by kind of attention, see `Rotations.at`
    biases: dict[nn.Parameter, Tensor] = field(default_factory=dict)  # computed so far; for generation

    @staticmethod
    def of(
        network: nn.Module,
        frames: int,
        window: int,
        device: torch.device,
        *,
        start: int = 0,
        slots: int | None = None,
        static: bool = False,
    ) -> Geometry:
        """For `frames` frames from number `start` on, each seeing `window` frames at most.

        `slots`: keys lie in a ring of that many frames, frame n in slot n % slots; without it, keys are the new frames.
        `static`: shapes depend on `frames` alone. Nothing here waits for a GPU.
        """
        end, room = start + frames, slots or frames
        filled = room if static else min(end, room)
        query, slot = torch.arange(start, end, device=device), torch.arange(filled, device=device)
        known = end - 1 - (end - 1 - slot) % room  # the newest frame that belongs there; negative: none yet
        lag = query[:, None] - known[None]
        visible = (lag >= 0) & (lag < window) & (known >= 0)
        group = network.tokens if network.config.attention == "joint" else 1
        mask = None
        if network.config.temporal == "rope" and (static or frames > 1 or end > min(window, room)):
            mask = torch.zeros(visible.shape, device=device).masked_fill_(~visible, -math.inf)
            mask = _spread(mask, group)
        lag = lag.clamp(0, network.frames - 1)
        places = _places(start, frames, room, group, device if static else None)
        return Geometry(frames, group, room, filled, lag, visible, mask, places)

    def of_last(self, frames: int) -> Geometry:
        """The same with the queries of the last `frames` frames alone."""
        if frames == self.frames:
            return self
        mask = None if self.mask is None else self.mask[-frames * self.group :]
        return replace(self, lag=self.lag[-frames:], visible=self.visible[-frames:], mask=mask, biases={})

    def bias(self, table: nn.Parameter) -> Tensor:
        """Mask plus the learned `table (H, window)` of biases by lag, (H, T * group, S * group) float32."""
        keep = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if keep and table in self.biases:
            return self.biases[table]
        bias = _spread(table[:, self.lag].masked_fill(~self.visible, -math.inf), self.group)
        if keep:
            self.biases[table] = bias
        return bias


def _spread(table: Tensor, group: int) -> Tensor:
    """(..., T, S) of frames -> (..., T * group, S * group) of tokens."""
    return table if group == 1 else table.repeat_interleave(group, -1).repeat_interleave(group, -2)


def _places(
    start: int, frames: int, slots: int, group: int, device: torch.device | None
) -> list[tuple[slice, slice]] | Tensor:
    """Where the tokens of frames from `start` on go in a ring of `slots` frames.

    As slices (of the ring, of the new tokens), or, given a `device`, as numbers (frames * group,) int64 there: a CPU
    copies a slice several times faster, but a compiled program knows no other slice than the one it was compiled with.
    """
    if device is not None:
        return torch.arange(start * group, (start + frames) * group, device=device) % (slots * group)
    first = start % slots
    fitting = min(frames, slots - first)  # the others go on at the ring's beginning
    pieces = [(first, 0, fitting)] + ([(0, fitting, frames - fitting)] if fitting < frames else [])
    return [
        (slice(old * group, (old + count) * group), slice(new * group, (new + count) * group))
        for old, new, count in pieces
    ]


class Rotations:
    """Rotary factors of a network's tokens, kept between passes."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        config = network.config
        self.head_dim, self.device = config.width // config.heads, device
        self.joint, self.temporal = config.attention == "joint", config.temporal == "rope"
        self.space = self.time = None
        if config.spatial_rope != "none":
            angles = rotary.spatial_angles(*network.grid, self.head_dim, config.spatial_rope)
            self.space = rotary.factors(angles).to(device)[:, None, None]

    def at(self, start: int, frames: int) -> dict[str, Tensor]:
        """By kind of attention, for queries and keys (B, T, N, 2, H, E) of frames from `start` on; may be empty."""
        found = {} if self.space is None else {"space": self.space}
        if self.temporal:
            if self.time is None or start + frames > len(self.time):
                room = 2 * (start + frames)  # grown rarely
                angles = rotary.temporal_angles(room, self.head_dim, self.device)
                self.time = rotary.factors(angles)[:, None, None, None]
            found["time"] = self.time[start : start + frames]
        if self.joint and found:
            found = {"both": rotary.multiply(*found.values()) if len(found) == 2 else next(iter(found.values()))}
        return found


@dataclass
class LayerCache:
    """Keys and values of one layer, (B, G, H, slots * M, E): G separate groups, M tokens of a group per frame."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Write new frames to their places and return what is filled."""
        for memory, new in ((self.keys, keys), (self.values, values)):
            if isinstance(geometry.places, Tensor):
                memory.index_copy_(3, geometry.places, new)
            else:
                for old, part in geometry.places:
                    memory[..., old, :] = new[..., part, :]
        filled = geometry.filled * geometry.group
        return self.keys[..., :filled, :], self.values[..., :filled, :]


class Cache:
    """Keys and values of context frames, per layer, in a ring of `slots` frames, and where the coming frames stand.

    A forward pass writes the frames it is given into the slots after the newest ones. They become context only when
    `keep` is called, else the next pass overwrites them: the ring needs as many slots as a frame sees (`window`, itself
    included) plus the most frames of a pass less one. The network's weights must not change while it is in use.

    `batch`, `dtype`: of the keys. `static`: the shapes of a pass depend on its number of frames alone, and nothing moves
    in memory, so that a compiled pass can be replayed.
    """

    def __init__(
        self, network: nn.Module, slots: int, window: int, batch: int, dtype: torch.dtype, *, static: bool = False
    ) -> None:
        self.network, self.slots, self.window, self.static = network, slots, window, static
        self.batch, self.dtype, self.device = batch, dtype, next(network.parameters()).device
        self.next = 0  # number of the frame after the newest one that is context
        self.geometry = self.last_geometry = None  # of the pass at hand; of its last block
        self._rotations = Rotations(network, self.device)
        self._known: dict[tuple[int, int, int], tuple[Geometry, Geometry]] = {}
        config = network.config
        groups, group = (1, network.tokens) if config.attention == "joint" else (network.tokens, 1)
        shape = batch, groups, config.heads, slots * group, config.width // config.heads
        self.layers = [
            LayerCache(*(torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2))) for _ in network.blocks
        ]
        if static:
            for layer in self.layers:
                torch._dynamo.mark_static_address(layer.keys)
                torch._dynamo.mark_static_address(layer.values)

    def begin(self, frames: int, last: int) -> None:
        """Prepare for a pass over `frames` new frames, of which the `last` ones are to be predicted."""
        turn = self.next if self.next < self.slots else self.slots + self.next % self.slots  # the ring looks the same
        key = turn, frames, last
        if key not in self._known:
            geometry = Geometry.of(
                self.network, frames, self.window, self.device, start=turn, slots=self.slots, static=self.static
            )
            self._known[key] = geometry, geometry.of_last(last)
        self.geometry, self.last_geometry = self._known[key]
        self.geometry.rotations = self.last_geometry.rotations = self._rotations.at(self.next, frames)

    def keep(self, frames: int) -> None:
        """Make the first `frames` frames of the latest pass context."""
        self.next += frames

    def clear(self) -> None:
        """Forget all frames."""
        self.next = 0

    def restart(self) -> None:
        """Forget all frames, for other trials."""
        self.next = 0
        if self.static:  # slots are read before they are written: what is not finite there would show behind a mask
            for layer in self.layers:
                layer.keys.zero_()
                layer.values.zero_()


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
        """`x (B, T, N, D)` -> same shape; over time, of the frames alone that `geometry` has queries of."""
        b, t, n, d = x.shape
        qkv = self.qkv_proj(x).view(b, t, n, 3, self.heads, d // self.heads)
        if self.over in geometry.rotations:
            rotated, rest = qkv.split((2, 1), 3)
            queries, keys = rotary.rotate(rotated, geometry.rotations[self.over]).unbind(3)
            values = rest.squeeze(3)
        else:
            queries, keys, values = qkv.unbind(3)
        if self.over != "space":
            queries = latest(queries, geometry.lag.shape[0])
        queries, keys, values = (self._grouped(part) for part in (queries, keys, values))
        if cache is not None:
            keys, values = cache.update(keys, values, geometry)
        out = attend(queries, keys, values, self._bias(geometry))
        if self.over == "space":
            out = out.transpose(2, 3)
        elif self.over == "time":
            out = out.permute(0, 3, 1, 2, 4)
        else:
            out = out.squeeze(1).transpose(1, 2)
        return self.out_proj(out.reshape(b, -1, n, d))

    def _grouped(self, features: Tensor) -> Tensor:
        """(B, T, N, H, E) -> (B, G, H, L, E): G groups of L tokens that attend to each other."""
        if self.over == "space":
            return features.transpose(2, 3)
        if self.over == "time":
            return features.permute(0, 2, 3, 1, 4)
        return features.flatten(1, 2).transpose(1, 2)[:, None]

    def _bias(self, geometry: Geometry) -> Tensor | None:
        if self.over == "space":
            return None
        return geometry.bias(self.relative_bias) if hasattr(self, "relative_bias") else geometry.mask


def latest(part: Tensor, frames: int) -> Tensor:
    """The last `frames` frames of `part (B, T, ...)`."""
    return part if part.shape[1] == frames else part[:, -frames:]


def attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention of `queries (B, G, H, L, E)` to `keys`, `values (B, G, H, S, E)`, with `bias` ([H,] L, S)."""
    if queries.device.type == "cpu" and queries.shape[3] < FUSED_FROM and (bias is not None or torch.is_grad_enabled()):
        return kernels.attention(queries, keys, values, bias)
    # The fused kernels take four dimensions, and no batch from 65,536 on: groups count as batch or as heads.
    shape = queries.shape
    first, second = (0, 1) if bias is None and shape[0] * shape[1] < 2**16 else (1, 2)
    queries, keys, values = (part.flatten(first, second) for part in (queries, keys, values))
    if bias is not None:
        bias = bias.to(queries.dtype)
        if bias.dim() == 3:  # of every head, in all groups
            bias = bias.expand(shape[1], -1, -1, -1).flatten(0, 1)[None]
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias).view(shape)
