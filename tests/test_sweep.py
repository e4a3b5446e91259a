"""One axis at a time: which actions, what is written, and that bad input is one line."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.test_world_model_env import CARD, SIDE, world
from workflow_src import embodiments
from workflow_src.common.errors import UserError, run_cli
from workflow_src.world_model import sweep

ROBOT = embodiments.get("tabletop")


def test_each_sweep_moves_one_axis_and_the_last_moves_none():
    sweeps = sweep.sweep_actions(ROBOT, 5)
    assert list(sweeps) == [
        "x_plus", "x_minus", "y_plus", "y_minus", "z_plus", "z_minus", "gripper_close_open", "still",
    ]  # fmt: skip
    for place, axis in enumerate("xyz"):
        plus, minus = sweeps[f"{axis}_plus"], sweeps[f"{axis}_minus"]
        np.testing.assert_allclose(plus[:, place], 0.025)
        np.testing.assert_allclose(minus[:, place], -0.025)
        assert not np.delete(plus, (place, 6), 1).any() and (plus[:, 6] == 1).all()
    assert sweeps["gripper_close_open"][:, 6].tolist() == [0, 0, 0, 1, 1]
    assert not sweeps["still"][:, :6].any() and (sweeps["still"][:, 6] == 1).all()


def test_sweeps_start_from_the_frame_share_their_noise_and_follow_their_actions():
    frame = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    sweeps = sweep.sweep_actions(ROBOT, 4)
    frames = sweep.roll_out(world(), frame, sweeps | {"again": sweeps["x_plus"]}, seed=3)
    assert all(video.shape == (5, SIDE, SIDE, 3) and (video[0] == frame).all() for video in frames.values())
    assert (frames["x_plus"] == frames["again"]).all()
    assert (frames["x_plus"][1:] != frames["x_minus"][1:]).any()


def run(monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["sweep", *map(str, options)])
    monkeypatch.setattr(sweep, "load_artefact", lambda path, device: world(replace(CARD, control_hz=5.0)))
    try:
        run_cli(sweep.main)
    except SystemExit as end:
        return end.code, capsys.readouterr().err.strip()
    return 0, ""


def test_the_command_line_writes_a_sheet_and_a_gif_per_sweep(tmp_path, monkeypatch, capsys):
    (tmp_path / "trials" / "lift").mkdir(parents=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))  # another size
    image.save(tmp_path / "trials" / "lift" / "0000.png")
    out = tmp_path / "figures" / "sheet.png"
    assert (
        run(monkeypatch, capsys, "--world-model", tmp_path, "--frame", tmp_path / "trials", "--out", out, "--steps", 3)[
            0
        ]
        == 0
    )
    with Image.open(out) as sheet:
        assert sheet.size[0] > 300 and sheet.size[1] > 800
    names = sorted(path.stem for path in out.parent.glob("*.gif"))
    assert names == sorted(f"sweep_{name}" for name in sweep.sweep_actions(ROBOT, 1))
    with Image.open(out.with_name("sweep_x_plus.gif")) as gif:
        assert gif.n_frames == 4 and gif.size == (192, 192)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"no image"), "not a readable image"),
        (lambda path: path.mkdir(), "no PNG below this folder"),
        (lambda path: None, "not a readable image"),
    ],
    ids=["damaged", "empty folder", "absent"],
)
def test_a_frame_that_cannot_be_read_is_named(make, message, tmp_path):
    make(tmp_path / "frame.png")
    with pytest.raises(UserError, match=f"--frame: {tmp_path / 'frame.png'}: {message}"):
        sweep.read_frame(tmp_path / "frame.png", (8, 8))


def test_no_steps_is_one_line(tmp_path, monkeypatch, capsys):
    code, line = run(
        monkeypatch, capsys, "--world-model", "w", "--frame", "f", "--out", tmp_path / "o.png", "--steps", 0
    )
    assert (code, line) == (2, "error: --steps: 0 is impossible; it must be at least 1")
