"""Published checkpoints: imported strictly, with the published numbers, into an artefact that rolls out."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import parity
from tests.published import make_vae, weights, write
from workflow_src.common.errors import UserError
from workflow_src.world_model import import_worldgym
from workflow_src.world_model.artefact import load_artefact, save_artefact
from workflow_src.world_model.environment import WorldModelEnv
from workflow_src.world_model.tokenizer_sd3 import make_tokenizer

PUBLISHED = "mixed_openx_9robots_20frames_0p1actiondropout_580ksteps.pt"


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


def run(monkeypatch, capsys, checkpoint, out, *options):
    """Exit code and the last line on stderr of the command line."""
    monkeypatch.setattr(sys, "argv", ["import_worldgym", str(checkpoint), "--out", str(out), *map(str, options)])
    try:
        import_worldgym.run_cli(import_worldgym.main)
        code = 0
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("name", parity.NAMES)
def test_an_imported_checkpoint_generates_the_published_frames(name, tmp_path, vae, monkeypatch, capsys):
    state, meta = weights(name)
    path = write(tmp_path, {"ema": state, "model": {key: value * 0 for key, value in state.items()}, "step": 7})
    code, line = run(monkeypatch, capsys, path, tmp_path / "out", "--rope", meta["rope"], "--cfg", meta["cfg"],
                     "--heads", meta["heads"], "--context", meta["max_frames"], "--image", 64, "--vae", vae)  # fmt: skip
    assert code == 0 and line.endswith(str(tmp_path / "out"))
    model = load_artefact(tmp_path / "out")
    assert model.card.sampler.guidance == meta["cfg"] and model.card.latent == (8, 8)
    arrays, _, _ = parity.load(name)
    model.card = replace(
        model.card, sampler=replace(model.card.sampler, steps=meta["sampling_timesteps"], horizon=meta["horizon"])
    )
    sampler, given, frames = model.sampler(), meta["n_context"], arrays["generated"]
    sampler.reset(frames[:, :given], arrays["actions"][:, :given])
    for start in range(given, meta["n_frames"], meta["horizon"]):
        chunk = slice(start, start + meta["horizon"])
        made = sampler.generate(
            arrays["actions"][:, chunk], arrays["noise"][:, start - given : start - given + meta["horizon"]]
        )
        assert parity.relative_error(made, frames[:, chunk]) <= parity.TOLERANCE


@pytest.mark.parametrize(
    "wrap",
    [
        lambda good, bad: {"ema": good, "model": bad},
        lambda good, bad: {"model": good, "optimizer": {"state": {}}},
        lambda good, bad: good,
        lambda good, bad: {"model": {f"_orig_mod.module.ema_model.{key}": value for key, value in good.items()}},
    ],
    ids=["ema first", "model", "bare", "wrapped"],
)
def test_weights_are_found_where_training_put_them(wrap, tmp_path):
    good, _ = weights("dit_standard_rope")
    found = import_worldgym.read_checkpoint(
        write(tmp_path, wrap(good, {key: value + 1 for key, value in good.items()}))
    )
    assert found.keys() == good.keys() and all(torch.equal(found[key], good[key]) for key in good)


def test_published_files_bring_their_settings(tmp_path, vae, monkeypatch, capsys):
    state, _ = weights("dit_standard_rope")
    for name, rope, cfg in ((PUBLISHED, "standard", 3.0), ("bridge_v2_pixel.pt", "pixel", 1.0)):
        path, out = write(tmp_path, {"ema": state}, name), tmp_path / f"out {rope}"
        assert run(monkeypatch, capsys, path, out, "--heads", 2, "--vae", vae)[0] == 0
        card = load_artefact(out).card
        assert (card.network.spatial_rope, card.sampler.guidance) == (rope, cfg)
        assert (card.frames, card.sampler.window, card.sampler.steps, card.sampler.mode) == (20, 20, 10, "exact")
        assert (card.convention, card.embodiment, card.image, card.latent) == (
            "worldgym",
            "widowx",
            (256, 256),
            (32, 32),
        )
        assert card.objective.action_dropout == 0.1 and card.provenance["checkpoint"] == name


def broken(change):
    state, _ = weights("dit_standard_rope")
    change(state)
    return {"ema": state}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: broken(lambda s: s.pop("timestep_mlp.0.bias")), r"weights do not fit .*missing timestep_mlp\.0\.bias"),
        (lambda: broken(lambda s: s.update(extra=torch.zeros(1))), r"weights do not fit .*not known extra"),
        (
            lambda: broken(lambda s: s.update({"final_layer.linear.bias": torch.zeros(3)})),
            r"wrong shape: final_layer\.linear\.bias is \(3,\), should be \(64,\)",
        ),
        (lambda: broken(lambda s: s.pop("x_proj.weight")), r"x_proj\.weight is absent; this is not a WorldGym network"),
        (lambda: {"ema": {"a": 1}}, r"holds no weights under `ema`, under `model`, or at its top"),
        (lambda: {"model": Malicious()}, r"loading it would run code \((_io|io|builtins)\.open\)"),
    ],
    ids=["missing", "extra", "misshapen", "another network", "no weights", "code"],
)
def test_what_does_not_fit_is_one_line(content, message, tmp_path, vae, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, content())
    code, line = run(
        monkeypatch, capsys, path, tmp_path / "out", "--rope", "standard", "--cfg", 3, "--heads", 2, "--vae", vae
    )
    assert code == 2 and line.startswith("error: ") and str(path) in line and re.search(message, line), line
    assert not (tmp_path / "out" / "model.safetensors").exists() and not (tmp_path / "ran").exists()


class Malicious:
    """Would make a file when unpickled."""

    def __reduce__(self):
        return open, ("ran", "w")


def test_what_is_not_known_or_impossible_is_one_line(tmp_path, vae, monkeypatch, capsys):
    path, enough = write(tmp_path, weights("dit_standard_rope")[0]), ("--cfg", 1, "--rope", "pixel", "--heads", 2)
    (tmp_path / "page.pt").write_text("<html>")
    for checkpoint, options, message in (
        (path, ("--cfg", 1), "other.pt: not the name of a published file, so --rope is needed; known: mixed_openx"),
        (path, ("--rope", "pixel"), "other.pt: not the name of a published file, so --cfg is needed"),
        (path, ("--cfg", 1, "--rope", "pixels"), "argument --rope: invalid choice: 'pixels'"),
        (path, (*enough, "--embodiment", "widoxw"), "'widoxw' is unknown; did you mean 'widowx'"),
        (path, (*enough, "--image", 100), "image size: 100 is impossible; it must be a positive multiple of 16"),
        (path, (*enough, "--context", 0), "frames in view: 0 is impossible"),
        (path, (*enough, "--vae", "./x"), "./x: no such folder"),
        (path, (*enough, "--vae", "a/b"), "a/b: no such folder; if the hub repository is meant, name its revision"),
        (tmp_path / "page.pt", enough, "page.pt: not a file that today's torch.save wrote"),
        (tmp_path / "no.pt", enough, f"error: {tmp_path / 'no.pt'}: no such file"),
    ):
        code, line = run(monkeypatch, capsys, checkpoint, tmp_path / "out", *options)
        assert code == 2 and message in line, line
    assert not (tmp_path / "out" / "model.safetensors").exists()


# ---- in a workflow ----------------------------------------------------------------------------------------------------


def stage(folder, network=None, sha256=""):
    """The stage file of a workflow that is configured for the small network."""
    small = {"width": 64, "depth": 2, "heads": 2, "spatial_rope": "standard"}
    content = {
        "seed": 0, "lab": {"image_size": 64, "embodiment": "widowx"},
        "world_model": {"source": {"sha256": sha256}, "network": small | (network or {}),
                        "sampler": {"window": 6, "guidance": 2.5, "mode": "streaming"}},
    }  # fmt: skip
    (folder / "world_model.json").write_text(json.dumps(content))
    return folder / "world_model.json"


def test_a_workflow_says_what_the_weights_do_not(tmp_path, vae, monkeypatch, capsys):
    path, sha256 = write(tmp_path, {"ema": weights("dit_standard_rope")[0]}), ""
    for pinned in (False, True):
        config = stage(tmp_path, sha256=sha256.upper() if pinned else "")
        assert run(monkeypatch, capsys, path, tmp_path / "out", "--config", config, "--vae", vae)[0] == 0
        card = load_artefact(tmp_path / "out").card
        sha256 = card.provenance["sha256"]
    assert (card.sampler.guidance, card.sampler.window, card.frames, card.sampler.mode) == (2.5, 6, 6, "streaming")
    assert (card.image, card.latent, card.network.heads, card.alignment) == ((64, 64), (8, 8), 2, "worldgym_train")


@pytest.mark.parametrize(
    ("network", "sha256", "options", "message"),
    [
        (
            {"depth": 16},
            "",
            (),
            r"other\.pt: is not the configured network: world_model\.network\.depth is 16, the weights' 2$",
        ),
        (
            {"mlp_ratio": 2.0},
            "",
            (),
            r"not the configured network: world_model\.network\.mlp_ratio is 2\.0, the weights' 4\.0",
        ),
        ({}, "0" * 64, (), r"other\.pt: sha256 is [0-9a-f]{64}, not 0{64} \(world_model\.source\.sha256\)"),
        ({}, "", ("--rope", "pixel"), r"--rope: stands in .*world_model\.json; leave one of them out"),
    ],
    ids=["depth", "mlp", "sha256", "twice"],
)
def test_a_checkpoint_that_the_workflow_is_not_configured_for(
    network, sha256, options, message, tmp_path, vae, monkeypatch, capsys
):
    path, config = write(tmp_path, weights("dit_standard_rope")[0]), stage(tmp_path, network, sha256)
    code, line = run(monkeypatch, capsys, path, tmp_path / "out", "--config", config, "--vae", vae, *options)
    assert code == 2 and re.search(message, line), line
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_an_imported_model_is_a_world_to_roll_out_in(tmp_path, vae, monkeypatch, capsys):
    path = write(tmp_path, {"ema": weights("dit_standard_rope")[0]}, PUBLISHED)
    out = tmp_path / "out"
    assert run(monkeypatch, capsys, path, out, "--heads", 2, "--image", 64, "--vae", vae)[0] == 0
    world = WorldModelEnv(2, out, horizon=2)
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    world.reset(seed=[1, 2], options={"trials": [{"image": image}, {"image": image}]})
    actions = np.zeros((2, 7), np.float32)
    actions[1, 0] = 0.04
    frames, _, _, truncated, _ = world.step(actions)
    assert frames["image"].shape == (2, 64, 64, 3) and not truncated.any()
    assert world.step(actions)[3].all()
    # Trained on, and saved again: the copied autoencoder travels along.
    model = load_artefact(out)
    save_artefact(tmp_path / "again", model.network, model.card, out / "tokenizer")
    assert load_artefact(tmp_path / "again").tokenizer.digest == model.card.tokenizer
    # Imported again from its own copy; then with another autoencoder under the same model.
    own = out / "tokenizer" / "vae"
    assert run(monkeypatch, capsys, path, out, "--heads", 2, "--image", 64, "--vae", own)[0] == 0
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"scaling_factor": 2.0}))
    with pytest.raises(UserError, match="vae/ is not what was copied there"):
        load_artefact(out)
    make_tokenizer(out / "tokenizer", str(own))
    with pytest.raises(UserError, match="is another tokenizer than the model's"):
        load_artefact(out)
