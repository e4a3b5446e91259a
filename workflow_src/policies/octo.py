"""Octo 1.5 (arXiv 2405.12213): a window of two images, a diffusion head, and a chunk of four actions, ensembled.

`checkpoint`: hf://rail-berkeley/octo-small-1.5, …/octo-base-1.5, or a folder. The instruction reaches T5 as it is.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from workflow_src.common import sections
from workflow_src.common.seeds import derive
from workflow_src.policies import images, pretrained
from workflow_src.policies.adapter import Observation, in_batches
from workflow_src.policies.wire import Metadata

CHECKPOINT = "rail-berkeley/octo-base-1.5"
IMAGE, WINDOW, CHUNK = 256, 2, 4


class Octo:
    """A loaded checkpoint: rows are computed side by side, each with noise of its own."""

    def __init__(self, policy: sections.Policy, lab: sections.Lab, batch: int):
        import os

        pretrained.refuse_other_dtypes(policy)
        if policy.offline:
            os.environ["HF_HUB_OFFLINE"] = "1"  # for T5's tokenizer and configuration, which it fetches by itself
        if policy.device:
            os.environ["JAX_PLATFORMS"] = policy.device
        import jax
        from octo.model.octo_model import OctoModel

        # Octo fetches from the hub by itself as well, but always the newest revision.
        where = pretrained.folder(replace(policy, checkpoint=policy.checkpoint.removeprefix("hf://")), CHECKPOINT)
        self._model, self._batch, self._embodiment = OctoModel.load_pretrained(where), batch, lab.embodiment
        self._gain = pretrained.options(policy)["commanded_gain"]
        known = self._model.dataset_statistics
        if "action" in known:  # fine-tuned on one data set
            self._statistics = known["action"]
        else:
            self._statistics = known[pretrained.statistics_key(policy, lab.embodiment, known)]["action"]
        self._memory = pretrained.Memory(WINDOW - 1)

        def one(model: OctoModel, seen: dict, task: dict, key: np.ndarray) -> np.ndarray:
            seen, task = jax.tree_util.tree_map(lambda leaf: leaf[None], (seen, task))
            return model.sample_actions(seen, task, unnormalization_statistics=self._statistics, rng=key)[0]

        # Mapped over rows instead of batched: a batch would draw the noise of all rows from one key. The model is an
        # argument, because what a compiled function closes over is written into it, all weights included.
        self._sample = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, 0)))
        self._tree_map = jax.tree_util.tree_map
        limits = {name: np.asarray(self._statistics[key]).tolist() for name, key in (("q01", "p01"), ("q99", "p99"))
                  if key in self._statistics}  # fmt: skip
        self.metadata = Metadata(
            control_rate=pretrained.embodiments.get(lab.embodiment).control_hz, chunk=CHUNK, history=WINDOW, batched=True,
            batch=batch, execution=policy.execution or "ensemble",
            revision=pretrained.revision(policy, where), extra={"sampling": True, **limits},
        )  # fmt: skip

    def act(self, observation: Observation) -> dict[str, np.ndarray]:
        seen, mask = self._windows(observation)
        tasks = self._model.create_tasks(texts=observation.prompt)
        keys = np.stack([_key(int(seed), int(step)) for seed, step in zip(observation.seed, observation.step)])

        def run(rows: np.ndarray) -> tuple[np.ndarray]:
            given = {"image_primary": seen[rows], "timestep_pad_mask": mask[rows]}
            task = self._tree_map(lambda leaf: np.asarray(leaf)[rows], tasks)
            return (np.asarray(self._sample(self._model, given, task, keys[rows])),)

        (answers,) = in_batches(len(observation), self._batch, run)
        return {"actions": pretrained.metric(answers, self._embodiment, self._gain)}

    def _windows(self, observation: Observation) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 (N, 2, 256, 256, 3), and whether each is one (N, 2) bool: before the first stands a copy of it."""
        windows, mask = [], []
        for image, episode, step in zip(observation.image, observation.episode, observation.step):
            now = images.lanczos(image, IMAGE)
            window = [*self._memory.before(int(episode), int(step)), now]
            self._memory.add(int(episode), int(step), now)
            missing = WINDOW - len(window)
            windows.append(np.stack([window[0]] * missing + window))
            mask.append([False] * missing + [True] * len(window))
        return np.stack(windows), np.array(mask)


def _key(seed: int, step: int) -> np.ndarray:
    """A JAX key, uint32 (2,), for one step of one rollout."""
    number = derive(seed, "octo", step)
    return np.array([number >> 32, number & 0xFFFFFFFF], np.uint32)


def load(policy: sections.Policy, networks: Path, lab: sections.Lab, seed: int, batch: int) -> Octo:
    """See `policies/adapter.py`. Rows bring their own seeds, so `seed` is not needed."""
    return Octo(policy, lab, batch)
