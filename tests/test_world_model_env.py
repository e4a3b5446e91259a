"""The learned world as an environment, and the artefact it is loaded from."""

from __future__ import annotations

import json
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.worlds import FACTORISED, FLOW, JOINT, make_network
from workflow_src.common import sections
from workflow_src.common.errors import UserError
from workflow_src.rollouts.run import model_digest
from workflow_src.world_model import artefact, environment
from workflow_src.world_model.artefact import (
    Card,
    Source,
    WorldModel,
    identity,
    load_artefact,
    read_card,
    save_artefact,
)

torch.set_num_threads(1)

ENV = "workflow_src.world_model.environment:WorldModel-v0"
PLACES, SIDE = 5, 8
CARD = Card(
    network=JOINT, objective=FLOW, sampler=sections.Sampler(steps=2, context_noise=0.03, window=4), latent=(4, 4),
    frames=4, image=(SIDE, SIDE), mean=(0.5, 0.4, 0.6), std=(0.2, 0.3, 0.2), embodiment="tabletop",
)  # fmt: skip


class Average:
    """A tokenizer in one line: 2x2 means, and their enlargement. Counts what it decodes."""

    decoded = 0

    def encode(self, images):
        return images.reshape(len(images), 4, 2, 4, 2, 3).mean((2, 4), dtype=np.float32) / 255

    def decode(self, latents):
        self.decoded += len(latents)
        return (latents.clip(0, 1) * 255).round().astype(np.uint8).repeat(2, 1).repeat(2, 2)


def world(card=CARD) -> WorldModel:
    return WorldModel(card, make_network(card.network, card.frames), Average(), "digest")


def make(model=None, places=PLACES, **options):
    return gymnasium.make_vec(ENV, num_envs=places, model=model or world(), **options)


def trials(places=PLACES, repeat=0):
    images = np.random.default_rng(0).integers(0, 256, (places, SIDE, SIDE, 3), dtype=np.uint8)
    return [{"image": image, "repeat": repeat, "trial_id": f"lift/{i}"} for i, image in enumerate(images)]


def roll(env, seeds, given, steps=6, actions=None):
    """All frames (N, steps + 1, H, W, 3)."""
    if actions is None:
        actions = np.random.default_rng(1).uniform(-0.05, 0.05, (steps, env.num_envs, 7)).astype(np.float32)
    frames = [env.reset(seed=seeds, options={"trials": given})[0]["image"]]
    return np.stack(frames + [env.step(action)[0]["image"] for action in actions[:steps]], 1)


def test_one_api_with_the_lab():
    env = make(horizon=2)
    given = trials()
    obs, info = env.reset(seed=[1, 2, 3, 4, 5], options={"trials": given})
    assert np.array_equal(obs["image"], [trial["image"] for trial in given]) and info == {}
    assert env.observation_space.contains(obs)
    for truncated in (False, True):
        obs, reward, terminated, was_truncated, info = env.step(np.zeros((PLACES, 7), np.float32))
        assert env.observation_space.contains(obs)
        assert not reward.any() and not terminated.any() and (was_truncated == truncated).all()
    assert env.metadata["autoreset_mode"] is gymnasium.vector.AutoresetMode.DISABLED


def test_only_new_frames_are_decoded():
    env = make()
    roll(env, list(range(PLACES)), trials(), steps=6)
    assert env.unwrapped.model.tokenizer.decoded == 6 * PLACES


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_trial_depends_on_neither_neighbours_nor_place(precision):
    env = make(precision=precision)
    seeds, given = [1, 2, 3, 4, 5], trials()
    actions = np.random.default_rng(1).uniform(-0.05, 0.05, (6, PLACES, 7)).astype(np.float32)
    together = roll(env, seeds, given, actions=actions)
    order = [3, 3, 0, 4, 3]
    other = roll(env, [seeds[i] for i in order], [given[i] for i in order], actions=actions[:, order])
    assert np.array_equal(other, together[order])
    assert np.array_equal(roll(make(precision=precision), seeds, given, actions=actions), together), "a new environment"


def test_noise_belongs_to_seed_repeat_and_step():
    same = [trials()[0]] * PLACES
    still = np.zeros((2, PLACES, 7), np.float32)
    frames = roll(make(), [1, 1, 2, 1, 1], [*same[:3], {**same[0], "repeat": 1}, *same[4:]], 2, still)
    assert np.array_equal(frames[0], frames[1]) and np.array_equal(frames[0], frames[4])
    assert not np.array_equal(frames[0], frames[2]), "another seed"
    assert not np.array_equal(frames[0], frames[3]), "another repeat"
    assert not np.array_equal(frames[0], roll(make(seed=9), [1] * PLACES, same, 2, still)[0]), "another world seed"


