"""Judges: opinions follow the frames, the artefact is strict, training labels from states, scoring gives a row each."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from workflow_src.common.config import load_stage
from workflow_src.common.errors import UserError
from workflow_src.common.seeds import rng
from workflow_src.episodes.record import main as record_episodes
from workflow_src.episodes.store import EpisodeStore
from workflow_src.judges import score
from workflow_src.judges.classifier import ClassifierJudge, calibrated, fit_calibration
from workflow_src.judges.interface import COLUMNS, Clip, Truth, opinion, read_clips, write_judgements
from workflow_src.judges.network import JudgeNetworks, in_batches, load_judge
from workflow_src.judges.state import StateJudge
from workflow_src.judges.truth import TruthJudge
from workflow_src.rollouts.loop import Item, Rollout
from workflow_src.rollouts.records import Recorder, Source
from workflow_src.rollouts.trials import Trial
from workflow_src.tabletop import tasks
from workflow_src.tabletop.scene import mirror_state
from workflow_src.training import judge as training

torch.set_num_threads(1)
SIZE, SCENE = 24, "one_block"
LAB = {"image_size": SIZE, "supersample": 1, "horizon": 4, "workers": 1, "tasks": ["put_on_plate", "push_left"]}
PLAIN = {"slope": 1.0, "intercept": 0.0}


def clip(frames, task="lift", truth=None):
    return Clip("lift/0", "p", "lab", 0, task, "lift it", None, np.asarray(frames, np.uint8), truth)


# ---- opinions -------------------------------------------------------------------------------------------------------


class Brightness(torch.nn.Module):
    """Stands in for the classifier: the logit of task 1 is the brightness - 100, that of task 0 its negative."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def logits(self, first, frame):
        bright = frame.float().mean((1, 2, 3)) - 100
        return torch.stack([-bright, bright], 1)


def brightness_judge(calibration=PLAIN):
    config = {"tasks": ["put_on_plate", "lift"], "calibration": calibration}
    return ClassifierJudge(SimpleNamespace(classifier=Brightness()), config, batch=4)


def video(*levels):
    return np.stack([np.full((2, 2, 3), level) for level in levels])


@pytest.mark.parametrize(
    ("levels", "end", "ever"),
    [
        ((0, 0, 0, 200, 200), True, True),
        ((0, 200, 200, 0, 0), False, True),
        ((200, 0, 0, 0, 0), False, False),  # the first frame is nobody's doing
        ((0, 0, 0, 0, 200), True, True),  # reached with the very last step
    ],
)
def test_classifier_reads_success_at_the_end_from_the_last_frame(levels, end, ever):
    (said,) = brightness_judge().judge([clip(video(*levels))])
    assert (said.judge, said.success_at_end, said.success_ever) == ("classifier", end, ever)
    assert (said.score > 0.5) == end and said.invalid == 0 and said.error is None


def test_classifier_answers_for_the_trials_own_task_and_calibration():
    (other,) = brightness_judge().judge([clip(video(0, 200, 200), task="put_on_plate")])
    assert not other.success_at_end
    (shifted,) = brightness_judge({"slope": 1.0, "intercept": -150.0}).judge([clip(video(0, 200, 200))])
    assert not shifted.success_at_end
    with pytest.raises(UserError, match="did you mean 'lift'"):
        brightness_judge().judge([clip(video(0, 200), task="lifft")])


def test_calibration_finds_the_line_and_survives_separable_examples():
    generator = rng(0, "calibration")
    sure = generator.normal(0, 3, 4000)
    labels = generator.random(4000) < 1 / (1 + np.exp(-sure))
    line = fit_calibration((sure + 2) / 0.5, labels)
    assert line["slope"] == pytest.approx(0.5, rel=0.1) and line["intercept"] == pytest.approx(-2, rel=0.1)
    separable = fit_calibration(np.array([-3.0, -2.0, 4.0, 5.0]), np.array([False, False, True, True]))
    assert np.isfinite(list(separable.values())).all()
    assert (calibrated(np.array([-3.0, 5.0]), separable) > 0).tolist() == [False, True]
    for labels in (np.zeros(5, bool), np.ones(5, bool), np.arange(5) < 2):  # no success, no failure, upside down
        assert fit_calibration(np.arange(5.0), labels)["slope"] > 0


def test_state_judge_says_what_the_predicates_say_of_its_reading():
    still = np.zeros((5, 14), np.float32)
    still[:, 4:7] = [0.09, 0, 0.025]  # far from the gripper
    lifted = still.copy()
    lifted[2:4, 6] = 0.12

    class Reader(torch.nn.Module):
        """Reads the state from the number that stands in the frame's first pixel."""

        mean = torch.zeros(14)

        def read(self, first, frame):
            return torch.from_numpy(lifted)[frame[:, 0, 0, 0].long()]

    frames = np.zeros((5, 2, 2, 3), np.uint8)
    frames[:, 0, 0, 0] = range(5)
    judge = StateJudge(SimpleNamespace(reader=Reader()), {"scene": SCENE}, batch=3)
    (said,) = judge.judge([clip(frames)])
    assert (said.success_at_end, said.success_ever, said.partial) == (False, True, 0.0)
    (held,) = judge.judge([clip(frames[:4])])
    assert (held.success_at_end, held.partial, held.score) == (True, 1.0, None)


