"""Noise schedules, prediction types and training losses behind one interface.

    objective = Objective(config.objective)
    levels  = objective.sample_levels(uniforms)                        # uniforms (B, T, 2) in [0, 1) -> levels (B, T)
    losses  = objective.training_loss(network, latents, actions, start=start, first=first, noise=noise, levels=levels,
                                      dropped=dropped)                 # -> (B,) float32, one per clip
    clean, noise = objective.estimate(prediction, noisy, levels)       # network output -> x0 and noise
    next_x  = objective.step(prediction, noisy, levels, next_levels)   # DDIM; on the flow schedule an Euler step

`latents (B, T, h, w, C)` are standardised, `actions (B, T, 10)` in world-model units, `start (B,)` bool: frame 0 of
the clip is the episode's first frame, `first (B, h, w, C)` or None: that first frame, for networks with `first_frame`,
`noise` like latents, `dropped (B,)` bool: hide the actions (guidance). Nothing here draws random numbers: the caller
passes them, so they stay a function of (seed, step, sample).

Levels are what the schedule understands: integers 0..999 (int64) on the sigmoid schedule, fractions [0, 1] (float32)
on the flow schedule; -1 on the sigmoid schedule means exactly clean. A frame is `signal * clean + sigma * noise`.
Sources: Diffusion Forcing (arXiv 2407.01392), sigmoid schedule (arXiv 2212.11972), v-prediction (arXiv 2202.00512),
rectified flow (arXiv 2209.03003).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workflow_src.common import sections

LEVELS = 1000  # discrete levels of the sigmoid schedule; the network embeds levels in these units on both schedules
FIRST_FRAME_CONTEXT = 0.85  # share of clip-first frames trained as context: a rollout never generates them


def sigmoid_alphas_cumprod(levels: int = LEVELS) -> Tensor:
    """Squared signal level at every discrete level, float32 (levels,), falling from almost 1 to almost 0."""
    time = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
    low, high = torch.tensor([-3.0, 3.0], dtype=torch.float64).sigmoid()
    cumulative = (high - (6 * time - 3).sigmoid()) / (high - low)
    betas = (1 - cumulative[1:] / cumulative[:-1]).clamp(0, 0.999)  # 0.999: the last level keeps a trace of signal
    return torch.cumprod(1 - betas, 0).float()


class Objective:
    """What a network predicts, and at which noise levels. See the module's docstring for shapes and units."""

    def __init__(self, config: sections.Objective) -> None:
        self.config = config
        self.discrete = config.schedule == "sigmoid"
        self._alphas = sigmoid_alphas_cumprod()

    # -- levels ----------------------------------------------------------------------------------------------------

    def sample_levels(self, uniforms: Tensor) -> Tensor:
        """Diffusion Forcing: a level per frame from `uniforms (B, T, 2)` in [0, 1).

        Levels are independent, and so is the choice of which frames are context, unless `context_pattern` is
        "alternating": then each frame is context as often as before, but neighbours are antithetic, so that a noisy
        frame mostly follows a clean one, as in a rollout.
        """
        choice, place = uniforms.unbind(-1)
        if self.discrete:
            return (place * LEVELS).long().clamp(max=LEVELS - 1)
        shift, probability = self.config.noise_shift, self.config.context_probability
        noisy = shift * place / (1 + (shift - 1) * place)
        if self.config.context_pattern == "alternating":
            turn = 0.5 * torch.arange(choice.shape[1], device=choice.device)
            # Frame 0 keeps its own draw: its chance is another one.
            choice = torch.cat([choice[:, :1], ((choice[:, 1:2] + turn) % 1)[:, 1:]], 1)
        chance = torch.full_like(choice, probability)
        if probability > 0:
            chance[:, 0] = max(probability, FIRST_FRAME_CONTEXT)
        return torch.where(choice < chance, place * self.config.context_noise, noisy)

    def context_level(self, fraction: float) -> int | float:
        """The level that stands for `fraction` of full noise, to show context frames at (15 / 1000: level 14)."""
        return max(round(fraction * LEVELS) - 1, 0) if self.discrete else fraction

    @property
    def noises_context(self) -> bool:
        """Whether context frames really get noise of their level (flow), or only its label (the published sampler)."""
        return not self.discrete

    def grid(self, steps: int) -> list[int | float]:
        """Levels of a denoising run: index 0 is exactly clean, index `steps` pure noise."""
        if self.discrete:
            return [int(level) for level in torch.linspace(-1, LEVELS - 1, steps + 1).tolist()]
        return [index / steps for index in range(steps + 1)]

    def network_level(self, levels: Tensor) -> Tensor:
        """Levels in the network's unit: thousandths of full noise."""
        return levels.float() if self.discrete else levels.float() * LEVELS

    def coefficients(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """(signal, sigma), each `levels`' shape + (1, 1, 1), so that they multiply frames."""
        levels = levels[..., None, None, None]
        if not self.discrete:
            return 1 - levels.float(), levels.float()
        if self._alphas.device != levels.device:
            self._alphas = self._alphas.to(levels.device)
        alphas = torch.where(levels < 0, 1.0, self._alphas[levels.clamp(min=0)])
        return alphas.sqrt(), (1 - alphas).sqrt()

    # -- frames ----------------------------------------------------------------------------------------------------

    def add_noise(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """`clean (B, T, h, w, C)` at `levels (B, T)`."""
        signal, sigma = self.coefficients(levels)
        return torch.addcmul(signal * clean, sigma, noise)

    def target(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """What the network should output for `add_noise(clean, noise, levels)`."""
        if self.config.prediction == "x0":
            return clean
        if self.config.prediction == "flow":
            return noise - clean
        signal, sigma = self.coefficients(levels)
        return signal * noise - sigma * clean

    def estimate(self, prediction: Tensor, noisy: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """The clean frames and the noise that a network output implies, both shaped like `noisy`."""
        signal, sigma = self.coefficients(levels)
        if self.config.prediction == "x0":
            return prediction, (noisy - signal * prediction) / sigma.clamp(min=1e-4)
        if self.config.prediction == "flow":
            total = signal + sigma
            return (noisy - sigma * prediction) / total, (noisy + signal * prediction) / total
        power = signal.square() + sigma.square()  # 1 on the sigmoid schedule
        return (signal * noisy - sigma * prediction) / power, (sigma * noisy + signal * prediction) / power

    def step(self, prediction: Tensor, noisy: Tensor, levels: Tensor, next_levels: Tensor) -> Tensor:
        """Deterministic denoising from `levels` to `next_levels`; frames whose level stays are returned unchanged."""
        clean, noise = self.estimate(prediction, noisy, levels)
        moved = self.add_noise(clean, noise, next_levels)
        return torch.where((levels == next_levels)[..., None, None, None], noisy, moved)

    # -- training --------------------------------------------------------------------------------------------------

    def weight(self, levels: Tensor) -> Tensor:
        """Loss weight per frame. x0 errors count more where little noise hides them: 1 / (t + 0.2)."""
        if self.config.prediction == "x0":
            return 1 / (self.network_level(levels) / LEVELS + 0.2)
        return torch.ones(levels.shape, device=levels.device)

    def training_loss(
        self,
        network: nn.Module,
        latents: Tensor,
        actions: Tensor,
        *,
        noise: Tensor,
        levels: Tensor,
        start: Tensor | None = None,
        first: Tensor | None = None,
        dropped: Tensor | None = None,
        shown: Tensor | None = None,
    ) -> Tensor:
        """Weighted squared error of every clip, float32 (B,). See the module's docstring for the arguments.

        `shown`, like `latents`: what frames at context level show instead of `latents` (flow schedule). Where it differs
        the frame itself is not learned from: it would teach to undo what the model did.
        """
        weight, visible = self.weight(levels), latents
        if shown is not None:
            context = levels <= self.config.context_noise
            foreign = (shown != latents).flatten(2).any(2)
            visible = torch.where(context[..., None, None, None], shown, latents)
            weight = weight * ~(context & foreign)
        noisy = self.add_noise(visible, noise, levels)
        prediction = network(noisy, self.network_level(levels), actions, start=start, dropped=dropped, first=first)
        error = (prediction.float() - self.target(latents, noise, levels)).square().mean((2, 3, 4))
        return (error * weight).mean(1)
