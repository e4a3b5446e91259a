"""The closed loop and its records, with a fake world and a fake policy whose every number can be foretold."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from types import SimpleNamespace

import av
import numpy as np
import pandas as pd
import pytest

from workflow_src.common.config import load_stage
from workflow_src.common.errors import UserError
from workflow_src.common.seeds import rng
from workflow_src.common.video import read_video
from workflow_src.policies.client import PolicyError
from workflow_src.policies.wire import Metadata
from workflow_src.rollouts import run as running
from workflow_src.rollouts.loop import Item, roll_out
from workflow_src.rollouts.records import COLUMNS, Recorder, Source, read_frames, read_records
from workflow_src.rollouts.run import record_world, shard_of
from workflow_src.rollouts.trials import Trial

SIZE, HORIZON = 16, 6


class FakeWorld:
    """Shows noise that depends on (trial, repeat, step) and on all actions so far; knows its truth when told to."""

    def __init__(self, num_envs, truth=False, width=7):
        self.num_envs, self.truth, self.batches, self.actions = num_envs, truth, [], []
        self.single_action_space = SimpleNamespace(shape=(width,))

    def reset(self, *, seed, options):
        assert len(seed) == len(options["trials"]) == self.num_envs
        self.trials, self.moved, self.steps = (
            options["trials"],
            np.zeros((self.num_envs, *self.single_action_space.shape)),
            0,
        )
        self.batches.append([trial["trial_id"] for trial in self.trials])
        return {"image": np.stack([trial["image"] for trial in self.trials])}, self._info()

    def step(self, actions):
        assert actions.shape == self.moved.shape and actions.dtype == np.float32
        self.actions.append(actions.copy())
        self.moved += actions
        self.steps += 1
        nobody = np.zeros(self.num_envs, bool)
        return (
            {"image": np.stack([self._image(row) for row in range(self.num_envs)])},
            nobody,
            nobody,
            nobody,
            self._info(),
        )

    def _image(self, row):
        trial = self.trials[row]
        names = (trial["repeat"], self.steps, self.moved[row].tobytes().hex())
        return rng(trial["seed"], *names).integers(0, 256, (SIZE, SIZE, 3), np.uint8)

    def _info(self):
        if not self.truth:
            return {}
        success = np.array([self.steps == 3] * self.num_envs)
        return {
            "success": success,
            "partial": np.full(self.num_envs, self.steps / 10, np.float32),
            "state": self.moved + 0,
        }

    def close(self):
        pass


class FakePolicy:
    """Chunks of `chunk` actions, each a function of image, seed and step; says stop in trial `stops` at step 4."""

    def __init__(self, chunk=2, stops=None, fails=None, execution="all", ensemble=0.0, base=None):
        self.metadata = Metadata(name="fake", batched=True, execution=execution, ensemble=ensemble)
        self.metadata_digest = "0123456789abcdef"
        self.chunk, self.stops, self.fails, self.base, self.asked = chunk, stops, fails, base, []

    def infer(self, observation):
        rows = len(observation["image"])
        assert all(len(value) == rows for value in observation.values())
        self.asked.append((observation["step"].tolist(), observation["prompt"]))
        for row, prompt in enumerate(observation["prompt"]):
            if self.fails and prompt == self.fails[0] and observation["step"][row] == self.fails[1]:
                raise PolicyError("policy fake: `actions` is not finite (NaN or infinite)", row)
        actions = np.stack([self._chunk(observation, row) for row in range(rows)])
        terminate = np.zeros((rows, self.chunk), bool)
        for row, (prompt, step) in enumerate(zip(observation["prompt"], observation["step"])):
            for k in range(self.chunk):
                terminate[row, k] = prompt == self.stops and step + k == 3
        moved = {} if self.base is None else {"base": np.full((rows, self.chunk, 3), self.base, np.float32)}
        return {"actions": actions, "terminate": terminate, **moved}

    def _chunk(self, observation, row):
        names = (int(observation["step"][row]), int(observation["image"][row].astype(int).sum()))
        return rng(int(observation["seed"][row]), *names).uniform(0, 1, (self.chunk, 7)).astype(np.float32)


def trial(index, **fields):
    image = rng(index, "image").integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    return Trial(f"lift/{index:04d}", "lift", f"lift number {index}", image, [0.0], 1000 + index, **fields)


def items(count, repeats=1):
    return shard_of([trial(i) for i in range(count)], repeats, 0, 1)


def recorder(folder, key="k", world="lab"):
    digest = None if world == "lab" else "m"
    return Recorder(folder / "rollouts.parquet", Source("fake", world, 5.0, "0123456789abcdef", digest), key)


def rolled(world, policy, work):
    return [rollout for batch in roll_out(world, policy, work, HORIZON) for rollout in batch]


# ---- the loop -------------------------------------------------------------------------------------------------------


def test_policy_is_asked_only_when_its_chunk_is_used_up_and_for_live_trials():
    policy = FakePolicy(chunk=2, stops="lift number 1")
    rolled(FakeWorld(3), policy, items(3))
    steps = [asked for asked, _ in policy.asked]
    assert steps == [[0, 0, 0], [2, 2, 2], [4, 4]]
    assert policy.asked[-1][1] == ["lift number 0", "lift number 2"]


def test_chunk_longer_than_the_rest_of_the_horizon_is_cut():
    (rollout,) = rolled(FakeWorld(1), FakePolicy(chunk=4), items(1))
    assert rollout.actions.shape == (HORIZON, 7) and rollout.frames.shape == (HORIZON + 1, SIZE, SIZE, 3)


def test_terminate_is_honoured_and_the_last_frame_held():
    world = FakeWorld(2, truth=True)
    free, stopped = rolled(world, FakePolicy(stops="lift number 1"), items(2))
    assert (free.steps, free.terminated, stopped.steps, stopped.terminated) == (HORIZON, False, 4, True)
    assert all(np.array_equal(frame, stopped.frames[4]) for frame in stopped.frames[4:])
    assert not np.array_equal(stopped.frames[3], stopped.frames[4])
    assert np.all(stopped.actions[4:, :6] == 0) and np.all(stopped.actions[4:, 6] == stopped.actions[3, 6])
    assert stopped.partial[-1] == pytest.approx(0.4) and free.partial[-1] == pytest.approx(0.6)
    assert np.array_equal(np.stack(world.actions)[:, 1], stopped.actions)


def test_world_rests_when_every_policy_has_terminated():
    world = FakeWorld(2)
    (rollout,) = rolled(world, FakePolicy(stops="lift number 0"), items(1))
    assert len(world.actions) == 4 and len(rollout.frames) == HORIZON + 1 and rollout.actions.shape == (HORIZON, 7)


def test_short_batches_are_padded_with_a_repeated_trial():
    world = FakeWorld(4)
    assert len(rolled(world, FakePolicy(), items(5))) == 5
    assert world.batches == [[f"lift/000{i}" for i in range(4)], ["lift/0004"] * 4]


def test_repeats_differ_and_runs_agree():
    once = rolled(FakeWorld(2), FakePolicy(), items(1, repeats=2))
    again = rolled(FakeWorld(3), FakePolicy(), items(1, repeats=2))
    assert not np.array_equal(once[0].actions, once[1].actions)
    for a, b in zip(once, again):
        assert np.array_equal(a.frames, b.frames) and np.array_equal(a.actions, b.actions)


def test_failing_policy_is_named_with_trial_and_step():
    with pytest.raises(UserError, match=r"trial 'lift/0002#0', step 2: policy fake: `actions` is not finite"):
        rolled(FakeWorld(3), FakePolicy(fails=("lift number 2", 2)), items(3))


def test_a_failure_of_the_whole_batch_names_its_trials():
    class Dead(FakePolicy):
        def infer(self, observation):
            raise PolicyError("policy fake: its server died")

    with pytest.raises(UserError, match=r"trials 'lift/0000#0' … 'lift/0002#0', step 0: policy fake: its server died"):
        rolled(FakeWorld(3), Dead(), items(3))


def test_a_moving_base_is_refused_where_it_is_fixed_and_carried_where_it_is_not():
    assert rolled(FakeWorld(1), FakePolicy(base=0.0), items(1))
    with pytest.raises(UserError, match="moves the robot's base, and this world's robot has a fixed one"):
        rolled(FakeWorld(1), FakePolicy(base=0.1), items(1))
    driving, parked = FakePolicy(base=0.1, stops="lift number 0"), FakePolicy()
    (rollout,) = rolled(FakeWorld(1, width=10), driving, items(1))
    assert rollout.actions.shape == (HORIZON, 10)
    assert np.all(rollout.actions[:4, 7:] == np.float32(0.1)) and np.all(rollout.actions[4:, 7:] == 0)
    (rollout,) = rolled(FakeWorld(1, width=10), parked, items(1))
    assert np.all(rollout.actions[:, 7:] == 0) and np.any(rollout.actions[:, :7])


def test_of_a_chunk_the_first_action_may_be_executed_alone():
    policy = FakePolicy(chunk=3, execution="first")
    (rollout,) = rolled(FakeWorld(1), policy, items(1))
    assert [asked for asked, _ in policy.asked] == [[step] for step in range(HORIZON)]
    (alone,) = rolled(FakeWorld(1), FakePolicy(chunk=1), items(1))
    assert np.array_equal(rollout.actions[0], alone.actions[0])


class Foretelling(FakePolicy):
    """At step s foretells 10 s + k for step s + k, so that every query's share in an action can be told."""

    def _chunk(self, observation, row):
        return np.float32(10 * observation["step"][row] + np.arange(self.chunk))[:, None] * np.ones(7, np.float32)


