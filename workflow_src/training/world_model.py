"""Train the world model on cached latents, validate it on held-out action replays, write the artefact.

Writes beside `--out` (`model.safetensors`, last): `config.json`, `tokenizer/`, `metrics.csv`, `loss.png`, `events/` for
TensorBoard, `validation.csv` and `mse.png` (MSE, PSNR, SSIM and LPIPS by horizon, for the model, for the frozen first frame
and for other actions) and `samples/*.gif` (truth | imagined).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from workflow_src import embodiments
from workflow_src.common.config import Stage, load_stage
from workflow_src.common.errors import UserError
from workflow_src.common.files import digest, sha256_file
from workflow_src.common.provenance import record
from workflow_src.common.sections import WorldModel
from workflow_src.common.seeds import derive
from workflow_src.episodes.clips import Choice, Clips, aligned_actions, contact_weight
from workflow_src.episodes.latents import Latents, load_latents
from workflow_src.episodes.store import Arrays, EpisodeStore
from workflow_src.training import randomness, replay
from workflow_src.training.distributed import join, leave, run_training
from workflow_src.training.engine import Engine
from workflow_src.training.own_frames import OwnFrames
from workflow_src.training.plots import plot_loss
from workflow_src.world_model.artefact import Card, build_network, save_artefact
from workflow_src.world_model.diffusion import Objective

OBJECT = slice(4, 7)  # of a recorded state: position of the first object, metres
MOVED = 0.002  # metres: less is settling, not contact

EXAMPLES = """examples (one line each):
  torchrun --standalone --nproc-per-node=1 -m workflow_src.training.world_model
      --config results/config/world_model.json --latents results/latents/train/latents.json
      --episodes results/episodes/tabletop/train/episodes.parquet
      --validation results/latents/validation/latents.json
      --validation-episodes results/episodes/tabletop/validation/episodes.parquet
      --tokenizer results/tokenizer --out results/world_model/model.safetensors --state results/state/world_model
