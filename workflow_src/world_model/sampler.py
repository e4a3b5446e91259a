"""Frame-by-frame generation: the naive sampler (the tested reference) and the cached one that equals it.

    sampler = make_sampler(network, objective, config.sampler)
    sampler.reset(frames, actions, ...)           # B trials start from their first frame(s)
    new = sampler.generate(actions, noise, ...)   # (B, K, h, w, C): the next K frames, 1 <= K <= horizon

Frames are standardised latents `(B, T, h, w, C)` float32, `actions (B, T, A)` lead into the frames beside them. All
noise is passed in. All trials of a batch advance together; a trial that ended earlier is padding.

A chunk of K frames is denoised on a pyramid schedule: each frame starts one step after the one before it. Context
frames are shown at a fixed low noise level, so their keys and values do not change between denoising steps or between
frames. Per new frame the naive sampler runs the network on steps x window frames, the cached one on steps + 1, in
`steps` calls: a finished frame enters the cache within the first call that denoises its successor.

`exact`: a frame sees a window of the last frames and nothing of what those saw before it; once the window slides, its
context is recomputed once per chunk, within the first call. `streaming`: cached states are kept, so that in each layer
a frame sees the last `window` frames' states; the reference is full-history recomputation with a banded mask.
On the sigmoid schedule context frames are shown clean and only labelled with their level, as in the published sampler;
on the flow schedule they get noise of that level, once, when they become context.

`compile`: the calls after a rollout's first one are compiled. Their shapes depend on the row of the schedule alone, so
on a GPU each is one CUDA graph. Nothing in `generate` waits for the device, and after a first chunk nothing is copied
to it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from workflow_src.common import sections
from workflow_src.common.errors import UserError
from workflow_src.world_model.attention import Cache
from workflow_src.world_model.diffusion import Objective
from workflow_src.world_model.network import Previous, WorldModelNetwork

GRAPHS = 64  # different shapes that may be compiled: a few per horizon, and chunks may be shorter


def pyramid(steps: int, horizon: int) -> list[list[int]]:
    """Indices into the level grid, one row per state of the chunk: from pure noise (`steps`) to done (0)."""
    return [[min(max(steps + frame - row, 0), steps) for frame in range(horizon)] for row in range(steps + horizon)]


def make_sampler(network: WorldModelNetwork, objective: Objective, config: sections.Sampler) -> Sampler:
    """The sampler that `config` asks for. Raises UserError if the network cannot serve it."""
    if config.window > network.frames:
        raise UserError(
            f"world_model.sampler.window: {config.window} exceeds the {network.frames} frames the network was "
            "trained with"
        )
    if not 1 <= config.horizon < config.window:
        raise UserError(
            f"world_model.sampler.horizon: {config.horizon} must be at least 1 and below the window ({config.window})"
        )
    if config.compile and not config.cached:
        raise UserError("world_model.sampler.compile: true goes with `cached: true` only; drop one of the two")
    return (CachedSampler if config.cached else NaiveSampler)(network, objective, config)


@dataclass
class Row:
    """One state of a chunk, and the step to the next: the same for all trials, on the device."""

    done: int  # frames [0, done) are clean
    active: int  # frames [done, active) move; those after them have not begun
    finishes: bool  # frame `done` is clean after this step
    levels: Tensor  # (1, K - done) in the network's unit, of frames [done, K)
    keep: Tensor  # (1, active - done, 1, 1, 1): x becomes keep * x + change * prediction
    change: Tensor


def predict(
    network: WorldModelNetwork,
    guidance: float,
    x: Tensor,
    levels: Tensor,
    actions: Tensor,
    previous: Previous | None,
    **given: Tensor | Cache | int | None,
) -> Tensor:
    """Guided network output. The null action stands on all frames of the second half of the batch."""
    if guidance == 1:
        return network(x, levels, actions, previous=previous, **given)
    if previous is not None:
        previous = Previous(torch.cat([previous.frame, previous.frame]), previous.level)
    out = network(torch.cat([x, x]), levels, torch.cat([actions, actions]), previous=previous, **given)
    told, untold = out.chunk(2)
    return torch.lerp(untold, told, guidance)


class Sampler:
    """What both samplers share: the history of shown frames, the schedule, and guidance."""

    def __init__(self, network: WorldModelNetwork, objective: Objective, config: sections.Sampler) -> None:
        self.network, self.objective, self.config = network, objective, config
        self.exact, self.guided = config.mode == "exact", config.guidance != 1
        self.device = next(network.parameters()).device
        self.level = torch.tensor([[objective.context_level(config.context_noise)]], device=self.device)
        self.context_level = objective.network_level(self.level)
        self.rows: dict[int, list[Row]] = {}  # by frames of a chunk

    @torch.inference_mode()
    def reset(
        self,
        frames: Tensor,
        actions: Tensor,
        *,
        context_noise: Tensor | None = None,
        opens: bool = True,
        first: Tensor | None = None,
    ) -> None:
        """Start B trials from clean context `frames`; `opens`: frames[:, 0] is the episode's first frame.

        `context_noise` like `frames`: required on the flow schedule. `first (B, h, w, C)`: defaults to frames[:, 0].
        """
        if frames.shape[1] > self.config.window - self.config.horizon:
            raise UserError(
                f"world_model.sampler.window: {frames.shape[1]} context frames and a horizon of {self.config.horizon} "
                f"do not fit into a window of {self.config.window}"
            )
        self.opens, self.batch = opens, frames.shape[0]
        self.first, self.first_tokens = frames[:, 0] if first is None else first, None
        self.dropped = torch.arange(2 * self.batch, device=self.device) >= self.batch if self.guided else None
        self.shown, self.actions = self._show(frames, context_noise), actions
        self.count = frames.shape[1]  # frames since the start of the trial, of which the last ones are in `shown`

    @torch.inference_mode()
    def generate(self, actions: Tensor, noise: Tensor, *, context_noise: Tensor | None = None) -> Tensor:
        """The next K clean frames from `actions (B, K, A)` and Gaussian `noise (B, K, h, w, C)`."""
        new = actions.shape[1]
        if new > self.config.horizon:
            raise UserError(f"world_model.sampler.horizon: {new} frames asked for, {self.config.horizon} at most")
        if new not in self.rows:
            self.rows[new] = self._schedule(new)
        x, shown = noise.clone(), torch.empty_like(noise)  # `shown`: how finished frames appear to those after them
        self._open_window(new)
        for row in self.rows[new]:
            moving = x[:, row.done : row.active]
            prediction = self._predict_chunk(x, shown, row, actions)
            x[:, row.done : row.active] = torch.addcmul(row.change * prediction, row.keep, moving)
            if row.finishes:
                frame = slice(row.done, row.done + 1)
                shown[:, frame] = self._show(x[:, frame], None if context_noise is None else context_noise[:, frame])
        self.shown, self.actions = torch.cat([self.shown, shown], 1), torch.cat([self.actions, actions], 1)
        self.count += new
        self._trim()
        return x

    # -- for the two samplers --------------------------------------------------------------------------------------

    def _open_window(self, new: int) -> None:
        """Called once per chunk of `new` frames."""

    def _predict_chunk(self, x: Tensor, shown: Tensor, row: Row, actions: Tensor) -> Tensor:
        """Network output for the moving frames of the chunk `x`; its done frames are seen as `shown`."""
        raise NotImplementedError

    def _trim(self) -> None:
        """Forget frames that no later frame sees."""

    def _start_of_window(self, new: int) -> int:
        """Frame number of the first context frame that `new` frames see."""
        return max(0, self.count + new - self.config.window) if self.exact else 0

    def _context(self, start: int) -> tuple[Tensor, Tensor]:
        """Shown frames and actions from frame number `start` on."""
        skip = start - (self.count - self.shown.shape[1])
        return self.shown[:, skip:], self.actions[:, skip:]

    def _keep(self, frames: int) -> None:
        """Forget all but the last `frames` frames."""
        self.shown, self.actions = self.shown[:, -frames:], self.actions[:, -frames:]

    def _schedule(self, new: int) -> list[Row]:
        """The rows of a chunk of `new` frames. Steps are linear, so what one does to x and to a prediction says all."""
        grid = torch.tensor(self.objective.grid(self.config.steps))
        one, none = torch.ones(1, new, 1, 1, 1), torch.zeros(1, new, 1, 1, 1)
        rows = []
        for now, then in itertools.pairwise(pyramid(self.config.steps, new)):
            done = now.count(0)
            active = done + sum(index != after for index, after in zip(now, then, strict=True))
            levels, next_levels = grid[now][None], grid[then][None]
            keep = self.objective.step(none, one, levels, next_levels)[:, done:active]
            change = self.objective.step(one, none, levels, next_levels)[:, done:active]
            levels = self.objective.network_level(levels[:, done:])
            rows.append(Row(done, active, now[done] == 1, *(part.to(self.device) for part in (levels, keep, change))))
        return rows

    def _levels(self, context: int, row: Row, active: int) -> Tensor:
        """Levels (1, context + active) in the network's unit: of context frames, and of the chunk's next ones."""
        return torch.cat([self.context_level.expand(1, context), row.levels[:, :active]], 1)

    def _given(self, network: WorldModelNetwork, opens: bool) -> dict[str, Tensor | None]:
        """What the network is told about the trials, both branches of the guidance; `opens`: x[:, 0] opens them."""
        if self.first_tokens is None and network.config.first_frame:
            self.first_tokens = self._both(network.embed_first(self.first))
        rows = self.batch * (2 if self.guided else 1)
        start = torch.ones(rows, dtype=torch.bool, device=self.device) if opens and self.opens else None
        return {"start": start, "dropped": self.dropped, "first_tokens": self.first_tokens}

    def _both(self, tensor: Tensor) -> Tensor:
        """For the branch that is told the actions and the one that is not."""
        return torch.cat([tensor, tensor]) if self.guided else tensor

    def _show(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        """Clean frames as later frames see them."""
        if not self.objective.noises_context:
            return frames
        if noise is None:
            raise ValueError("the flow schedule shows context frames with noise: pass `context_noise`")
        return self.objective.add_noise(frames, noise, self.level)


class NaiveSampler(Sampler):
    """Runs the network on the whole window (`streaming`: the whole history) at every denoising step."""

    def _predict_chunk(self, x: Tensor, shown: Tensor, row: Row, actions: Tensor) -> Tensor:
        start = self._start_of_window(x.shape[1])
        context, context_actions = self._context(start)
        frames = torch.cat([context, shown[:, : row.done], x[:, row.done :]], 1)
        levels = self._levels(context.shape[1] + row.done, row, x.shape[1] - row.done)
        acts = torch.cat([context_actions, actions], 1)
        given = self._given(self.network, start == 0) | {"window": self.config.window}
        out = predict(self.network, self.config.guidance, frames, levels, acts, None, **given)
        return out[:, context.shape[1] + row.done : context.shape[1] + row.active]

    def _trim(self) -> None:
        if self.exact:
            self._keep(self.config.window - 1)


class CachedSampler(Sampler):
    """Runs the network on new frames only; `pending` are context frames that the next call brings into the cache.

    The network's weights must not change during the sampler's life.
    """

    def __init__(self, network: WorldModelNetwork, objective: Objective, config: sections.Sampler) -> None:
        super().__init__(network, objective, config)
        self.cache: Cache | None = None
        self.networks = {network.x_proj.weight.dtype: network}
        self.compiled = None
        if config.compile:
            self.compiled = torch.compile(predict, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def reset(self, frames: Tensor, actions: Tensor, **options: object) -> None:
        """See `Sampler.reset`."""
        super().reset(frames, actions, **options)
        self.fresh = True

    def _open_window(self, new: int) -> None:
        if self.fresh:
            self._open_cache()
        start = self._start_of_window(new)
        if start != self.origin:  # exact: the oldest frames left the window, so what the others saw changes
            self.cache.clear()
            self.origin = start
        self.cached = start + self.cache.next  # number of the first frame that is not in the cache

    def _open_cache(self) -> None:
        """An empty cache, and a network with matrices rounded once to what autocast would round them to every time."""
        dtype, kind = self.network.x_proj.weight.dtype, self.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        if dtype not in self.networks:
            self.networks[dtype] = self.network.rounded(dtype)
        rows = self.batch * (2 if self.guided else 1)
        if self.cache is None or (self.cache.batch, self.cache.dtype) != (rows, dtype):
            window, horizon = self.config.window, self.config.horizon
            slots = window if self.exact else window + horizon
            self.cache = Cache(self.networks[dtype], slots, window, rows, dtype, static=self.config.compile)
        else:
            self.cache.restart()
        self.fresh, self.origin = False, 0  # `origin`: number of the first frame the cached states know of

    def _predict_chunk(self, x: Tensor, shown: Tensor, row: Row, actions: Tensor) -> Tensor:
        """Done frames enter the cache; frames that have not begun are left out, for nothing depends on them."""
        known = max(0, self.cached - self.count)  # frames of this chunk in the cache
        context, context_actions = self._context(min(self.cached, self.count))
        pending, frames = context.shape[1] + row.done - known, row.active - row.done
        seen = torch.cat([context, shown[:, known : row.done], x[:, row.done : row.active]], 1)
        acts = torch.cat([context_actions, actions[:, known : row.active]], 1)
        levels, network = self._levels(pending, row, frames), self.cache.network
        self.cache.begin(pending + frames, frames)
        given = self._given(network, self.cached == 0) | {"cache": self.cache}
        guidance, previous = self.config.guidance, self._previous(shown)
        if self.compiled is None or self.cached == 0:  # a rollout's first call has a shape of its own
            out = predict(network, guidance, seen, levels, acts, previous, **given)
        else:
            with _compiling():
                out = self.compiled(network, guidance, seen, levels, acts, previous, **given)
        self.cache.keep(pending)
        self.cached += pending
        return out

    def _previous(self, shown: Tensor) -> Previous | None:
        """The newest cached frame, which the first frame of the coming call follows."""
        if not self.network.config.previous_frame or self.cached == self.origin:
            return None
        number = self.cached - 1
        frame = shown[:, number - self.count] if number >= self.count else self._context(number)[0][:, 0]
        return Previous(frame.contiguous(), self.context_level[0])  # views would differ in their strides

    def _trim(self) -> None:
        self._keep(self.config.window - 1 if self.exact else self.count - self.cached + 1)


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Room for all shapes of a schedule, and cache rows written in any order.

    They are distinct, but where determinism is asked for a compiler sorts them first.
    """
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        with torch._dynamo.config.patch(recompile_limit=GRAPHS):
            yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)