@pytest.mark.parametrize(
    ("m", "expected"),
    [
        # Step 1: (1, 10); step 2: (2, 11, 20); step 3: (12, 21, 30), the oldest first.
        (0.0, [0, 5.5, 11, 21]),
        (
            -0.8,
            [0, (1 + 10 * 2.225541) / 3.225541, (2 + 11 * 2.225541 + 20 * 4.953032) / 8.178573, 25.350064],
        ),  # exp(0.8), exp(1.6)
    ],
)
def test_ensemble_of_overlapping_chunks(m, expected):
    policy = Foretelling(chunk=3, execution="ensemble", ensemble=m)
    (rollout,) = rolled(FakeWorld(1), policy, items(1))
    assert rollout.actions[:4, 0] == pytest.approx(expected, rel=1e-5)
    assert len(policy.asked) == HORIZON


# ---- records --------------------------------------------------------------------------------------------------------


def by_name(
    folder, columns=("trial_id", "repeat", "sha256", "sha256_arrays", "steps", "success_at_end", "success_ever")
):
    table = pd.concat([pd.read_parquet(path) for path in sorted(folder.rglob("rollouts.parquet"))])
    return table.sort_values(["trial_id", "repeat"]).reset_index(drop=True)[list(columns)]


@pytest.mark.parametrize("batch", [2, 7])
def test_any_number_of_shards_gives_the_same_rollouts(tmp_path, batch):
    trials = [trial(i) for i in range(7)]
    for shards in (1, 3, 9):
        for shard in range(shards):
            work = shard_of(trials, 2, shard, shards)
            out = recorder(tmp_path / str(shards) / str(shard))
            record_world(lambda: FakeWorld(batch, True), FakePolicy(stops="lift number 3"), work, HORIZON, out)
    whole = by_name(tmp_path / "1")
    assert len(whole) == 14
    pd.testing.assert_frame_equal(whole, by_name(tmp_path / "3"))
    pd.testing.assert_frame_equal(whole, by_name(tmp_path / "9"))  # two shards without a trial


