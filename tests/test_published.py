"""config/worldgym.yaml: checked before anything is fetched, and run for real with a small checkpoint from a local server."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.chain import ROOT, errors, run
from tests.loopback import ranges, serving
from tests.published import make_vae, weights
from workflow_src.common.errors import UserError
from workflow_src.workflow import checked
from workflow_src.world_model.artefact import load_artefact

CONFIG = ROOT / "config" / "worldgym.yaml"
WORLDGYM = yaml.safe_load(CONFIG.read_text())
SHEET = "results/worldgym/figures/sweeps/sheet.png"
MODEL = "results/worldgym/world_model/model.safetensors"


def with_(changes: dict[str, object], mapping: dict = WORLDGYM) -> dict:
    """The configuration with the values at `a/b/c` replaced."""
    mapping = copy.deepcopy(mapping)
    for path, value in changes.items():
        *parents, last = path.split("/")
        section = mapping
        for name in parents:
            section = section[name]
        section[last] = value
    return mapping


# ---- before anything is fetched ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer/kind": "sd4"}, r"tokenizer\.kind: 'sd4' is not allowed; did you mean 'sd3'\?"),
        ({"tokenizer/kind": "conv"}, r"tokenizer\.kind: 'conv' is not what published checkpoints were trained on; set sd3"),
        ({"tokenizer/source": ""}, r"tokenizer\.source: is empty; give a folder or a hub repository, for example stab"),
        ({"tokenizer/source": "./vae"}, r"tokenizer\.source: \./vae: no such folder, and no hub repository"),
        ({"tokenizer/source": "a/b", "tokenizer/revision": ""}, r"tokenizer\.source: a/b: .* name its revision"),
        ({"world_model/source/checkpoint": "ftp://host/wm.pt"}, r"source\.checkpoint: ftp://host/wm\.pt: not an address"),
        ({"world_model/source/checkpoint": "no.pt"}, r"source\.checkpoint: 'no\.pt' is neither an address nor a file"),
        ({"world_model/source/checkpoint": "https://drive.google.com/drive/folders/x"}, r"checkpoint: .* no file identifier"),
        ({"world_model/source/sha256": "abc"}, r"world_model\.source\.sha256: 'abc' is not 64 hexadecimal digits"),
        ({"world_model/source/publishd": "x"}, r"world_model\.source\.publishd: unknown key"),
        ({"world_model/network/spatial_rope": "pixels"}, r"spatial_rope: 'pixels' is not allowed; did you mean 'pixel'\?"),
        ({"world_model/network/spatial_rope": "pixel"}, r"spatial_rope: 'pixel' does not fit https://drive\S+, .* 'standard'"),
        ({"world_model/network/attention": "joint"}, r"network\.attention: 'joint' is not how published .* set 'factorised'"),
        ({"world_model/sampler/window": 30}, r"world_model\.sampler\.window: 30 exceeds the 20 frames"),
        ({"world_model/convention": "rehearsal"}, r"world_model\.convention: 'rehearsal' is not how .* set 'worldgym'"),
        ({"world_model/alignment": "leads_to"}, r"world_model\.alignment: 'leads_to' is not how .* set 'worldgym_train'"),
        ({"world_model/objective/schedule": "flow"}, r"objective\.schedule: 'flow' is not how published .* set 'sigmoid'"),
    ],
)  # fmt: skip
def test_what_cannot_become_a_world_model_is_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        checked(with_(changes))
    assert "\n" not in str(error.value)


def test_the_other_published_file_is_known_by_its_name(tmp_path):
    path = tmp_path / "bridge_v2_ckpt.pt"
    path.touch()
    bridge = {"world_model/source/checkpoint": str(path), "world_model/network/spatial_rope": "pixel"}
    assert checked(with_(bridge)).checkpoint == str(path)
    with pytest.raises(UserError, match=r"does not fit .*bridge_v2_ckpt\.pt, which was trained with 'pixel'"):
        checked(with_(bridge | {"world_model/network/spatial_rope": "standard"}))
    assert checked(WORLDGYM).checkpoint == "results/worldgym/downloads/checkpoint.pt"


def test_what_cannot_be_ranked_ends_with_one_line_and_leaves_no_lock(tmp_path):
    text = CONFIG.read_text()
    (tmp_path / "no_policies.yaml").write_text(text[: text.index("policies: #")])
    (tmp_path / "no_judge.yaml").write_text(yaml.safe_dump({**WORLDGYM, "judges": {}}))
    nothing, no_lab = (
        "error: policies: is empty, so there is nothing to roll out",
        "error: judges.primary: the learned judges need a lab's episodes, and lab.scene is none",
    )
    for target, config, says in (
        ("results/worldgym/tables/policy_ranking.csv", tmp_path / "no_policies.yaml", nothing),
        ("results/worldgym/gallery/index.html", tmp_path / "no_policies.yaml", nothing),
        ("results/worldgym/tables/policy_ranking.csv", tmp_path / "no_judge.yaml", no_lab),
    ):
        done = run(tmp_path, target, config=config, check=False)
        (line,) = errors(done)
        assert done.returncode == 2 and line.startswith(says)
        assert "Traceback" not in done.stderr
    run(tmp_path, "--dry-run", MODEL, config=CONFIG)


def test_the_papers_policies_are_served_beside_their_rollouts(tmp_path):
    """policy x shard: a server in the policy's own environment, and its only consumer in the same group."""
    printed = run(tmp_path, "rollouts", "--dry-run", config=CONFIG).stdout
    assert re.search(r"serve_policy +24\n", printed) and re.search(r"roll_out +24\n", printed)
    pairs = [
        (re.findall(r"    rule (\w+):", group), re.findall(r"endpoints/(\w+/\d)\.json", group))
        for group in printed.split("Group job ")[1:]
    ]
    policies = ("octo_base", "octo_small", "openvla", "openvla_v01", "rt_1_x", "spatialvla")
    assert all(set(rules) == {"roll_out", "serve_policy"} and len(set(ends)) == 1 for rules, ends in pairs)
    assert {ends[0] for _, ends in pairs} == {f"{policy}/{shard}" for policy in policies for shard in range(4)}
    printed = run(tmp_path, "results/worldgym/tables/policy_ranking.csv", "--dry-run", config=CONFIG).stdout
    assert re.search(r"ask_vlm +1\n", printed) and re.search(r"make_tables +1\n", printed)
    assert (
        "train_judge" not in printed
        and "record_episodes" not in printed
        and "rollouts/lab" not in printed.split("ask_vlm:")[1]
    )
    flow = checked(WORLDGYM)
    environments = [flow.environment(policy) for policy in policies]
    assert environments == [
        f"../envs/{name}.yaml" for name in ("octo", "octo", "openvla", "openvla", "rt1x", "spatialvla")
    ]