def test_truth_is_passed_on():
    (said,) = TruthJudge().judge([clip(video(0, 0), truth=Truth(False, True, 0.5))])
    assert (said.judge, said.success_at_end, said.success_ever, said.partial) == ("truth", False, True, 0.5)


def test_a_pairs_result_does_not_depend_on_its_company():
    torch.manual_seed(0)
    networks = JudgeNetworks(4, 2, 14).eval()
    frames = rng(0, "frames").integers(0, 256, (7, SIZE, SIZE, 3), np.uint8)
    together = in_batches(networks.reader, frames, frames, 4, torch.device("cpu"))
    alone = [in_batches(networks.reader, one[None], one[None], 4, torch.device("cpu")) for one in frames]
    assert together.shape == (7, 14) and np.array_equal(together, np.concatenate(alone))


def test_an_invalid_answer_is_no_failure(tmp_path):
    undecided = opinion("vlm", clip(video(0, 0)), success_at_end=None, success_ever=None, votes=3, invalid=3)
    write_judgements(tmp_path / "judgements.parquet", [undecided])
    table = pd.read_parquet(tmp_path / "judgements.parquet")
    assert list(table) == list(COLUMNS)
    assert table.success_at_end.isna().all() and table.success_at_end.mean() is pd.NA


# ---- training -------------------------------------------------------------------------------------------------------


def test_labels_refer_to_the_first_frame_and_mirrored_states_to_the_mirrored_task():
    states = np.zeros((1, 3, 14), np.float32)
    states[..., 4:7] = [0.05, 0, 0.025]
    states[0, 1, 4] -= 0.08  # to the left
    states[0, 2, 4] += 0.08  # to the right of where it began
    labels = training.label(states, ("push_left", "push_right"), SCENE)
    assert labels[0].tolist() == [[False, False], [True, False], [False, True]]
    mirrored = training.label(mirror_state(states, SCENE), ("push_left", "push_right"), SCENE)
    assert np.array_equal(mirrored, labels[..., ::-1])


