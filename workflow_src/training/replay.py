"""Validation of a world model: replay the actions of held-out episodes from their first frames and compare.

Every figure is given per horizon, beside the baseline that never moves (the first frame, frozen), the tokenizer's own
reconstruction (the ceiling), and two replays that a model which follows actions must lose against the true one: another
episode's actions, and standing still.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from workflow_src.common.files import write_text
from workflow_src.common.progress import say
from workflow_src.common.video import write_gif
from workflow_src.episodes.store import Arrays
from workflow_src.world_model.artefact import Card, WorldModel
from workflow_src.world_model.environment import imagine
from workflow_src.world_model.tokenizer import load_tokenizer

EPISODES = 64  # held-out episodes replayed at most
SAMPLES = 6  # of them shown as GIFs
WINDOW = 7  # side of SSIM's averaging window, pixels


def validate(
    folder: Path, network: nn.Module, card: Card, tokenizer: Path, episodes: Arrays, latents: np.ndarray, seed: int
) -> list[dict[str, float]]:
    """Replay up to 64 held-out episodes; write `validation.csv` and `samples/*.gif` into `folder`; return the rows.

    `latents (N, F, h, w, C)`: of the episodes' frames.
    """
    device = next(network.parameters()).device
    model = WorldModel(card, network.eval(), load_tokenizer(tokenizer, device), "")
    count = min(EPISODES, len(episodes.images))
    truth = episodes.images[:count]
    recorded = (episodes.reached if card.actions == "reached" else episodes.actions)[:count]
    # Half way around: with tasks and behaviours in random order, another episode altogether.
    shuffled = np.roll(recorded, max(1, count // 2), axis=0)
    still = np.concatenate([np.zeros_like(recorded[..., :6]), recorded[..., 6:]], -1)
    imagined = {name: imagine(model, truth[:, 0], actions, seed, range(count))
                for name, actions in (("", recorded), ("_shuffled", shuffled), ("_still", still))}  # fmt: skip
    imagined["_frozen"] = truth[:, :1].repeat(truth.shape[1] - 1, axis=1)
    flat = np.asarray(latents[:count, 1:], np.float32)
    imagined["_tokenizer"] = model.tokenizer.decode(flat.reshape(-1, *flat.shape[2:])).reshape(truth[:, 1:].shape)
    rows = compare(truth[:, 1:], imagined)
    _write_rows(folder / "validation.csv", rows)
    for index in np.linspace(0, count - 1, min(SAMPLES, count)).astype(int):
        both = np.concatenate([truth[index], np.concatenate([truth[index, :1], imagined[""][index]])], axis=2)
        write_gif(folder / "samples" / f"episode_{index:03d}.gif", both, card.control_hz, scale=4)
    last = rows[-1]
    say(
        f"world model: PSNR {rows[0]['psnr']:.1f} dB after 1 step, {last['psnr']:.1f} dB after {last['horizon']} "
        f"(frozen frame {last['psnr_frozen']:.1f}, other actions {last['psnr_shuffled']:.1f})"
    )
    return rows


def compare(truth: np.ndarray, imagined: dict[str, np.ndarray]) -> list[dict[str, float]]:
    """Rows by horizon with `psnr<name>` (dB) and `ssim<name>`, means over episodes of uint8 (N, T, H, W, 3)."""
    rows: list[dict[str, float]] = [{"horizon": step + 1} for step in range(truth.shape[1])]
    for name, frames in imagined.items():
        scores = {f"psnr{name}": psnr(frames, truth), f"ssim{name}": ssim(frames, truth)}
        for label, values in scores.items():
            for row, value in zip(rows, values.mean(0)):
                row[label] = round(float(value), 4)
    return rows


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
