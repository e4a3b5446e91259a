"""The world-model artefact: one self-contained folder, written by training or import, read by rollouts.

    model.safetensors   EMA weights, float32; written last
    config.json         `Card`: everything needed to rebuild and to run the model
    tokenizer/          the tokenizer whose latents the model was trained on

Loading is strict: a missing, extra or misshapen parameter is one readable error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from workflow_src.common import sections
from workflow_src.common.config import from_dict, to_dict
from workflow_src.common.errors import UserError
from workflow_src.common.files import atomic_path, copy_file, digest, sha256_file, write_json
from workflow_src.world_model.diffusion import Objective
from workflow_src.world_model.network import WorldModelNetwork
from workflow_src.world_model.sampler import Sampler, make_sampler
from workflow_src.world_model.tokenizer import ImageTokenizer, load_tokenizer

FORMAT = "rehearsal-world-model-1"
SHOWN = 5  # names listed in an error before it says how many more


@dataclass(frozen=True)
class Source:
    """One data set that a world model was trained on."""

    dataset: str
    embodiment: str
    control_hz: float  # as recorded
    frame_skip: int  # every n-th recorded frame was shown: the model imagines control_hz / n frames a second
    share: float  # of the training clips


@dataclass(frozen=True)
class Card:
    """What `config.json` holds."""

    network: sections.Network
    objective: sections.Objective
    sampler: sections.Sampler
    latent: tuple[int, int]  # rows, columns of the latent grid
    frames: int  # the most frames in view that the network was trained with
    image: tuple[int, int]  # rows, columns of the frames, pixels
    mean: tuple[float, ...]  # of the latents, per channel: the network sees (latent - mean) / std
    std: tuple[float, ...]
    embodiment: str  # whose actions it was trained on, a key of `embodiments`
    convention: Literal["worldgym", "rehearsal"] = "rehearsal"  # action scaling
    alignment: Literal["leads_to", "worldgym_train"] = "leads_to"  # which action stood beside a frame in training
    actions: Literal["commanded", "reached"] = "commanded"
    control_hz: float = 5.0  # frames imagined per second of `embodiment`'s time
    sources: tuple[Source, ...] = ()  # what it was trained on, the one of `embodiment` first; (): not known
    tokenizer: str = ""  # digest of the tokenizer's weights
    format: str = FORMAT
    provenance: dict[str, str] = field(default_factory=dict)

    def steps(self, embodiment: str) -> int:
        """Control steps of `embodiment` that lie between two imagined frames."""
        return next((source.frame_skip for source in self.sources if source.embodiment == embodiment), 1)


def identity(content: Mapping[str, Any]) -> str:
    """Digest of what the weights depend on, from `config.json`'s content; the sampler's settings may be changed afterwards.

    Of the content as it was written: a field that a later version adds makes no older artefact another one.
    """
    return digest({key: value for key, value in content.items() if key not in ("sampler", "provenance", "format")})


class WorldModel:
    """A loaded artefact: `card`, `network`, `objective`, `tokenizer`, and `digest` of the weights."""

    def __init__(self, card: Card, network: WorldModelNetwork, tokenizer: ImageTokenizer, weights_digest: str) -> None:
        self.card, self.network, self.tokenizer, self.digest = card, network, tokenizer, weights_digest
        self.objective = Objective(card.objective)
        device = next(network.parameters()).device
        self.mean, self.std = torch.tensor(card.mean, device=device), torch.tensor(card.std, device=device)

    def standardise(self, latents: Tensor) -> Tensor:
        """Raw latents (..., C) as the network sees them."""
        return (latents.float() - self.mean) / self.std

    def restore(self, latents: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        return latents * self.std + self.mean

    def sampler(self) -> Sampler:
        """A new sampler with the artefact's settings."""
        return make_sampler(self.network, self.objective, self.card.sampler)


def build_network(card: Card) -> WorldModelNetwork:
    """The network that `card` describes, with fresh weights."""
    return WorldModelNetwork(card.network, *card.latent, card.frames)


def save_artefact(folder: str | Path, network: nn.Module, card: Card, tokenizer: str | Path | None) -> Path:
    """Write `network`'s weights, `card` and a copy of the `tokenizer` folder. Returns the path of the weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None and Path(tokenizer).resolve() != (folder / "tokenizer").resolve():
        _copy_tokenizer(Path(tokenizer), folder / "tokenizer")
    content = to_dict(card)
    write_json(folder / "config.json", content)
    weights = {name: value.detach().float().cpu().contiguous() for name, value in network.state_dict().items()}
    path = folder / "model.safetensors"
    with atomic_path(path) as temporary:
        # One entry only: safetensors writes several in random order, and equal models should be equal files.
        save_file(weights, temporary, metadata={"identity": identity(content)})
    return path


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Weights last, each file atomically: a half-copied tokenizer has no weights."""
    target.mkdir(parents=True, exist_ok=True)
    files = sorted(source.rglob("*.json")) + sorted(source.rglob("*.safetensors"))
    if not files:
        raise UserError(f"{source}: no tokenizer there (config.json and model.safetensors); train or import one first")
    for file in files:
        copy_file(file, target / file.relative_to(source))


def load_artefact(folder: str | Path, device: torch.device | str = "cpu") -> WorldModel:
    """Load `folder` (or its `model.safetensors`) for generation. Raises UserError: what is wrong with which file."""
    folder = Path(folder)
    folder = folder.parent if folder.suffix == ".safetensors" else folder
    content = _read_content(folder)
    card = _card(folder, content)
    path = folder / "model.safetensors"
    network = build_network(card)
    weights, metadata = read_weights(path)
    load_strictly(network, weights, path)
    if metadata.get("identity") not in (None, identity(content)):
        raise UserError(
            f"{folder / 'config.json'}: does not belong to {path.name} beside it; restore it, or make the model again"
        )
    tokenizer = load_tokenizer(folder / "tokenizer", device)
    if card.tokenizer and card.tokenizer != tokenizer.digest:
        raise UserError(
            f"{folder / 'tokenizer'}: is another tokenizer than the model's; make or import the model again"
        )
    return WorldModel(card, network.to(device).eval(), tokenizer, sha256_file(path)[:16])


def read_card(folder: str | Path) -> Card:
    """The card of an artefact. Raises UserError if it is missing, broken or of another format."""
    return _card(folder, _read_content(folder))


def _read_content(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); is this a world-model folder?") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); make the model again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise UserError(f"{path}: format {found!r} is not {FORMAT!r}; this is no world model of this version")
    return content


def _card(folder: str | Path, content: dict[str, Any]) -> Card:
    path = Path(folder) / "config.json"
    try:
        return from_dict(Card, content, str(path))
    except TypeError as error:  # a field without default is absent
        raise UserError(f"{path}: incomplete ({error}); make the model again") from error


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); the file is missing or cut short, make it again") from error


def load_strictly(network: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Load `weights` into `network`; one UserError names every kind of mismatch."""
    expected = network.state_dict()
    problems = []
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing:
        problems.append(f"missing {_some(missing)}")
    if extra:
        problems.append(f"not known {_some(extra)}")
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, should be {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & weights.keys())
        if weights[name].shape != expected[name].shape
    ]
    if shapes:
        problems.append(f"wrong shape: {_some(shapes)}")
    if problems:
        raise UserError(f"{source}: weights do not fit the configured network: {'; '.join(problems)}")
    network.load_state_dict(dict(weights))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
