"""Optimisers with one schedule: AdamW for everything, or Muon for hidden matrices and AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) orthogonalises every hidden matrix's momentum.
Equal-shaped matrices are stacked and iterated as one batch: three times as fast on a CPU as `torch.optim.Muon`, which
takes them one by one and, besides, exists only from torch 2.9 on. Several processes share this work, each taking whole
matrices, and exchange the results.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from workflow_src.common.compute import uses_bf16
from workflow_src.common.sections import Training
from workflow_src.training.distributed import Processes
from workflow_src.training.sharding import like

# Quintic Newton-Schulz coefficients of the reference implementation: steepest at zero, singular values end near 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95
# Parameters whose name holds one of these embed, modulate or read out; Muon is for the matrices between them.
NOT_HIDDEN = ("embed", "modulation", "adaln", "bias", "final", "head", "null", "stem")


def schedule(step: int, config: Training) -> float:
    """Learning-rate factor of 0-based `step`: linear warm-up, constant, decay over the last `config.decay`."""
    rising = (step + 1) / max(1, config.warmup)
    falling = (config.steps - step) / max(1.0, config.decay * config.steps) if config.decay > 0 else 1.0
    falling = max(0.0, min(1.0, falling))
    if config.decay_shape == "cosine":
        falling = 0.5 - 0.5 * math.cos(math.pi * falling)
    return min(1.0, rising, falling)


def hidden_matrices(model: nn.Module) -> list[str]:
    """Names of the parameters that Muon takes: weights of at least two dimensions inside the blocks.

    A model that knows better says so by a method `hidden_matrices() -> list[str]`.
    """
    if hasattr(model, "hidden_matrices"):
        return list(model.hidden_matrices())
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and "blocks." in name and not any(word in name.lower() for word in NOT_HIDDEN)
    ]


def orthogonalise(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly, of a stack (n, rows, columns); same dtype as the input."""
    a, b, c = COEFFICIENTS
    x = stack.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(stack.dtype)


class Muon:
    """Batched Muon over matrices (rows, columns) or convolution kernels (out, in, h, w), taken as (out, in*h*w).

    Every process holds all momentum and all weights; the iterations, nearly all of the time, it does for its own matrices.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], weight_decay: float, dtype: torch.dtype, processes: Processes
    ):
        groups = defaultdict(dict)
        for name, parameter in parameters.items():
            groups[tuple(parameter.flatten(1).shape)][name] = parameter
        self.groups, self.weight_decay, self.dtype, self.processes = groups, weight_decay, dtype, processes
        named = {name: parameter for group in groups.values() for name, parameter in group.items()}
        self.momentum = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
        self.owners = share_work([parameter.flatten(1).shape for parameter in named.values()], processes.size)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update. The gradients are used up: their memory takes the orthogonalised matrices."""
        owners = iter(self.owners)
        for group in self.groups.values():
            gradients, momentum = self._gradients(group), [self.momentum[name] for name in group]
            torch._foreach_lerp_(momentum, gradients, 1 - MOMENTUM)
            own = [index for index in range(len(group)) if next(owners) == self.processes.rank]
            if not own:
                continue
            gradients = [gradients[index] for index in own]
            # Nesterov: look ahead along the new momentum.
            ahead = torch._foreach_lerp(gradients, [momentum[index] for index in own], MOMENTUM)
            update = orthogonalise(torch.stack([item.flatten(1) for item in ahead]), self.dtype)
            torch._foreach_copy_(gradients, [piece.view_as(like) for piece, like in zip(update, gradients)])
        everything = [gradient for group in self.groups.values() for gradient in self._gradients(group)]
        self.processes.exchange(everything, self.owners, self.dtype)
        for (rows, columns), group in self.groups.items():
            parameters = list(group.values())
            torch._foreach_mul_(parameters, 1 - lr * self.weight_decay)
            # A tall matrix needs larger steps for the same change of its outputs.
            scale = lr * max(1.0, rows / columns) ** 0.5
            torch._foreach_add_(parameters, self._gradients(group), alpha=-scale)

    @staticmethod
    def _gradients(group: dict[str, nn.Parameter]) -> list[Tensor]:
        return [parameter.grad for parameter in group.values()]


def share_work(shapes: list[tuple[int, int]], size: int) -> list[int]:
    """Which of `size` processes orthogonalises each matrix: the costliest first, each to the one with the least to do."""
    costs = [rows * columns * min(rows, columns) for rows, columns in shapes]
    loads, owners = [0] * size, [0] * len(costs)
    for index in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


class Optimizers:
    """All optimiser state of one training. `tensors()` and `load()` carry it through a checkpoint, bit by bit."""

    def __init__(self, model: nn.Module, config: Training, processes: Processes):
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        device = next(iter(named.values())).device
        chosen = set(hidden_matrices(model)) if config.optimizer == "muon" else set()
        dtype = torch.bfloat16 if uses_bf16(device, config.precision) else torch.float32
        self.config = config
        self.rest = {name: parameter for name, parameter in named.items() if name not in chosen}
        matrices = {name: named[name] for name in named if name in chosen}
        self.muon = Muon(matrices, config.weight_decay, dtype, processes)
        # Only matrices decay: biases and gains at zero would be pulled away from what they are for.
        decayed = [parameter for parameter in self.rest.values() if parameter.ndim >= 2]
        plain = [parameter for parameter in self.rest.values() if parameter.ndim < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True) if groups else None

    def step(self, step: int) -> float:
        """One update by the gradients in place; returns the schedule's factor."""
        factor = schedule(step, self.config)
        self.muon.step(factor * self.config.muon_lr)
        if self.adamw is not None:
            for group in self.adamw.param_groups:
                group["lr"] = factor * self.config.lr
            self.adamw.step()
        return factor

    def tensors(self) -> dict[str, Tensor]:
        """State by name, as it is now (no copies)."""
        state = {f"muon.{name}": value for name, value in self.muon.momentum.items()}
        for name, parameter in self.rest.items():
            for key, value in self.adamw.state.get(parameter, {}).items():
                state[f"adamw.{key}.{name}"] = value
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `tensors()` gave."""
        for name, value in self.muon.momentum.items():
            value.copy_(state[f"muon.{name}"])
        for name, parameter in self.rest.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = state.get(f"adamw.{key}.{name}")
                if value is not None:
                    # The fused optimiser pairs moments with weights by memory order, so moments take the weights' layout.
                    target = parameter if value.shape == parameter.shape else value
                    target = torch.empty_like(target, device=parameter.device)
                    self.adamw.state[parameter][key] = target.copy_(like(value, target))
