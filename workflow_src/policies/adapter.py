"""The interface between the policy server and a policy: an adapter.

An adapter is a module `policies/<name>.py`, or a package `policies/<name>/` with a module `adapter`, that has

    load(policy: sections.Policy, networks: Path, lab: sections.Lab, seed: int, batch: int) -> Adapter

Its framework is imported inside that module; nothing else of the package may need it. Actions are metric; what is
random is a function of the seed and step that come with each row, never of the batch around it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from workflow_src.common import config, sections
from workflow_src.common.errors import UserError
from workflow_src.policies.wire import Metadata, WireError


@dataclass(frozen=True)
class Observation:
    """N rows, one per rollout. `episode`, `step`, `seed` identify the row's randomness."""

    image: np.ndarray  # uint8 (N, H, W, 3)
    prompt: list[str]  # N instructions
    episode: np.ndarray  # int64 (N,)
    step: np.ndarray  # int64 (N,), environment steps since the rollout began
    seed: np.ndarray  # int64 (N,)
    extra: dict[str, Any] = field(default_factory=dict)  # whatever else was sent, e.g. `state` (N, S)

    def __len__(self) -> int:
        return len(self.image)


class Adapter(Protocol):
    """A loaded policy."""

    metadata: Metadata

    def act(self, observation: Observation) -> dict[str, np.ndarray]:
        """`actions` float32 (N, K, 7): dx, dy, dz m, droll, dpitch, dyaw rad, gripper opening [0, 1]; optional `base`
        (N, K, 3) and `terminate` bool (N, K)."""
        ...


def load(name: str, policy: sections.Policy, networks: Path, lab: sections.Lab, seed: int, batch: int) -> Adapter:
    """Imports adapter `policy.adapter` and loads policy `name` with it. Raises UserError for an unknown adapter, and for a
    state of the robot that the policy would not look at."""
    config.check_name(f"policies.{name}.adapter", policy.adapter, ADAPTERS)
    loaded = importlib.import_module(ADAPTERS[policy.adapter]).load(policy, networks, lab, seed, batch)
    if policy.foreign.state and not loaded.metadata.extra.get("state"):
        raise UserError(f"policies.{name}.foreign.state: this policy takes no state of the robot; remove it")
    return loaded


def _adapters() -> dict[str, str]:
    """Adapter → module, by a listing of this folder: nothing is imported."""
    machinery = {
        "adapter", "client", "doctor", "foreign", "hosting", "images", "lifecycle", "pretrained", "serve", "server", "wire",
    }  # fmt: skip
    found = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name not in machinery:
            found[module.name] = f"{__package__}.{module.name}" + (".adapter" if module.ispkg else "")
    return found


ADAPTERS = _adapters()


def read_observation(message: Any, image_size: int, calls: int) -> tuple[Observation, bool]:
    """Checks a received message. Returns the observation and whether it was a single row without a batch dimension.

    A foreign openpi client sends one image and one prompt and nothing else; `calls` then counts as its step.
    Raises WireError that names the key.
    """
    if not isinstance(message, dict):
        raise WireError(f"observation must be a map, got {type(message).__name__}")
    image, prompt = message.get("image"), message.get("prompt")
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3:
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise WireError(f"observation.image must be uint8 (H, W, 3) or (N, H, W, 3), got {found}")
    single = image.ndim == 3
    image = image[None] if single else image
    if image_size and image.shape[1:3] != (image_size, image_size):
        raise WireError(
            f"observation.image is {image.shape[1]}x{image.shape[2]}; this policy sees {image_size}x{image_size}"
        )
    prompts = [prompt] if single else prompt
    if not isinstance(prompts, list) or len(prompts) != len(image) or not all(isinstance(p, str) for p in prompts):
        raise WireError(f"observation.prompt must be {len(image)} instruction(s), one per image")
    numbers = {key: _numbers(message, key, len(image), calls) for key in ("episode", "step", "seed")}
    extra = {key: value for key, value in message.items() if key not in ("image", "prompt", *numbers)}
    return Observation(image, prompts, **numbers, extra=extra), single


def _numbers(message: dict, key: str, rows: int, calls: int) -> np.ndarray:
    value = np.atleast_1d(np.asarray(message.get(key, np.full(rows, calls if key == "step" else 0))))
    if value.shape != (rows,) or value.dtype.kind not in "iu":
        raise WireError(f"observation.{key} must be {rows} integer(s), got {value.dtype} {value.shape}")
    return value.astype(np.int64)


def in_batches(rows: int, batch: int, run: Callable[[np.ndarray], tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """Calls `run(indices (batch,))` as often as `rows` need, always at one shape, and joins what it returns.

    Matrix libraries choose kernels by shape, so another batch shape may change the last bits of a row's result; the
    short last batch is therefore filled up with copies of its first row, which are cut off again.
    """
    parts = []
    for start in range(0, rows, batch):
        indices = np.arange(start, min(start + batch, rows))
        filled = np.concatenate([indices, np.full(batch - len(indices), start)])
        parts.append(tuple(part[: len(indices)] for part in run(filled)))
    return tuple(np.concatenate(column) for column in zip(*parts))


def check_options(policy: sections.Policy, allowed: dict[str, tuple[float, float, float]]) -> dict[str, float]:
    """Options of a policy with defaults filled in; `allowed`: name → (default, lowest, highest). Raises UserError."""
    for key, value in policy.options.items():
        config.check_name(f"options of adapter {policy.adapter}", key, allowed)
        _, lowest, highest = allowed[key]
        if not lowest <= value <= highest:
            raise UserError(f"options.{key} of adapter {policy.adapter}: {value} is not between {lowest} and {highest}")
    return {key: float(policy.options.get(key, default)) for key, (default, _, _) in allowed.items()}