def test_actions_steer():
    given = [trials()[0]] * PLACES
    actions = np.zeros((3, PLACES, 7), np.float32)
    actions[0, 1, 0] = 0.05
    frames = roll(make(), [1] * PLACES, given, 3, actions)
    assert np.array_equal(frames[0, 1:], frames[2, 1:]) and not np.array_equal(frames[0, 1], frames[1, 1])


def test_imagining_is_stepping_through_an_environment():
    given, actions = trials(), np.random.default_rng(2).uniform(-0.05, 0.05, (PLACES, 3, 7)).astype(np.float32)
    frames = environment.imagine(world(), np.stack([t["image"] for t in given]), actions, 4, range(PLACES))
    stepped = roll(make(seed=4), list(range(PLACES)), given, 3, actions.swapaxes(0, 1))
    assert np.array_equal(frames, stepped[:, 1:])


def test_an_action_of_a_model_that_skips_frames_spans_several_control_steps():
    """Twice the reach of one step tells from one step where the model imagines every second frame, and not otherwise."""
    skips = (Source("a", "tabletop", 5.0, 2, 1.0),)
    near, far = (np.tile(np.float32([reach, 0, 0, 0, 0, 0, 1]), (1, PLACES, 1)) for reach in (0.05, 0.1))
    videos = {}
    for name, card in (("all", CARD), ("every second", replace(CARD, sources=skips))):
        videos[name] = [roll(make(world(card)), list(range(PLACES)), trials(), 1, actions) for actions in (near, far)]
    assert np.array_equal(*videos["all"]) and not np.array_equal(*videos["every second"])
    assert np.array_equal(videos["all"][0], videos["every second"][0])


def test_a_relative_gripper_is_remembered_from_step_to_step_and_the_base_moves():
    """RT-1: closing shows once, staying closed is no command; a new rollout begins open."""
    env = make(world(replace(CARD, embodiment="google_robot")))
    converted = []
    env._convert = lambda actions, convert=env._convert: converted.append(convert(actions)) or converted[-1]
    closed = np.zeros((PLACES, 10), np.float32)
    closed[:, 7:] = 0.5
    for _ in range(2):
        env.reset(seed=list(range(PLACES)), options={"trials": trials()})
        for actions in (closed, closed, closed[:, :7]):
            env.step(actions)
    assert [float(one[0, 0, 6]) for one in converted] == [1, 0, 0] * 2
    assert [one[0, 0, 7:].tolist() for one in converted] == [[0.5] * 3, [0.5] * 3, [0.0] * 3] * 2


def test_chunks():
    chunky = world(replace(CARD, sampler=replace(CARD.sampler, horizon=2)))
    env, given = make(chunky, horizon=4), trials()
    actions = np.random.default_rng(1).uniform(-0.05, 0.05, (PLACES, 4, 7)).astype(np.float32)
    env.reset(seed=3, options={"trials": given})
    first, *_ = env.unwrapped.step_chunk(actions[:, :2])
    second, _, _, truncated, _ = env.unwrapped.step_chunk(actions[:, 2:])
    assert first["image"].shape == (PLACES, 2, SIDE, SIDE, 3) and second["image"].dtype == np.uint8 and truncated.all()
    with pytest.raises(UserError, match="1 to 2"):
        env.unwrapped.step_chunk(np.zeros((PLACES, 3, 7), np.float32))


def test_networks_without_null_embeddings_run_too():
    card = replace(
        CARD, network=FACTORISED, objective=sections.Objective(), sampler=sections.Sampler(steps=2, window=4)
    )
    assert roll(make(world(card)), [1] * PLACES, trials(), 4).shape == (PLACES, 5, SIDE, SIDE, 3)


def test_misuse_is_one_line():
    env = make()
    with pytest.raises(UserError, match="reset"):
        env.step(np.zeros((PLACES, 7), np.float32))
    with pytest.raises(UserError, match="5 trials"):
        env.reset(options={"trials": trials(2)})
    with pytest.raises(UserError, match=r"lift/1.*\(4, 4, 3\)"):
        env.reset(
            options={
                "trials": [trials()[0], {"image": np.zeros((4, 4, 3), np.uint8), "trial_id": "lift/1"}, *trials(3)]
            }
        )
    env.reset(options={"trials": trials()})
    actions = np.zeros((PLACES, 7), np.float32)
    actions[3, 2] = np.nan
    with pytest.raises(UserError, match="lift/3"):
        env.step(actions)
    with pytest.raises(UserError, match="shape"):
        env.step(np.zeros((PLACES, 6), np.float32))


