"""World-model training, from recorded episodes to an artefact that imagines: tiny, on moving squares."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.test_engine_at_scale import points
from tests.test_tokenizer import CONFIG, moving_squares, run_cli, write_store
from workflow_src.common import sections
from workflow_src.common.config import to_dict
from workflow_src.common.errors import UserError
from workflow_src.embodiments import to_world_model
from workflow_src.episodes import latents as cache
from workflow_src.episodes.clips import Choice
from workflow_src.episodes.store import EpisodeStore
from workflow_src.training import randomness, world_model
from workflow_src.training import tokenizer as tokenizer_training
from workflow_src.training.clip_source import ClipSource
from workflow_src.training.datasets import open_training
from workflow_src.training.distributed import Processes
from workflow_src.world_model.artefact import Source, build_network, load_artefact

torch.set_num_threads(1)
MODEL = sections.WorldModel(
    network=sections.Network(in_channels=4, width=32, depth=2, heads=2, attention="joint", temporal="relative_bias",
                             spatial_rope="none", previous_frame=True, action_mlp=True, learned_null=True,
                             first_frame=True),
    objective=sections.Objective(schedule="flow", prediction="x0", context_probability=0.35, noise_shift=2.0),
    sampler=sections.Sampler(steps=2, context_noise=0.03, window=4, mode="streaming"),
    clip_frames=4,
    training=sections.Training(steps=40, batch=16, optimizer="muon", warmup=5, precision="fp32", checkpoint_every=20),
)  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Episodes, tokenizer and latents in one folder; the world-model command line's flags."""
    root = tmp_path_factory.mktemp("chain")
    config = root / "stage.json"
    config.write_text(json.dumps({"seed": 0, "tokenizer": to_dict(CONFIG), "world_model": to_dict(MODEL)}))
    tables = {name: write_store(root / name, *moving_squares(n, 6, n)) for name, n in (("train", 24), ("held", 4))}
    flags = {"config": config, "out": root / "tokenizer" / "model.safetensors", "state": root / "tokenizer_state"}
    with pytest.MonkeyPatch.context() as patch:
        run_cli(patch, tokenizer_training, episodes=tables["train"], validation=tables["held"], **flags)
        for name, table in tables.items():
            run_cli(patch, cache, config=config, episodes=table, tokenizer=root / "tokenizer",
                    out=root / f"latents_{name}" / "latents.json")  # fmt: skip
    return root, {
        "config": config, "latents": root / "latents_train" / "latents.json", "episodes": tables["train"],
        "validation": root / "latents_held" / "latents.json", "validation_episodes": tables["held"],
        "tokenizer": root / "tokenizer",
    }  # fmt: skip


def make_source(config: sections.WorldModel, flags) -> ClipSource:
    """The data of `config`; flags as on the command line, with lists where they take several."""
    alone = Processes(0, 1, torch.device("cpu"))
    datasets = open_training(config, flags["episodes"], flags["latents"], flags["tokenizer"], alone)
    return ClipSource(config, datasets, alone)


def make_loss(prepared, **changes) -> world_model.DiffusionForcing:
    _, flags = prepared
    stage = world_model.load_stage(flags["config"])
    stage.world_model = replace(stage.world_model, **changes)
    source = make_source(stage.world_model, flags | {"episodes": [flags["episodes"]], "latents": [flags["latents"]]})
    return world_model.DiffusionForcing(world_model.make_card(stage, source), stage.world_model, source, seed=3)


def test_the_command_line_leaves_a_whole_artefact(prepared, monkeypatch):
    root, flags = prepared
    out = root / "world_model" / "model.safetensors"
    run_cli(monkeypatch, world_model, **flags, out=out, state=root / "state")
    model = load_artefact(out.parent)
    assert model.card.embodiment == "tabletop" and model.card.tokenizer == model.tokenizer.digest
    assert model.card.sources == (Source(root.name, "tabletop", 5.0, 1, 1.0),) and model.card.control_hz == 5
    latents = cache.load_latents(flags["latents"])
    np.testing.assert_allclose(model.card.mean, latents.mean, rtol=1e-6)
    rows = list(csv.DictReader((out.parent / "metrics.csv").open()))
    assert int(rows[-1]["step"]) == 40 and float(rows[-1]["loss"]) < float(rows[0]["loss"])
    scores = list(csv.DictReader((out.parent / "validation.csv").open()))
    assert [int(row["horizon"]) for row in scores] == [1, 2, 3, 4, 5]
    compared = {"", "_frozen", "_shuffled", "_still", "_tokenizer"}  # nothing was dropped, so no `_null`
    assert scores[0].keys() == {"horizon", *(f"{m}{name}" for m in ("mse", "psnr", "ssim") for name in compared)}
    assert len(list((out.parent / "samples").glob("*.gif"))) == 4
    assert all((out.parent / name).stat().st_size > 1000 for name in ("loss.png", "mse.png"))
    weights = out.read_bytes()
    out.unlink()
    run_cli(monkeypatch, world_model, **flags, out=out, state=root / "state")
    assert out.read_bytes() == weights


