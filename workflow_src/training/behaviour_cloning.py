"""Trains one behaviour-cloning policy of the tabletop; its snapshots are a ladder of graded policies.

Every recorded frame, whatever behaviour led to it, carries the clean expert action of every task, so each frame trains
all instructions, and failed or random episodes teach recovery.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from workflow_src.common import compute, files, sections
from workflow_src.common.config import check_name, load_stage
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.provenance import record
from workflow_src.common.seeds import derive, rng
from workflow_src.policies.tabletop_bc.network import TRANSLATION, Shape, TabletopPolicy, embed_words
from workflow_src.training.engine import Engine
from workflow_src.training.randomness import integers, normal, uniform

MOVE_WEIGHT = 2.0
GRIPPER_WEIGHT = 0.3
STATE_WEIGHT = 1.0
EXAMPLES = """example:
  python -m workflow_src.training.behaviour_cloning --network bc_a \\
      --config results/config/behaviour_cloning/bc_a.json \\
      --episodes results/episodes/tabletop/train/episodes.parquet --out results/policies/bc_a/bc_a.json \\
      --state results/state/policies/bc_a
"""


class Frames:
    """All training frames in memory, with labels.

    images uint8 (M, H, W, 3); expert metric (M, K, 7) for the K `instructions`, whose `mirrors` say whether the task
    stays the same in a mirror; state and its mirror image (M, S); `seen` (S,) weighs the state's numbers.
    """

    def __init__(
        self,
        images: np.ndarray,
        expert: np.ndarray,
        state: np.ndarray,
        mirrored: np.ndarray,
        instructions: list[str],
        mirrors: list[bool],
        seen: np.ndarray,
        device: torch.device,
    ):
        self.images = torch.from_numpy(images).to(device)
        expert = torch.from_numpy(expert).to(device)
        self.translation = (expert[..., :3] / TRANSLATION).clamp(-1, 1)
        self.opening = expert[..., 6].clamp(0, 1)
        self.state = torch.from_numpy(state).to(device)
        self.mirrored = torch.from_numpy(mirrored).to(device)
        self.words = embed_words(instructions).to(device)  # (K, WORDS)
        self.mirrors = torch.tensor(mirrors, device=device)
        self.seen = torch.from_numpy(seen).to(device)


def augment(pixels: Tensor, draws: Tensor, blotches: Tensor) -> Tensor:
    """Small photometric changes: brightness, contrast, colour, blur and blotches as a tokenizer makes them.

    pixels (B, 3, H, W) in [-1, 1], draws uniform [0, 1) (B, 7), blotches standard normal (B, 3, h, w). Geometry is left
    alone: one pixel is eight millimetres.
    """
    height, width = pixels.shape[2:]
    draws = draws[:, :, None, None]
    # Every second image stays sharp.
    pixels = pixels.lerp(blur(pixels), (1.6 * draws[:, 0:1] - 0.8).clamp(min=0))
    contrast = 0.85 + 0.3 * draws[:, 1:2]
    brightness = 0.2 * (draws[:, 2:3] - 0.5) + 0.1 * (draws[:, 3:6] - 0.5)
    blotches = brightness + 0.08 * draws[:, 6:7] * blotches
    spread = functional.interpolate(blotches, size=(height, width), mode="bilinear", align_corners=False)
    return torch.addcmul(spread, pixels, contrast)


def blur(pixels: Tensor) -> Tensor:
    """Mean of 3 x 3 pixels, along a border of fewer. Sums of slices: several times faster than pooling on a CPU."""
    for axis in (2, 3):
        first, middle, last = (pixels.narrow(axis, start, pixels.shape[axis] - 2) for start in range(3))
        inner = (first + middle).add_(last).div_(3)
        pixels = torch.cat([pixels.narrow(axis, 0, 1), inner, pixels.narrow(axis, -1, 1)], dim=axis)
    return pixels


class Cloning:
    """The loss: imitation of all tasks at every frame, and regression of the simulation state."""

    def __init__(self, frames: Frames, seed: int, mirror: bool):
        self.frames, self.seed, self.mirror = frames, seed, mirror

    def __call__(self, model: TabletopPolicy, step: int, samples: np.ndarray) -> dict[str, Tensor]:
        frames, device = self.frames, self.frames.images.device
        chosen = torch.from_numpy(integers(self.seed, step, samples, len(frames.images), "frame")).to(device)
        draws = torch.from_numpy(uniform(self.seed, step, samples, 8, "augmentation")).float().to(device)
        blotches = torch.from_numpy(normal(self.seed, step, samples, (3, 12, 12), "blotches")).to(device)
        pixels = augment(model.prepare(frames.images[chosen]), draws[:, :7], blotches)
        translation = frames.translation[chosen]
        flipped = draws[:, 7] < (0.5 if self.mirror else 0.0)
        pixels = torch.where(flipped[:, None, None, None], pixels.flip(3), pixels)
        sign = 1.0 - 2.0 * flipped.float()
        translation = torch.cat([translation[..., :1] * sign[:, None, None], translation[..., 1:]], dim=2)
        actions, state = model.decide(pixels, frames.words.expand(len(chosen), -1, -1))
        valid = (~flipped[:, None] | frames.mirrors).float()
        # Squared error: where the expert changes its mind within what the eye can tell apart, the mean of both still
        # moves on, while the median of an absolute error may stand still for ever.
        move = (actions[..., :3] - translation).square().mean(2)
        grip = functional.binary_cross_entropy_with_logits(actions[..., 3], frames.opening[chosen], reduction="none")
        truth = torch.where(flipped[:, None], frames.mirrored[chosen], frames.state[chosen])
        read = (((state - truth) / model.state_scale).square() * frames.seen).mean()
        move, grip = (move * valid).mean(), (grip * valid).mean()
        return {
            "loss": MOVE_WEIGHT * move + GRIPPER_WEIGHT * grip + STATE_WEIGHT * read,
            "move": move,
            "gripper": grip,
            "state": read,
        }


def read_frames(episodes: Path, lab: sections.Lab, fraction: float, seed: int, device: torch.device) -> Frames:
    """Frames of the share of episodes that this network sees. Raises UserError when the store does not fit the lab."""
    from workflow_src.episodes.store import EpisodeStore
    from workflow_src.tabletop.scene import mirror_state, state_layout
    from workflow_src.tabletop.tasks import MIRRORED, TASKS

    arrays = EpisodeStore(episodes.parent).load_all()
    count = len(arrays.images)
    if not 0 < fraction <= 1:
        raise UserError(f"behaviour_cloning: data_fraction {fraction} is not in (0, 1]")
    if arrays.expert is None or arrays.expert.shape[2] != len(lab.tasks):
        raise UserError(f"{episodes}: has no expert labels for the {len(lab.tasks)} tasks of lab.tasks; record it anew")
    kept = np.sort(rng(seed, "episodes").permutation(count)[: math.ceil(fraction * count)])

    def flat(values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values[kept].reshape(-1, *values.shape[2:]))

    instructions = [TASKS[task].instruction for task in lab.tasks]
    state = flat(arrays.state)
    mirrored = mirror_state(state, lab.scene)
    mirrors = [task not in MIRRORED for task in lab.tasks]
    seen = np.ones(state.shape[1], np.float32)
    for name, part in state_layout(lab.scene).items():
        if name.endswith("_quaternion"):
            seen[part] = 0.0  # a cube looks the same after a quarter turn: what cannot be seen only adds noise
    return Frames(flat(arrays.images), flat(arrays.expert), state, mirrored, instructions, mirrors, seen, device)


def build(frames: Frames, config: sections.BehaviourCloning, seed: int) -> TabletopPolicy:
    """A freshly initialised network whose state head speaks in standard deviations of the data."""
    torch.manual_seed(seed)
    shape = Shape(frames.images.shape[1], frames.state.shape[1], config.width, config.keypoints)
    model = TabletopPolicy(shape)
    model.state_mean.copy_(frames.state.mean(0))
    # Numbers that hardly change (the plate's height) must not be blown up to full weight.
    model.state_scale.copy_(frames.state.std(0).clamp(min=0.01))
    return model


def train(arguments: argparse.Namespace) -> None:
    """Trains network `arguments.network` and writes its description last."""
    stage = load_stage(arguments.config)
    check_name("behaviour_cloning", arguments.network, stage.behaviour_cloning)
    config = stage.behaviour_cloning[arguments.network]
    seed = derive(stage.seed, "behaviour_cloning", arguments.network)
    device = compute.configure_torch()
    frames = read_frames(arguments.episodes, stage.lab, config.data_fraction, seed, device)
    model = build(frames, config, seed)
    folder = arguments.out.parent

    def keep(step: int, ema: torch.nn.Module) -> None:
        with files.atomic_path(_snapshot(folder, step)) as temporary:
            save_file({name: value.contiguous().cpu() for name, value in ema.state_dict().items()}, temporary)

    key = files.digest({"stage": stage.digest, "episodes": files.sha256_file(arguments.episodes)})
    hooks = dict.fromkeys(config.snapshots, keep)
    label = f"policy {arguments.network}"
    loss = Cloning(frames, seed, config.mirror)
    engine = Engine(
        model, loss, config.training, seed=seed, state=arguments.state, digest=key, label=label, hooks=hooks
    )
    engine.run()
    if engine.processes.first:
        engine.write_metrics(folder / "metrics.csv")
        describe(arguments, config, asdict(model.shape), key)


def describe(arguments: argparse.Namespace, config: sections.BehaviourCloning, shape: dict, key: str) -> None:
    """Writes `<network>.json`: how to rebuild the network, and its snapshots with checksums."""
    snapshots = {}
    for step in sorted(config.snapshots):
        path = _snapshot(arguments.out.parent, step)
        if not path.is_file():
            raise UserError(f"{path}: snapshot is missing; delete {arguments.state} to train this network anew")
        snapshots[str(step)] = {"file": path.name, "sha256": files.sha256_file(path)}
    content = {"network": arguments.network, "shape": shape, "snapshots": snapshots, "digest": key}
    files.write_json(arguments.out, {**content, "provenance": record()})


def _snapshot(folder: Path, step: int) -> Path:
    return folder / f"step_{step}.safetensors"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.training.behaviour_cloning",
        description=__doc__.split("\n", 1)[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="stage file with seed, lab, behaviour_cloning")
    parser.add_argument("--network", required=True, help="name of the network in the configuration")
    parser.add_argument("--episodes", type=Path, required=True, help="episodes.parquet of the training split")
    parser.add_argument("--out", type=Path, required=True, help="<network>.json, written last, beside the snapshots")
    parser.add_argument("--state", type=Path, required=True, help="folder for checkpoints of this training")
    train(parser.parse_args())


if __name__ == "__main__":
    run_cli(main)
