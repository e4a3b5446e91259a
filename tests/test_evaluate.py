"""One command from first frames to success per task, as WorldGym's runners give it: real server, world model and judge."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tomllib
from PIL import Image
from safetensors.torch import save_file

from tests.chain import ROOT
from tests.vlm_server import VlmServer
from tests.worlds import FLOW, JOINT, make_network
from workflow_src.analysis.records import Outcomes
from workflow_src.common import sections
from workflow_src.common.config import to_dict
from workflow_src.common.errors import run_cli
from workflow_src.common.files import write_json
from workflow_src.rollouts import evaluate
from workflow_src.world_model.artefact import Card, save_artefact
from workflow_src.world_model.tokenizer import FORMAT, ConvTokenizer, load_tokenizer

SIDE = 32


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An artefact with random weights: 32 pixels, tabletop actions."""
    folder = tmp_path_factory.mktemp("world")
    settings = sections.Tokenizer(channels=3, width=8)
    (folder / "t").mkdir()
    weights = {name: value.contiguous() for name, value in ConvTokenizer(settings).state_dict().items()}
    save_file(weights, folder / "t" / "model.safetensors")
    write_json(folder / "t" / "config.json", {"format": FORMAT, "tokenizer": to_dict(settings)})
    card = Card(
        network=replace(JOINT, in_channels=3), objective=FLOW, sampler=sections.Sampler(steps=1, window=3),
        latent=(4, 4), frames=4, image=(SIDE, SIDE), mean=(0.0,) * 3, std=(1.0,) * 3, embodiment="tabletop",
        tokenizer=load_tokenizer(folder / "t").digest,
    )  # fmt: skip
    save_artefact(folder / "wm", make_network(card.network, card.frames), card, folder / "t")
    return folder / "wm"


@pytest.fixture
def tasks(tmp_path):
    """Two tasks with two and one first frames."""
    for stem in ("lift/a", "lift/b", "push/a"):
        (tmp_path / "tasks" / stem).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (90, len(stem), 9)).save(tmp_path / "tasks" / f"{stem}.png")
        text = {"instruction": stem, "partial_credit_criteria": "touched it"}
        (tmp_path / "tasks" / f"{stem}.json").write_text(json.dumps(text))
    return tmp_path / "tasks"


def command(monkeypatch, capsys, line, family=None):
    """Exit code, stdout and stderr lines of a command line in this process."""
    monkeypatch.setattr(evaluate, "die_with_parent", lambda: None)
    monkeypatch.setattr(sys, "argv", ["evaluate", *shlex.split(line)])
    code = 0
    try:
        run_cli(lambda: evaluate.evaluate(family))
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err.splitlines()


def test_from_first_frames_to_a_table(world, tasks, tmp_path, monkeypatch, capsys):
    out, videos = tmp_path / "out", tmp_path / "videos"
    with VlmServer() as server:
        server.answer = lambda body: json.dumps(
            {"reasoning": "saw", "score": int("lift" in json.dumps(body["messages"]))}
        )
        line = (
            f"tabletop_random --root-dir {tasks} --checkpoint-path {world} --rollout-length 3 --batch 2 --fit crop --retries 2 "
            f"--votes 1 --judge-model stub --judge-url {server.url} --out {out} --save-video --video-out-dir {videos}"
        )
        code, printed, said = command(monkeypatch, capsys, line)
        assert code == 0, said
        asked = len(server.bodies)
        again = command(monkeypatch, capsys, line)
    # All rollouts of a task agree, so its standard error is zero and its interval is not.
    names, rows = [row.split()[0] for row in printed], [row.split() for row in printed]
    assert names == ["task", "lift", "push", "all"] and rows[1][1:4] == ["4", "1.000", "0.000"]
    assert rows[2][1:4] == ["2", "0.000", "0.000"] and rows[3][2:5] == ["6", "0.500", "0.000"]
    found = pd.read_parquet(out / "rollouts" / "rollouts.parquet")
    assert len(found) == 6 and set(found.policy) == {"tabletop_random"} and (found.steps == 3).all()
    assert sorted(str(path.relative_to(videos)) for path in videos.rglob("*.mp4")) == [
        "lift/a.mp4", "lift/a_r1.mp4", "lift/b.mp4", "lift/b_r1.mp4", "push/a.mp4", "push/a_r1.mp4",
    ]  # fmt: skip
    # The same command again rolls nothing out and asks nobody.
    assert again[:2] == (0, printed) and len(server.bodies) == asked <= 6


def test_errors_are_of_clusters_not_of_repeats():
    """Three first frames, ten rollouts each, all of a frame alike: three samples, not thirty (WorldGym's are of thirty)."""
    outcomes = Outcomes(np.array([[10.0, 10.0, 0.0]]), np.full((1, 3), 10.0), np.zeros(3, int))
    judged = pd.DataFrame({"valid": [True] * 29 + [False]})
    study = SimpleNamespace(imagined=outcomes, tasks=["lift"], confidence=0.95, judgements=judged)
    _, task, every, lost = evaluate.report(study)
    assert task.split()[1:4] == ["30", "0.667", "0.272"]  # sqrt(2/3 · 1/3 / 3)
    assert every.split()[2:5] == ["30", "0.667", "0.272"] and lost.startswith("1 rollouts without")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "tabletop_rnadom --checkpoint-path {world}",
            "family: 'tabletop_rnadom' is unknown; did you mean 'tabletop_random'",
        ),
        (
            "tabletop_random --checkpoint-path none.pt",
            "--checkpoint-path: none.pt is neither a world model's folder nor",
        ),
        ("tabletop_random --checkpoint-path {world}", "environment variable OPENAI_API_KEY is not set"),
        ("tabletop_random --checkpoint-path {world} --judge-url http://example.org/v1", "is unencrypted; use https://"),
        ("tabletop_random --checkpoint-path {world} --judge-model none --retries 0", "--retries: 0 is impossible"),
        ("tabletop_random --checkpoint-path {world} --python /no/python", "--python: '/no/python' is no Python"),
        ("tabletop_random --checkpoint-path {world} --file code", "--file: 'code' is not of the form NAME=PATH"),
        (
            "tabletop_random --checkpoint-path {world} --judge-model none --fit as_is",
            "first frame is uint8 (32, 40, 3)",
        ),
    ],
)
def test_a_mistake_is_one_line(world, tasks, tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    code, _, said = command(
        monkeypatch,
        capsys,
        line.format(world=world) + f" --root-dir {tasks} --out {tmp_path / 'out'} --rollout-length 2",
    )
    assert code == 2 and said[-1].startswith("error: ") and message in said[-1]


def test_what_failed_on_the_way_names_trial_and_step(world, tasks, tmp_path, monkeypatch, capsys):
    """A published policy without its framework: the server's own words reach the terminal."""
    line = f"--root-dir {tasks} --checkpoint-path {world} --model-name octo-small-1.5 --judge-model none --fit crop"
    code, _, said = command(monkeypatch, capsys, f"{line} --out {tmp_path / 'out'}", family="octo")
    assert code == 2 and any("policy octo-small-1.5: its server ended while loading" in line for line in said)
    assert "No module named" in "\n".join(said)


def test_commands_are_installed_under_their_names():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for family in ("openvla", "octo", "spatialvla", "rt1"):
        module, function = scripts[f"rehearse-{family}"].split(":")
        assert module == evaluate.__name__ and callable(getattr(evaluate, function))
