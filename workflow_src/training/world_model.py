"""Train the world model on latents of one or several data sets, validate it on held-out action replays, write the artefact.

Writes beside `--out` (`model.safetensors`, last): `config.json`, `tokenizer/`, `metrics.csv`, `loss.png`, `events/` for
TensorBoard, `validation.csv` and `mse.png` (MSE, PSNR, SSIM and LPIPS by horizon, for the model, for the frozen first frame
and for other actions) and `samples/*.gif` (truth | imagined).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from workflow_src.common.config import Stage, load_stage
from workflow_src.common.errors import UserError
from workflow_src.common.files import digest
from workflow_src.common.provenance import record
from workflow_src.common.sections import WorldModel
from workflow_src.common.seeds import derive
from workflow_src.episodes.clips import Choice
from workflow_src.episodes.mixture import read_mixture
from workflow_src.episodes.sources import find_split
from workflow_src.training import randomness, replay
from workflow_src.training.clip_source import ClipSource
from workflow_src.training.datasets import open_held_out, open_training
from workflow_src.training.distributed import join, leave, run_training
from workflow_src.training.engine import Engine
from workflow_src.training.held_out import choose_episodes, read_held_out
from workflow_src.training.own_frames import OwnFrames
from workflow_src.training.plots import plot_loss
from workflow_src.world_model.artefact import Card, build_network, save_artefact
from workflow_src.world_model.diffusion import Objective

EXAMPLES = """examples (one line each):
  torchrun --standalone --nproc-per-node=1 -m workflow_src.training.world_model
      --config results/config/world_model.json --latents results/latents/tabletop/train/latents.json
      --episodes results/episodes/tabletop/train/episodes.parquet
      --validation results/latents/tabletop/validation/latents.json
      --validation-episodes results/episodes/tabletop/validation/episodes.parquet
      --tokenizer results/tokenizer --out results/world_model/model.safetensors --state results/state/world_model
  a mixture, encoded on the fly: --latents --episodes rt_1/train/episodes.parquet bridge_v2/train/episodes.parquet
      --validation --validation-episodes rt_1/validation/episodes.parquet …
  the same by names, with the stage file and the tokenizer of results/: torchrun --standalone --nproc-per-node=8
      -m workflow_src.training.world_model --dataset-dir results/episodes --subset-names rt_1,bridge_v2