def test_record_says_what_happened(tmp_path):
    record_world(lambda: FakeWorld(2, True), FakePolicy(), items(2), HORIZON, recorder(tmp_path))
    rows = read_records(tmp_path / "rollouts.parquet")
    assert list(rows) == list(COLUMNS)
    first = rows.iloc[0]
    assert (first.trial_id, first.policy, first.world, first["repeat"]) == ("lift/0000", "fake", "lab", 0)
    assert (first.success_at_end, first.success_ever, first.steps) == (False, True, HORIZON)
    assert pd.isna(first.model_digest) and first.policy_digest == "0123456789abcdef"
    with av.open(first.video) as container:
        assert float(container.streams.video[0].average_rate) == first.control_hz == 5.0
    with np.load(first.arrays) as arrays:
        assert arrays["actions"].shape == (HORIZON, 7) and arrays["state"].shape == (HORIZON + 1, 7)
    expected = rolled(FakeWorld(1, True), FakePolicy(), items(1))[0]
    assert np.array_equal(read_video(first.video), expected.frames)


def test_a_world_without_truth_has_none_in_its_record(tmp_path):
    record_world(lambda: FakeWorld(2), FakePolicy(), items(2), HORIZON, recorder(tmp_path, world="world_model"))
    rows = read_records(tmp_path / "rollouts.parquet")
    assert (
        rows[["success_at_end", "success_ever", "partial"]].isna().all(axis=None) and (rows.model_digest == "m").all()
    )


