"""Failure optimism: what is spoiled, how it is replayed, and that a perfect world model is not called an optimist."""

from __future__ import annotations

import argparse
import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests import analysis_data as data
from workflow_src.analysis import optimism
from workflow_src.common.config import load_stage
from workflow_src.common.errors import UserError
from workflow_src.common.sections import Lab
from workflow_src.common.seeds import derive
from workflow_src.judges.interface import read_clips, write_judgements
from workflow_src.judges.score import judge
from workflow_src.judges.truth import TruthJudge
from workflow_src.rollouts import corruptions as cr
from workflow_src.rollouts.loop import Item, Rollout
from workflow_src.rollouts.records import Recorder, Source, read_records
from workflow_src.rollouts.trials import Trial
from workflow_src.rollouts.worlds import make_lab
from workflow_src.workflow import CORRUPTIONS

TASKS, HORIZON = ("lift", "push_left"), 18


def trial(number: int = 0, task: str = "lift", state: list | None = None) -> Trial:
    image = np.zeros((16, 16, 3), np.uint8)
    return Trial(f"{task}/{number:04d}", task, f"do {task}", image, state or [0.0], derive(7, "trial", task, number))


# ---- corruptions ----------------------------------------------------------------------------------------------------


def recorded() -> np.ndarray:
    actions = np.random.default_rng(0).uniform(-0.03, 0.03, (HORIZON, 7)).astype(np.float32)
    actions[:, 6] = np.arange(HORIZON) < 9
    return actions


def test_every_corruption_does_what_its_name_says():
    actions = recorded()
    found = {name: cr.corrupt(name, actions.copy(), trial()) for name in cr.CORRUPTIONS}
    assert all(spoiled.shape == (HORIZON, 7) and spoiled.dtype == np.float32 for spoiled in found.values())
    assert (found["as_recorded"] == actions).all()
    assert (found["gripper_open"][:, 6] == 1).all() and (found["gripper_open"][:, :6] == actions[:, :6]).all()
    assert (found["frozen"][:, :6] == 0).all() and (found["frozen"][:, 6] == actions[0, 6]).all()
    assert (found["reversed"] == actions[::-1]).all()
    assert sorted(map(tuple, found["shuffled"])) == sorted(map(tuple, actions))
    assert (found["shuffled"] != actions).any()


def test_the_offset_is_four_centimetres_within_the_largest_recorded_step():
    for number in range(12):
        spoiled = cr.corrupt("offset", recorded(), trial(number))
        moved = (spoiled - recorded()).sum(0)
        assert np.abs(moved[:2]).max() == pytest.approx(cr.OFFSET, abs=1e-6) and np.abs(moved[2:]).max() == 0
        assert np.abs(moved[:2]).min() == 0
        assert np.abs(spoiled[:, :2]).max() <= np.abs(recorded()[:, :2]).max() + 1e-6


def test_what_is_random_depends_on_the_trial_alone():
    one, again, other = (cr.corrupt("shuffled", recorded(), trial(number)) for number in (0, 0, 1))
    assert (one == again).all() and (one != other).any()


def test_the_workflow_knows_all_corruptions():
    assert tuple(cr.CORRUPTIONS) == CORRUPTIONS


# ---- replays --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Trials of a small tabletop, and what the expert and an idle policy did there: (folder, trials, tables)."""
    folder, settings = tmp_path_factory.mktemp("lab"), Lab(tasks=TASKS, image_size=16, supersample=1, workers=1)
    wanted = [{"task": task, "seed": derive(7, "trial", task, i)} for task in TASKS for i in range(3)]
    env = make_lab(settings, len(wanted))
    try:
        _, info = env.reset(seed=[one["seed"] for one in wanted], options={"trials": wanted})
        states = info["state"].tolist()
        trials = [trial(i % 3, one["task"], state) for i, (one, state) in enumerate(zip(wanted, states))]
        tables = [_record(folder, "expert", env, trials), _record(folder, "idle", env, trials)]
    finally:
        env.close()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    sections = {"seed": 0, "lab": {"tasks": list(TASKS), "image_size": 16, "supersample": 1, "workers": 1},
                "rollouts": {"batch": 4}}  # fmt: skip
    (folder / "stage.json").write_text(json.dumps(sections))
    return folder, trials, tables