class Blur:
    """Stands in for the tokenizer: averages blocks of 8 x 8 pixels."""

    def encode(self, images):
        n, h, w, c = images.shape
        return images.reshape(n, h // 8, 8, w // 8, 8, c).mean((2, 4)).astype(np.float32)

    def decode(self, latents):
        return np.clip(latents, 0, 255).astype(np.uint8).repeat(8, 1).repeat(8, 2)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with 10 recorded episodes and the stage file of a tiny judge."""
    folder = tmp_path_factory.mktemp("judge")
    split = {"episodes": 10, "mix": {"expert": 0.5, "random": 0.5}}
    recipe = {"steps": 6, "batch": 8, "warmup": 1, "checkpoint_every": 3}
    judges = {"width": 4, "batch": 16, "training": recipe}
    write = lambda name, **content: (folder / name).write_text(json.dumps({"seed": 5, "lab": LAB} | content))  # noqa: E731
    write("episodes.json", episodes={"splits": {"judge": split}})
    write("judges.json", judges=judges)
    write("other.json", judges=judges, lab=LAB | {"tasks": ["put_on_plate", "lift"]})
    arguments = [
        "--config",
        folder / "episodes.json",
        "--split",
        "judge",
        "--out",
        folder / "judge" / "episodes.parquet",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["record", *map(str, arguments)])
        record_episodes()
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "model.safetensors").write_bytes(b"blur")
    return folder


def train(recorded, monkeypatch, out, state=None):
    arguments = {
        "--config": recorded / "judges.json", "--episodes": recorded / "judge" / "episodes.parquet",
        "--tokenizer": recorded / "tokenizer", "--out": out / "model.safetensors", "--state": state or out / "state",
    }  # fmt: skip
    monkeypatch.setattr(training, "load_tokenizer", lambda folder: Blur())
    monkeypatch.setattr(sys, "argv", ["judge", *(str(part) for pair in arguments.items() for part in pair)])
    monkeypatch.setattr(training, "die_with_parent", lambda: None)
    training.main()
    return out / "model.safetensors"


def test_training_twice_gives_the_same_judge(recorded, tmp_path, monkeypatch):
    first, second = (train(recorded, monkeypatch, tmp_path / name) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    config = json.loads(first.with_name("config.json").read_text())
    assert config["held_out_episodes"] == 2 and config["tasks"] == LAB["tasks"]
    assert set(config["accuracy"]["classifier"]["reconstructed"]) == set(LAB["tasks"])
    assert len(pd.read_csv(first.with_name("metrics.csv"))) > 0


def test_damaged_or_foreign_judges_are_refused(recorded, tmp_path, monkeypatch):
    weights = train(recorded, monkeypatch, tmp_path)
    load_judge(weights)
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"model\.safetensors: is not the file that config\.json describes"):
        load_judge(weights)
    with pytest.raises(UserError, match="not a judge"):
        load_judge(tmp_path / "absent" / "model.safetensors")


def test_samples_of_a_batch_do_not_depend_on_the_split_into_micro_batches(recorded, monkeypatch):
    monkeypatch.setattr(training, "load_tokenizer", lambda folder: Blur())
    stage = load_stage(recorded / "judges.json")
    pairs = training.prepare(stage, recorded / "judge" / "episodes.parquet", recorded / "tokenizer")
    torch.manual_seed(0)
    networks = JudgeNetworks(4, 2, 14)
    training._standardise(networks, pairs, SCENE)
    loss = training.JudgeLoss(pairs, networks, seed=1)
    device = torch.device("cpu")
    whole = loss._batch(3, np.arange(8), device)
    halves = [loss._batch(3, part, device) for part in (np.arange(4), np.arange(4, 8))]
    for all_rows, *parts in zip(whole, *halves):
        assert torch.equal(all_rows, torch.cat(parts))
    assert not torch.equal(whole[1], loss._batch(4, np.arange(8), device)[1])


def test_mirrored_images_come_with_mirrored_states_and_labels(recorded, monkeypatch):
    monkeypatch.setattr(training, "load_tokenizer", lambda folder: Blur())
    pairs = training.prepare(load_stage(recorded / "judges.json"), recorded / "judge" / "episodes.parquet", recorded)
    arrays = EpisodeStore(recorded / "judge").load_all()
    assert np.array_equal(pairs.states[1], mirror_state(arrays.state, SCENE))
    expected = tasks.get("push_left", SCENE).success(pairs.states[1, :, -1], pairs.states[1, :, 0], SCENE)
    assert np.array_equal(pairs.labels[1, :, -1, 1], expected)
    u = np.array([[0.5, 0.0], [0.5, 0.0]])  # no change of brightness, no blur
    first, later = arrays.images[:2, 0], arrays.images[:2, -1]
    seen = training._augment(first, later, np.array([0, 1]), u, torch.device("cpu"))
    for image, original in zip(seen, (first, later)):
        assert np.array_equal(image[0].numpy(), original[0]) and np.array_equal(image[1].numpy(), original[1][:, ::-1])


# ---- scoring --------------------------------------------------------------------------------------------------------


def write_rollouts(folder, world, truth):
    """Two rollouts of the horizon's length."""
    table = folder / world / "p" / "shard_0" / "rollouts.parquet"
    recorder = Recorder(table, Source("p", world, 5.0, "x", None), "key")
    rolled = []
    for i, task in enumerate(LAB["tasks"]):
        frames = rng(i, "frames").integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
        item = Item(Trial(f"{task}/{i}", task, "do it", frames[0], None, i), 0)
        known = {"success": np.arange(5) == 4, "partial": np.linspace(0, 1, 5)} if truth else {}
        actions = np.zeros((4, 7), np.float32)
        rolled.append(Rollout(item, frames, actions, 4, False, 0.1, None, known.get("success"), known.get("partial")))
        recorder.write(rolled[-1])
    recorder.finish([rollout.item for rollout in rolled])
    return table


def run_score(config, weights, tables, out, monkeypatch):
    arguments = ["--config", config, "--judge", weights, "--rollouts", *tables, "--out", out]
    monkeypatch.setattr(sys, "argv", ["score", *map(str, arguments)])
    monkeypatch.setattr(score, "die_with_parent", lambda: None)
    score.main()
    return pd.read_parquet(out)


def test_scoring_gives_one_row_per_rollout_and_judge(recorded, tmp_path, monkeypatch):
    weights = train(recorded, monkeypatch, tmp_path)
    tables = [write_rollouts(tmp_path, "lab", True), write_rollouts(tmp_path, "world_model", False)]
    rows = run_score(recorded / "judges.json", weights, tables, tmp_path / "all.parquet", monkeypatch)
    assert not rows.duplicated(["trial_id", "policy", "world", "repeat", "judge"]).any()
    counts = rows.groupby(["world", "judge"]).size().to_dict()
    lab = {("lab", judge): 2 for judge in ("truth", "classifier", "state")}
    assert counts == lab | {("world_model", "classifier"): 2, ("world_model", "state"): 2}
    assert rows[rows.judge == "truth"].success_at_end.all() and rows.success_at_end.notna().all()
    alone = run_score(recorded / "judges.json", weights, tables[1:], tmp_path / "one.parquet", monkeypatch)
    pd.testing.assert_frame_equal(alone, rows[rows.world == "world_model"].reset_index(drop=True))
    assert [made.truth is None for made in read_clips(tables[1])] == [True, True]
    with pytest.raises(UserError, match="train the judge anew"):
        run_score(recorded / "other.json", weights, tables, tmp_path / "no.parquet", monkeypatch)