def test_interrupted_work_is_continued_not_redone(tmp_path):
    with pytest.raises(UserError):
        record_world(
            lambda: FakeWorld(2), FakePolicy(fails=("lift number 4", 2)), items(5), HORIZON, recorder(tmp_path)
        )
    assert not (tmp_path / "rollouts.parquet").exists()
    world = FakeWorld(2)
    record_world(lambda: world, FakePolicy(), items(5), HORIZON, recorder(tmp_path))
    assert world.batches == [["lift/0004", "lift/0004"]]
    record_world(lambda: FakeWorld(2), FakePolicy(), items(5), HORIZON, recorder(tmp_path / "whole"))
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "rollouts.parquet").drop(columns="seconds"),
        pd.read_parquet(tmp_path / "whole" / "rollouts.parquet").drop(columns="seconds"),
    )


@pytest.mark.parametrize("suffix", [".mp4", ".npz"])
def test_damaged_and_lost_files_are_made_again(tmp_path, suffix):
    record_world(lambda: FakeWorld(4), FakePolicy(), items(4), HORIZON, recorder(tmp_path))
    before = by_name(tmp_path)
    damaged = tmp_path / f"lift__0001__r0{suffix}"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    (tmp_path / f"lift__0003__r0{suffix}").unlink()
    world = FakeWorld(4)
    record_world(lambda: world, FakePolicy(), items(4), HORIZON, recorder(tmp_path))
    assert world.batches == [["lift/0001", "lift/0003", "lift/0001", "lift/0001"]]
    pd.testing.assert_frame_equal(before, by_name(tmp_path))


def test_finished_work_needs_no_world_and_other_inputs_start_afresh(tmp_path):
    record_world(lambda: FakeWorld(2), FakePolicy(), items(2), HORIZON, recorder(tmp_path))
    record_world(lambda: pytest.fail("no world needed"), FakePolicy(), items(2), HORIZON, recorder(tmp_path))
    world = FakeWorld(2)
    record_world(lambda: world, FakePolicy(), items(2), HORIZON, recorder(tmp_path, key="another model"))
    assert world.batches == [["lift/0000", "lift/0001"]]


def test_reader_notices_a_damaged_video(tmp_path):
    record_world(lambda: FakeWorld(2), FakePolicy(), items(2), HORIZON, recorder(tmp_path))
    rows = read_records(tmp_path / "rollouts.parquet")
    video = tmp_path / "lift__0001__r0.mp4"
    video.write_bytes(video.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"lift__0001__r0\.mp4: missing or damaged"):
        list(read_frames(rows))
    (tmp_path / "rollouts.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not a readable table"):
        read_records(tmp_path / "rollouts.parquet")


