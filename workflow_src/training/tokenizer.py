"""Train the tokenizer on recorded frames and their mirror images.

Writes `config.json`, `metrics.csv`, `reconstructions.png` and, last, `model.safetensors` beside `--out`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from workflow_src.common import sections
from workflow_src.common.config import load_stage, to_dict
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import atomic_path, digest, write_json
from workflow_src.common.progress import say
from workflow_src.common.provenance import record
from workflow_src.common.seeds import derive
from workflow_src.episodes.store import EpisodeStore
from workflow_src.training import randomness
from workflow_src.training.distributed import join, leave
from workflow_src.training.engine import Engine
from workflow_src.training.replay import psnr
from workflow_src.world_model.tokenizer import FORMAT, ConvTokenizer, architecture, to_signal

EXAMPLES = """examples:
  python -m workflow_src.training.tokenizer --config results/config/tokenizer.json \\
      --episodes results/episodes/tabletop/train/episodes.parquet \\
      --validation results/episodes/tabletop/validation/episodes.parquet \\
      --out results/tokenizer/model.safetensors --state results/state/tokenizer
  torchrun --standalone --nproc-per-node=2 -m workflow_src.training.tokenizer …
"""
MOVED = 16 / 255  # a pixel that differs this much from the median frame shows something that moves
MOVED_WEIGHT = 2.0  # how much more such a pixel counts: objects are small, and they are what matters
ABSOLUTE = 0.1  # share of the absolute error in the loss: keeps edges sharp where the squared error is content
LATENT_NOISE = 0.05  # added to latents in training, so that neighbouring latents decode alike
MOST = 20_000  # frames of recorded episodes, spread over all of them
LATENT_SIZE = 1e-3  # penalty on squared latents, without which they would outgrow that noise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="stage file (seed, tokenizer)")
    parser.add_argument("--episodes", type=Path, required=True, help="episodes.parquet of the training split")
    parser.add_argument("--validation", type=Path, required=True, help="episodes.parquet of the validation split")
    parser.add_argument("--out", type=Path, required=True, help="weights to write (model.safetensors)")
    parser.add_argument("--state", type=Path, required=True, help="folder of checkpoints")
    arguments = parser.parse_args()
    stage = load_stage(arguments.config)
    processes = join()
    images = load_frames(arguments.episodes)
    recipe = digest([stage.digest, EpisodeStore(arguments.episodes).identity])
    engine = train(images, stage.tokenizer, seed=derive(stage.seed, "tokenizer"), state=arguments.state, recipe=recipe)
    if processes.first:
        write_artefact(arguments.out, engine, load_frames(arguments.validation))
    processes.barrier()
    leave()


def load_frames(table: Path) -> np.ndarray:
    """Frames of a split, uint8 (N, H, W, 3): all of equally long episodes, as a lab records them, or else `MOST` of all."""
    store = EpisodeStore(table)
    if len(set(store.lengths.tolist())) == 1:
        images = store.load_all().images
        return images.reshape(-1, *images.shape[2:])
    store.image_size()  # complains where it is not one
    positions = np.linspace(0, store.lengths.sum() - 1, min(store.lengths.sum(), MOST)).round().astype(int)
    ends = store.lengths.cumsum()
    episodes = np.searchsorted(ends, positions, side="right")
    frames = [
        store.read(i, (positions - ends[i] + store.lengths[i])[episodes == i].tolist()) for i in np.unique(episodes)
    ]
    return np.concatenate(frames)


def train(images: np.ndarray, config: sections.Tokenizer, *, seed: int, state: Path, recipe: str) -> Engine:
    """Train on frames uint8 (N, H, W, 3); the engine holds the EMA model."""
    if not len(images):
        raise UserError("tokenizer: the training split holds no frame; raise episodes.splits.train.episodes")
    if images.shape[1] % config.downsample or images.shape[2] % config.downsample:
        raise UserError(
            f"tokenizer.downsample: {config.downsample} does not divide the {images.shape[1]}x{images.shape[2]} images "
            "(lab.image_size)"
        )
    torch.manual_seed(derive(seed, "weights"))
    loss = Reconstruction(images, seed)
    engine = Engine(ConvTokenizer(config), loss, config.training, seed=seed, state=state, digest=recipe,
                    label="tokenizer", describe=loss.describe)  # fmt: skip
    engine.run()
    return engine


class Reconstruction:
    """Squared and a little absolute error, weighted towards pixels that differ from the median frame."""

    def __init__(self, images: np.ndarray, seed: int) -> None:
        self.images, self.seed, self.device = images, seed, join().device
        median = np.median(images[:: max(1, len(images) // 500)], axis=0).astype(np.uint8)
        self.median = to_signal(torch.from_numpy(median)[None].to(self.device))

    def choose(self, step: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Frame numbers (B,) and whether each is mirrored (B,)."""
        draws = randomness.uniform(self.seed, step, samples, 2, "frame")
        return np.minimum((draws[:, 0] * len(self.images)).astype(np.int64), len(self.images) - 1), draws[:, 1] < 0.5

    def describe(self, step: int, samples: np.ndarray) -> dict[str, list]:
        frames, mirrored = self.choose(step, samples)
        return {"frame": frames.tolist(), "mirrored": mirrored.tolist()}

    def __call__(self, model: nn.Module, step: int, samples: np.ndarray) -> dict[str, Tensor]:
        frames, mirrored = self.choose(step, samples)
        batch = self.images[frames]
        batch = np.where(mirrored[:, None, None, None], batch[:, :, ::-1], batch)
        target = to_signal(torch.from_numpy(batch).to(self.device))
        latents = model.encoder(target).float()
        noise = randomness.normal(self.seed, step, samples, tuple(latents.shape[1:]), "latent")
        decoded = model.decoder(latents + LATENT_NOISE * torch.from_numpy(noise).to(self.device)).float()
        moved = (target - self.median).abs().amax(1, keepdim=True) > 2 * MOVED
        weight = 1 + (MOVED_WEIGHT - 1) * moved.float()
        error = (decoded - target).abs()
        # Normalised per batch by a constant, not by the batch's own weights: micro-batches must add up.
        loss = (weight * (error.square() + ABSOLUTE * error)).mean() + LATENT_SIZE * latents.square().mean()
        return {"loss": loss, "squared_error": error.detach().square().mean() / 4}