# ---- artefact


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A saved world model, whose tokenizer folder is read by a stand-in."""
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, source / "model.safetensors")
    monkeypatch.setattr(artefact, "load_tokenizer", lambda folder, device="cpu": Average())
    save_artefact(tmp_path / "world", make_network(JOINT, 4), CARD, source)
    return tmp_path / "world"


def test_artefact_is_self_contained_and_runs_as_before(folder):
    assert (folder / "tokenizer" / "model.safetensors").exists() and read_card(folder) == CARD
    loaded = load_artefact(folder)
    again = load_artefact(folder / "model.safetensors")
    assert loaded.card == CARD and loaded.digest == again.digest
    seeds, given = [1] * PLACES, trials()
    assert np.array_equal(roll(make(str(folder)), seeds, given), roll(make(world()), seeds, given))


def test_sampler_settings_may_be_changed_afterwards(folder):
    content = json.loads((folder / "config.json").read_text())
    content["sampler"]["steps"] = 4
    (folder / "config.json").write_text(json.dumps(content))
    assert load_artefact(folder).card.sampler.steps == 4


def test_an_artefact_from_before_an_option_was_added_still_loads(folder, tmp_path):
    """Whoever wrote it did not know the field; its default is what the network was."""
    content = json.loads((folder / "config.json").read_text())
    assert content["network"].pop("first_frame") is True  # the option is new: its default, False, is another network
    content["network"].pop("mlp_ratio")  # here the default is what the weights are
    (folder / "config.json").write_text(json.dumps(content))
    with safe_open(folder / "model.safetensors", "pt") as handle:
        weights = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    weights.pop("first_proj.weight")
    save_file(weights, folder / "model.safetensors", {"identity": identity(content)})
    card = load_artefact(folder).card
    assert card.network.mlp_ratio == 4 and not card.network.first_frame


def _weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def _config(folder, change):
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: _weights(f, lambda w: w.pop("x_proj.bias")), r"model.safetensors.*missing x_proj.bias"),
        (lambda f: _weights(f, lambda w: w.update(extra=torch.zeros(1))), "not known extra"),
        (lambda f: _weights(f, lambda w: w.update({"x_proj.bias": torch.zeros(3)})), r"x_proj.bias is \(3,\).*\(16,\)"),
        (lambda f: (f / "model.safetensors").write_bytes(b"12345678"), "cut short"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be read"),
        (lambda f: (f / "config.json").unlink(), "world-model folder"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: _config(f, lambda c: c.update(format="other")), "format 'other'"),
        (lambda f: _config(f, lambda c: c.pop("mean")), "incomplete.*mean"),
        (lambda f: _config(f, lambda c: c.update(mean=[0.0, 0.0, 0.0])), "does not belong"),
        (lambda f: _config(f, lambda c: c["network"].update(widht=3)), "widht.*width"),
    ],
    ids=[
        "missing",
        "extra",
        "shape",
        "cut",
        "no weights",
        "no config",
        "json",
        "format",
        "incomplete",
        "stale",
        "typo",
    ],
)
def test_a_broken_artefact_is_one_line(folder, spoil, says):
    spoil(folder)
    with pytest.raises(UserError, match=says) as caught:
        load_artefact(folder)
    assert "\n" not in str(caught.value)


def test_saving_without_a_tokenizer_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        save_artefact(tmp_path / "world", make_network(JOINT, 4), CARD, tmp_path / "nothing")


def test_the_environment_is_registered():
    assert environment.WorldModelEnv.__name__ == "WorldModelEnv" and "WorldModel-v0" in gymnasium.registry


def test_model_digest_follows_weights_and_settings_but_not_provenance(tmp_path):
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"

    def digest_of(content, **said):
        weights.write_bytes(content)
        config.write_text(json.dumps(said))
        return model_digest(weights)

    base = digest_of(b"w", steps=3, provenance=1)
    assert base == digest_of(b"w", steps=3, provenance=2)
    assert len({base, digest_of(b"v", steps=3), digest_of(b"w", steps=4)}) == 3
    config.unlink()
    with pytest.raises(UserError, match="part of the world-model artefact"):
        model_digest(weights)
