"""Latent cache: encode every frame of a split once, as it is and mirrored.

Writes beside `--out` (`latents.json`, last): `latents.npy` and `latents_mirrored.npy`, float16 (N, F, h, w, C), raw
latents in the order of the episode table. Resumes by blocks of episodes; another tokenizer or other episodes start
it anew.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workflow_src.common.compute import configure_torch
from workflow_src.common.config import load_stage
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import Journal, create_array, digest, sha256_file, write_json
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import Progress
from workflow_src.episodes.store import EpisodeStore

EXAMPLES = """example:
  python -m workflow_src.episodes.latents --config results/config/latents.json \\
      --episodes results/episodes/tabletop/train/episodes.parquet --tokenizer results/tokenizer \\
      --out results/latents/train/latents.json
"""
BLOCK = 32  # episodes per journal entry
FILES = {"latents": "latents.npy", "mirrored": "latents_mirrored.npy"}


@dataclass(frozen=True)
class Latents:
    """A latent cache: memory-mapped float16 `plain` and `mirrored` (N, F, h, w, C), `mean` and `std` float32 (C,)."""

    plain: np.ndarray
    mirrored: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    tokenizer: str  # digest of the tokenizer's weights
    episodes: str  # sha256 of the episode table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="stage file (seed)")
    parser.add_argument("--episodes", type=Path, required=True, help="episodes.parquet of the split")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder")
    parser.add_argument("--out", type=Path, required=True, help="latents.json to write")
    arguments = parser.parse_args()
    load_stage(arguments.config)
    die_with_parent()
    device = configure_torch()
    from workflow_src.world_model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer, device)
    images = EpisodeStore(arguments.episodes.parent).load_all().images
    encode(images, tokenizer, arguments.out, source=sha256_file(arguments.episodes))


def encode(images: np.ndarray, tokenizer, out: Path, source: str) -> None:
    """Encode `images` uint8 (N, F, H, W, 3) into the cache of `out`; `source` identifies them."""
    shape = (*images.shape[:2], *tokenizer.shape(*images.shape[2:4]))
    key = digest([tokenizer.digest, source, shape])
    journal = Journal(out.with_name("journal.jsonl"), key)
    out.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: _open(out.with_name(file), shape, fresh=not journal.done) for name, file in FILES.items()}
    if any(array is None for array in arrays.values()):  # a file went missing or was cut short: nothing can be trusted
        journal.path.unlink()
        return encode(images, tokenizer, out, source)
    with Progress(len(images), f"latents {out.parent.name}", "episode") as progress:
        progress.skip(min(len(images), BLOCK * len(journal.done)))
        for start in range(0, len(images), BLOCK):
            if str(start) not in journal:
                _encode_block(images[start : start + BLOCK], tokenizer, arrays, start)
                journal.record(str(start))
                progress.update(len(images[start : start + BLOCK]))
    mean, std = _statistics(arrays["latents"])
    write_json(out, {"shape": list(shape), "tokenizer": tokenizer.digest, "episodes": source,
                     "mean": mean.tolist(), "std": std.tolist(),
                     "sha256": {name: sha256_file(out.with_name(file)) for name, file in FILES.items()}})  # fmt: skip


def _open(path: Path, shape: tuple[int, ...], fresh: bool) -> np.ndarray | None:
    if fresh:
        return create_array(path, shape, np.float16)
    try:
        array = np.lib.format.open_memmap(path, "r+")
        return array if array.shape == shape and array.dtype == np.float16 else None
    except (OSError, ValueError):
        return None


def _encode_block(images: np.ndarray, tokenizer, arrays: dict[str, np.ndarray], start: int) -> None:
    flat = images.reshape(-1, *images.shape[2:])
    for name, pixels in (("latents", flat), ("mirrored", flat[:, :, ::-1])):
        latents = tokenizer.encode(pixels)
        if not np.isfinite(latents).all() or np.abs(latents).max() > np.finfo(np.float16).max:
            raise UserError(
                f"tokenizer: latents of episodes {start}… are not finite in float16; train the tokenizer again"
            )
        arrays[name][start : start + len(images)] = latents.reshape(*images.shape[:2], *latents.shape[1:])
        arrays[name].flush()  # on disk before the journal says so


def _statistics(latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel, over everything, in bounded memory."""
    total, squares, count = 0.0, 0.0, 0
    for block in range(0, len(latents), BLOCK):
        part = latents[block : block + BLOCK].astype(np.float64).reshape(-1, latents.shape[-1])
        total, squares, count = total + part.sum(0), squares + (part**2).sum(0), count + len(part)
    mean = total / count
    # A channel that never varies carries nothing; dividing by a tiny deviation would blow up its rounding.
    return mean, np.maximum(np.sqrt(np.maximum(squares / count - mean**2, 0)), 1e-3)


def load_latents(path: str | Path) -> Latents:
    """Open the cache that `path` (`latents.json`) describes. Raises UserError naming what is missing or damaged."""
    path = Path(path)
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        arrays = {}
        for name, file in FILES.items():
            arrays[name] = np.load(path.with_name(file), mmap_mode="r")
            if list(arrays[name].shape) != card["shape"] or sha256_file(path.with_name(file)) != card["sha256"][name]:
                raise UserError(f"{path.with_name(file)}: does not match {path}; delete {path} and run again")
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename}: no such file; run `episodes.latents`, or delete {path} and run again"
        ) from None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged latent cache ({error}); delete it and run again") from error
    statistics = (np.asarray(card[name], np.float32) for name in ("mean", "std"))
    return Latents(arrays["latents"], arrays["mirrored"], *statistics, card["tokenizer"], card["episodes"])


if __name__ == "__main__":
    run_cli(main)
