"""Octo's adapter under Octo's JAX, in an environment of its own, with a stand-in of its model."""

from __future__ import annotations

import subprocess
import textwrap

import numpy as np
import pytest

from envs.build import interpreter
from tests.chain import ROOT

# Five rows at one image, in batches of two and one by one, and what the stand-in must have answered.
SCRIPT = """
    import sys
    from functools import partial
    from types import ModuleType
    import jax
    import jax.numpy as jnp
    import numpy as np
    from workflow_src.common import sections
    from workflow_src.policies import adapter, images, octo

    LIMITS = {"mean": np.full(7, 0.01), "std": np.full(7, 0.1), "mask": np.array([True] * 6 + [False])}

    @jax.tree_util.register_pytree_node_class
    class OctoModel:
        dataset_statistics = {"bridge_dataset": {"action": LIMITS}}

        def __init__(self, weight):
            self.weight = weight

        def tree_flatten(self):
            return (self.weight,), None

        @classmethod
        def tree_unflatten(cls, _, leaves):
            return cls(*leaves)

        @classmethod
        def load_pretrained(cls, where):
            return cls(jnp.float32(3))

        def create_tasks(self, texts):
            words = {"input_ids": np.array([[len(text)] * 16 for text in texts])}
            return {"language_instruction": words, "pad_mask_dict": {"language_instruction": np.ones(len(texts), bool)}}

        @partial(jax.jit, static_argnames=("train", "argmax", "sample_shape"))
        def sample_actions(self, observations, tasks, unnormalization_statistics=None, train=False, argmax=False,
                           sample_shape=(), rng=None):
            image, real = observations["image_primary"], observations["timestep_pad_mask"]
            assert image.shape == (1, 2, 256, 256, 3) and real.shape == (1, 2) and real.dtype == bool
            words = tasks["language_instruction"]["input_ids"].mean(-1)
            drawn = jax.random.normal(rng, (len(image), 4, len(unnormalization_statistics["mean"])))
            action = drawn + (self.weight * real.sum(-1) + words + image[:, -1].mean((1, 2, 3)))[:, None, None]
            limits = unnormalization_statistics
            return jnp.where(limits["mask"], action * limits["std"] + limits["mean"], action)

    for name in ("octo", "octo.model", "octo.model.octo_model"):
        sys.modules[name] = ModuleType(name)
    sys.modules["octo.model.octo_model"].OctoModel = OctoModel
    lab = sections.Lab(embodiment="widowx", image_size=64)
    policy = adapter.load("p", sections.Policy(adapter="octo", checkpoint=sys.argv[1]), None, lab, 0, 2)

    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    prompts = ["lift", "lift", "push it", "lift", "close the drawer"]

    def act(rows, step=0):
        number = np.array(rows)
        seen = np.stack([image] * len(rows))
        given = adapter.Observation(seen, [prompts[row] for row in rows], number, number * 0 + step, number + 7)
        return policy.act(given)["actions"]

    def expected(rows, step, real):
        light = images.lanczos(image, 256).mean()
        noise = [jax.random.normal(octo._key(row + 7, step), (1, 4, 7))[0] for row in rows]
        return 0.01 + 0.1 * np.stack([drawn + 3 * real + len(prompts[row]) + light for row, drawn in zip(rows, noise)])

    together, alone = act(range(5)), np.concatenate([act([row]) for row in range(5)])
    print(jax.__version__)
    np.savez(sys.argv[2], together=together, alone=alone, later=act([3, 1], 1), expected=expected(range(5), 0, 1),
             expected_later=expected([3, 1], 1, 2))
"""


@pytest.mark.requires("jax")
def test_rows_are_mapped_each_with_noise_of_its_own(tmp_path):
    command = [interpreter("jax"), "-c", textwrap.dedent(SCRIPT), tmp_path, tmp_path / "out.npz"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "0.4.20\n", done.stderr[-3000:]
    out = np.load(tmp_path / "out.npz")
    assert np.array_equal(out["together"], out["alone"])
    np.testing.assert_allclose(out["together"][..., :6], out["expected"][..., :6], rtol=1e-5)
    np.testing.assert_allclose(out["later"][..., :6], out["expected_later"][..., :6], rtol=1e-5)
    assert np.all(out["together"][..., 6] == 1)  # beyond an opening