def write_artefact(out: Path, engine: Engine, images: np.ndarray) -> None:
    """Validate on frames uint8 (N, H, W, 3) and write everything; the weights come last."""
    tokenizer: ConvTokenizer = engine.ema
    decoded = tokenizer.decode(tokenizer.encode(images))
    mirrored = images[:, :, ::-1]
    both = {
        "psnr": psnr(decoded, images),
        "psnr_mirrored": psnr(tokenizer.decode(tokenizer.encode(mirrored)), mirrored),
    }
    validation = {name: round(float(values.mean()), 3) for name, values in both.items()}
    say(f"tokenizer: reconstruction PSNR {validation['psnr']:.1f} dB on {len(images)} validation frames")
    config = tokenizer.config
    out.parent.mkdir(parents=True, exist_ok=True)
    engine.write_metrics(out.with_name("metrics.csv"))
    _picture(out.with_name("reconstructions.png"), images, decoded)
    write_json(
        out.with_name("config.json"),
        {"format": FORMAT, "tokenizer": architecture(config), "image_size": list(images.shape[1:3]),
         "training": to_dict(config.training), "validation": validation, "provenance": record()},
    )  # fmt: skip
    with atomic_path(out) as temporary:
        save_file({name: value.contiguous().cpu() for name, value in engine.ema.state_dict().items()}, temporary)


def _picture(path: Path, images: np.ndarray, decoded: np.ndarray) -> None:
    """Originals above their reconstructions."""
    from PIL import Image

    chosen = np.linspace(0, len(images) - 1, min(12, len(images))).astype(int)
    rows = [np.concatenate(list(source[chosen]), axis=1) for source in (images, decoded)]
    with atomic_path(path) as temporary:
        Image.fromarray(np.concatenate(rows).repeat(3, 0).repeat(3, 1)).save(temporary)


if __name__ == "__main__":
    run_cli(main)
