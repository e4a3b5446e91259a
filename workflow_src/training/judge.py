"""Train the judge: success classifier and state read-out, on episodes that nothing else trains on.

Every frame of every episode is labelled for every task from the stored states, with frame 0 as the reference (what the
episode was recorded for does not matter). Half of the frames are seen through the tokenizer with noise on the latents,
and all with small changes of brightness and sharpness, because the judge will look at generated video.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from workflow_src.common import provenance
from workflow_src.common.compute import configure_torch
from workflow_src.common.config import Stage, load_stage
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import atomic_path, digest, sha256_file, write_json
from workflow_src.common.process import die_with_parent
from workflow_src.common.seeds import derive, rng
from workflow_src.episodes.store import EpisodeStore
from workflow_src.judges.classifier import calibrated, fit_calibration
from workflow_src.judges.network import FORMAT, JudgeNetworks, in_batches
from workflow_src.tabletop import tasks
from workflow_src.tabletop.scene import mirror_state, state_layout
from workflow_src.training import randomness
from workflow_src.training.engine import Engine
from workflow_src.world_model.tokenizer import load_tokenizer

HELD_OUT = 0.15  # share of the episodes for calibration and the reported accuracy
LARGEST_WEIGHT = 5.0  # of a success; rarer ones would make the classifier shy of nothing
BRIGHTNESS = 0.12  # largest relative change
STATE_WEIGHT = 0.3  # of the classifier's auxiliary state loss


@dataclass(frozen=True)
class Pairs:
    """Episodes with labels. Axis 0 of `images`: raw, through the tokenizer; of the others: as they are, mirrored."""

    images: np.ndarray  # uint8 (2, E, F, H, W, 3)
    states: np.ndarray  # float32 (2, E, F, S)
    labels: np.ndarray  # bool (2, E, F, M)

    def subset(self, episodes: np.ndarray) -> Pairs:
        """Some of the episodes."""
        return Pairs(self.images[:, episodes], self.states[:, episodes], self.labels[:, episodes])


# ---- data -----------------------------------------------------------------------------------------------------------


def label(states: np.ndarray, names: tuple[str, ...], scene: str) -> np.ndarray:
    """Success of each task, bool (E, F, M), at every state (E, F, S) of episodes that began with their frame 0."""
    start = np.broadcast_to(states[:, :1], states.shape)
    return np.stack([tasks.get(name, scene).success(states, start, scene) for name in names], -1)


def reconstruct(images: np.ndarray, folder: Path, noise: float, seed: int) -> np.ndarray:
    """uint8 (E, F, H, W, 3) through the tokenizer, with latent noise of `noise` standard deviations per channel."""
    tokenizer = load_tokenizer(folder)
    flat = images.reshape(-1, *images.shape[2:])
    latents = tokenizer.encode(flat)
    deviation = latents.std(axis=(0, 1, 2))
    draws = rng(seed, "latent noise").standard_normal(latents.shape, dtype=np.float32)
    return tokenizer.decode(latents + noise * deviation * draws).reshape(images.shape)


def prepare(stage: Stage, episodes: Path, tokenizer: Path) -> Pairs:
    """Load and label the judge's episodes."""
    arrays = EpisodeStore(episodes.parent).load_all()
    if len(arrays.images) < 4:
        raise UserError(f"{episodes}: {len(arrays.images)} episodes are too few for a judge; record at least 4")
    seen = reconstruct(arrays.images, tokenizer, stage.judges.latent_noise, stage.seed)
    states = np.stack([arrays.state, mirror_state(arrays.state, stage.lab.scene)]).astype(np.float32)
    labels = np.stack([label(one, stage.lab.tasks, stage.lab.scene) for one in states])
    return Pairs(np.stack([arrays.images, seen]), states, labels)


# ---- loss -----------------------------------------------------------------------------------------------------------


