"""The data sets of one training, opened and checked: store, latents, embodiment, control rate and frame skip of each."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from workflow_src import embodiments
from workflow_src.common.config import check_name
from workflow_src.common.errors import UserError
from workflow_src.common.sections import WorldModel
from workflow_src.episodes.latents import Latents, load_latents
from workflow_src.episodes.mixture import frame_skips, read_mixture
from workflow_src.episodes.store import EpisodeStore
from workflow_src.training.distributed import Processes
from workflow_src.training.live_latents import THREADS, LiveLatents
from workflow_src.training.local_cache import localise
from workflow_src.world_model.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Dataset:
    """One split of one data set. All data sets of a training have frames and latents of the same size."""

    name: str
    store: EpisodeStore
    latents: Latents | LiveLatents
    skip: int  # recorded frames from one frame of a clip to the next
    embodiment: str
    control_hz: float  # as recorded


def open_training(
    config: WorldModel, stores: Sequence[Path], caches: Sequence[Path], tokenizer: Path, processes: Processes
) -> list[Dataset]:
    """The data sets of `config.data`, in its order; `caches`: their latents.json, none where encoded on the fly.

    Raises UserError: caches of other episodes or another tokenizer, several embodiments in one store, frames of different
    sizes.
    """
    if config.latents == "cached":
        caches = localise(caches)  # of the stores only actions are read, once
    else:
        stores = localise(stores)
    opened = [EpisodeStore(path) for path in stores]
    names = read_mixture(config.data, opened[0].root.resolve().parent.name).names
    cached = config.latents == "cached"
    if len(stores) != len(names) or len(caches) != (len(names) if cached else 0):
        raise UserError(f"world_model.data: {len(names)} data sets ({', '.join(names)}), but {len(stores)} --episodes and "
                        f"{len(caches)} --latents; one each, and no --latents for on_the_fly")  # fmt: skip
    skips = frame_skips(config.frame_skip, names)
    latents: list[Latents | LiveLatents]
    if cached:
        latents = [_cache(path, store, config.mirror, processes) for path, store in zip(caches, opened)]
    else:
        encoder, pool = load_tokenizer(tokenizer, processes.device), ThreadPoolExecutor(THREADS)
        latents = [LiveLatents(store, encoder, pool) for store in opened]
    datasets = [_dataset(*parts) for parts in zip(names, opened, latents, skips)]
    for other in datasets[1:]:
        _check_alike(datasets[0], other)
    return datasets


def open_held_out(primary: Dataset, store: Path, cache: Path | None, processes: Processes) -> Dataset:
    """The validation split of the data set `primary`; `cache`: its latents.json, None where encoded on the fly."""
    opened = EpisodeStore(store)
    if isinstance(primary.latents, LiveLatents):
        latents: Latents | LiveLatents = primary.latents.of(opened)
    elif cache is None:
        raise UserError("--validation: is missing; give the latents.json of the validation split")
    else:
        latents = _cache(cache, opened, False, processes)
    held_out = _dataset(f"{primary.name}, validation", opened, latents, primary.skip)
    _check_alike(primary, held_out)
    return held_out


def _cache(path: Path, store: EpisodeStore, mirror: bool, processes: Processes) -> Latents:
    latents = load_latents(path, processes.rank, processes.size)
    if latents.episodes != store.identity:
        raise UserError(f"{path}: was made from other episodes than {store.root}; delete it and run again")
    if mirror and not latents.mirrored:
        raise UserError(f"{path}: holds no mirrored latents, which world_model.mirror needs; delete it and run again")
    return latents


def _dataset(name: str, store: EpisodeStore, latents: Latents | LiveLatents, skip: int) -> Dataset:
    robots, rates = set(store.table.embodiment), set(map(float, store.table.control_hz))
    if len(robots) != 1 or len(rates) != 1:
        raise UserError(f"{store.root}: embodiments {sorted(robots)} at {sorted(rates)} Hz cannot be mixed in one data set; "
                        "make several of it")  # fmt: skip
    (robot,), (rate,) = robots, rates
    check_name(f"{store.root}: embodiment", robot, embodiments.EMBODIMENTS)
    return Dataset(name, store, latents, skip, robot, rate)


def _check_alike(one: Dataset, other: Dataset) -> None:
    if other.latents.tokenizer != one.latents.tokenizer:
        raise UserError(
            f"world_model.data: the latents of {one.name} and {other.name} come from two tokenizers; delete both"
        )
    if other.latents.image != one.latents.image:
        sizes = ["{}x{}".format(*data.latents.image) for data in (one, other)]
        raise UserError(f"world_model.data: frames of {one.name} are {sizes[0]} pixels, of {other.name} {sizes[1]}; resize "
                        "them to one size")  # fmt: skip
