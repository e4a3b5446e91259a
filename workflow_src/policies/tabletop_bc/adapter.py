"""Serves a snapshot of a behaviour-cloning network, as trained or perturbed.

Options: `noise` m, standard deviation of Gaussian noise on each translation; `gripper_flips`, probability per step that
the gripper is told the opposite; `gain`, factor on the translations.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from workflow_src.common import sections
from workflow_src.common.config import check_name, from_dict
from workflow_src.common.errors import UserError
from workflow_src.common.files import digest, sha256_file
from workflow_src.common.seeds import rng
from workflow_src.policies.adapter import Observation, check_options, in_batches
from workflow_src.policies.wire import Metadata

OPTIONS = {"noise": (0.0, 0.0, 1.0), "gripper_flips": (0.0, 0.0, 1.0), "gain": (1.0, -10.0, 10.0)}


class Network:
    """A trained network that runs at one batch shape, on the GPU where there is one."""

    def __init__(self, policy: sections.Policy, networks: Path, lab: sections.Lab, batch: int):
        import torch
        from safetensors.torch import load_file

        from workflow_src.common.compute import configure_torch
        from workflow_src.policies.tabletop_bc import network

        self.device = configure_torch()
        path, content = find_snapshot(policy, networks)
        shape = from_dict(network.Shape, content["shape"], f"{policy.network}.json: shape")
        if shape.image_size != lab.image_size:
            raise UserError(
                f"{path}: trained on {shape.image_size} px, but lab.image_size is {lab.image_size}: train it anew"
            )
        self._model = network.TabletopPolicy(shape).eval().requires_grad_(False)
        self._model.load_state_dict(load_file(path), strict=True)
        self._model.to(self.device, memory_format=torch.channels_last)
        self._embed, self._metric, self._torch = network.embed_words, network.metric, torch
        self.batch, self.image_size, self.revision = batch, shape.image_size, sha256_file(path)

    def __call__(self, images: np.ndarray, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (N, H, W, 3), N instructions → actions float32 (N, 7) metric, state float32 (N, S)."""
        words = self._embed(prompts)

        def run(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            with self._torch.inference_mode():
                batch = self._torch.from_numpy(images[rows]).to(self.device)
                actions, state = self._model(batch, words[rows][:, None].to(self.device))
                return self._metric(actions[:, 0]).cpu().numpy(), state.cpu().numpy()

        return in_batches(len(images), self.batch, run)


def find_snapshot(policy: sections.Policy, networks: Path) -> tuple[Path, dict]:
    """Weights of the configured snapshot, and the description of its network. Raises UserError."""
    description = networks / policy.network / f"{policy.network}.json"
    if not policy.network or not description.is_file():
        raise UserError(
            f"adapter {policy.adapter}: network {policy.network!r} is not trained: {description} is missing"
        )
    content = json.loads(description.read_text(encoding="utf-8"))
    check_name(f"{description}: snapshot", str(policy.snapshot), content["snapshots"])
    path = description.parent / content["snapshots"][str(policy.snapshot)]["file"]
    if not path.is_file() or sha256_file(path) != content["snapshots"][str(policy.snapshot)]["sha256"]:
        raise UserError(f"{path}: missing or damaged; delete {description} to have it trained again")
    return path, content


class BehaviourCloning:
    """The network's actions, perturbed as configured."""

    def __init__(self, network: Network, options: dict[str, float], control_rate: float):
        self._network, self._options = network, options
        sampling = bool(options["noise"] or options["gripper_flips"])
        revision = digest({"network": network.revision, "options": options})
        self.metadata = Metadata(
            control_rate=control_rate, chunk=1, batched=True, batch=network.batch, image_size=network.image_size,
            revision=revision, extra={"sampling": sampling},
        )  # fmt: skip

    def act(self, observation: Observation) -> dict[str, np.ndarray]:
        actions, _ = self._network(observation.image, observation.prompt)
        for action, seed, step in zip(actions, observation.seed, observation.step):
            perturb(action, self._options, int(seed), int(step))
        return {"actions": actions[:, None]}


def perturb(action: np.ndarray, options: dict[str, float], seed: int, step: int) -> None:
    """Changes one action (7,) in place, as a function of (seed, step)."""
    action[:3] *= options["gain"]
    if options["noise"] or options["gripper_flips"]:
        random = rng(seed, "perturbation", step)
        action[:3] += options["noise"] * random.standard_normal(3)
        if random.random() < options["gripper_flips"]:
            action[6] = 1.0 - action[6]


def load(policy: sections.Policy, networks: Path, lab: sections.Lab, seed: int, batch: int) -> BehaviourCloning:
    """See `policies/adapter.py`. Rows bring their own seeds, so `seed` is not needed."""
    from workflow_src.embodiments import get

    options = check_options(policy, OPTIONS)
    return BehaviourCloning(Network(policy, networks, lab, batch), options, get(lab.embodiment).control_hz)