class JudgeLoss:
    """Loss of one micro-batch: which pairs, and how they are changed, follows from (seed, step, sample) alone."""

    def __init__(self, pairs: Pairs, networks: JudgeNetworks, seed: int) -> None:
        self.pairs, self.seed = pairs, seed
        positive = pairs.labels[:, :, 1:].mean((0, 1, 2))
        self.weight = torch.tensor(np.clip((1 - positive) / np.maximum(positive, 1e-6), 1, LARGEST_WEIGHT)).float()
        self.mean, self.deviation = networks.reader.mean.clone(), networks.reader.deviation.clone()

    def __call__(self, networks: JudgeNetworks, step: int, samples: np.ndarray) -> dict[str, Tensor]:
        first, frame, states, labels = self._batch(step, samples, networks.reader.mean.device)
        logits, guess = networks.classifier(first, frame)
        read = networks.reader(first, frame)
        weight = self.weight.to(logits.device)  # successes are rarer than failures
        success = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), pos_weight=weight)
        auxiliary = F.smooth_l1_loss(guess.float(), states)
        state = F.smooth_l1_loss(read.float(), states, beta=0.1)
        return {"loss": success + STATE_WEIGHT * auxiliary + state, "success": success, "state": state}

    def _batch(self, step: int, samples: np.ndarray, device: torch.device) -> tuple[Tensor, ...]:
        _, episodes, frames = self.pairs.images.shape[:3]
        u = randomness.uniform(self.seed, step, samples, 8, "judge")
        episode, t = (u[:, 0] * episodes).astype(int), (u[:, 1] * frames).astype(int)
        mirrored = (u[:, 2] < 0.5).astype(int)
        through = (u[:, 3] < 0.5).astype(int)
        # A rollout in the world model begins with a real frame, whatever its later frames look like.
        first_through = through * (u[:, 4] < 0.5)
        first = self.pairs.images[first_through, episode, 0]
        frame = self.pairs.images[through, episode, t]
        states = torch.from_numpy(self.pairs.states[mirrored, episode, t]).to(device)
        safe = torch.where(self.deviation > 0, self.deviation, torch.ones_like(self.deviation)).to(device)
        standard = (states - self.mean.to(device)) / safe * (self.deviation > 0).to(device)
        labels = torch.from_numpy(self.pairs.labels[mirrored, episode, t]).to(device)
        return (*_augment(first, frame, mirrored, u[:, 5:], device), standard, labels)


def _augment(
    first: np.ndarray, frame: np.ndarray, mirrored: np.ndarray, u: np.ndarray, device: torch.device
) -> list[Tensor]:
    """Mirror, brighten or darken both images alike, blur every other later one; float (B, H, W, 3) in 0..255."""
    gain = torch.from_numpy((1 + BRIGHTNESS * (2 * u[:, 0] - 1)).astype(np.float32)).to(device)[:, None, None, None]
    flip = mirrored.astype(bool)
    images = []
    for image in (first, frame):
        image = image.copy()
        image[flip] = image[flip, :, ::-1]
        images.append(torch.from_numpy(image).to(device).float().mul_(gain).clamp_(0, 255))
    blurred = u[:, 1] > 0.5
    amount = torch.from_numpy((2 * u[blurred, 1] - 1).astype(np.float32)).to(device)[:, None, None, None]
    rows = torch.from_numpy(np.flatnonzero(blurred)).to(device)
    sharp = images[1][rows]
    soft = F.avg_pool2d(sharp.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False).permute(0, 2, 3, 1)
    images[1][rows] = torch.lerp(sharp, soft, amount)
    return images


# ---- evaluation -----------------------------------------------------------------------------------------------------


def evaluate(networks: JudgeNetworks, held: Pairs, stage: Stage) -> dict[str, Any]:
    """Calibration line and accuracies, on held-out episodes, raw frames and frames through the tokenizer."""
    device, batch = networks.reader.mean.device, stage.judges.batch
    shape = held.images.shape
    frames = held.images.reshape(-1, *shape[3:])
    firsts = np.broadcast_to(held.images[:, :, :1], shape).reshape(frames.shape)
    logits = in_batches(networks.classifier.logits, firsts, frames, batch, device).reshape(*shape[:3], -1)
    states = in_batches(networks.reader.read, firsts, frames, batch, device).reshape(*shape[:3], -1)
    truth = held.labels[:1].repeat(2, 0)
    line = fit_calibration(logits[:, :, 1:], truth[:, :, 1:])
    sure = calibrated(logits, line)
    read = np.stack([label(one, stage.lab.tasks, stage.lab.scene) for one in states])
    return {
        "calibration": line,
        "accuracy": {
            "classifier": _accuracy(sure[:, :, 1:] > 0, truth[:, :, 1:], stage.lab.tasks),
            "classifier_at_end": _accuracy(sure[:, :, -1] > 0, truth[:, :, -1], stage.lab.tasks),
            "state": _accuracy(read[:, :, 1:], truth[:, :, 1:], stage.lab.tasks),
            "state_at_end": _accuracy(read[:, :, -1], truth[:, :, -1], stage.lab.tasks),
        },
    }


