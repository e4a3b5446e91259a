"""What is known of published files: WorldGym's checkpoints, and the autoencoder that they were trained on.

Their weights do not say it, and the configuration is checked against it before anything is downloaded. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from workflow_src.common import sections
from workflow_src.common.errors import UserError
from workflow_src.common.fetch import resolve, shown

HUB = "stabilityai/stable-diffusion-3-medium-diffusers"
REVISION = "ea42f8cef0f178587cf766dc8129abd379c90671"
SUBFOLDER = "vae"  # of a hub repository
CONTEXT = 20  # frames in view of both checkpoints
OBJECTIVE = sections.Objective(schedule="sigmoid", prediction="v", action_dropout=0.1)
CONVENTION, ALIGNMENT, ACTIONS = "worldgym", "worldgym_train", "commanded"
SIZES = ("in_channels", "patch", "width", "depth", "heads", "mlp_ratio", "action_dim", "spatial_rope")


@dataclass(frozen=True)
class Known:
    """A published checkpoint."""

    rope: str  # spatial rotary embedding
    cfg: float  # guidance over actions it was rolled out with
    drive: str = ""  # its identifier on Google Drive, where links name no file


# By a part of the file's name (WG-code: README, notebook).
CHECKPOINTS = {
    "mixed_openx_9robots_20frames_0p1actiondropout": Known("standard", 3.0, "1uiRP2BuavapMsyP9Cbr25mi_ymk9SEJb"),
    "bridge_v2": Known("pixel", 1.0),
}


def known(address: str) -> Known | None:
    """The published checkpoint that a path or an address is of, by its name or its Google Drive identifier."""
    name = shown(address).rpartition("/")[2]
    for part, checkpoint in CHECKPOINTS.items():
        if part in name or (checkpoint.drive and checkpoint.drive in address):
            return checkpoint
    return None


def is_address(checkpoint: str) -> bool:
    """Whether it has to be fetched; otherwise it is a file."""
    return "://" in checkpoint


def autoencoder(source: str, revision: str) -> str:
    """Where the autoencoder is: a folder, or `hf://owner/name@revision/vae`. Raises UserError for neither."""
    if Path(source).is_dir():
        return source
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise UserError(f"{source}: no such folder, and no hub repository (owner/name) either")
    revision = revision or (REVISION if source == HUB else "")
    if not revision:
        raise UserError(
            f"{source}: no such folder; if the hub repository is meant, name its revision (a commit), so that the same "
            "weights are meant later"
        )
    return f"hf://{source}@{revision}/{SUBFOLDER}"


def check(config: sections.Config) -> None:
    """Raise UserError where `tokenizer` and `world_model` do not fit what they are to be fetched from."""
    tokenizer, model, source = config.tokenizer, config.world_model, config.world_model.source
    if tokenizer.kind == "sd3":
        if not tokenizer.source:
            raise UserError(f"tokenizer.source: is empty; give a folder or a hub repository, for example {HUB}")
        _under("tokenizer.source", autoencoder, tokenizer.source, tokenizer.revision)
    if not source.checkpoint:
        return
    if is_address(source.checkpoint):
        _under("world_model.source.checkpoint", resolve, source.checkpoint)
    elif not Path(source.checkpoint).is_file():
        # Snakemake would train a world model instead.
        raise UserError(f"world_model.source.checkpoint: {source.checkpoint!r} is neither an address nor a file")
    if source.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", source.sha256):
        raise UserError(f"world_model.source.sha256: {source.sha256!r} is not 64 hexadecimal digits")
    if tokenizer.kind != "sd3":
        raise UserError(
            f"tokenizer.kind: {tokenizer.kind!r} is not what published checkpoints were trained on; set sd3"
        )
    sizes = {name: getattr(model.network, name) for name in SIZES}
    published = replace(
        model, network=replace(sections.Network(), **sizes), convention=CONVENTION, alignment=ALIGNMENT, actions=ACTIONS,
        objective=replace(model.objective, schedule=OBJECTIVE.schedule, prediction=OBJECTIVE.prediction),
    )  # fmt: skip
    if wrong := next(differences(model, published, "world_model"), None):
        path, configured, wanted = wrong
        raise UserError(f"{path}: {configured!r} is not how published checkpoints were trained; set {wanted!r}")
    _check_known(model, known(source.checkpoint))


def _check_known(model: sections.WorldModel, checkpoint: Known | None) -> None:
    if checkpoint is None:
        return
    if model.network.spatial_rope != checkpoint.rope:
        raise UserError(
            f"world_model.network.spatial_rope: {model.network.spatial_rope!r} does not fit "
            f"{shown(model.source.checkpoint)}, which was trained with {checkpoint.rope!r}"
        )
    if model.sampler.window > CONTEXT:
        raise UserError(
            f"world_model.sampler.window: {model.sampler.window} exceeds the {CONTEXT} frames that "
            f"{shown(model.source.checkpoint)} was trained with"
        )


def _under(path: str, function, *arguments: str) -> None:
    try:
        function(*arguments)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def differences(one: Any, other: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Path and both values of every field in which two dataclasses of one type differ."""
    for field in fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if is_dataclass(mine):
            yield from differences(mine, theirs, f"{path}.{field.name}")
        elif mine != theirs:
            yield f"{path}.{field.name}", mine, theirs
