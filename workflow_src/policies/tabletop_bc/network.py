"""The tabletop's behaviour-cloning policy: pixels and an instruction → one metric action and a read-out of the state.

Convolutions down to about 12 x 12 → spatial softmax (where each of some keypoints is, and what is seen there) → MLP.
The state head is an auxiliary task in training: plain cloning from pixels failed, with it the features become
geometric. It is also what the scripted policy looks through.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

HIDDEN = 256  # width of the fully connected layers
WORDS = 256  # buckets of the instruction's hashed words
TRANSLATION = 0.05  # m per step and axis; the largest command, and the network's unit of translation


@dataclass(frozen=True)
class Shape:
    """What is needed to rebuild a network."""

    image_size: int  # pixels, square
    state: int  # numbers in the simulation state
    width: int = 32
    keypoints: int = 32


def embed_words(prompts: list[str]) -> Tensor:
    """Bags of hashed words, float32 (len(prompts), WORDS), rows of length 1. Case and punctuation do not matter."""
    bags = torch.zeros(len(prompts), WORDS)
    for bag, prompt in zip(bags, prompts):
        words = "".join(c if c.isalnum() else " " for c in prompt.lower()).split()
        for position in {zlib.crc32(word.encode()) % WORDS for word in words}:
            bag[position] = 1.0
    return functional.normalize(bags, dim=1)


class TabletopPolicy(nn.Module):
    """forward(images uint8 (B, H, W, 3), words (B, P, WORDS)) → actions (B, P, 4), state (B, S).

    P instructions share the view of one image, so training answers every task for every frame at little cost.
    `actions`: translation in units of TRANSLATION (3) and the logit of the gripper's opening. `state` is in the
    simulation's units.
    """

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        width = shape.width
        halvings = 2
        while shape.image_size >> (halvings + 1) >= 12:
            halvings += 1
        layers, channels = [], 3
        for level in range(halvings):
            wider = width * min(2**level, 2)
            size = 5 if level == 0 else 3
            layers += [nn.Conv2d(channels, wider, size, stride=2, padding=size // 2), nn.SiLU()]
            channels = wider
        for _ in range(2):
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.attention = nn.Conv2d(channels, shape.keypoints, 1)
        self.values = nn.Conv2d(channels, shape.keypoints, 1)
        self.view = nn.Sequential(nn.Linear(3 * shape.keypoints, HIDDEN), nn.SiLU())
        self.read = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, shape.state))
        self.mix = nn.Linear(HIDDEN + shape.state, HIDDEN)
        self.task = nn.Sequential(nn.Linear(WORDS, 64), nn.SiLU(), nn.Linear(64, 2 * HIDDEN))
        self.act = nn.Sequential(
            nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 4)
        )
        self.register_buffer("state_mean", torch.zeros(shape.state))
        self.register_buffer("state_scale", torch.ones(shape.state))

    def forward(self, images: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        return self.decide(self.prepare(images), words)

    @staticmethod
    def prepare(images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) → float32 (B, 3, H, W) in [-1, 1], channels last in memory."""
        return images.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)

    def decide(self, pixels: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, from what `prepare` returns."""
        features = self.trunk(pixels)
        maps, values = self.attention(features).float(), self.values(features).float()
        # bfloat16 resolves a coordinate to about a millimetre only, so what follows is exact; it is small.
        with torch.autocast(pixels.device.type, enabled=False):
            return self._head(self.view(_keypoints(maps, values)), words)

    def _head(self, view: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        state = self.read(view)
        # The instruction scales and shifts features, as the same view means other things for other tasks.
        scale, shift = self.task(words).chunk(2, dim=2)
        hidden = self.mix(torch.cat([view, state], dim=1))[:, None] * (1 + scale) + shift
        return self.act(hidden), state * self.state_scale + self.state_mean


def _keypoints(maps: Tensor, values: Tensor) -> Tensor:
    """Spatial softmax of `maps (B, K, h, w)`: expected row, column and value of each keypoint, (B, 3 K)."""
    height, width = maps.shape[2:]
    weights = maps.flatten(2).softmax(2)
    rows = torch.linspace(-1, 1, height, device=maps.device).repeat_interleave(width)
    columns = torch.linspace(-1, 1, width, device=maps.device).repeat(height)
    # Sums, not products with a vector: those round a row according to its place in the batch.
    return torch.cat([(weights * part).sum(2) for part in (rows, columns, values.flatten(2))], dim=1)


def metric(actions: Tensor) -> Tensor:
    """Network actions (…, 4) → metric (…, 7): dx, dy, dz m, no rotation, gripper open (1) or closed (0)."""
    translation = actions[..., :3].clamp(-1, 1) * TRANSLATION
    # Half-open fingers neither hold nor release, so the more probable of the two is done, as published policies do.
    opening = (actions[..., 3:] > 0).to(translation.dtype)
    return torch.cat([translation, torch.zeros_like(translation), opening], dim=-1)