def test_an_empty_source_trains_the_same_network(tmp_path):
    training = ("world_model={source: {checkpoint: ''}, alignment: leads_to}", "lab={scene: one_block, tasks: [lift]}")
    printed = run(tmp_path, "--dry-run", "--quiet", "rules", "--", MODEL, config=CONFIG, overrides=training).stdout
    assert all(rule in printed for rule in ("train_world_model", "cache_latents", "fetch_tokenizer"))
    assert all(rule not in printed for rule in ("import_world_model", "fetch_checkpoint", "train_tokenizer"))
    mapping = with_({"world_model/source/checkpoint": "", "world_model/alignment": "leads_to"})
    assert checked(mapping).config.world_model.network == checked(WORLDGYM).config.world_model.network


# ---- for real, in small -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def server():
    content = io.BytesIO()
    torch.save({"ema": weights("dit_standard_rope")[0], "step": 7}, content)
    with serving(content.getvalue()) as server:
        server.sha256 = hashlib.sha256(server.content).hexdigest()
        yield server


@pytest.fixture
def small(tmp_path, server, vae):
    """worldgym.yaml for the small weights of the local server: its path, with some values replaced."""
    trials = tmp_path / "trials" / "lift"
    trials.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(trials / "a.png")
    (trials / "a.json").write_text(json.dumps({"instruction": "lift the block"}))

    def write(**changes):
        mapping = with_({
            "lab/image_size": 64, "tokenizer/source": str(vae), "world_model/source/checkpoint": server.url,
            "world_model/source/sha256": changes.pop("sha256", server.sha256),
            "world_model/network": {"width": 64, "depth": 2, "heads": 2, "spatial_rope": "standard"},
            "world_model/sampler/steps": 2, "world_model/sampler/window": 4, "trials": {"root": str(tmp_path / "trials")},
        } | changes)  # fmt: skip
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(mapping))
        return path

    return write


