"""The golden vectors of the published world model, for the tests of network, diffusion and sampler."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import torch

from workflow_src.common import sections
from workflow_src.world_model.network import WorldModelNetwork

FOLDER = Path(__file__).parent / "golden" / "parity"
NAMES = (
    "dit_standard_rope", "dit_pixel_rope", "sliding_window", "cfg3_horizon1", "cfg1_horizon4", "cfg3_horizon4_sliding_context2",
)  # fmt: skip
TOLERANCE = 1e-4  # relative, float32


@functools.cache
def load(name: str) -> tuple[dict[str, torch.Tensor], dict, WorldModelNetwork]:
    """(arrays, settings, network with the published weights)."""
    with np.load(FOLDER / f"{name}.npz") as content:
        meta = json.loads(str(content["meta"]))
        arrays = {key: torch.from_numpy(content[key]) for key in content.files if key != "meta"}
    config = sections.Network(
        in_channels=meta["in_channels"], patch=meta["patch"], width=meta["dim"], depth=meta["layers"],
        heads=meta["heads"], action_dim=meta["action_dim"], spatial_rope=meta["rope"],
    )  # fmt: skip
    network = WorldModelNetwork(config, 8, 8, meta["max_frames"]).eval()
    network.load_state_dict({key[3:]: value for key, value in arrays.items() if key.startswith("sd.")}, strict=True)
    return arrays, meta, network


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of `expected`."""
    return float((actual - expected).norm() / expected.norm())
