"""Probes: changed lab clips with exact labels, and what judges make of them."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pandas as pd
import pytest

from tests.vlm_server import VlmServer, shown_frames
from workflow_src.common.config import write_stage
from workflow_src.common.errors import UserError
from workflow_src.common.sections import Config, Judges, Lab, Vlm
from workflow_src.judges import calibrate
from workflow_src.judges.probes import KINDS, make_probes
from workflow_src.rollouts.loop import Item, Rollout
from workflow_src.rollouts.records import Recorder, Source
from workflow_src.rollouts.trials import Trial
from workflow_src.workflow import ROOT

SCENE, NAMES, STEPS, LIFTED_FROM = "one_block", ["lift", "push_left"], 8, 5


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Six lifts from step 5 on and six attempts that never lift. A frame is bright where the block is up, and numbered."""
    path = tmp_path_factory.mktemp("lab") / "rollouts.parquet"
    recorder, items = Recorder(path, Source("p", "lab", 5.0, "x", None), "key"), []
    for i in range(12):
        states = np.zeros((STEPS + 1, 14), np.float32)
        states[:, 4:7] = [0.09, 0, 0.025]
        if i < 6:
            states[LIFTED_FROM:, 6] = 0.12
        frames = np.full((STEPS + 1, 16, 16, 3), 20, np.uint8)
        frames[states[:, 6] > 0.05] = 200
        frames[:, 0, :8], frames[:, 0, 8:] = i, np.arange(STEPS + 1, dtype=np.uint8)[:, None, None]
        trial = Trial(f"lift/{i:02d}", "lift", "lift the red block", frames[0], None, i, "it was touched")
        items.append(Item(trial, 0))
        success = states[:, 6] > 0.05
        actions = np.zeros((STEPS, 7), np.float32)
        recorder.write(Rollout(items[-1], frames, actions, STEPS, False, 0.1, states, success, success.astype(float)))
    recorder.finish(items)
    return path


def order_of(clip):
    """Which frames a clip shows."""
    return clip.frames[:, 0, 8, 0].tolist()


def test_probes_show_what_their_labels_say(table):
    probes = make_probes([table], SCENE, NAMES, 12, seed=0)
    counts = pd.Series([probe.kind for probe in probes]).value_counts().to_dict()
    assert counts == {"recorded": 12, "clipped": 6, "swapped": 6, "reversed": 6, "shuffled": 6}
    whole = list(range(STEPS + 1))
    for probe in probes:
        order, lifted = order_of(probe.clip), int(probe.clip.trial_id[-2:]) < 6
        if probe.kind == "recorded":
            assert order == whole and probe.label == lifted
        elif probe.kind == "clipped":  # a near miss: some steps into it, none of success
            assert order == whole[: len(order)] and LIFTED_FROM // 2 < len(order) <= LIFTED_FROM and not probe.label
        elif probe.kind == "swapped":
            assert order == whole and not probe.label
            assert (probe.clip.task, probe.clip.partial_credit_criteria) == ("push_left", None)
            assert "left" in probe.clip.instruction
        elif probe.kind == "reversed":
            assert order == whole[::-1] and not probe.label
        else:
            assert sorted(order) == whole and order != whole
            assert probe.label == (order[-1] >= LIFTED_FROM)
    again = make_probes([table], SCENE, NAMES, 12, seed=0)
    assert all((a.clip.frames == b.clip.frames).all() for a, b in zip(probes, again))


def test_successes_and_failures_are_half_of_the_probes_as_far_as_possible(table):
    def outcomes(count):
        labels = [probe.label for probe in make_probes([table], SCENE, ["lift"], count, 0) if probe.kind == "recorded"]
        return sum(labels), len(labels) - sum(labels)

    assert outcomes(4) == (2, 2) and outcomes(5) == (2, 3) and outcomes(99) == (6, 6)


def test_a_lab_without_states_is_one_line(table, tmp_path):
    rows = pd.read_parquet(table)
    for name in rows["video"]:
        (tmp_path / name).write_bytes((table.parent / name).read_bytes())
    for name in rows["arrays"]:
        np.savez(tmp_path / name, actions=np.zeros((STEPS, 7)))
    rows.to_parquet(tmp_path / "rollouts.parquet")
    with pytest.raises(
        UserError, match=r"lift__\d\d__r0\.npz: holds no states .*; probes need a lab that records them"
    ):
        make_probes([tmp_path / "rollouts.parquet"], SCENE, NAMES, 4, 0)
    rows.assign(success_at_end=pd.array([None] * 12, "boolean")).to_parquet(tmp_path / "rollouts.parquet")
    with pytest.raises(UserError, match=r"rollouts\.parquet: no lab rollout with known truth"):
        make_probes([tmp_path / "rollouts.parquet"], SCENE, NAMES, 4, 0)


@pytest.mark.parametrize("careless", [True, False])
def test_a_vision_language_model_on_probes(table, tmp_path, monkeypatch, capsys, careless):
    """One that calls a success whatever shows a lifted block anywhere, and one that looks at the end and the instruction."""

    def answer(body):
        lifted = [image[10:, 10:].mean() > 100 for image in shown_frames(body)]
        asked = "lift the red block" in body["messages"][0]["content"][0]["text"]
        success = any(lifted) if careless else asked and lifted[-1]
        return f"Score: {int(success)}"

    with VlmServer() as server:
        server.answer = answer
        settings = Vlm(model="stub", base_url=server.url, votes=1, frames=STEPS - 1, side=0)
        config = Config(lab=Lab(tasks=("lift", "push_left")), judges=Judges(vlm={"gpt": settings}))
        sections = {"lab": None, "judges": {"vlm": {"gpt": dataclasses.asdict(settings)}}}
        stage = write_stage(tmp_path, "gpt", config, sections)
        out = tmp_path / "calibration" / "gpt.parquet"
        arguments = ["--config", stage, "--vlm", "gpt", "--prompt", ROOT / "config/prompts/success_1.yaml", "--cache",
                     tmp_path / "cache", "--rollouts", table, "--count", 6, "--out", out]  # fmt: skip
        monkeypatch.setattr(calibrate, "die_with_parent", lambda: None)
        monkeypatch.setattr(sys, "argv", ["calibrate", *map(str, arguments), "--dry-run"])
        calibrate.main()
        assert "requests          18" in capsys.readouterr().out and not server.seen
        monkeypatch.setattr(sys, "argv", ["calibrate", *map(str, arguments)])
        calibrate.main()
        asked = len(server.bodies)
        calibrate.main()
        assert len(server.bodies) == asked
    rows = pd.read_parquet(out)
    assert (rows["judge"] == "gpt").all() and set(rows["probe"]) == set(KINDS)
    wrong = rows[rows["success_at_end"] != rows["label"]].groupby("probe").size().to_dict()
    if careless:
        # Every lifted block is a success to it; what was cut off before shows none.
        assert {kind: wrong.get(kind, 0) for kind in ("recorded", "clipped", "swapped", "reversed")} == {
            "recorded": 0, "clipped": 0, "swapped": 3, "reversed": 3,
        }  # fmt: skip
    else:
        assert wrong == {}
    said = capsys.readouterr().err
    assert "gpt          reversed" in said and "undecided" in said
