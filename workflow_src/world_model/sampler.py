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
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from workflow_src.common import sections
from workflow_src.common.errors import UserError
from workflow_src.world_model.attention import Cache
from workflow_src.world_model.diffusion import Objective
from workflow_src.world_model.network import Previous, WorldModelNetwork


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
    return (CachedSampler if config.cached else NaiveSampler)(network, objective, config)


class Sampler:
    """What both samplers share: the history of shown frames, the schedule, and guidance."""

    def __init__(self, network: WorldModelNetwork, objective: Objective, config: sections.Sampler) -> None:
        self.network, self.objective, self.config = network, objective, config
        self.grid = objective.grid(config.steps)
        self.level = objective.context_level(config.context_noise)
        self.exact = config.mode == "exact"

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
        self.opens = opens
        self.first = (frames[:, 0] if first is None else first) if self.network.config.first_frame else None
        self.shown, self.actions = self._show(frames, context_noise), actions
        self.count = frames.shape[1]  # frames since the start of the trial, of which the last ones are in `shown`
        self._trim()

    @torch.inference_mode()
    def generate(self, actions: Tensor, noise: Tensor, *, context_noise: Tensor | None = None) -> Tensor:
        """The next K clean frames from `actions (B, K, A)` and Gaussian `noise (B, K, h, w, C)`."""
        new = actions.shape[1]
        if new > self.config.horizon:
            raise UserError(f"world_model.sampler.horizon: {new} frames asked for, {self.config.horizon} at most")
        x = noise
        shown = torch.empty_like(noise)  # how finished frames appear to those after them
        self._open_window(new)
        rows = pyramid(self.config.steps, new)
        for now, then in itertools.pairwise(rows):
            levels, next_levels = self._levels(now, x), self._levels(then, x)
            prediction = self._predict_chunk(x, shown, now, actions)
            x = self.objective.step(prediction, x, levels, next_levels)
            for frame in (i for i in range(new) if now[i] == 1):
                own_noise = None if context_noise is None else context_noise[:, frame : frame + 1]
                shown[:, frame : frame + 1] = self._show(x[:, frame : frame + 1], own_noise)
        self.shown, self.actions = torch.cat([self.shown, shown], 1), torch.cat([self.actions, actions], 1)
        self.count += new
        self._trim()
        return x

    # -- for the two samplers --------------------------------------------------------------------------------------

    def _open_window(self, new: int) -> None:
        """Called once per chunk of `new` frames."""

    def _predict_chunk(self, x: Tensor, shown: Tensor, indices: list[int], actions: Tensor) -> Tensor:
        """Network output for the chunk `x`, whose frames stand at `indices` of the grid (0: done, seen as `shown`)."""
        raise NotImplementedError

    def _start_of_window(self, new: int) -> int:
        """Frame number of the first context frame that `new` frames see."""
        return max(0, self.count + new - self.config.window) if self.exact else 0

    def _context(self, start: int) -> tuple[Tensor, Tensor]:
        """Shown frames and actions from frame number `start` on."""
        skip = start - (self.count - self.shown.shape[1])
        return self.shown[:, skip:], self.actions[:, skip:]

    def _run(self, x: Tensor, levels: Tensor, actions: Tensor, number: int, **cached: object) -> Tensor:
        """Guided network output for frames from frame `number` on. The null action stands on all of them."""
        batch, guided = x.shape[0], self.config.guidance != 1

        def both(tensor: Tensor | None) -> Tensor | None:
            return torch.cat([tensor, tensor]) if guided and tensor is not None else tensor

        previous = cached.pop("previous", None)
        if previous is not None:
            previous = Previous(both(previous.frame), both(previous.level))
        flags = torch.arange(2 * batch if guided else batch, device=x.device)
        out = self.network(
            both(x),
            both(self.objective.network_level(levels)),
            both(actions),
            start=flags >= 0 if number == 0 and self.opens else None,
            dropped=flags >= batch if guided else None,
            first=both(self.first),
            previous=previous,
            window=self.config.window,
            **cached,
        )
        if not guided:
            return out
        told, untold = out.chunk(2)
        return torch.lerp(untold, told, self.config.guidance)

    def _levels(self, indices: list[int], x: Tensor) -> Tensor:
        levels = torch.tensor([self.grid[index] for index in indices], device=x.device)
        return levels.expand(x.shape[0], -1)

    def _show(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        """Clean frames as later frames see them."""
        if not self.objective.noises_context:
            return frames
        if noise is None:
            raise ValueError("the flow schedule shows context frames with noise: pass `context_noise`")
        return self.objective.add_noise(frames, noise, self._context_levels(frames))

    def _context_levels(self, frames: Tensor) -> Tensor:
        return torch.full(frames.shape[:2], self.level, device=frames.device)

    def _trim(self) -> None:
        """Forget frames that no later frame sees."""
        if self.exact or self.config.cached:
            keep = (
                max(self.config.window - 1, self.count) if self.count < self.config.window else self.config.window - 1
            )
            self.shown, self.actions = self.shown[:, -keep:], self.actions[:, -keep:]


class NaiveSampler(Sampler):
    """Runs the network on the whole window (`streaming`: the whole history) at every denoising step."""

    def _predict_chunk(self, x: Tensor, shown: Tensor, indices: list[int], actions: Tensor) -> Tensor:
        start = self._start_of_window(x.shape[1])
        context, context_actions = self._context(start)
        done = sum(index == 0 for index in indices)
        frames = torch.cat([context, shown[:, :done], x[:, done:]], 1)
        levels = torch.cat(
            [self._context_levels(frames[:, : context.shape[1] + done]), self._levels(indices[done:], x)], 1
        )
        out = self._run(frames, levels, torch.cat([context_actions, actions], 1), start)
        return out[:, context.shape[1] :]


class CachedSampler(Sampler):
    """Runs the network on new frames only; `pending` are context frames that the next call brings into the cache."""

    def reset(self, frames: Tensor, actions: Tensor, **options: object) -> None:
        """See `Sampler.reset`."""
        super().reset(frames, actions, **options)
        window, horizon = self.config.window, self.config.horizon
        self.cache = Cache(window if self.exact else window - 1 + max(frames.shape[1], horizon + 1))
        self.origin = 0  # number of the first frame the cached states know of

    def _open_window(self, new: int) -> None:
        start = self._start_of_window(new)
        if start != self.origin:  # exact: the oldest frames left the window, so what the others saw changes
            self.cache.clear()
            self.origin = start
        self.cached = start + self.cache.next  # number of the first frame that is not in the cache

    def _predict_chunk(self, x: Tensor, shown: Tensor, indices: list[int], actions: Tensor) -> Tensor:
        """Done frames enter the cache; frames that have not started are left out, for nothing depends on them."""
        done = sum(index == 0 for index in indices)
        begun = max((i + 1 for i in range(x.shape[1]) if indices[i] < self.config.steps), default=0)
        active = min(begun + 1, x.shape[1])  # the frame after the last one that has begun begins now
        known = max(0, self.cached - self.count)  # frames of this chunk in the cache
        context, context_actions = self._context(min(self.cached, self.count))
        pending = torch.cat([context, shown[:, known:done]], 1)
        frames = torch.cat([pending, x[:, done:active]], 1)
        levels = torch.cat([self._context_levels(pending), self._levels(indices[done:active], x)], 1)
        acts = torch.cat([context_actions, actions[:, known:active]], 1)
        out = self._run(frames, levels, acts, self.cached, cache=self.cache, previous=self._previous(shown))
        self.cache.keep(pending.shape[1])
        self.cached += pending.shape[1]
        result = torch.zeros_like(x)  # only frames that move are read
        result[:, done:active] = out[:, pending.shape[1] :]
        return result

    def _previous(self, shown: Tensor) -> Previous | None:
        """The newest cached frame, which the first frame of the coming call follows."""
        if self.cached == self.origin:
            return None
        number = self.cached - 1
        if number >= self.count:
            frame = shown[:, number - self.count]
        else:
            frame = self._context(number)[0][:, 0]
        level = self._context_levels(frame[:, None])[:, 0]
        return Previous(frame, self.objective.network_level(level))
