"""LeRobot itself, in its own environment: randomly initialised policies are served, and rolled out in the tabletop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from envs.build import interpreter
from tests.chain import MINI, ROOT, copy_of, run
from tests.test_rollouts import SIZE, FakeWorld
from workflow_src.common import sections
from workflow_src.common.errors import UserError
from workflow_src.embodiments import dead_reckon
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
    from pathlib import Path
    from workflow_src.policies.pretrained import import_torch
    torch = import_torch()
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    seen = {"observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, 48, 48))}
    state = {"observation.state": PolicyFeature(FeatureType.STATE, (8,))}
    done = {"action": PolicyFeature(FeatureType.ACTION, (7,))}
    common = {"output_features": done, "pretrained_backbone_weights": None, "device": "cpu"}
    small = {"chunk_size": 4, "n_action_steps": 2, "dim_model": 32, "n_heads": 2, "dim_feedforward": 64, "n_encoder_layers": 1,
             "use_vae": False}
    configs = {
        "act": ACTConfig(input_features=seen, **small, **common),
        "act_state": ACTConfig(input_features={**seen, **state}, **small, **common),
        "diffusion": DiffusionConfig(input_features={**seen, **state}, horizon=8, n_action_steps=4, crop_shape=None,
                                     down_dims=(16, 32), spatial_softmax_num_keypoints=4, num_train_timesteps=5, **common),
    }
    statistics = {}
    for name, feature in {**seen, **state, **done}.items():
        shape = (3, 1, 1) if feature.type == FeatureType.VISUAL else feature.shape
        statistics[name] = {"mean": torch.zeros(shape), "std": torch.full(shape, 0.02), "min": -torch.ones(shape),
                            "max": torch.ones(shape)}
    for name, config in configs.items():
        torch.manual_seed(0)
        policy = get_policy_class(config.type)(config)
        for part in policy, *make_pre_post_processors(config, dataset_stats=statistics):
            part.save_pretrained(Path(sys.argv[1]) / name)
"""
STATE = {"state": "observation.state", "state_layout": ["x", "y", "z", "roll", "pitch", "yaw", "zero", "opening"]}
POSE = [0.3, 0.0, 0.1, 0.0, 0.0, 3.1, 1.0]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    command = [interpreter("lerobot"), "-c", textwrap.dedent(MAKE), str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


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


def test_an_act_policy_is_rolled_out_in_the_tabletop(checkpoints, serve):
    env = make_lab(LAB, 2)
    observation, info = env.reset(seed=[1, 2], options={"trials": [{"task": "lift", "initial_state": None, "seed": s}
                                                                   for s in (1, 2)]})  # fmt: skip
    trials = [
        Trial(f"lift/{i}", "lift", "lift the block", observation["image"][i], info["state"][i].tolist(), i)
        for i in range(2)
    ]
    with serve(checkpoints / "act") as policy:
        assert (policy.metadata.chunk, policy.metadata.execution, policy.metadata.batch) == (2, "all", 4)
        first, second = next(roll_out(env, policy, shard_of(trials, 1, 0, 1), LAB.horizon))
    env.close()
    assert first.steps == second.steps == LAB.horizon and first.actions.shape == (LAB.horizon, 7)
    assert 0 < np.abs(first.actions[:, :3]).max() < 0.2 and not np.array_equal(first.actions, second.actions)
    assert not np.array_equal(first.frames[0], first.frames[-1])


def test_units_gripper_and_batches_of_an_act_policy(checkpoints, serve):
    options = {"translation_unit": 0.5, "gripper_open": -1.0, "gripper_closed": 1.0}
    with serve(checkpoints / "act") as policy:
        plain = policy.infer(observe(4, 0, 0))["actions"]
        for row in range(4):
            one = {key: value[row : row + 1] for key, value in observe(4, 0, 0).items()}
            assert np.array_equal(policy.infer(one)["actions"][0], plain[row])
        revision = policy.metadata.revision
    with serve(checkpoints / "act", options=options) as policy:
        scaled = policy.infer(observe(4, 0, 0))["actions"]
        assert policy.metadata.revision != revision
    np.testing.assert_allclose(scaled[..., :3], plain[..., :3] / 2, rtol=1e-6)
    assert np.array_equal(scaled[..., 3:6], plain[..., 3:6])
    # plain is clipped to 0…1: what was g there is now (1 - g) / 2, wherever nothing was clipped
    kept = (plain[..., 6] > 0) & (plain[..., 6] < 1)
    np.testing.assert_allclose(scaled[..., 6][kept], (1 - plain[..., 6][kept]) / 2, rtol=1e-5)
    assert np.all(scaled[..., 6] <= 0.51) or not kept.all()


def test_a_diffusion_policy_draws_by_seed(checkpoints, serve):
    pose = np.tile(POSE, (2, 1))
    with serve(checkpoints / "diffusion", foreign=STATE) as policy:
        assert policy.metadata.history == 2 and policy.metadata.extra["sampling"] is True
        answers = [policy.infer(observe(2, 0, seed, pose=pose))["actions"] for seed in (0, 0, 7)]
        assert answers[0].shape == (2, 4, 7) and np.isfinite(answers[0]).all()
        assert np.array_equal(answers[0], answers[1]) and not np.array_equal(answers[0], answers[2])
        with pytest.raises(UserError, match=r"needs the robot's `pose` \(N, 7\): x, y, z, roll, pitch, yaw"):
            policy.infer(observe(2, 0, 0))


def test_an_act_policy_is_told_the_reckoned_state(checkpoints, serve, tmp_path):
    pictures = np.random.default_rng(2).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    trials = [Trial(f"lift/{i}", "lift", "lift it", pictures[i], POSE, i) for i in range(2)]
    with serve(checkpoints / "act_state", foreign=STATE) as policy:
        assert policy.metadata.extra["needs_pose"] is True
        (first, second) = next(roll_out(FakeWorld(2), policy, shard_of(trials, 1, 0, 1), 4))
        for rollout, step in ((first, 0), (second, 0), (first, 2), (second, 2)):  # asked at both
            pose = np.array(POSE)
            for action in rollout.actions[:step]:
                pose = dead_reckon(pose, action)
            asked = {**observe(1, step, 0, pose=pose[None]), "image": rollout.frames[step][None]}
            answer = policy.infer(asked)["actions"][0]
            np.testing.assert_allclose(rollout.actions[step : step + 2], answer, atol=1e-6)
            moved = policy.infer({**asked, "pose": pose[None] - 0.3})["actions"][0]
            assert np.abs(moved - answer).max() > 1e-3
    doctor_wants_states(tmp_path, pictures)


def doctor_wants_states(folder, pictures):
    """The doctor passes the policy served in `folder`, unless trials do not say where the gripper is."""
    task = folder / "trials" / "lift"
    task.mkdir(parents=True)
    for state, code in ((POSE, 0), (None, 2)):
        for index, picture in enumerate(pictures):
            Image.fromarray(picture).save(task / f"{index}.png")
            (task / f"{index}.json").write_text(json.dumps({"instruction": "lift it", "initial_state": state}))
        command = [sys.executable, "-m", "workflow_src.policies.doctor", "--endpoint", folder / "0" / "endpoint.json",
                   "--embodiment", "tabletop", "--trials", folder / "trials"]  # fmt: skip
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
    assert done.stdout.startswith("mapping           failed      it needs the robot's state, and 2 of 2 trials have no")


def test_a_policy_in_its_own_environment_is_ranked(checkpoints, finished, tmp_path):
    """The tabletop ranking with a LeRobot policy more: it is examined, rolled out and ranked; the others are not redone."""
    folder = copy_of(finished, tmp_path / "run")
    act = {"adapter": "lerobot", "checkpoint": str(checkpoints / "act_state"), "env": str(interpreter("lerobot")),
           "foreign": {**STATE, "state_layout": ["zero"] * 8}}  # fmt: skip
    config = yaml.safe_load(MINI.read_text())
    config["policies"]["act"] = act
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(config))
    ranking = "results/tables/policy_ranking.csv"
    done = run(folder, "--", "results/doctor/act.csv", ranking, config=tmp_path / "more.yaml")
    text = done.stdout + done.stderr
    assert text.count("rule roll_out:") == 1 and "rule train_" not in text
    table = pd.read_csv(folder / ranking).set_index("policy")
    assert sorted(table.index) == ["act", "bc_3", "bc_6", "random"] and table.loc["act", "n_real"] == 6
    assert set(pd.read_csv(folder / "results" / "doctor" / "act.csv")["outcome"]) <= {"passed", "not judged"}


