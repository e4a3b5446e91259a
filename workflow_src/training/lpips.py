"""LPIPS, the perceptual distance of Zhang et al. 2018 (arXiv 1801.03924), version 0.1 on AlexNet.

Nothing is downloaded: `REHEARSAL_LPIPS` names a folder with the two published files, `alexnet-owt-7be5be79.pth` (torchvision's
AlexNet) and `alex.pth` (the linear layers, in the package `lpips` under `weights/v0.1/`).
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workflow_src.common.errors import UserError

VARIABLE = "REHEARSAL_LPIPS"
BACKBONE, HEADS = "alexnet-owt-7be5be79.pth", "alex.pth"
# AlexNet's convolutions: place in torchvision's `features`, then channels in and out, kernel, stride, padding.
CONVOLUTIONS = ((0, 3, 64, 11, 4, 2), (3, 64, 192, 5, 1, 2), (6, 192, 384, 3, 1, 1), (8, 384, 256, 3, 1, 1),
                (10, 256, 256, 3, 1, 1))  # fmt: skip
POOLED = (1, 2)  # convolutions that a 3x3 maximum of stride 2 precedes
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # per channel, of images in [-1, 1]
BATCH = 256  # images


class LPIPS(nn.Module):
    """Distance of image pairs; 0 for equal ones. `heads.<i>`: weights of the channels of layer i."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(*shape) for _, *shape in CONVOLUTIONS)
        self.heads = nn.ParameterList(torch.zeros(1, shape[2], 1, 1) for shape in CONVOLUTIONS)

    def features(self, images: Tensor) -> list[Tensor]:
        """Of images (N, 3, H, W) in [-1, 1]: every layer's activations, of unit length across channels."""
        shift, scale = (images.new_tensor(values)[:, None, None] for values in (SHIFT, SCALE))
        x, found = (images - shift) / scale, []
        for index, layer in enumerate(self.layers):
            if index in POOLED:
                x = F.max_pool2d(x, 3, 2)
            x = layer(x).relu()
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    @torch.inference_mode()
    def forward(self, one: np.ndarray, two: np.ndarray) -> np.ndarray:
        """Distance per image, float32, of uint8 (…, H, W, 3) from 32x32 pixels on."""
        shape, device = one.shape[:-3], self.heads[0].device
        one, two = (images.reshape(-1, *images.shape[-3:]) for images in (one, two))
        parts = []
        for start in range(0, len(one), BATCH):
            pair = (torch.from_numpy(images[start : start + BATCH]).to(device).float() for images in (one, two))
            pairs = zip(*(self.features(images.permute(0, 3, 1, 2) / 127.5 - 1) for images in pair))
            distances = [(head * (a - b).square()).sum(1).mean((1, 2)) for head, (a, b) in zip(self.heads, pairs)]
            parts.append(torch.stack(distances).sum(0).cpu())
        return torch.cat(parts).numpy().reshape(shape)


def load_lpips(device: torch.device) -> LPIPS | None:
    """The metric with the weights in the folder that `REHEARSAL_LPIPS` names; None where it is not set.

    Raises UserError when a file is missing or is not what its name says.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        return None
    backbone, heads = (_read(Path(folder) / name) for name in (BACKBONE, HEADS))
    names = {}
    for index, (place, *_) in enumerate(CONVOLUTIONS):
        for part in ("weight", "bias"):
            names[f"layers.{index}.{part}"] = (backbone, BACKBONE, f"features.{place}.{part}")
        names[f"heads.{index}"] = (heads, HEADS, f"lin{index}.model.1.weight")
    model = LPIPS()
    expected = model.state_dict()
    for name, (content, file, key) in names.items():
        if key not in content or content[key].shape != expected[name].shape:
            raise UserError(
                f"{Path(folder) / file}: holds no {key} of shape {tuple(expected[name].shape)} ({VARIABLE})"
            )
    model.load_state_dict({name: content[key] for name, (content, _, key) in names.items()})
    return model.requires_grad_(False).to(device).eval()


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).split("\n")[0]
        raise UserError(
            f"{path}: cannot be read ({reason}); {VARIABLE} must name a folder with it, or be unset"
        ) from error