def _accuracy(said: np.ndarray, truth: np.ndarray, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Share of right answers per task, for raw images and images through the tokenizer (axis 0)."""
    right = (said == truth).reshape(2, -1, len(names)).mean(1)
    return {kind: dict(zip(names, map(float, row))) for kind, row in zip(("raw", "reconstructed"), right)}


# ---- the run --------------------------------------------------------------------------------------------------------


def train(stage: Stage, pairs: Pairs, state: Path, key: str, out: Path) -> None:
    """Train on most episodes, calibrate on the others, write the artefact."""
    order = rng(stage.seed, "judge split").permutation(pairs.images.shape[1])
    count = max(1, round(HELD_OUT * len(order)))
    held, rest = pairs.subset(order[:count]), pairs.subset(order[count:])
    torch.manual_seed(derive(stage.seed, "judge weights"))
    networks = JudgeNetworks(stage.judges.width, len(stage.lab.tasks), pairs.states.shape[-1])
    _standardise(networks, rest, stage.lab.scene)
    seed = derive(stage.seed, "judge")
    loss = JudgeLoss(rest, networks, seed)
    engine = Engine(networks, loss, stage.judges.training, seed=seed, state=state, digest=key, label="judge")
    trained = engine.run()
    if engine.processes.first:
        _write(trained.eval(), held, stage, key, out)
        engine.write_metrics(out.with_name("metrics.csv"))


def _standardise(networks: JudgeNetworks, pairs: Pairs, scene: str) -> None:
    """Mean and deviation of the state numbers; rotations, which no predicate asks for, are left out."""
    values = pairs.states.reshape(-1, pairs.states.shape[-1])
    deviation = values.std(0)
    for name, part in state_layout(scene).items():
        if name.endswith("_quaternion"):
            deviation[part] = 0
    # What hardly ever moves (a plate's height) is not worth learning either.
    deviation[deviation < 1e-4] = 0
    networks.reader.mean.copy_(torch.from_numpy(values.mean(0)))
    networks.reader.deviation.copy_(torch.from_numpy(deviation))


def _write(networks: JudgeNetworks, held: Pairs, stage: Stage, key: str, out: Path) -> None:
    found = evaluate(networks, held, stage)
    weights = {name: value.detach().cpu().float().contiguous() for name, value in networks.state_dict().items()}
    with atomic_path(out) as temporary:
        save_file(weights, temporary)
        checksum = sha256_file(temporary)
        # The configuration comes first: weights that are there are always described.
        write_json(
            out.with_name("config.json"),
            {
                "format": FORMAT, "sha256": checksum, "digest": key, "scene": stage.lab.scene,
                "tasks": list(stage.lab.tasks), "width": stage.judges.width, "state_size": held.states.shape[-1],
                "held_out_episodes": held.images.shape[1], **found, "training": asdict(stage.judges.training),
                "provenance": provenance.record(seed=stage.seed),
            },
        )  # fmt: skip


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.training.judge",
        description=__doc__.split("\n", 1)[0],
        epilog="examples:\n  python -m workflow_src.training.judge --config results/config/judges.json \\\n"
        "      --episodes results/episodes/tabletop/judge/episodes.parquet --tokenizer results/tokenizer \\\n"
        "      --out results/judge/model.safetensors --state results/state/judge",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="stage file with seed, lab, judges")
    parser.add_argument("--episodes", type=Path, required=True, help="episodes.parquet of the judge split")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the trained tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="model.safetensors to write, beside config.json")
    parser.add_argument("--state", type=Path, required=True, help="folder for checkpoints")
    options = parser.parse_args()
    die_with_parent()
    configure_torch()
    stage = load_stage(options.config)
    key = digest([stage.digest, sha256_file(options.episodes), sha256_file(options.tokenizer / "model.safetensors")])
    train(stage, prepare(stage, options.episodes, options.tokenizer), options.state, key, options.out)


if __name__ == "__main__":
    run_cli(main)