"""


def main() -> None:
    arguments = _arguments()
    stage = load_stage(arguments.config)
    processes = join()
    if arguments.dataset_dir:
        found = find_subsets(arguments.dataset_dir, arguments.subset_names)
        arguments.episodes, arguments.validation_episodes = found
        stage.world_model = replace(stage.world_model, data=arguments.subset_names, latents="on_the_fly")
    config: WorldModel = stage.world_model
    datasets = open_training(config, arguments.episodes, arguments.latents, arguments.tokenizer, processes)
    held_out = open_held_out(datasets[0], arguments.validation_episodes, arguments.validation, processes)
    choose_episodes(held_out, replay.EPISODES)  # complains now, not when everything is trained
    source = ClipSource(config, datasets, processes)
    card = make_card(stage, source)
    loss = DiffusionForcing(card, config, source, derive(stage.seed, "world_model"))
    torch.manual_seed(derive(stage.seed, "world_model", "weights"))
    identity = digest([stage.digest, *source.identity, *filter(None, [arguments.subset_names])])
    loss.show_own_frames(arguments.state, identity)
    folder, training = arguments.out.parent, stage.world_model.training
    network = build_network(card)
    validation = None
    if processes.first:
        shown = read_held_out(held_out, config, replay.EPISODES)
        validation = replay.Validation(folder, card, arguments.tokenizer, *shown, loss.seed, processes.device)

    def validate(step: int, network: nn.Module) -> None:
        engine.events.add(step, "validation", replay.summary(validation(network)))

    every = training.validate_every
    engine = Engine(
        network, loss, training, seed=loss.seed, state=arguments.state, digest=identity, label="world model",
        describe=loss.describe, prepare=loss.prepare if loss.own else None, frames=card.frames, events=folder / "events",
        hooks=dict.fromkeys(range(every, training.steps, every), validate) if every else {},
    )  # fmt: skip
    network = engine.run()
    if processes.first:
        engine.write_metrics(folder / "metrics.csv")
        plot_loss(folder / "loss.png", engine.history)
        validate(training.steps, network)
        save_artefact(folder, network, card, arguments.tokenizer)
        loss.forget_own_frames()
    processes.barrier()
    leave()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several = "; one for each data set of world_model.data, in its order"
    for flag, count, default, text in (
        ("--config", None, "results/config/world_model.json", "stage file (seed, world_model)"),
        ("--latents", "*", [], f"latents.json of the training split{several}; none: encode on the fly"),
        ("--episodes", "+", None, f"episodes.parquet of the training split, or its folder{several}"),
        ("--validation", "?", None, "latents.json of the first data set's validation split; none: encode on the fly"),
        ("--validation-episodes", None, None, "episodes.parquet of that split, or its folder"),
        ("--dataset-dir", None, None, "instead of these four: a folder per data set, and in it one per split"),
        ("--tokenizer", None, "results/tokenizer", "tokenizer folder, copied into the artefact"),
        ("--out", None, "results/world_model/model.safetensors", "weights to write (default: %(default)s)"),
        ("--state", None, "results/state/world_model", "folder of checkpoints (default: %(default)s)"),
    ):
        parser.add_argument(flag, type=Path, nargs=count, default=default, help=text)
    parser.add_argument(
        "--subset-names", default="", help="of --dataset-dir, in place of world_model.data: rt_1,bridge_v2"
    )
    arguments = parser.parse_args()
    named = [bool(arguments.dataset_dir), bool(arguments.subset_names)]
    listed = [bool(arguments.episodes), bool(arguments.validation_episodes)]
    if named + [not one for one in listed] not in ([True] * 4, [False] * 4):
        parser.error("give --episodes and --validation-episodes, or else --dataset-dir and --subset-names")
    return arguments


def find_subsets(folder: Path, names: str) -> tuple[list[Path], Path]:
    """Training splits of the data sets `names` ("rt_1,bridge_v2") in `folder`, and the validation split of the first."""
    roots = [folder / name for name in read_mixture(names, "").names]
    return [find_split(root, "train") for root in roots], find_split(roots[0], "validation")


def make_card(stage: Stage, source: ClipSource) -> Card:
    """What the artefact will say about itself. Raises UserError where data and configuration do not fit."""
    model: WorldModel = stage.world_model
    primary = source.datasets[0]
    channels = primary.latents.shape[-1]
    if model.network.in_channels != channels:
        raise UserError(
            f"world_model.network.in_channels: {model.network.in_channels}, but the latents have {channels}"
        )
    return Card(
        network=model.network, objective=model.objective, sampler=model.sampler, latent=primary.latents.shape[:2],
        frames=model.clip_frames, image=primary.latents.image, mean=tuple(source.mean.tolist()),
        std=tuple(source.std.tolist()), embodiment=primary.embodiment, convention=model.convention,
        alignment=model.alignment, actions=model.actions, control_hz=primary.control_hz / primary.skip,
        sources=source.sources, tokenizer=primary.latents.tokenizer,
        provenance={name: str(value) for name, value in record().items()},
    )  # fmt: skip


class DiffusionForcing:
    """The training loss: clips, noise, levels and dropped actions drawn as functions of (seed, step, sample)."""

    def __init__(self, card: Card, config: WorldModel, source: ClipSource, seed: int) -> None:
        self.card, self.config, self.source, self.seed = card, config, source, seed
        self.objective = Objective(card.objective)
        self.own: OwnFrames | None = None

    def show_own_frames(self, folder: Path, digest: str) -> None:
        """From the configured step on, show the model its own rollouts too; they are kept in `folder`."""
        if self.config.own_frames.share > 0:
            episodes, length = self.source.equal_episodes()
            self.own = OwnFrames(self.card, self.config, self.source.read, episodes, length, self.seed, folder, digest,
                                 join())  # fmt: skip

    def prepare(self, step: int, ema: nn.Module) -> None:
        """Before update number `step`, on every process."""
        if self.own is not None:
            self.own.prepare(step, ema)

    def forget_own_frames(self) -> None:
        """Free their disk space: the training is over."""
        if self.own is not None:
            self.own.clear()

    def choose(self, step: int, samples: np.ndarray) -> Choice:
        choice = self.source.clips.choose(randomness.uniform(self.seed, step, samples, 3, "clip"))
        return choice if self.own is None else self.own.exchange(step, samples, choice)

    def describe(self, step: int, samples: np.ndarray) -> dict[str, list]:
        return self.source.describe(self.choose(step, samples))

    def __call__(self, network: nn.Module, step: int, samples: np.ndarray) -> dict[str, Tensor]:
        choice = self.choose(step, samples)
        clean, first, actions = self.source.read(
            choice.episode, self.source.clips.frame_numbers(choice), choice.mirrored
        )
        if self.source.live and step + 1 < self.config.training.steps:
            # A process is given the same samples of every step.
            self.source.prefetch(self.choose(step + 1, samples))
        noise = self.source.tensor(randomness.normal(self.seed, step, samples, tuple(clean.shape[1:]), "noise"))
        draws = randomness.uniform(self.seed, step, samples, 2 * clean.shape[1] + 1, "levels").astype(np.float32)
        levels = self.objective.sample_levels(self.source.tensor(draws[:, 1:]).view(len(samples), -1, 2))
        dropped = None
        if self.config.objective.action_dropout > 0:
            dropped = self.source.tensor(draws[:, 0] < self.config.objective.action_dropout)
        losses = self.objective.training_loss(
            network, clean, actions, noise=noise, levels=levels, start=self.source.tensor(choice.start == 0),
            first=first, dropped=dropped,
            shown=None if self.own is None else self.own.shown(choice, clean),
        )  # fmt: skip
        return {"loss": losses.mean()}


if __name__ == "__main__":
    run_training(main)
