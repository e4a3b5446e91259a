"""Validation of a world model: replay the actions of held-out episodes from their first frames and compare.

Every figure is given per horizon, beside the baseline that never moves (the first frame, frozen), the tokenizer's own
reconstruction (the ceiling), and replays that a model which follows actions must lose against the true one: another
episode's actions, standing still and, for models trained to go without, no actions.
"""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from workflow_src.common.files import write_text
from workflow_src.common.progress import say
from workflow_src.common.video import write_gif
from workflow_src.episodes.store import Arrays
from workflow_src.training.lpips import VARIABLE, load_lpips
from workflow_src.training.plots import plot_horizon
from workflow_src.world_model.artefact import Card, WorldModel
from workflow_src.world_model.environment import imagine
from workflow_src.world_model.tokenizer import load_tokenizer

EPISODES = 64  # held-out episodes replayed at most
SAMPLES = 6  # of them shown as GIFs
WINDOW = 7  # side of SSIM's averaging window, pixels
Rows = list[dict[str, float]]


class Validation:
    """Replays up to 64 held-out `episodes` (and `latents (N, F, h, w, C)` of theirs) through a network that `card` describes.

    Called with a network it returns rows by horizon, and writes into `folder`: them as `validation.csv`, their picture
    `mse.png`, and `samples/*.gif` (truth | imagined).
    """

    def __init__(
        self, folder: Path, card: Card, tokenizer: Path, episodes: Arrays, latents: np.ndarray, seed: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.folder, self.card, self.seed = folder, card, seed
        self.tokenizer = load_tokenizer(tokenizer, device)
        self.lpips = load_lpips(device)
        if self.lpips is None:
            say(f"world model: no LPIPS, because {VARIABLE} names no folder with its weights (training/lpips.py)")
        self.count = min(EPISODES, len(episodes.images))
        self.truth = episodes.images[: self.count]
        self.recorded = (episodes.reached if card.actions == "reached" else episodes.actions)[: self.count]
        flat = np.asarray(latents[: self.count, 1:], np.float32)
        decoded = self.tokenizer.decode(flat.reshape(-1, *flat.shape[2:]))
        self.baselines = {
            "_frozen": self.truth[:, :1].repeat(self.truth.shape[1] - 1, axis=1),
            "_tokenizer": decoded.reshape(self.truth[:, 1:].shape),
        }

    def __call__(self, network: nn.Module) -> Rows:
        imagined = self._imagine(network.eval())
        rows = compare(self.truth[:, 1:], imagined | self.baselines, self.lpips)
        _write_rows(self.folder / "validation.csv", rows)
        plot_horizon(self.folder / "mse.png", rows)
        for index in np.linspace(0, self.count - 1, min(SAMPLES, self.count)).astype(int):
            shown = np.concatenate([self.truth[index, :1], imagined[""][index]])
            both = np.concatenate([self.truth[index], shown], axis=2)
            write_gif(self.folder / "samples" / f"episode_{index:03d}.gif", both, self.card.control_hz, scale=4)
        last = rows[-1]
        say(
            f"world model: PSNR {rows[0]['psnr']:.1f} dB after 1 step, {last['psnr']:.1f} dB after {last['horizon']} "
            f"(frozen frame {last['psnr_frozen']:.1f}, other actions {last['psnr_shuffled']:.1f})"
        )
        return rows

    def _imagine(self, network: nn.Module) -> dict[str, np.ndarray]:
        """Replays uint8 (N, T, H, W, 3) under the true actions ("") and others."""
        # Half way around: with tasks and behaviours in random order, another episode altogether.
        shuffled = np.roll(self.recorded, max(1, self.count // 2), axis=0)
        still = np.concatenate([np.zeros_like(self.recorded[..., :6]), self.recorded[..., 6:]], -1)
        model = WorldModel(self.card, network, self.tokenizer, "")
        actions = {"": self.recorded, "_shuffled": shuffled, "_still": still}
        imagined = {name: self._replay(model, some) for name, some in actions.items()}
        if self.card.objective.action_dropout > 0:
            # Guidance 0 leaves the branch that was trained without actions.
            alone = replace(self.card, sampler=replace(self.card.sampler, guidance=0.0))
            blind = WorldModel(alone, network, self.tokenizer, "")
            imagined["_null"] = self._replay(blind, self.recorded)
        return imagined

    def _replay(self, model: WorldModel, actions: np.ndarray) -> np.ndarray:
        return imagine(model, self.truth[:, 0], actions, self.seed, range(self.count))


def compare(truth: np.ndarray, imagined: dict[str, np.ndarray], lpips: nn.Module | None = None) -> Rows:
    """Rows by horizon with `mse<name>`, `psnr<name>` (dB), `ssim<name>` and, given `lpips`, `lpips<name>`.

    Means over episodes of uint8 (N, T, H, W, 3).
    """
    metrics = {"mse": mse, "psnr": psnr, "ssim": ssim} | ({"lpips": lpips} if lpips else {})
    rows: Rows = [{"horizon": step + 1} for step in range(truth.shape[1])]
    for name, frames in imagined.items():
        for metric, measure in metrics.items():
            for row, value in zip(rows, measure(frames, truth).mean(0)):
                row[metric + name] = float(f"{value:.6g}")
    return rows


def summary(rows: Rows) -> dict[str, float]:
    """Every column's mean over the horizon."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "horizon"}


def mse(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Mean squared error, of intensities in [0, 1], per image of uint8 (…, H, W, 3)."""
    return ((one.astype(np.float32) - two.astype(np.float32)) ** 2).mean((-3, -2, -1)) / 255**2


def psnr(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, per image, of uint8 (…, H, W, 3)."""
    error = (one.astype(np.float32) - two.astype(np.float32)) ** 2
    return 10 * np.log10(255**2 / np.maximum(error.mean((-3, -2, -1)), 1e-3))


def ssim(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Structural similarity (Wang et al. 2004; flat 7x7 window, mean over channels) per image of uint8 (…, H, W, 3)."""
    shape = one.shape[:-3]
    a, b = (torch.from_numpy(x.reshape(-1, *x.shape[-3:]).astype(np.float32)).permute(0, 3, 1, 2) for x in (one, two))

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, WINDOW, stride=1)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return value.mean((1, 2, 3)).numpy().reshape(shape)


def _write_rows(path: Path, rows: list[dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
