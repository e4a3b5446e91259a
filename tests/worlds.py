"""Small world-model networks with weights that do something, for the tests of the world-model room."""

from __future__ import annotations

from dataclasses import replace

import torch

from workflow_src.common import sections
from workflow_src.world_model.network import WorldModelNetwork

FACTORISED = sections.Network(in_channels=3, width=16, depth=2, heads=2)
JOINT = replace(
    FACTORISED, activation="relu2", attention="joint", spatial_rope="none", temporal="relative_bias",
    previous_frame=True, action_mlp=True, learned_null=True, first_frame=True,
)  # fmt: skip
FLOW = sections.Objective(schedule="flow", prediction="x0", context_probability=0.35, noise_shift=2.0)


def make_network(config: sections.Network, frames: int = 6, size: int = 4) -> WorldModelNetwork:
    """A network whose gates are open: every parameter gets noise, so that every path matters."""
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = WorldModelNetwork(config, size, size, frames).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            # Small output and skip gates: a gain above one would let rollouts grow without bound and hide the rest.
            spread = 0.01 if name.startswith("skip_gates") else 0.07 if name.startswith("final_layer.linear") else 0.2
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return network


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
