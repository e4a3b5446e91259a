"""LeRobot itself, in its own environment: randomly initialised policies are served, and rolled out in the tabletop."""

from __future__ import annotations

import json
import os
import subprocess
import textwrap

import numpy as np
import pytest

from envs.build import interpreter
from tests.chain import ROOT
from workflow_src.common import sections
from workflow_src.common.errors import UserError
from workflow_src.policies import client
from workflow_src.rollouts.loop import roll_out
from workflow_src.rollouts.run import shard_of
from workflow_src.rollouts.trials import Trial
from workflow_src.rollouts.worlds import make_lab

pytestmark = pytest.mark.requires("lerobot")
LAB = sections.Lab(image_size=48, horizon=5, workers=1)

# Untrained policies of LeRobot's own classes, saved as its training saves them. Actions: deviation 0.02 around zero.
MAKE = """
    import sys
    from workflow_src.policies.lerobot import _import_torchvision
    torch = _import_torchvision()
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    torch.manual_seed(0)
    out, kind = sys.argv[1:]
    seen = {"observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, 48, 48))}
    done = {"action": PolicyFeature(FeatureType.ACTION, (7,))}
    common = {"output_features": done, "pretrained_backbone_weights": None, "device": "cpu"}
    if kind == "act":
        config = ACTConfig(input_features=seen, chunk_size=4, n_action_steps=2, dim_model=32, n_heads=2, dim_feedforward=64,
                           n_encoder_layers=1, use_vae=False, **common)
    else:
        seen["observation.state"] = PolicyFeature(FeatureType.STATE, (7,))
        config = DiffusionConfig(input_features=seen, horizon=8, n_action_steps=4, crop_shape=None, down_dims=(16, 32),
                                 spatial_softmax_num_keypoints=4, num_train_timesteps=5, **common)
    statistics = {}
    for name, feature in {**seen, **done}.items():
        shape = (3, 1, 1) if feature.type == FeatureType.VISUAL else feature.shape
        statistics[name] = {"mean": torch.zeros(shape), "std": torch.full(shape, 0.02), "min": -torch.ones(shape),
                            "max": torch.ones(shape)}
    parts = get_policy_class(kind)(config), *make_pre_post_processors(config, dataset_stats=statistics)
    for part in parts:
        part.save_pretrained(out)
"""


def checkpoint(folder, kind):
    subprocess.run(
        [interpreter("lerobot"), "-c", textwrap.dedent(MAKE), str(folder), kind],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="module")
def act(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("act"), "act")


@pytest.fixture
def serve(tmp_path):
    """Serves a checkpoint from LeRobot's environment; yields the connection."""
    servers = []

    def begin(where, **fields):
        policy = {"adapter": "lerobot", "checkpoint": str(where), "offline": True, **fields}
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        stage = {"seed": 0, "lab": {"image_size": 48}, "policies": {"p": policy}, "rollouts": {"batch": 4}}
        (folder / "stage.json").write_text(json.dumps(stage))
        command = [interpreter("lerobot"), "-m", "workflow_src.policies.serve", "--config", folder / "stage.json",
                   "--policy", "p", "--endpoint-file", folder / "endpoint.json", "--log", folder / "log"]  # fmt: skip
        servers.append(subprocess.Popen(list(map(str, command)), cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}))
        return client.connect(folder / "endpoint.json", 120)

    yield begin
    for server in servers:
        server.terminate()
        server.wait(20)


def observe(rows, step, seeds, **extra):
    picture = np.random.default_rng(1).integers(0, 256, (4, 48, 48, 3), np.uint8)[:rows]
    number = np.arange(rows)
    prompts = ["lift the block"] * rows
    return {
        "image": picture,
        "prompt": prompts,
        "episode": number,
        "step": number * 0 + step,
        "seed": seeds + number,
        **extra,
    }


def test_an_act_policy_is_rolled_out_in_the_tabletop(act, serve):
    env = make_lab(LAB, 2)
    observation, info = env.reset(seed=[1, 2], options={"trials": [{"task": "lift", "initial_state": None, "seed": s}
                                                                   for s in (1, 2)]})  # fmt: skip
    trials = [
        Trial(f"lift/{i}", "lift", "lift the block", observation["image"][i], info["state"][i].tolist(), i)
        for i in range(2)
    ]
    with serve(act) as policy:
        assert (policy.metadata.chunk, policy.metadata.execution, policy.metadata.batch) == (2, "all", 4)
        first, second = next(roll_out(env, policy, shard_of(trials, 1, 0, 1), LAB.horizon))
    env.close()
    assert first.steps == second.steps == LAB.horizon and first.actions.shape == (LAB.horizon, 7)
    assert 0 < np.abs(first.actions[:, :3]).max() < 0.2 and not np.array_equal(first.actions, second.actions)
    assert not np.array_equal(first.frames[0], first.frames[-1])


def test_units_gripper_and_batches_of_an_act_policy(act, serve):
    options = {"translation_unit": 0.5, "gripper_open": -1.0, "gripper_closed": 1.0}
    with serve(act) as policy:
        plain = policy.infer(observe(4, 0, 0))["actions"]
        for row in range(4):
            one = {key: value[row : row + 1] for key, value in observe(4, 0, 0).items()}
            assert np.array_equal(policy.infer(one)["actions"][0], plain[row])
        revision = policy.metadata.revision
    with serve(act, options=options) as policy:
        scaled = policy.infer(observe(4, 0, 0))["actions"]
        assert policy.metadata.revision != revision
    np.testing.assert_allclose(scaled[..., :3], plain[..., :3] / 2, rtol=1e-6)
    assert np.array_equal(scaled[..., 3:6], plain[..., 3:6])
    # plain is clipped to 0…1: what was g there is now (1 - g) / 2, wherever nothing was clipped
    kept = (plain[..., 6] > 0) & (plain[..., 6] < 1)
    np.testing.assert_allclose(scaled[..., 6][kept], (1 - plain[..., 6][kept]) / 2, rtol=1e-5)
    assert np.all(scaled[..., 6] <= 0.51) or not kept.all()


def test_a_diffusion_policy_draws_by_seed_and_needs_a_state(tmp_path, serve):
    where, state = checkpoint(tmp_path / "diffusion", "diffusion"), np.zeros((2, 7), np.float32)
    with serve(where) as policy:
        assert policy.metadata.history == 2 and policy.metadata.extra["sampling"] is True
        answers = [policy.infer(observe(2, 0, seed, state=state))["actions"] for seed in (0, 0, 7)]
        assert answers[0].shape == (2, 4, 7) and np.isfinite(answers[0]).all()
        assert np.array_equal(answers[0], answers[1]) and not np.array_equal(answers[0], answers[2])
        with pytest.raises(UserError, match="needs the robot's state, and a world of images has none to give"):
            policy.infer(observe(2, 0, 0))