LOAD = """
    import json, sys
    from workflow_src.common import config, sections
    from workflow_src.common.errors import UserError
    from workflow_src.policies import adapter
    said = []
    for fields in json.loads(sys.argv[1]):
        try:
            adapter.load("p", config.from_dict(sections.Policy, {"adapter": "lerobot", **fields}), None, sections.Lab(), 0, 1)
        except UserError as problem:
            said.append(str(problem))
    print(json.dumps(said))
"""


def test_a_state_that_does_not_fit_is_one_line_each(checkpoints):
    asked = [("act_state", {}), ("act_state", {**STATE, "state_layout": ["x", "y"]}), ("act", STATE)]
    fields = json.dumps([{"checkpoint": str(checkpoints / name), "foreign": foreign} for name, foreign in asked])
    command = [interpreter("lerobot"), "-c", textwrap.dedent(LOAD), fields]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    assert json.loads(said[-1]) == [
        "adapter lerobot: the checkpoint wants the robot's state, 8 numbers; say what they are: foreign: {state: "
        "observation.state, state_layout: [8 of x, y, z, roll, pitch, yaw, opening, closedness, zero]}",
        "adapter lerobot: foreign.state_layout names 2 numbers (x, y), and the checkpoint wants 8",
        "policies.p.foreign.state: this policy takes no state of the robot; remove it",
    ]
