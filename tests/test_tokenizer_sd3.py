"""The Stable Diffusion 3 autoencoder as a tokenizer: its numbers, its folder, and where it is fetched from."""

import json
import sys

import numpy as np
import pytest
import torch

from tests.loopback import ranges, serving
from tests.published import make_vae
from workflow_src.common.errors import UserError, run_cli
from workflow_src.world_model import tokenizer_sd3
from workflow_src.world_model.published import HUB, REVISION, autoencoder
from workflow_src.world_model.tokenizer import load_tokenizer
from workflow_src.world_model.tokenizer_sd3 import FILES, make_tokenizer


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def hub(vae, monkeypatch):
    """A hub that has the autoencoder as somebody/small@abc."""
    content = {f"/somebody/small/resolve/abc/vae/{name}": (vae / name).read_bytes() for name in FILES}
    with serving(content) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url.removesuffix("/file.bin"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def test_the_autoencoder_scales_and_does_not_shift(vae, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    identity = make_tokenizer(tmp_path, str(vae))
    tokenizer = load_tokenizer(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (18, 32, 48, 3), np.uint8)  # more than one slice
    latents = tokenizer.encode(images)
    assert tokenizer.digest == identity and latents.shape == (18, *tokenizer.shape(32, 48)) == (18, 4, 6, 16)
    model = diffusers.AutoencoderKL.from_pretrained(vae)
    with torch.inference_mode():
        signal = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        mode = model.encode(signal).latent_dist.mode()
        decoded = model.decode(mode).sample
    scale = float(np.abs(latents).max())
    np.testing.assert_allclose(latents, 1.5305 * mode.permute(0, 2, 3, 1).numpy(), atol=0.02 * scale)
    pixels = ((decoded + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(tokenizer.decode(latents).astype(int) - pixels).mean() < 2
    with pytest.raises(UserError, match="sides divisible by 8"):
        tokenizer.encode(images[:, :30])


def test_it_is_fetched_from_the_hub_whole_and_equals_a_local_copy(hub, vae, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    assert make_tokenizer(tmp_path / "hub", "somebody/small", "abc") == make_tokenizer(tmp_path / "copy", str(vae))
    assert load_tokenizer(tmp_path / "hub").digest == load_tokenizer(tmp_path / "copy").digest
    assert all(headers["Authorization"] == "Bearer secret-token" for _, headers in hub.seen)
    described = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert described["origin"] == "hf://somebody/small@abc/vae" and "secret" not in json.dumps(described)


def test_a_fetch_that_was_cut_continues(hub, vae, tmp_path, monkeypatch):
    monkeypatch.setattr("workflow_src.common.fetch.BLOCK", 1000)
    hub.faults = [None, 10_000, 404]
    with pytest.raises(UserError, match="answered 404"):
        make_tokenizer(tmp_path, "somebody/small", "abc")
    assert not (tmp_path / "config.json").exists()
    make_tokenizer(tmp_path, "somebody/small", "abc")
    assert ranges(hub) == [None, None, "bytes=10000-", None, "bytes=10000-"]
    assert load_tokenizer(tmp_path).digest == make_tokenizer(tmp_path, str(vae))


@pytest.mark.parametrize(
    ("status", "token", "message"),
    [
        (401, "", r"refuses it \(401\); accept its licence at https://huggingface.co/somebody/small, and set HF_TOKEN"),
        (
            403,
            "t",
            r"refuses it \(403\); the account of HF_TOKEN has to accept its licence at https://\S+/somebody/small",
        ),
        (401, "t", r"refuses it \(401\); HF_TOKEN is not a valid token, or there is no https://\S+/somebody/small"),
        (404, "t", r"vae/config.json: the server answered 404; check the address"),
    ],
    ids=["no token", "licence not accepted", "wrong token", "no such revision"],
)
def test_a_refusal_says_what_helps(hub, tmp_path, monkeypatch, capsys, status, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(sys, "argv", ["tokenizer_sd3", "somebody/small", "--revision", "abc", "--out", str(tmp_path)])
    hub.faults = [status]
    with pytest.raises(SystemExit) as end:
        run_cli(tokenizer_sd3.main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and len(hub.seen) == 1
    with pytest.raises(UserError, match=message):
        raise UserError(lines[0])
    assert not (tmp_path / "config.json").exists()


def test_where_an_autoencoder_is_looked_for(tmp_path):
    assert autoencoder(str(tmp_path), "") == str(tmp_path)
    assert autoencoder(HUB, "") == f"hf://{HUB}@{REVISION}/vae" and autoencoder(HUB, "abc") == f"hf://{HUB}@abc/vae"
    for source, message in (
        ("somebody/small", "no such folder; if the hub repository is meant, name its revision"),
        ("./vae", "no such folder, and no hub repository"),
        ("/nowhere/vae", "no such folder, and no hub repository"),
    ):
        with pytest.raises(UserError, match=message):
            autoencoder(source, "")
    with pytest.raises(UserError, match=r"config\.json: no such file; give a folder of diffusers' AutoencoderKL"):
        make_tokenizer(tmp_path / "out", str(tmp_path))


def test_what_was_not_made_here_is_refused(vae, tmp_path):
    make_tokenizer(tmp_path, str(vae))
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config.json: not a usable tokenizer \(vae/ is not what was copied there\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"tokenizer": {"kind": "sd3"}, "format": "x"}))
    with pytest.raises(UserError, match="not a usable tokenizer"):
        load_tokenizer(tmp_path)
