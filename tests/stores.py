"""Small episode stores for tests of the data side: frames whose latents tell where they came from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from workflow_src.common import sections
from workflow_src.common.video import write_video
from workflow_src.episodes.store import EpisodeStore, write_episode, write_table


class Cells:
    """A tokenizer in one line: latents are the mean colour of 8x8 cells. `batches`: how many images each call got."""

    digest, scaled = "cells", False

    def __init__(self) -> None:
        self.batches: list[int] = []

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        return height // 8, width // 8, 3

    def encode(self, images: np.ndarray) -> np.ndarray:
        self.batches.append(len(images))
        n, h, w, c = images.shape
        return images.reshape(n, h // 8, 8, w // 8, 8, c).mean((2, 4)).astype(np.float32)


def frames_of(lengths: list[int], seed: int = 0, size: tuple[int, int] = (16, 16)) -> list[np.ndarray]:
    """Episodes of noise, uint8 (F, H, W, 3)."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (length, *size, 3), dtype=np.uint8) for length in lengths]


def make_store(root: Path, episodes: list[np.ndarray], *, seed: int = 0, embodiment: str = "tabletop", hz: float = 5.0,
               **arrays: list[np.ndarray]) -> EpisodeStore:  # fmt: skip
    """A store of these episodes with random actions; `arrays`: more of them, one for each episode."""
    rng, rows = np.random.default_rng(seed), []
    for index, frames in enumerate(episodes):
        actions = rng.uniform(-0.05, 0.05, (len(frames) - 1, 7)).astype(np.float32)
        actions[:, 6] = rng.integers(0, 2, len(frames) - 1)
        mine = {"actions": actions} | {name: values[index] for name, values in arrays.items()}
        rows.append({"index": index, "frames": len(frames), "control_hz": hz, "embodiment": embodiment,
                     "action_semantics": "commanded", **write_episode(root, index, frames, mine, hz)})  # fmt: skip
    write_table(root / "episodes.parquet", rows)
    return EpisodeStore(root)


def write_worldgym(folder: Path, lengths: list[int], seed: int, size: tuple[int, int] = (16, 16)) -> Path:
    """A folder as WorldGym publishes them: videos at 20 frames a second, actions in its units, also one for the last frame."""
    rng = np.random.default_rng(seed)
    for index, frames in enumerate(frames_of(lengths, seed, size)):
        number = 3 * index  # not counted through
        write_video(folder / f"{number:09d}.mp4", frames, 20)
        actions = np.zeros((len(frames), 10), np.float32)
        actions[:, :6] = rng.uniform(-1.3, 1.3, (len(frames), 6))
        actions[:, 6] = rng.choice([-1, 1], len(frames))
        np.savez(folder / f"{number:09d}.npz", actions)
    return folder


def write_tokenizer(folder: Path) -> Path:
    """An untrained tokenizer of 4 channels. Its framework is imported late: threads are set first."""
    import torch
    from safetensors.torch import save_file

    from workflow_src.world_model.tokenizer import FORMAT, ConvTokenizer, architecture

    config = sections.Tokenizer(channels=4, width=4)
    torch.manual_seed(0)
    folder.mkdir()
    model = ConvTokenizer(config)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"format": FORMAT, "tokenizer": architecture(config)}))
    return folder