def test_validations_in_training_are_curves_and_change_no_weight(prepared, monkeypatch, tmp_path):
    _, flags = prepared
    stage = json.loads(flags["config"].read_text())
    stage["world_model"]["objective"]["action_dropout"] = 0.1
    weights = {}
    for every in (0, 15):
        stage["world_model"]["training"] |= {"validate_every": every, "steps": 30}
        config, folder = tmp_path / f"{every}.json", tmp_path / str(every)
        config.write_text(json.dumps(stage))
        out = folder / "model.safetensors"
        run_cli(monkeypatch, world_model, **{**flags, "config": config}, out=out, state=folder / "state")
        weights[every] = load_file(out)
    curve = points(folder / "events")
    assert curve["validation/mse"] == curve["validation/psnr_null"] == [15, 30]
    assert curve["training/loss"] == list(range(1, 31))
    assert all(torch.equal(weights[0][name], weights[15][name]) for name in weights[0])
    # One training, done in two manners: either goes on where the other stopped.
    one, other = (world_model.load_stage(tmp_path / f"{every}.json").digest for every in (0, 15))
    stage["world_model"]["training"]["lr"] *= 2
    config.write_text(json.dumps(stage))
    assert one == other != world_model.load_stage(config).digest


def test_a_clip_shows_the_action_that_led_to_each_frame(prepared):
    loss = make_loss(prepared)
    episodes = EpisodeStore(prepared[1]["episodes"].parent).load_all()
    choice = Choice(np.array([5, 7, 5]), np.array([2, 0, 2]), np.array([False, False, True]))
    clean, first, actions = loss.source.read(choice.episode, loss.source.clips.frame_numbers(choice), choice.mirrored)
    units = to_world_model(episodes.actions, "tabletop", "rehearsal")
    np.testing.assert_allclose(actions[0], units[5, 1:5])  # mid-episode: the true preceding action
    np.testing.assert_allclose(actions[1, 0], 0)
    np.testing.assert_allclose(actions[1, 1:], units[7, :3])
    np.testing.assert_allclose(actions[2, :, 0], -actions[0, :, 0])  # mirrored: sideways motion flips,
    np.testing.assert_allclose(actions[2, :, 1], actions[0, :, 1])  # the other axis stays
    plain, mirrored = cache.load_latents(prepared[1]["latents"]).shards
    mean, std = loss.source.mean, loss.source.std
    np.testing.assert_allclose(clean[0] * std + mean, plain[5 * 6 + 2 : 6 * 6], atol=2e-3)
    np.testing.assert_allclose(first[2] * std + mean, mirrored[5 * 6], atol=2e-3)


def test_a_loss_does_not_depend_on_how_the_batch_is_split(prepared):
    loss = make_loss(prepared)
    torch.manual_seed(0)
    network = build_network(loss.card)
    whole = loss(network, 4, np.arange(6))["loss"]
    parts = [loss(network, 4, np.arange(start, start + 2))["loss"] for start in (0, 2, 4)]
    torch.testing.assert_close(whole, sum(parts) / 3)
    assert loss(network, 5, np.arange(6))["loss"] != whole


def test_action_dropout_drops_the_configured_share(prepared):
    loss = make_loss(prepared, objective=replace(MODEL.objective, action_dropout=0.25))
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x, levels, actions, *, dropped, **_):
            seen.append(dropped)
            return x

    loss(Spy(), 0, np.arange(400))
    assert 0.15 < seen[0].float().mean() < 0.35


def test_mistakes_are_named_before_the_first_step(prepared, tmp_path):
    with pytest.raises(UserError, match=r"world_model.clip_frames: 9"):
        make_loss(prepared, clip_frames=9)
    with pytest.raises(UserError, match=r"in_channels: 8, but the latents have 4"):
        make_loss(prepared, network=replace(MODEL.network, in_channels=8))
    with pytest.raises(UserError, match=r"world_model.actions: 'reached'"):
        make_loss(prepared, actions="reached")
    other = write_store(tmp_path / "other", *moving_squares(2, 6, 9))
    root, flags = prepared
    with pytest.raises(UserError, match="was made from other episodes"):
        make_loss((root, flags | {"episodes": other}))


def test_draws_differ_between_streams():
    assert not np.allclose(randomness.uniform(0, 0, [0], 4, "clip"), randomness.uniform(0, 0, [0], 4, "levels"))
