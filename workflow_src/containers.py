"""Container images with `--sdm apptainer`: which one a job runs in, and what of this machine it sees there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from workflow_src.checks import ROOT
from workflow_src.common.config import to_dict
from workflow_src.common.errors import UserError
from workflow_src.common.sections import Config
from workflow_src.training.local_cache import VARIABLE

FOLDERS = ("HF_HOME", "REHEARSAL_LPIPS", VARIABLE)  # variables of the environment that name folders
MADE = ("HF_HOME", VARIABLE, "local_cache", "results")  # folders that jobs make where they are not there


def image_of(config: Config, env: str, key: str = "") -> str:
    """The image of the environment `env`, which the configuration names at `key`.

    The tabletop's own policies need nothing that the base image lacks. Raises UserError where there is no image.
    """
    if "/" in env:
        raise UserError(
            f"{key}: {env!r} is of this machine, and in no image; name an environment and, in `images`, its image"
        )
    name = env if env in config.images or env != "tabletop" else "base"
    if name not in config.images:
        user = f"{key} names that environment" if key else "most jobs run in it"
        raise UserError(f"images.{name}: is missing, and with --sdm apptainer {user}; write docker://… or a .sif file")
    image = config.images[name]
    address = urlsplit(image)
    if address.scheme in ("", "file") and not Path(address.path).exists():
        raise UserError(f"images.{name}: {image!r} is not there; build it (README, Apptainer), or write docker://…")
    return image


def outside_paths(config: Config) -> list[str]:
    """Absolute paths outside the working directory that jobs need: the project, and what `config` and variables name.

    Links are followed; of a folder that is still to be made (MADE), it is the nearest that is there. Raises UserError for a
    path in `~`, which is another place in an image, and for one that cannot be written as a --bind.
    """
    named = [*((name, os.environ.get(name, "")) for name in FOLDERS), *_texts(to_dict(config))]
    found = {str(ROOT)}
    for key, text in named:
        if key.startswith("images."):
            continue
        if text.startswith("~"):
            raise UserError(f"{key}: {text!r} is another place in an image; write the whole path")
        path = os.path.abspath(os.path.expandvars(text))
        while key in MADE and not os.path.exists(path):
            path = os.path.dirname(path)
        if not os.path.exists(path):
            continue
        if set(":,") & set(path):
            raise UserError(f"{key}: {path!r} has a ':' or ',' in it, which Apptainer takes for a separator; rename it")
        found |= {path, os.path.realpath(path)}
    covered = [Path.cwd()]
    for path in sorted(found - {"/"}):
        if not any(Path(path).is_relative_to(folder) for folder in covered):
            covered.append(Path(path))
    return [str(path) for path in covered[1:]]


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of all texts in a configuration."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(part, f"{key}.{name}" if key else str(name))
