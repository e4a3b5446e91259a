"""What the adapters of published policies share: where weights come from, and what they remember of an episode."""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from workflow_src import embodiments
from workflow_src.common import sections
from workflow_src.common.config import check_name
from workflow_src.common.errors import UserError
from workflow_src.common.files import digest, sha256_file
from workflow_src.policies.adapter import check_options

# A policy trained on reached displacements under-commands a world model that was trained on commanded ones: on Bridge by
# 18 to 26 %. The factor on translation and rotation makes up for it, for such a pair; by default nothing is changed.
OPTIONS = {"commanded_gain": (1.0, 1.0, 1.5)}
STATISTICS = {
    "widowx": "bridge",
    "google_robot": "fractal",
}  # family of the data set that an embodiment's policies name


def checkpoint(policy: sections.Policy, default: str) -> str:
    """Folder or hub name of the configured checkpoint. Raises UserError for a folder that is not there."""
    name = policy.checkpoint or default
    if not name:
        raise UserError(f"adapter {policy.adapter}: `checkpoint` is empty; name a folder, or owner/name on the hub")
    if (name.startswith(("/", ".", "~")) or name.count("/") > 1) and not Path(name).expanduser().exists():
        raise UserError(f"adapter {policy.adapter}: checkpoint {name!r} is no folder here")
    return str(Path(name).expanduser()) if Path(name).expanduser().exists() else name


def hub(policy: sections.Policy) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` that say which version, and from where."""
    return {"revision": policy.revision or None, "local_files_only": policy.offline}


def folder(policy: sections.Policy, default: str) -> str:
    """The configured checkpoint's folder; one on the hub is fetched as a whole, at the configured revision."""
    where = checkpoint(policy, default)
    if Path(where).is_dir():
        return str(Path(where).absolute())
    from huggingface_hub import snapshot_download

    return snapshot_download(where, **hub(policy))


def revision(policy: sections.Policy, where: str, commit: str | None = None) -> str:
    """What is served, for the metadata: configuration, and the hub's `commit` or the checksums of a folder's files."""
    folder = Path(where)
    files = {}
    if folder.exists():
        paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]
        files = {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}
    extra = {name: sha256_file(path) for name, path in policy.files.items() if Path(path).is_file()}
    said = [policy.adapter, policy.statistics, policy.dtype, policy.execution, policy.options]
    said += [policy.foreign.state_layout] if policy.foreign.state else []
    return digest([said, files or [where, commit or policy.revision], extra])


def import_torch() -> Any:
    """torch, with torchvision imported. PyPI's torchvision is built for CUDA: beside a torch for CPUs its compiled operators
    do not load and, for one of them that is not declared, nothing does. The networks need its Python part alone.
    """
    import torch
    from torch import library

    try:
        import torchvision
    except RuntimeError as problem:
        if "torchvision::nms" not in str(problem):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        # Kept for ever: the declaration ends with the object.
        import_torch.operators = library.Library("torchvision", "DEF")
        import_torch.operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
    return torch


def torch_device(policy: sections.Policy) -> Any:
    """The configured torch device."""
    import torch

    return torch.device(policy.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def number_format(policy: sections.Policy, published: str) -> dict[str, Any]:
    """Keyword arguments of transformers' `from_pretrained` for `policy.dtype`; `auto` is `published`."""
    import torch

    name = published if policy.dtype == "auto" else policy.dtype
    if name in ("int8", "int4"):
        from transformers import BitsAndBytesConfig

        quantised = BitsAndBytesConfig(load_in_8bit=name == "int8", load_in_4bit=name == "int4")
        return {"quantization_config": quantised, "torch_dtype": torch.float16}
    return {"torch_dtype": {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]}


def refuse_other_dtypes(policy: sections.Policy) -> None:
    """Raises UserError where `dtype` asks for a number format that this adapter's stack does not offer."""
    if policy.dtype not in ("auto", "fp32"):
        raise UserError(f"adapter {policy.adapter}: dtype {policy.dtype} is not available; it computes in fp32")


def statistics_key(policy: sections.Policy, embodiment: str, known: Any) -> str:
    """Which of the `known` statistics un-normalise: the configured, or the only one of the embodiment's family."""
    names = list(known)
    if policy.statistics:
        check_name("statistics", policy.statistics, names)
        return policy.statistics
    family = STATISTICS.get(embodiment, embodiment)
    fitting = [name for name in names if name.startswith(family)]
    if len(fitting) != 1:
        raise UserError(
            f"adapter {policy.adapter}: `statistics` must say which fit {embodiment}; known: {', '.join(sorted(names))}"
        )
    return fitting[0]


def options(policy: sections.Policy, more: dict[str, tuple[float, float, float]] | None = None) -> dict[str, float]:
    """The policy's options, those that all published policies have included."""
    return check_options(policy, OPTIONS | (more or {}))


def metric(actions: np.ndarray, embodiment: str, gain: float) -> np.ndarray:
    """Actions (..., 7) as the embodiment's data set records them, gripper 1 open, to metric ones times `gain`.

    What a network says of the gripper may lie beyond what it was trained on: it is clipped to an opening.
    """
    result = embodiments.from_recorded(actions, embodiment)
    result[..., :6] *= gain
    result[..., 6] = np.clip(result[..., 6], 0, 1)
    return result


class Memory:
    """What happened earlier in each episode. Asking anew about a step forgets it and what came after it.

    So an episode begins at its step 0, whatever an interrupted one of the same number left behind.
    """

    def __init__(self, length: int, episodes: int = 4096):
        self._length, self._limit = length, episodes
        self._kept: OrderedDict[int, list[tuple[int, Any]]] = OrderedDict()

    def before(self, episode: int, step: int) -> list[Any]:
        """At most `length` entries of earlier steps, oldest first."""
        kept = [entry for entry in self._kept.get(episode, []) if entry[0] < step]
        return [value for _, value in kept[-self._length :]]

    def add(self, episode: int, step: int, value: Any) -> None:
        """Note `value` for a step. The episode that was silent longest is forgotten where there are too many."""
        kept = [entry for entry in self._kept.pop(episode, []) if entry[0] < step]
        self._kept[episode] = [*kept, (step, value)][-self._length :]
        if len(self._kept) > self._limit:
            self._kept.popitem(last=False)
