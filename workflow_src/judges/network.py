"""The judge's two networks: success from a pair of frames, and the scene's state from the same pair.

Both see the first frame beside the present one: "pushed to the left" is about where the block was, and the plate under
a block is seen in the first frame only. They share no weights with each other or with any policy. Shape letters:
B pairs, H and W pixels, M tasks, S state numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from workflow_src.common.compute import autocast
from workflow_src.common.errors import UserError
from workflow_src.common.files import sha256_file

FEATURES = 128  # hidden units behind the pooled features
Pairwise = Callable[[Tensor, Tensor], Tensor]
CLIPS_AT_ONCE = 64  # bounds the memory of copies


class PairEncoder(nn.Module):
    """Two images → where things are: a convolutional trunk on a quarter grid, then spatial soft-argmax.

    Soft-argmax coordinates say *where* to a fraction of a cell; the values pooled under the same attention say *what*.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        # The unshuffle reaches the quarter grid in one move: cheaper than two strided convolutions, equally accurate.
        self.trunk = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(6 * 16, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
        )
        self.attention = nn.Conv2d(2 * width, 2 * width, 1)
        self.outputs = 6 * width  # x, y and value of every attention map

    def forward(self, first: Tensor, frame: Tensor) -> Tensor:
        """uint8 or float 0..255 (B, H, W, 3) twice → (B, 6 * width)."""
        pair = torch.cat([first, frame], -1).permute(0, 3, 1, 2).float() / 127.5 - 1
        features = self.trunk(pair)
        height, width = features.shape[-2:]
        attention = self.attention(features).flatten(2).float().softmax(-1)
        grid = torch.stack(
            torch.meshgrid(
                torch.linspace(-1, 1, height, device=pair.device), torch.linspace(-1, 1, width, device=pair.device),
                indexing="ij",
            ), -1,
        ).flatten(0, 1)  # fmt: skip
        places = (attention @ grid).flatten(1)
        values = (attention * features.flatten(2).float()).sum(-1)
        return torch.cat([places, values], -1)


class SuccessClassifier(nn.Module):
    """(first frame, present frame) → logits of success at the present frame, one per task.

    One output per task rather than a task input: every pair then teaches all tasks at once.
    """

    def __init__(self, width: int, tasks: int, state: int) -> None:
        super().__init__()
        self.encoder = PairEncoder(width)
        self.hidden = nn.Sequential(
            nn.Linear(self.encoder.outputs, FEATURES), nn.SiLU(), nn.Linear(FEATURES, FEATURES), nn.SiLU()
        )
        self.success = nn.Linear(FEATURES, tasks)
        # Only a help in training: features that tell where things are also tell success.
        self.state = nn.Linear(self.encoder.outputs, state)

    def forward(self, first: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, 3) twice → logits (B, M), standardised state (B, S)."""
        features = self.encoder(first, frame)
        return self.success(self.hidden(features)), self.state(features)

    def logits(self, first: Tensor, frame: Tensor) -> Tensor:
        """(B, H, W, 3) twice → logits (B, M)."""
        return self(first, frame)[0]


class StateReader(nn.Module):
    """(first frame, present frame) → state at the present frame, in the lab's units.

    Learned on standardised numbers; `mean` and `deviation` belong to the weights. Numbers that nothing asks for (the
    blocks' rotations) have deviation 0: they are read as their mean.
    """

    def __init__(self, width: int, state: int) -> None:
        super().__init__()
        self.encoder = PairEncoder(width)
        self.head = nn.Sequential(nn.Linear(self.encoder.outputs, FEATURES), nn.SiLU(), nn.Linear(FEATURES, state))
        self.register_buffer("mean", torch.zeros(state))
        self.register_buffer("deviation", torch.ones(state))

    def forward(self, first: Tensor, frame: Tensor) -> Tensor:
        """(B, H, W, 3) twice → standardised state (B, S)."""
        return self.head(self.encoder(first, frame))

    def read(self, first: Tensor, frame: Tensor) -> Tensor:
        """(B, H, W, 3) twice → state (B, S) in the lab's units."""
        return self(first, frame) * self.deviation + self.mean


class JudgeNetworks(nn.Module):
    """Both networks, trained in one run and kept in one file."""

    def __init__(self, width: int, tasks: int, state: int) -> None:
        super().__init__()
        self.classifier = SuccessClassifier(width, tasks, state)
        self.reader = StateReader(width, state)


# ---- artefact -------------------------------------------------------------------------------------------------------

FORMAT = "rehearsal-judge-1"


def load_judge(weights: str | Path) -> tuple[JudgeNetworks, dict[str, Any]]:
    """Networks and configuration of a judge artefact (`model.safetensors` with `config.json` beside it).

    Raises `UserError` naming the file that is missing, damaged or of another kind.
    """
    weights = Path(weights)
    path = weights.with_name("config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("format") != FORMAT:
            raise UserError(f"{path}: format is {config.get('format')!r}, not {FORMAT!r}; train the judge anew")
        if config["sha256"] != sha256_file(weights):
            raise UserError(f"{weights}: is not the file that {path.name} describes; train the judge anew")
        networks = JudgeNetworks(config["width"], len(config["tasks"]), config["state_size"])
        networks.load_state_dict(load_file(weights), strict=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{weights.parent}: not a judge ({' '.join(str(error).split())}); train it anew") from error
    return networks.eval(), config


def per_clip(network: Pairwise, clips: Sequence[np.ndarray], batch: int, device: torch.device) -> list[np.ndarray]:
    """`network(frame 0, frame)` of every frame of every clip, uint8 (T+1, H, W, 3); per clip float32 (T+1, …).

    Clips share batches: one alone would leave most of a batch to padding.
    """
    results: list[np.ndarray] = []
    for start in range(0, len(clips), CLIPS_AT_ONCE):
        part = clips[start : start + CLIPS_AT_ONCE]
        firsts = np.concatenate([np.broadcast_to(frames[:1], frames.shape) for frames in part])
        found = in_batches(network, firsts, np.concatenate(part), batch, device)
        results += np.split(found, np.cumsum([len(frames) for frames in part])[:-1])
    return results


@torch.no_grad()
def in_batches(
    network: Pairwise, first: np.ndarray, frames: np.ndarray, batch: int, device: torch.device
) -> np.ndarray:
    """`network(first, frame)` of every pair, uint8 (N, H, W, 3) twice, always at one batch shape; float32 (N, …).

    Matrix libraries choose kernels by shape; a filled-up last batch keeps a pair's result independent of its company.
    """
    parts = []
    for start in range(0, len(frames), batch):
        rows = np.minimum(np.arange(start, start + batch), len(frames) - 1)
        pair = [torch.from_numpy(images[rows]).to(device) for images in (first, frames)]
        with autocast(device):
            parts.append(network(*pair).float().cpu())
    return torch.cat(parts)[: len(frames)].numpy()