"""


def main() -> None:
    arguments = _arguments()
    stage = load_stage(arguments.config)
    processes = join()
    episodes = EpisodeStore(arguments.episodes.parent).load_all()
    latents = _latents(arguments.latents, arguments.episodes)
    card = make_card(stage, episodes, latents)
    loss = DiffusionForcing(card, stage.world_model, episodes, latents, derive(stage.seed, "world_model"))
    torch.manual_seed(derive(stage.seed, "world_model", "weights"))
    identity = digest([stage.digest, latents.tokenizer, latents.episodes])
    loss.show_own_frames(arguments.state, identity)
    folder, training = arguments.out.parent, stage.world_model.training
    network = build_network(card)
    validation = _validation(arguments, card, latents, loss) if processes.first else None

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


def _validation(
    arguments: argparse.Namespace, card: Card, latents: Latents, loss: DiffusionForcing
) -> replay.Validation:
    held_out = EpisodeStore(arguments.validation_episodes.parent).load_all()
    cached = _latents(arguments.validation, arguments.validation_episodes)
    if cached.tokenizer != latents.tokenizer:
        raise UserError(f"{arguments.validation}: made by another tokenizer than {arguments.latents}; delete both")
    folder = arguments.out.parent
    return replay.Validation(folder, card, arguments.tokenizer, held_out, cached, loss.seed, loss.device)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, text in {
        "--config": "stage file (seed, world_model)",
        "--latents": "latents.json of the training split",
        "--episodes": "episodes.parquet of the training split",
        "--validation": "latents.json of the validation split",
        "--validation-episodes": "episodes.parquet of the validation split",
        "--tokenizer": "tokenizer folder, copied into the artefact",
        "--out": "weights to write (model.safetensors)",
        "--state": "folder of checkpoints",
    }.items():
        parser.add_argument(flag, type=Path, required=True, help=text)
    return parser.parse_args()


def _latents(path: Path, episodes: Path) -> Latents:
    latents = load_latents(path)
    if latents.episodes != sha256_file(episodes):
        raise UserError(f"{path}: was made from other episodes than {episodes}; delete it and run again")
    return latents


def make_card(stage: Stage, episodes: Arrays, latents: Latents) -> Card:
    """What the artefact will say about itself. Raises UserError where data and configuration do not fit."""
    model: WorldModel = stage.world_model
    channels = latents.plain.shape[-1]
    if model.network.in_channels != channels:
        raise UserError(
            f"world_model.network.in_channels: {model.network.in_channels}, but the latents have {channels}"
        )
    names, rates = set(episodes.table.embodiment), set(map(float, episodes.table.control_hz))
    if len(names) != 1 or len(rates) != 1:
        raise UserError(f"episodes: embodiments {sorted(names)} and rates {sorted(rates)} Hz cannot be mixed here")
    return Card(
        network=model.network, objective=model.objective, sampler=model.sampler, latent=latents.plain.shape[2:4],
        frames=model.clip_frames, image=episodes.images.shape[2:4], mean=tuple(map(float, latents.mean)),
        std=tuple(map(float, latents.std)), embodiment=names.pop(), convention=model.convention,
        alignment=model.alignment, actions=model.actions, control_hz=rates.pop(), tokenizer=latents.tokenizer,
        provenance={name: str(value) for name, value in record().items()},
    )  # fmt: skip


def world_model_actions(episodes: Arrays, card: Card) -> np.ndarray:
    """The action beside every frame in world-model units, float32 (N, F, 10)."""
    recorded = episodes.reached if card.actions == "reached" else episodes.actions
    if recorded is None:
        raise UserError(f"world_model.actions: {card.actions!r} is not in this episode store; choose commanded")
    converted = embodiments.to_world_model(recorded, card.embodiment, card.convention)
    return aligned_actions(converted, card.alignment)


def object_moved(episodes: Arrays) -> np.ndarray:
    """Whether the first object moved in each step, bool (N, F-1), from recorded states."""
    if episodes.state is None:
        raise UserError("world_model.contact_weight: this episode store has no object states; set it to 0")
    place = episodes.state[..., OBJECT]
    return np.linalg.norm(np.diff(place, axis=1), axis=-1) > MOVED


class DiffusionForcing:
    """The training loss: clips, noise, levels and dropped actions drawn as functions of (seed, step, sample)."""

    def __init__(self, card: Card, config: WorldModel, episodes: Arrays, latents: Latents, seed: int) -> None:
        count, length = latents.plain.shape[:2]
        self.card, self.config, self.seed, self.device = card, config, seed, join().device
        weight = None
        if config.contact_weight > 0:
            weight = contact_weight(object_moved(episodes), config.clip_frames, config.contact_weight)
        self.clips = Clips(count, length, config.clip_frames, config.mirror, weight)
        self.objective = Objective(card.objective)
        self.latents = (latents.plain, latents.mirrored)
        actions = world_model_actions(episodes, card)
        self.actions = (actions, embodiments.mirror_actions(actions, card.embodiment))
        self.mean, self.std = (torch.tensor(value, device=self.device) for value in (card.mean, card.std))
        self.own: OwnFrames | None = None

    def show_own_frames(self, folder: Path, digest: str) -> None:
        """From the configured step on, show the model its own rollouts too; they are kept in `folder`."""
        if self.config.own_frames.share > 0:
            self.own = OwnFrames(self.card, self.config, self.read, *self.latents[0].shape[:2], self.seed,
                                 folder, digest, join())  # fmt: skip

    def prepare(self, step: int, ema: nn.Module) -> None:
        """Before update number `step`, on every process."""
        if self.own is not None:
            self.own.prepare(step, ema)

    def forget_own_frames(self) -> None:
        """Free their disk space: the training is over."""
        if self.own is not None:
            self.own.clear()

    def choose(self, step: int, samples: np.ndarray) -> Choice:
        choice = self.clips.choose(randomness.uniform(self.seed, step, samples, 3, "clip"))
        return choice if self.own is None else self.own.exchange(step, samples, choice)

    def describe(self, step: int, samples: np.ndarray) -> dict[str, list]:
        choice = vars(self.choose(step, samples))
        return {name: value.tolist() for name, value in choice.items() if value is not None}

    def __call__(self, network: nn.Module, step: int, samples: np.ndarray) -> dict[str, Tensor]:
        choice = self.choose(step, samples)
        clean, first, actions = self.read(choice.episode, self.clips.frame_numbers(choice), choice.mirrored)
        noise = self._tensor(randomness.normal(self.seed, step, samples, tuple(clean.shape[1:]), "noise"))
        draws = randomness.uniform(self.seed, step, samples, 2 * clean.shape[1] + 1, "levels").astype(np.float32)
        levels = self.objective.sample_levels(self._tensor(draws[:, 1:]).view(len(samples), -1, 2))
        dropped = None
        if self.config.objective.action_dropout > 0:
            dropped = self._tensor(draws[:, 0] < self.config.objective.action_dropout)
        losses = self.objective.training_loss(
            network, clean, actions, noise=noise, levels=levels, start=self._tensor(choice.start == 0),
            first=first if self.card.network.first_frame else None, dropped=dropped,
            shown=None if self.own is None else self.own.shown(choice, clean),
        )  # fmt: skip
        return {"loss": losses.mean()}

    def read(self, episode: np.ndarray, frames: np.ndarray, mirrored: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Standardised frames (B, T, h, w, C), their episodes' first frames (B, h, w, C), actions (B, T, 10).

        Of `episode (B,)` the frames numbered `frames (B, T)`, int64; `mirrored (B,)` bool.
        """
        pick = mirrored.astype(int)
        latents = np.stack([self.latents[m][e, f] for m, e, f in zip(pick, episode, frames)])
        first = np.stack([self.latents[m][e, 0] for m, e in zip(pick, episode)])
        actions = np.stack([self.actions[m][e, f] for m, e, f in zip(pick, episode, frames)])
        clean, first = ((self._tensor(value).float() - self.mean) / self.std for value in (latents, first))
        return clean, first, self._tensor(actions)

    def _tensor(self, value: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(value)).to(self.device, non_blocking=True)


if __name__ == "__main__":
    run_training(main)
