"""The one world-model network: a diffusion transformer over the latents of a window of frames.

With the default configuration it is the network of WorldGym (arXiv 2506.00613), under the published parameter names and
with 607.93 M parameters; the tabletop runs a small one with other options of `sections.Network`.

Shapes: B clips, T frames, N tokens per frame, D width, H heads, E features per head, S cached frames.
A frame is conditioned on its own noise level and on the action that leads into it, through one modulation per frame.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from workflow_src.common import sections
from workflow_src.common.errors import UserError
from workflow_src.world_model.attention import Attention, Cache, Geometry, LayerCache, Rotations, latest
from workflow_src.world_model.kernels import SquaredReLU, gated_add, modulate

FREQUENCIES = 256  # features of the sinusoidal embedding of a noise level
PURE_NOISE = 1000.0  # noise level of a frame that is not there
NULL_DIMENSION = 9  # published networks: the null action is zeros with a one here


def level_features(levels: Tensor) -> Tensor:
    """Sinusoidal embedding (..., 256) of `levels`, cosines first."""
    half = FREQUENCIES // 2
    rates = torch.exp(torch.arange(half, device=levels.device) * (-math.log(10000.0) / half))
    phase = levels.float()[..., None] * rates
    return torch.cat([phase.cos(), phase.sin()], -1)


class SubBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the frame's condition (adaLN-zero)."""

    def __init__(self, config: sections.Network, over: str, frames: int) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.attn = Attention(width, config.heads, over, frames, config.temporal == "relative_bias")
        activation = SquaredReLU() if config.activation == "relu2" else nn.GELU(approximate="tanh")
        self.ffwd = nn.Sequential(nn.Linear(width, hidden), activation, nn.Linear(hidden, width))

    def forward(self, x: Tensor, condition: Tensor, geometry: Geometry, cache: LayerCache | None) -> Tensor:
        modulation = self.adaLN_modulation(condition).unsqueeze(2).chunk(6, -1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        attended = self.attn(modulate(x, shift_a, scale_a), geometry, cache)
        if attended.shape[1] < x.shape[1]:  # the last block: context frames have left their keys, and end here
            parts = x, gate_a, shift_m, scale_m, gate_m
            x, gate_a, shift_m, scale_m, gate_m = (latest(part, attended.shape[1]) for part in parts)
        x = gated_add(x, gate_a, attended)
        return gated_add(x, gate_m, self.ffwd(modulate(x, shift_m, scale_m)))


class Block(nn.Module):
    """Factorised: spatial, then causal temporal sub-block. Joint: one block-causal sub-block over all tokens."""

    def __init__(self, config: sections.Network, frames: int) -> None:
        super().__init__()
        if config.attention == "factorised":
            self.s_block = SubBlock(config, "space", frames)
            self.t_block = SubBlock(config, "time", frames)
        else:
            self.j_block = SubBlock(config, "both", frames)

    def forward(self, x: Tensor, condition: Tensor, geometry: Geometry, cache: LayerCache | None) -> Tensor:
        if hasattr(self, "j_block"):
            return self.j_block(x, condition, geometry, cache)
        return self.t_block(self.s_block(x, condition, geometry, None), condition, geometry, cache)


class FinalLayer(nn.Module):
    """Modulated projection of tokens to patches (row, column, channel)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).unsqueeze(2).chunk(2, -1)
        return self.linear(modulate(x, shift, scale))


@dataclass
class Previous:
    """The frame before the first one given: `frame (B, h, w, C)` as the network sees it, its `level (B,)` or (1,)."""

    frame: Tensor
    level: Tensor


class WorldModelNetwork(nn.Module):
    """Predicts what `diffusion.Objective.target` says for every frame of a window.

    `height`, `width`: of the latent; `frames`: window, the most frames a frame attends to (itself included).
    """

    def __init__(self, config: sections.Network, height: int, width: int, frames: int) -> None:
        super().__init__()
        self.config, self.height, self.width, self.frames = config, height, width, frames
        self._check()
        self.grid = height // config.patch, width // config.patch
        self.tokens = self.grid[0] * self.grid[1]  # of a frame
        patch_values = config.patch**2 * config.in_channels
        self.x_proj = nn.Conv2d(config.in_channels, config.width, config.patch, config.patch)
        levels = 2 if config.previous_frame else 1
        self.timestep_mlp = _mlp(levels * FREQUENCIES, config.width)
        if config.action_mlp:
            self.action_embedder = _mlp(config.action_dim, config.width)
        else:
            self.action_embedder = nn.Linear(config.action_dim, config.width)
        self.blocks = nn.ModuleList(Block(config, frames) for _ in range(config.depth))
        self.final_layer = FinalLayer(config.width, patch_values)
        if config.previous_frame:
            self.previous_proj = nn.Linear(patch_values, config.width, bias=False)
            self.skip_gates = nn.Linear(config.width, 2)
        if config.first_frame:
            self.first_proj = nn.Linear(patch_values, config.width, bias=False)
        if config.learned_null:
            self.start_embedding = nn.Parameter(torch.zeros(config.width))
            self.dropped_embedding = nn.Parameter(torch.zeros(config.width))
        if config.spatial_rope == "none":
            self.position_embedding = nn.Parameter(torch.zeros(self.tokens, config.width))
        self.initialise()

    def _check(self) -> None:
        config = self.config
        if self.height % config.patch or self.width % config.patch:
            raise UserError(
                f"world_model.network.patch: {config.patch} does not divide the {self.height}x{self.width} latent; "
                "choose a divisor of both"
            )
        if config.width % config.heads or (config.width // config.heads) % 4:
            raise UserError(
                f"world_model.network.heads: width {config.width} / heads {config.heads} must be a multiple of 4, "
                "for the rotary axes"
            )
        if not config.learned_null and config.action_dim <= NULL_DIMENSION:
            raise UserError(
                f"world_model.network.action_dim: {config.action_dim} needs `learned_null: true` (below 10)"
            )

    @torch.no_grad()
    def initialise(self) -> None:
        """Xavier matrices, zero gates and output (adaLN-zero): at the start every block is the identity."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith(("final_layer.linear", "skip_gates")):
                nn.init.zeros_(parameter)
            elif (name.startswith("timestep_mlp") and name.endswith("weight")) or name.endswith("_embedding"):
                nn.init.normal_(parameter, std=0.02)

    def rounded(self, dtype: torch.dtype) -> WorldModelNetwork:
        """A copy for generation whose matrices have `dtype`, to run under autocast to `dtype` with equal results."""
        network = copy.deepcopy(self).requires_grad_(False)
        for module in network.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(dtype)
        return network

    # -- input and output ------------------------------------------------------------------------------------------

    def patches(self, x: Tensor) -> Tensor:
        """(B, T, h, w, C) -> (B, T, N, P*P*C), values of a patch ordered (row, column, channel)."""
        p = self.config.patch
        return rearrange(x, "b t (h p) (w q) c -> b t (h w) (p q c)", p=p, q=p)

    def unpatch(self, patches: Tensor) -> Tensor:
        """The inverse of `patches`."""
        p = self.config.patch
        return rearrange(patches, "b t (h w) (p q c) -> b t (h p) (w q) c", h=self.height // p, p=p, q=p)

    def embed(self, patches: Tensor, before: Tensor | None, first: Tensor | None) -> Tensor:
        """Tokens (B, T, N, D) of a frame's patches, of those of the frame before, and of the first frame's tokens."""
        kernel = self.x_proj.weight.permute(0, 2, 3, 1).flatten(1)
        if before is not None:
            patches = torch.cat([patches, before], -1)
            kernel = torch.cat([kernel, self.previous_proj.weight], -1)
        x = F.linear(patches, kernel, self.x_proj.bias).float()
        if first is not None:
            x = x + first
        return x + self.position_embedding if self.config.spatial_rope == "none" else x

    def embed_first(self, first: Tensor | None) -> Tensor | None:
        """Tokens (B, 1, N, D) by which `first (B, h, w, C)` stays in view; None for networks without `first_frame`."""
        if not self.config.first_frame:
            return None
        if first is None:
            raise UserError("world_model.network.first_frame: this network needs the episode's first frame (`first`)")
        return self.first_proj(self.patches(first[:, None]))

    def condition(self, levels: Tensor, actions: Tensor, start: Tensor | None, dropped: Tensor | None) -> Tensor:
        """(B, T, D) from noise levels `(B, T)` or `(B, T, 2)` (own, previous) and actions, see `forward`. B may be 1."""
        if not self.config.learned_null and dropped is not None:
            null = (torch.arange(actions.shape[-1], device=actions.device) == NULL_DIMENSION).to(actions)
            actions = torch.where(dropped[:, None, None], null, actions)
        embedded = self.action_embedder(actions).float()
        if self.config.learned_null:
            if start is not None:
                opening = torch.where(start[:, None, None], self.start_embedding, embedded[:, :1])
                embedded = torch.cat([opening, embedded[:, 1:]], 1)
            if dropped is not None:
                embedded = torch.where(dropped[:, None, None], self.dropped_embedding, embedded)
        return self.timestep_mlp(level_features(levels).flatten(2)).float() + embedded

    def forward(
        self,
        x: Tensor,
        noise_level: Tensor,
        actions: Tensor,
        *,
        start: Tensor | None = None,
        dropped: Tensor | None = None,
        first: Tensor | None = None,
        first_tokens: Tensor | None = None,
        cache: Cache | None = None,
        previous: Previous | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Predict for frames `x (B, T, h, w, C)`; returns float32 of that shape.

        `noise_level (B, T)` or (1, T): of each frame, in thousandths of full noise.

        `actions (B, T, A)`: the action that leads into each frame. `start (B,)` bool: x[:, 0] opens the episode, so no
        action led to it (networks with `learned_null`; for others the caller passes zeros there). `dropped (B,)` bool:
        show the null action on every frame. `first (B, h, w, C)`: the episode's clean first frame, for networks with
        `first_frame`; `first_tokens`: what `embed_first` made of it, where the caller keeps that.
        `previous`: the frame before x[:, 0] where there is one (networks with `previous_frame`; without it the first
        frame sees none). `window`: the most frames a frame attends to, itself included, if fewer than the network's.
        `cache`: attend also to the frames it holds, within its window. It was prepared for this pass (`Cache.begin`), and
        only the frames that it was told of are predicted: returns (B, last, h, w, C).
        """
        patches, levels, before, keep = self.patches(x), noise_level.float(), None, None
        if self.config.previous_frame:
            before, before_level = self._before(patches, levels, previous)
            levels, keep = torch.stack([levels, before_level], -1), 1 - before_level / PURE_NOISE
        condition = self.condition(levels, actions, start, dropped)
        tokens = self.embed(patches, before, self.embed_first(first) if first_tokens is None else first_tokens)
        if cache is None:
            geometry = last = Geometry.of(self, x.shape[1], window or self.frames, x.device)
            geometry.rotations = Rotations(self, x.device).at(0, x.shape[1])
        else:
            geometry, last = cache.geometry, cache.last_geometry
        for index, block in enumerate(self.blocks):
            there = last if index == len(self.blocks) - 1 else geometry
            tokens = block(tokens, condition, there, None if cache is None else cache.layers[index])
        condition = latest(condition, tokens.shape[1])
        out = self.final_layer(tokens, condition).float()
        if before is not None:
            patches, before, keep = (latest(part, tokens.shape[1]) for part in (patches, before, keep))
            own, prior = self.skip_gates(F.silu(condition)).float()[:, :, None].split(1, -1)
            out = out + own * patches + (keep[..., None, None] + prior) * before
        return self.unpatch(out)

    def _before(self, patches: Tensor, levels: Tensor, previous: Previous | None) -> tuple[Tensor, Tensor]:
        """Patches and levels of every frame's predecessor; zeros at full noise where there is none."""
        if previous is None:
            frame, level = torch.zeros_like(patches[:, :1]), torch.full_like(levels[:, :1], PURE_NOISE)
        else:
            frame, level = self.patches(previous.frame[:, None]), previous.level[:, None].to(levels)
        return torch.cat([frame, patches[:, :-1]], 1), torch.cat([level, levels[:, :-1]], 1)


def _mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))
