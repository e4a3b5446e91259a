"""Looking at a store: the summary, the figures, and whether a shift of the actions is found."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.stores import make_store
from workflow_src.episodes.inspect import COLUMNS, alignment, inspect, judge_alignment, spread


def moving(shift: int, seed: int = 0, count: int = 8) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Episodes of a square that moves by ten pixels per 5 cm, and actions that stand `shift` places late."""
    rng, episodes, actions = np.random.default_rng(seed), [], []
    for _ in range(count):
        steps = rng.integers(0, 4, 30)
        places = np.concatenate([[0], np.cumsum(steps)])
        frames = np.zeros((31, 16, 128, 3), np.uint8)
        for frame, place in zip(frames, places):
            frame[4:12, place : place + 10] = 255
        action = np.zeros((30, 7), np.float32)
        action[:, 0] = np.roll(steps, shift) * 0.01
        action[:, 6] = 1
        episodes.append(frames)
        actions.append(action)
    return episodes, actions


@pytest.mark.parametrize("shift", [-2, -1, 0, 1, 2])
def test_the_shift_that_explains_the_motion_is_found(shift):
    """Actions that stand `shift` places late explain the motion at that shift; only 0 and -1 are what a store declares."""
    episodes, actions = moving(shift)
    motions = [np.abs(np.diff(frames.astype(int), axis=0)).mean((1, 2, 3)) for frames in episodes]
    found = alignment(motions, actions)
    assert found.idxmax() == shift and found[shift] > 0.9
    warning = judge_alignment(found)
    assert (f"actions[t{shift:+d}] explain" in warning) == (shift not in (-1, 0)), warning


def test_noise_contradicts_nothing():
    rng = np.random.default_rng(1)
    assert judge_alignment(alignment([rng.random(500)], [rng.normal(size=(500, 7))])) == ""
    assert judge_alignment(alignment([np.zeros(9)], [np.zeros((9, 7))])) == ""


def test_a_store_is_summed_up(tmp_path, capsys):
    episodes, actions = moving(2)
    store = make_store(tmp_path / "store", episodes)
    for i, action in enumerate(actions):
        with open(tmp_path / "store" / f"{i:09d}.npz", "wb") as handle:
            np.savez(handle, actions=action)
    store.table["sha256_arrays"] = ""
    store.table["instruction"] = ["push é"] * 7 + [""]
    store.table["source"] = "made"
    inspect(store, tmp_path)
    printed = capsys.readouterr()
    for line in ("episodes      8, of 31 to 31 frames, 248 in all", "frames        16 x 128 pixels",
                 "robots        tabletop at 5 Hz", "instructions  2, 1 episodes without"):  # fmt: skip
        assert line in printed.out
    assert printed.out.split("dx")[1].split()[:5:4] == ["0.0000", "0.0300"]
    assert "warning: " in printed.err and "actions[t+2] explain" in printed.err
    sheet = np.asarray(Image.open(tmp_path / "contact_sheet.png"))
    assert sheet.shape == (8 * (16 + 12), COLUMNS * 128, 3)
    np.testing.assert_array_equal(sheet[12:28, :128], episodes[0][0])
    np.testing.assert_array_equal(sheet[-16:, -128:], episodes[7][30])
    assert Image.open(tmp_path / "actions.png").size == (1400, 400)
    assert (tmp_path / "alignment.csv").read_text().startswith("shift,correlation\n-3,")


def test_samples_are_spread():
    assert spread(1, 5) == [0] and spread(3, 5) == [0, 1, 2] and spread(101, 3) == [0, 50, 100]