def test_a_published_model_is_fetched_imported_and_swept(tmp_path, server, small):
    folder = tmp_path / "run"
    server.faults = [600_000, 404, 404]  # cut in the middle, and gone for this run and its retry
    done = run(folder, SHEET, "-k", config=small(), check=False)
    assert done.returncode and f"error: {server.url}: the server answered 404; check the address" in errors(done)
    results = folder / "results" / "worldgym"
    assert not (results / "downloads" / "checkpoint.pt").exists()

    run(folder, SHEET, config=small())
    assert ranges(server) == [None, "bytes=524288-", "bytes=524288-", "bytes=524288-"]
    assert (results / "downloads" / "checkpoint.pt").read_bytes() == server.content
    with Image.open(folder / SHEET) as sheet:
        assert sheet.size[0] > 300
    assert len(list((results / "figures" / "sweeps").glob("sweep_*.gif"))) == 8
    model = load_artefact(results / "world_model")
    state = weights("dit_standard_rope")[0]
    assert all(torch.equal(value, state[name]) for name, value in model.network.state_dict().items())
    sampler = model.card.sampler
    assert (sampler.guidance, sampler.window, sampler.steps, sampler.mode) == (3.0, 4, 2, "exact")
    assert (model.card.provenance["checkpoint"], model.card.provenance["sha256"]) == (server.url, server.sha256)
    assert not any((results / name).exists() for name in ("episodes", "latents", "state/world_model"))
    assert "Nothing to be done" in (again := run(folder, "--dry-run", SHEET, config=small())).stdout + again.stderr

    # Another checksum is a matter of the import: gigabytes are not fetched again.
    done = run(folder, MODEL, config=small(sha256="0" * 64), check=False)
    (line,) = errors(done)
    assert f"sha256 is {server.sha256}, not {'0' * 64} (world_model.source.sha256)" in line
    assert len(server.seen) == 4 and (results / "downloads" / "checkpoint.pt").exists()


def test_another_file_than_the_checksum_says_is_not_kept(tmp_path, server, small):
    done = run(tmp_path / "run", MODEL, config=small(sha256="0" * 64), check=False)
    (line,) = errors(done)
    assert f"{server.url}: sha256 is {server.sha256}, not {'0' * 64}: another file, or damaged on the way" in line
    assert len(server.seen) == 2  # once more, in case it was damaged on the way
    assert not list((tmp_path / "run" / "results" / "worldgym").glob("downloads/*"))


def test_a_checkpoint_that_is_a_file_is_read_where_it_is(tmp_path, server, small):
    path = tmp_path / "wm.pt"
    path.write_bytes(server.content)
    run(tmp_path / "run", MODEL, config=small(**{"world_model/source/checkpoint": str(path)}))
    assert not server.seen and path.read_bytes() == server.content
    assert not (tmp_path / "run" / "results" / "worldgym" / "downloads").exists()
