"""Trials: what is drawn can be read back, starts the lab where it was drawn, and broken folders are reported whole."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image

from workflow_src.common.config import load_stage
from workflow_src.common.errors import UserError
from workflow_src.rollouts import gather, trials
from workflow_src.rollouts.trials import load_trials
from workflow_src.rollouts.worlds import make_lab

LAB = {"image_size": 24, "supersample": 1, "horizon": 3, "workers": 1, "tasks": ["lift", "push_left"]}


def stage_file(folder, seed=3, per_task=2, root=""):
    path = folder / "trials_stage.json"
    path.write_text(json.dumps({"seed": seed, "lab": LAB, "trials": {"per_task": per_task, "root": root}}))
    return path


def make(monkeypatch, stage, out, program=trials):
    monkeypatch.setattr(sys, "argv", ["trials", "--config", str(stage), "--out", str(out)])
    program.main()
    return load_trials(out)


def pair(root, stem, **fields):
    """A trial by hand, as in WorldGym's layout."""
    (root / stem).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(root / f"{stem}.png")
    (root / f"{stem}.json").write_text(json.dumps({"instruction": "lift it"} | fields))


def test_drawn_trials_restart_the_lab_where_they_were_drawn(tmp_path, monkeypatch):
    drawn = make(monkeypatch, stage_file(tmp_path), tmp_path / "trials" / "trials.json")
    assert [trial.trial_id for trial in drawn] == ["lift/0000", "lift/0001", "push_left/0000", "push_left/0001"]
    assert drawn[0].instruction == "lift the red block" and drawn[0].partial_credit_criteria
    assert len({trial.image.tobytes() for trial in drawn}) == 4
    env = make_lab(load_stage(stage_file(tmp_path)).lab, 4)
    observation, info = env.reset(options={"trials": [trial.options(0) for trial in drawn]})
    env.close()
    assert np.array_equal(observation["image"], [trial.image for trial in drawn])
    assert info["state"].tolist() == [trial.initial_state for trial in drawn]


def test_drawing_depends_on_seed_and_index_alone(tmp_path, monkeypatch):
    few = make(monkeypatch, stage_file(tmp_path, per_task=1), tmp_path / "few" / "trials.json")
    more = {t.trial_id: t for t in make(monkeypatch, stage_file(tmp_path), tmp_path / "more" / "trials.json")}
    other = make(monkeypatch, stage_file(tmp_path, seed=4, per_task=1), tmp_path / "other" / "trials.json")
    for trial, changed in zip(few, other):
        assert np.array_equal(trial.image, more[trial.trial_id].image) and trial.seed == more[trial.trial_id].seed
        assert not np.array_equal(trial.image, changed.image)


def test_fewer_trials_in_the_same_folder_leave_no_strays(tmp_path, monkeypatch):
    out = tmp_path / "trials.json"
    assert len(make(monkeypatch, stage_file(tmp_path, per_task=2), out)) == 4
    assert len(make(monkeypatch, stage_file(tmp_path, per_task=1), out)) == 2


def test_all_broken_pairs_are_reported_at_once(tmp_path):
    pair(tmp_path, "lift/good")
    pair(tmp_path, "lift/no_text")
    (tmp_path / "lift/no_text.json").unlink()
    pair(tmp_path, "lift/no_image")
    (tmp_path / "lift/no_image.png").unlink()
    pair(tmp_path, "push/empty", instruction=" ")
    pair(tmp_path, "push/cut")
    (tmp_path / "push/cut.png").write_bytes((tmp_path / "push/cut.png").read_bytes()[:40])
    pair(tmp_path, "push/garbled")
    (tmp_path / "push/garbled.json").write_text("{")
    pair(tmp_path, "push/seed", seed="seven")
    pair(tmp_path, "push/large")
    Image.new("RGB", (9, 8)).save(tmp_path / "push/large.png")
    with pytest.raises(UserError) as caught:
        load_trials(tmp_path)
    message = str(caught.value)
    for name in ("no_text.json", "no_image.png", "empty.json", "cut.png", "garbled.json", "seed.json", "large.png"):
        assert name in message
    assert "good" not in message and "\n" not in message and "7 broken" in message


def test_a_changed_file_is_noticed(tmp_path, monkeypatch):
    out = tmp_path / "trials.json"
    make(monkeypatch, stage_file(tmp_path), out)
    Image.new("RGB", (24, 24)).save(tmp_path / "lift/0001.png")
    with pytest.raises(UserError, match=r"lift/0001\.png differs from the checksum"):
        load_trials(out)


def test_somebodys_own_folder_is_taken_over(tmp_path, monkeypatch):
    own = tmp_path / "own"
    pair(own, "stack cups/v1.2", partial_credit_criteria="0.5 if it holds the cup")
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(own / "stack cups/v1.2.png")  # grey
    (only,) = make(monkeypatch, stage_file(tmp_path, root=str(own)), tmp_path / "out" / "trials.json", gather)
    assert (only.trial_id, only.task) == ("stack cups/v1.2", "stack cups")
    assert only.image.shape == (8, 8, 3) and only.initial_state is None
    assert only.partial_credit_criteria == "0.5 if it holds the cup"
    assert only.seed == load_trials(own)[0].seed


@pytest.mark.parametrize("content", ["", "{}", '{"trials": [1]}'])
def test_a_damaged_listing_is_one_clear_line(tmp_path, content):
    pair(tmp_path, "lift/a")
    (tmp_path / "trials.json").write_text(content)
    with pytest.raises(UserError, match=r"trials\.json: not a listing"):
        load_trials(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no trial"):
        load_trials(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        load_trials(tmp_path / "absent")