def _record(folder, policy, env, trials):
    """The lab rollouts of a policy that knows the state, in the format of every other."""
    table = folder / policy / "rollouts.parquet"
    recorder = Recorder(table, Source(policy, "lab", 5.0, "p", None), "k")
    _, info = env.reset(options={"trials": [one.options(0) for one in trials]})
    actions, success = [], [info["success"]]
    for _ in range(HORIZON):
        chosen = np.zeros((len(trials), 7), np.float32)
        if policy == "expert":
            chosen = env.unwrapped.expert_actions(info["state"], [one.task for one in trials])
        actions.append(chosen)
        *_, info = env.step(chosen)
        success.append(info["success"])
    actions, success = np.stack(actions, 1), np.stack(success, 1)
    frames = np.zeros((HORIZON + 1, 16, 16, 3), np.uint8)
    items = [Item(one, 0) for one in trials]
    for row, item in enumerate(items):
        recorder.write(Rollout(item, frames, actions[row], HORIZON, False, 0.0, None, success[row], None))
    recorder.finish(items)
    return table


def replay(lab, out):
    """Replay in the lab, and in a world model that is the lab itself."""
    folder, trials, tables = lab
    stage = load_stage(folder / "stage.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cr, "load_trials", lambda path: trials)
        patch.setattr(cr, "make_world_model", lambda folder, num_envs, seed, horizon: make_lab(stage.lab, num_envs))
        options = argparse.Namespace(trials=None, rollouts=tables, world_model=folder / "model.safetensors", out=out)
        cr.replay(stage, options)


@pytest.fixture(scope="module")
def replayed(lab, tmp_path_factory):
    """The folder with every replay in both worlds. Copy it; do not change it."""
    folder = tmp_path_factory.mktemp("replayed")
    replay(lab, folder)
    return folder


def test_actions_come_from_the_policy_that_solves_most(lab):
    _, trials, tables = lab
    found = cr.solved(tables)
    assert set(found) == {one.trial_id for one in trials}  # the expert solves them all
    assert all(np.abs(actions[:, :3]).max() > 0.01 for actions in found.values())
    with pytest.raises(UserError, match="no policy solved any trial in the lab"):
        cr.solved(tables[1:])


def test_a_lost_file_is_named(lab, tmp_path):
    table = tmp_path / "rollouts.parquet"
    rows = pd.read_parquet(lab[2][0])
    rows["arrays"] = "gone.npz"
    rows.to_parquet(table)
    with pytest.raises(UserError, match=r"gone\.npz: missing or damaged"):
        cr.solved([table])


def test_a_world_model_that_is_the_lab_is_no_optimist(replayed, tmp_path):
    tables = sorted(replayed.glob("*/*/rollouts.parquet"))
    assert len(tables) == 2 * len(cr.CORRUPTIONS)
    as_recorded = read_records(replayed / "lab" / "as_recorded" / "rollouts.parquet")
    assert as_recorded["success_at_end"].all()  # the lab is deterministic
    frozen = read_records(replayed / "lab" / "frozen" / "rollouts.parquet")
    assert not frozen["success_at_end"].any()
    judgements = [one for table in tables for one in judge(read_clips(table), [_seer()])]
    write_judgements(tmp_path / "judgements.parquet", judgements)
    table = optimism.records.load_judgements([tmp_path / "judgements.parquet"])
    rows = optimism.optimism_table(table, ["seer"], TASKS, 0.95, 0).set_index(["corruption", "task"])
    assert (rows["n"].xs("all", level="task") == 6).all()
    assert (rows["false_success"].dropna() == 0).all() and (rows["success_imagined"] == rows["success_real"]).all()
    assert rows.loc[("frozen", "all"), ["false_success", "n_failed", "auroc"]].tolist() == [0, 6, 1]
    assert rows.loc[("frozen", "all"), "false_success_high"] == pytest.approx(0.39, abs=0.01)
    assert np.isnan(rows.loc[("as_recorded", "all"), "auroc"])


def _seer():
    """Knows the outcome of every clip that has one."""
    seer = TruthJudge()
    seer.name = "seer"
    return seer


def test_replays_resume(lab, replayed, tmp_path):
    folder = tmp_path / "replays"
    shutil.copytree(replayed, folder)  # with time stamps
    video = next((folder / "world_model" / "offset").glob("*.mp4"))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*.mp4")}
    video.unlink()
    replay(lab, folder)
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*.mp4")}
    assert {path for path in before if before[path] != after[path]} == {video}


# ---- tables ---------------------------------------------------------------------------------------------------------


def judgements() -> pd.DataFrame:
    """Ten replays as recorded and ten frozen ones; imagination calls four of the frozen successes, the judge none."""
    rows = []
    for corruption, real, imagined in (
        ("as_recorded", [1] * 10, [1] * 9 + [0]),
        ("frozen", [0] * 10, [1] * 4 + [0] * 6),
    ):
        for i, (truth, verdict) in enumerate(zip(real, imagined)):
            key = {"policy": corruption, "trial_id": f"lift/{i:03d}", "task": "lift", "repeat": 0, "valid": True}
            rows += [key | {"world": "lab", "judge": judge, "success_at_end": truth, "score": float(truth)}
                     for judge in ("truth", "classifier")]  # fmt: skip
            score = 0.9 if verdict else 0.1
            rows.append(
                key | {"world": "world_model", "judge": "classifier", "success_at_end": verdict, "score": score}
            )
    return pd.DataFrame(rows)


def test_false_successes_and_auroc_by_hand():
    rows = optimism.optimism_table(judgements(), ["classifier"], ["lift"], 0.95, 0).set_index(["corruption", "task"])
    frozen = rows.loc[("frozen", "all")]
    assert frozen[["n", "n_failed", "success_real", "success_imagined"]].tolist() == [10, 10, 0, 0.4]
    assert frozen["false_success"] == 0.4 and frozen["judge_false_success"] == 0
    assert (frozen["false_success_low"], frozen["false_success_high"]) == pytest.approx((0.168, 0.687), abs=1e-3)
    # 9 of 10 successes score 0.9, 4 of 10 failures do: wins 9*6, ties 9*4 + 1*6.
    assert frozen["auroc"] == pytest.approx((54 + 0.5 * 42) / 100)
    assert frozen["auroc_low"] < frozen["auroc"] < frozen["auroc_high"]
    assert rows.loc[("frozen", "all")].equals(rows.loc[("frozen", "lift")]) or rows.loc[("frozen", "lift"), "n"] == 10


def test_a_judge_without_scores_is_taken_at_its_verdict():
    table = judgements().drop(columns="score")
    rows = optimism.optimism_table(table, ["classifier"], ["lift"], 0.95, 0).set_index(["corruption", "task"])
    assert rows.loc[("frozen", "all"), "auroc"] == pytest.approx(0.75)
    with pytest.raises(UserError, match="none by 'state' of imagined replays"):
        optimism.optimism_table(table, ["state"], ["lift"], 0.95, 0)


def test_command_line_writes_table_figure_and_examples(tmp_path, monkeypatch):
    table = judgements().drop(columns="valid").assign(success_ever=False, invalid=0, error=None)
    files = data.write_run(tmp_path, table, videos=True)
    config = data.stage_file(tmp_path)
    merged = tmp_path / "judgements.parquet"
    pd.concat(map(pd.read_parquet, files["judgements"])).to_parquet(merged)
    arguments = ["--config", config, "--rollouts", *files["rollouts"], "--judgements", merged,
                 "--out", tmp_path / "failure_optimism.csv", "--out-dir", tmp_path]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["optimism", *map(str, arguments)])
    optimism.main()
    rows = pd.read_csv(tmp_path / "failure_optimism.csv")
    assert list(rows) == optimism.COLUMNS and set(rows["corruption"]) == {"as_recorded", "frozen"}
    assert Image.open(tmp_path / "failure_examples.png").height > 4 * 2 * 96  # two examples of each
    assert (tmp_path / "failure_optimism.svg").is_file() and (tmp_path / "failure_optimism.png").is_file()