# ---- the job --------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A stage with a world-model artefact, and both worlds replaced by fakes."""
    lab = {"horizon": HORIZON, "image_size": SIZE}
    sections = {"seed": 0, "lab": lab, "rollouts": {"batch": 2, "repeats": 2}, "policies": {"fake": {}}}
    (tmp_path / "stage.json").write_text(json.dumps(sections))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text(json.dumps({"steps": 3, "provenance": {"time": "now"}}))
    monkeypatch.setattr(running, "make_lab", lambda lab, num_envs: FakeWorld(num_envs, True))
    monkeypatch.setattr(running, "make_world_model", lambda folder, num_envs, seed, horizon: FakeWorld(num_envs))
    monkeypatch.setattr(running, "load_trials", lambda path: [trial(0), trial(1)])
    options = argparse.Namespace(
        policy="fake", shard=0, shards=1, trials=None, world_model=tmp_path / "model.safetensors",
        lab_out=tmp_path / "lab" / "rollouts.parquet", world_model_out=tmp_path / "wm" / "rollouts.parquet",
    )  # fmt: skip
    return load_stage(tmp_path / "stage.json"), options


def test_job_records_both_worlds(job, tmp_path):
    running.run(*job, FakePolicy())
    lab, imagined = by_name(tmp_path / "lab"), by_name(tmp_path / "wm")
    assert len(lab) == len(imagined) == 4
    assert lab.success_ever.all() and imagined.success_ever.isna().all()
    assert pd.read_parquet(job[1].world_model_out).model_digest.iloc[0] == running.model_digest(job[1].world_model)


def test_trials_no_lab_can_start_are_rehearsed_only(job, tmp_path, monkeypatch):
    photo = trial(1)
    photo = Trial(photo.trial_id, photo.task, photo.instruction, photo.image, None, photo.seed)
    monkeypatch.setattr(running, "load_trials", lambda path: [trial(0), photo])
    running.run(*job, FakePolicy())
    assert set(by_name(tmp_path / "lab").trial_id) == {"lift/0000"} and len(by_name(tmp_path / "wm")) == 4


def test_without_a_lab_everything_is_rehearsed_only(job, tmp_path, monkeypatch):
    content = json.loads((tmp_path / "stage.json").read_text())
    content["lab"] |= {"scene": "none", "embodiment": "widowx", "tasks": []}
    (tmp_path / "stage.json").write_text(json.dumps(content))
    monkeypatch.setattr(running, "make_lab", lambda lab, num_envs: pytest.fail("there is no lab"))
    running.run(load_stage(tmp_path / "stage.json"), job[1], FakePolicy())
    assert len(pd.read_parquet(job[1].lab_out)) == 0 and len(by_name(tmp_path / "wm")) == 4
    assert read_records(job[1].world_model_out).robot_state.isna().all()


def test_what_is_told_the_reckoned_pose_is_marked_so(job, tmp_path, monkeypatch):
    content = json.loads((tmp_path / "stage.json").read_text())
    content["lab"] |= {"scene": "none", "embodiment": "widowx", "tasks": []}
    (tmp_path / "stage.json").write_text(json.dumps(content))
    stage, policy = load_stage(tmp_path / "stage.json"), FakePolicy()
    policy.metadata.extra["needs_pose"] = True
    with pytest.raises(UserError, match="fake: it needs the robot's state, and 2 of 2 trials have no initial_state"):
        running.run(stage, job[1], policy)
    starts = [replace(trial(index), initial_state=[0.1] * 7) for index in range(2)]
    monkeypatch.setattr(running, "load_trials", lambda path: starts)
    running.run(stage, job[1], policy)
    assert set(read_records(job[1].world_model_out).robot_state) == {"dead_reckoned"}


def test_names_of_rollouts_are_unique():
    names = [Item(trial(i), repeat).name for i in range(3) for repeat in range(3)]
    assert len(set(names)) == 9
    assert len({Item(trial(i), repeat).episode for i in range(3) for repeat in range(3)}) == 9
