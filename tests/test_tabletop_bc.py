"""The tabletop's policies: instructions, randomness, batches, snapshots; and that cloning learns."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from workflow_src.common import files, sections
from workflow_src.common.errors import UserError
from workflow_src.policies import adapter
from workflow_src.policies.adapter import Observation
from workflow_src.policies.tabletop_bc.network import Shape, TabletopPolicy, embed_words, metric
from workflow_src.training import behaviour_cloning
from workflow_src.training.behaviour_cloning import Cloning, Frames, augment, blur, build

torch.set_num_threads(1)
LAB = sections.Lab(image_size=24)
BATCH = 5
PROMPTS = ["put the red block on the plate", "lift the red block", "push the red block to the left"]


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """A folder as training leaves it: one untrained network with one snapshot."""
    root = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    shape = Shape(image_size=24, state=14, width=8, keypoints=6)
    network = TabletopPolicy(shape)
    (root / "bc").mkdir()
    save_file(network.state_dict(), root / "bc" / "step_10.safetensors")
    snapshots = {
        "10": {"file": "step_10.safetensors", "sha256": files.sha256_file(root / "bc" / "step_10.safetensors")}
    }
    files.write_json(root / "bc" / "bc.json", {"shape": vars(shape), "snapshots": snapshots})
    return root


def observe(rows: int, seed: int = 0) -> Observation:
    random = np.random.default_rng(seed)
    return Observation(
        image=random.integers(0, 256, (rows, 24, 24, 3), np.uint8),
        prompt=[PROMPTS[row % 3] for row in range(rows)],
        episode=np.arange(rows),
        step=np.arange(rows) % 4,
        seed=np.arange(rows) + 100,
    )


def take(observation: Observation, rows: list[int]) -> Observation:
    return Observation(
        observation.image[rows], [observation.prompt[row] for row in rows], observation.episode[rows],
        observation.step[rows], observation.seed[rows],
    )  # fmt: skip


def load(networks, **changes):
    policy = sections.Policy(**{"network": "bc", "snapshot": 10, **changes})
    return adapter.load("p", policy, networks, LAB, 0, BATCH)


POLICIES = {
    "bc": {},
    "noisy": {"options": {"noise": 0.02, "gripper_flips": 0.3, "gain": 0.5}},
    "scripted": {"adapter": "tabletop_scripted"},
    "random": {"adapter": "tabletop_random", "network": "", "snapshot": 0},
}


@pytest.mark.parametrize("name", POLICIES)
def test_rows_do_not_depend_on_their_batch(networks, name):
    """Bitwise: alone, in another order, split over calls, or on another server."""
    policy, everything = load(networks, **POLICIES[name]), observe(12)
    together = policy.act(everything)["actions"]
    assert together.shape == (12, 1, 7) and together.dtype == np.float32
    assert np.isfinite(together).all() and set(np.unique(together[..., 6])) <= {0.0, 1.0}
    backwards = policy.act(take(everything, list(range(11, -1, -1))))["actions"]
    np.testing.assert_array_equal(backwards[::-1], together)
    again = load(networks, **POLICIES[name])
    for row in (0, 7):
        np.testing.assert_array_equal(again.act(take(everything, [row]))["actions"][0], together[row])


def test_noise_is_a_function_of_seed_and_step(networks):
    policy = load(networks, **POLICIES["noisy"])
    same = take(observe(3), [0, 0, 0, 0])
    same = Observation(same.image, same.prompt, same.episode, np.array([0, 0, 1, 0]), np.array([1, 1, 1, 2]))
    actions = policy.act(same)["actions"][:, 0]
    np.testing.assert_array_equal(actions[0], actions[1])
    assert not np.array_equal(actions[0], actions[2]) and not np.array_equal(actions[0], actions[3])


def test_options_do_what_they_say(networks):
    plain, view = load(networks).act(observe(200))["actions"][:, 0], observe(200)
    half = load(networks, options={"gain": 0.5}).act(view)["actions"][:, 0]
    np.testing.assert_allclose(half[:, :3], plain[:, :3] / 2, rtol=1e-6)
    flipped = load(networks, options={"gripper_flips": 0.25}).act(view)["actions"][:, 0]
    assert 0.15 < (flipped[:, 6] != plain[:, 6]).mean() < 0.35
    noisy = load(networks, options={"noise": 0.01}).act(view)["actions"][:, 0]
    assert 0.008 < (noisy - plain)[:, :3].std() < 0.012 and np.array_equal(noisy[:, 3:], plain[:, 3:])


def test_revision_names_weights_and_options(networks):
    revisions = {load(networks, **changes).metadata.revision for changes in POLICIES.values()}
    assert len(revisions) == len(POLICIES) and all(revisions)
    assert load(networks).metadata.revision == load(networks).metadata.revision


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"adapter": "tabletop_bv"}, "policies.p.adapter: 'tabletop_bv' is unknown; did you mean 'tabletop_bc'"),
        ({"network": "bd"}, "network 'bd' is not trained"),
        ({"snapshot": 11}, "snapshot: '11' is unknown; Allowed: 10"),
        ({"options": {"nois": 0.1}}, "'nois' is unknown; did you mean 'noise'"),
        ({"options": {"gripper_flips": 1.5}}, "gripper_flips of adapter tabletop_bc: 1.5 is not between"),
    ],
)
def test_wrong_configuration_is_one_line(networks, changes, line):
    with pytest.raises(UserError, match=line):
        load(networks, **changes)


def test_damaged_weights_and_other_image_size_are_refused(networks, tmp_path):
    (tmp_path / "bc").mkdir()
    for file in (networks / "bc").iterdir():
        (tmp_path / "bc" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"trained on 24 px, but lab.image_size is 48"):
        adapter.load("p", sections.Policy(network="bc", snapshot=10), tmp_path, sections.Lab(), 0, BATCH)
    weights = tmp_path / "bc" / "step_10.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="missing or damaged"):
        load(tmp_path)


def test_scripted_policy_refuses_an_instruction_it_has_no_script_for(networks):
    view = observe(2)
    strange = Observation(view.image, ["juggle", "lift the red block"], view.episode, view.step, view.seed)
    with pytest.raises(UserError, match="no script for the instruction 'juggle'"):
        load(networks, **POLICIES["scripted"]).act(strange)


def test_random_walk_is_smooth_and_bounded(networks):
    policy = load(networks, **POLICIES["random"])
    walks = np.array([[policy.action(seed, step) for step in range(18)] for seed in range(60)])
    assert np.abs(walks[..., :3]).max() <= 0.05 and 0.015 < walks[..., :3].std() < 0.022
    before, after = walks[:, :-1, 0].ravel(), walks[:, 1:, 0].ravel()
    assert 0.5 < np.corrcoef(before, after)[0, 1] < 0.85
    assert 0.05 < np.abs(np.diff(walks[..., 6], axis=1)).mean() < 0.25


def test_instruction_decides_and_its_spelling_does_not():
    torch.manual_seed(0)
    network = TabletopPolicy(Shape(image_size=24, state=14, width=8, keypoints=6)).eval()
    image = torch.randint(0, 256, (1, 24, 24, 3), dtype=torch.uint8)
    prompts = [*PROMPTS, "Lift the red  block."]
    actions, state = network(image, embed_words(prompts)[None])
    assert actions.shape == (1, 4, 4) and state.shape == (1, 14)
    assert torch.equal(actions[0, 1], actions[0, 3])
    assert not torch.allclose(actions[0, 0], actions[0, 1]) and not torch.allclose(actions[0, 1], actions[0, 2])
    bounds = metric(100 * actions)
    assert bounds[..., :3].abs().max() <= 0.05 and torch.equal(bounds[..., 3:6], torch.zeros(1, 4, 3))


def test_augmentation_keeps_geometry():
    pixels = torch.full((2, 3, 24, 24), -0.5)
    pixels[:, :, 8:12, 6:10] = 0.5
    neutral = torch.full((2, 7), 0.5)
    torch.testing.assert_close(augment(pixels, neutral, torch.zeros(2, 3, 12, 12)), pixels)
    seeds = torch.manual_seed(0)
    changed = augment(pixels, torch.rand(2, 7, generator=seeds), torch.randn(2, 3, 12, 12, generator=seeds))
    assert 0.03 < (changed - pixels).abs().mean() < 0.3
    torch.testing.assert_close(blur(pixels).mean(), pixels.mean())
    torch.testing.assert_close(blur(pixels)[:, :, 9, 7], pixels[:, :, 9, 7])
    assert blur(pixels)[0, 0, 8, 6] < 0 < blur(pixels)[0, 0, 9, 6]


def spots(count: int, size: int = 24) -> Frames:
    """Frames of a white spot; task 0 is to move towards it, task 1 away from it. State: where it is."""
    random = np.random.default_rng(0)
    place = random.uniform(-0.8, 0.8, (count, 2)).astype(np.float32)
    axis = np.linspace(-1, 1, size)
    columns, rows = np.meshgrid(axis, axis)
    near = (columns - place[:, 0, None, None]) ** 2 + (rows - place[:, 1, None, None]) ** 2 < 0.04
    images = np.repeat((200 * near[..., None]).astype(np.uint8), 3, axis=3)
    expert = np.zeros((count, 2, 7), np.float32)
    expert[:, 0, :2], expert[:, 1, :2], expert[:, 0, 6] = 0.05 * place, -0.05 * place, 1.0
    mirrored = place * np.array([-1, 1], np.float32)
    return Frames(
        images, expert, place, mirrored, PROMPTS[:2], [True, True], np.ones(2, np.float32), torch.device("cpu")
    )


@pytest.mark.parametrize("mirror", [False, True])
def test_cloning_learns_both_tasks_and_the_state(mirror):
    """Mirrored training must not confuse left and right."""
    frames = spots(256)
    config = sections.BehaviourCloning(width=8, keypoints=8, mirror=mirror)
    model, loss = build(frames, config, seed=1), Cloning(frames, 1, mirror)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(150):
        optimizer.zero_grad()
        loss(model, step, np.arange(32))["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        actions, state = model(frames.images, frames.words.expand(256, -1, -1))
    assert (state - frames.state).abs().mean() < 0.12
    assert (actions[..., :3] - frames.translation).abs().mean() < 0.12
    assert ((actions[..., 3] > 0) == (frames.opening > 0.5)).float().mean() > 0.97


def test_loss_depends_on_global_samples_only():
    frames = spots(64)
    model, loss = build(frames, sections.BehaviourCloning(width=8, keypoints=8), 1), Cloning(frames, 1, False)
    whole = loss(model, 7, np.arange(16))["loss"]
    halves = [loss(model, 7, part)["loss"] for part in (np.arange(8), np.arange(8, 16))]
    torch.testing.assert_close(whole, sum(halves) / 2, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """Six short episodes of the real lab, and stage files; returns their folder."""
    from workflow_src.episodes import record

    folder = tmp_path_factory.mktemp("recorded")
    lab = {"image_size": 24, "supersample": 1, "horizon": 4, "workers": 1}
    splits = {split: {"episodes": 6} for split in ("train", "validation", "judge")}
    training = {"steps": 4, "batch": 6, "checkpoint_every": 2, "warmup": 1}
    network = {
        "snapshots": [2, 4],
        "data_fraction": 0.5,
        "width": 8,
        "keypoints": 8,
        "mirror": True,
        "training": training,
    }
    files.write_json(folder / "episodes.json", {"seed": 1, "lab": lab, "episodes": {"splits": splits}})
    files.write_json(
        folder / "cloning.json", {"seed": 1, "lab": lab, "behaviour_cloning": {"bc": {**network, "training": training}}}
    )
    arguments = [
        "record",
        "--config",
        folder / "episodes.json",
        "--split",
        "train",
        "--out",
        folder / "train/episodes.parquet",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [str(argument) for argument in arguments])
        record.main()
    return folder


def clone(monkeypatch, recorded: Path, out: Path, network: str = "bc") -> Path:
    """Runs the training command; returns the description it wrote."""
    description = out / network / f"{network}.json"
    paths = {"--config": recorded / "cloning.json", "--episodes": recorded / "train/episodes.parquet"}
    paths |= {"--out": description, "--state": out / "state", "--network": network}
    monkeypatch.setattr("sys.argv", ["behaviour_cloning", *(str(part) for pair in paths.items() for part in pair)])
    behaviour_cloning.main()
    return description


def test_interrupted_training_ends_with_the_same_snapshots(monkeypatch, recorded, tmp_path):
    whole = json.loads(clone(monkeypatch, recorded, tmp_path / "whole").read_text())
    assert sorted(whole["snapshots"]) == ["2", "4"]
    save = behaviour_cloning.save_file

    def fail_late(tensors, path):
        if "step_4" in path.name:
            raise OSError("power cut")
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(behaviour_cloning, "save_file", fail_late)
        with pytest.raises(OSError, match="power cut"):
            clone(monkeypatch, recorded, tmp_path / "cut")
    assert not (tmp_path / "cut/bc/bc.json").exists()
    resumed = json.loads(clone(monkeypatch, recorded, tmp_path / "cut").read_text())
    assert resumed["snapshots"] == whole["snapshots"]
    policy = sections.Policy(network="bc", snapshot=4)
    served = adapter.load("p", policy, tmp_path / "cut", LAB, 0, BATCH)
    assert served.act(observe(3))["actions"].shape == (3, 1, 7)


def test_training_names_what_does_not_fit(monkeypatch, recorded, tmp_path):
    with pytest.raises(UserError, match="behaviour_cloning: 'bd' is unknown; Allowed: bc"):
        clone(monkeypatch, recorded, tmp_path, "bd")
    stage = json.loads((recorded / "cloning.json").read_text())
    stage["lab"]["tasks"] = ["lift"]
    (tmp_path / "train").symlink_to(recorded / "train")
    files.write_json(tmp_path / "cloning.json", stage)
    with pytest.raises(UserError, match=r"has no expert labels for the 1 tasks of lab.tasks"):
        clone(monkeypatch, tmp_path, tmp_path)
