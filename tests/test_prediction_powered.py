"""Prediction-powered estimates: they agree with the reference library, cover the truth, and refuse unfit trial sets."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest

from workflow_src.analysis import prediction_powered as pp
from workflow_src.analysis.records import Outcomes
from workflow_src.common.errors import UserError

# Values of ppi-python 0.2.3 on these frames: lam=1 gives 0.78, tuned 0.72180.
REAL = np.array([1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 1, 1, 0, 1, 1, 0], float)
IMAGINED = np.array([1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0], float)
OTHERS = np.repeat([1.0, 0.0], [62, 38])


def frames(real=REAL, imagined=IMAGINED, others=OTHERS, tasks=None, other_tasks=None) -> pp.Frames:
    tasks = np.zeros(len(real), int) if tasks is None else tasks
    other_tasks = np.zeros(len(others), int) if other_tasks is None else other_tasks
    return pp.Frames(
        np.asarray(real, float), np.asarray(imagined, float), tasks, np.asarray(others, float), other_tasks
    )


def test_one_task_without_repeats_is_the_reference_library_s():
    found = pp.estimate(frames(), 0.95)
    assert found["estimate"] == pytest.approx(0.72180, abs=0.002)  # λ differs in the degrees of freedom
    assert REAL.mean() + found["lambda"] * (OTHERS.mean() - IMAGINED.mean()) == pytest.approx(found["estimate"])
    assert (found["success_real"], found["n_real"], found["n_imagined"]) == (0.68, 25, 125)
    assert found["low"] < found["estimate"] < found["high"]
    assert found["high"] - found["low"] < found["success_real_high"] - found["success_real_low"]
    assert found["trials_saved_low"] < found["trials_saved"] < found["trials_saved_high"]
    assert found["n_effective"] == pytest.approx(25 + found["trials_saved"])


def test_imagination_that_knows_nothing_saves_nothing_and_may_cost():
    found = pp.estimate(frames(imagined=np.roll(REAL, 5)), 0.95)
    assert np.cov(REAL, np.roll(REAL, 5))[0, 1] < 0
    assert found["lambda"] == 0 and found["estimate"] == found["success_real"]
    assert -2 < found["trials_saved"] < 0 and found["trials_saved_untuned"] < -10
    assert found["trials_saved_low"] == 0


def test_imagination_that_is_reality_is_worth_its_own_number():
    found = pp.estimate(frames(imagined=REAL), 0.95)
    assert found["lambda"] == pytest.approx(100 / 125, abs=0.04)
    assert found["estimate"] == pytest.approx((25 * 0.68 + 62) / 125, abs=0.003)
    assert found["n_effective"] > 90
    constant = pp.estimate(frames(real=np.ones(25)), 0.95)
    assert constant["lambda"] == 0 and constant["estimate"] == 1 > constant["low"] > 0.8
    assert np.isnan(constant["trials_saved_high"])  # nothing tells what imagination knows


def test_bias_of_imagination_is_removed():
    """Imagined success lies 0.4 above the real one, on all frames alike: the estimate does not."""
    generator, found = np.random.default_rng(1), []
    for _ in range(200):
        hard = generator.random(300)
        real, imagined = (hard < 0.3).astype(float), (hard < 0.7).astype(float)
        found.append(pp.estimate(frames(real[:60], imagined[:60], imagined[60:]), 0.95))
    assert np.mean([one["estimate"] for one in found]) == pytest.approx(0.3, abs=0.01)
    assert np.mean([one["success_imagined"] for one in found]) == pytest.approx(0.7, abs=0.01)
    assert np.mean([one["trials_saved"] for one in found]) > 5


def test_repeats_of_a_frame_are_no_new_samples(tmp_path):
    rows = [
        {"policy": "p", "task": "t", "frame": i, "real": r, "imagined": f}
        for i, (r, f) in enumerate(zip(REAL, IMAGINED))
    ]
    other = [{"policy": "p", "task": "t", "frame": 100 + i, "imagined": f} for i, f in enumerate(OTHERS)]
    once = write(tmp_path / "once", rows, other)
    thrice = write(tmp_path / "thrice", rows * 3, other * 3)
    assert pp.estimate(pp.load_frames(*once)["p"], 0.95) == pp.estimate(pp.load_frames(*thrice)["p"], 0.95)


@pytest.mark.parametrize(("per_task", "others", "shared"), [(10, 24, 0.2), (10, 240, 0.8), (5, 50, 0.6)])
def test_intervals_cover(per_task, others, shared):
    """Three tasks, imagination too low and right about a share of the frames: at least 93 % of 1,000 resamplings."""
    generator, rates, hits = np.random.default_rng(2), np.array([0.9, 0.5, 0.2]), 0
    tasks, more = np.repeat(np.arange(3), per_task), np.repeat(np.arange(3), others)
    for _ in range(1000):
        sides = []
        for where in (tasks, more):
            real = (generator.random(len(where)) < rates[where]).astype(float)
            guess = (generator.random(len(where)) < rates[where] - 0.1).astype(float)
            sides.append((real, np.where(generator.random(len(where)) < shared, real, guess)))
        found = pp.estimate(frames(*sides[0], sides[1][1], tasks, more), 0.95)
        hits += found["low"] <= rates.mean() <= found["high"]
    assert hits >= 930


# ---- a run's trials -------------------------------------------------------------------------------------------------


def test_a_run_takes_some_trials_as_real():
    generator = np.random.default_rng(3)
    tasks = np.repeat([0, 1], 30)
    real = Outcomes((generator.random((2, 60)) < 0.6).astype(float), np.ones((2, 60)), tasks)
    imagined = Outcomes(real.successes.copy(), np.ones((2, 60)), tasks)
    imagined.counts[1, 5] = 0  # not judged
    rows = pp.rows_of_run(imagined, real, ("a", "b"), 10, 0, 0.95)
    chosen = pp.real_trials(tasks, 10, 0)
    assert chosen.sum() == 20 and (np.bincount(tasks[chosen]) == 10).all()
    assert [row["n_real"] for row in rows] == [20, 20 - chosen[5]]
    assert rows[0]["success_all"] == pytest.approx(real.successes[0].mean())
    assert rows[0]["success_real"] == pytest.approx(real.successes[0, chosen].mean())
    assert rows[0]["trials_saved"] > 10  # imagination is reality here
    assert pp.rows_of_run(imagined, real, ("a", "b"), 30, 0, 0.95) == []  # nothing left to imagine
    assert (pp.real_trials(tasks, 10, 1) != chosen).any()


# ---- files ----------------------------------------------------------------------------------------------------------


def write(folder, paired, imagined):
    folder.mkdir(exist_ok=True)
    for name, rows in (("paired", paired), ("imagined", imagined)):
        pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)
    return folder / "paired.csv", folder / "imagined.csv"


def sets(seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    generator = np.random.default_rng(seed)
    rows = [(p, t, f"{t}/{i}", float(generator.random() < 0.5), float(generator.random() < 0.5))
            for p in ("one", "two") for t in ("lift", "push") for i in range(30)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["policy", "task", "frame", "real", "imagined"])
    number = table["frame"].str.partition("/")[2].astype(int)
    return table[number < 10], table[number >= 10].drop(columns="real")


def test_command_line(tmp_path, monkeypatch, capsys):
    paired, imagined = write(tmp_path, *sets())
    out = tmp_path / "out.csv"
    monkeypatch.setattr(sys, "argv", ["pp", "--paired", str(paired), "--imagined", str(imagined), "--out", str(out)])
    pp.main()
    found = pd.read_csv(out)
    assert found["policy"].tolist() == ["one", "two"] and list(found) == pp.COLUMNS
    assert (found["n_real"] == 20).all() and (found["n_imagined"] == 60).all()
    assert "real trials saved" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "message"), [
    (lambda a, b: (a, pd.concat([b, a.drop(columns="real").iloc[:1]])), "frame lift/0 of one, lift is in"),
    (lambda a, b: (a, b[b["policy"] == "one"]), "imagined.csv: has no policy 'two', which the other file has"),
    (lambda a, b: (a[a["task"] == "lift"], b), "paired.csv: has no task 'push', which the other file has"),
    (lambda a, b: (a.assign(drawn="by hand"), b.assign(drawn="at random")), "drawn is at random, in"),
    (lambda a, b: (a.assign(drawn="by hand"), b), "column drawn is not given"),
    (lambda a, b: (a.assign(imagined=1.0), b.assign(imagined=0.0)), "its frames were drawn differently from those in"),
    (lambda a, b: (a.assign(real=2), b), "paired.csv: real of one, lift, frame lift/0 is 2; it must be between 0 and 1"),
    (lambda a, b: (a.assign(imagined="yes"), b), "is yes; it must be between 0 and 1"),
    (lambda a, b: (a.drop(columns="real"), b), "paired.csv: has no column real; columns: policy, task, frame, real"),
    (lambda a, b: (a[~a["frame"].isin([f"push/{i}" for i in range(9)])], b), "paired.csv: 1 frames of one, push"),
])  # fmt: skip
def test_unfit_sets_are_one_clear_line(tmp_path, change, message):
    files = write(tmp_path, *change(*sets()))
    with pytest.raises(UserError) as error:
        pp.load_frames(*files)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_sets_drawn_alike_pass():
    assert sum(_passes(seed) for seed in range(5)) == 5


def _passes(seed: int) -> bool:
    pp._check_alike("paired.csv", "imagined.csv", *sets(seed))
    return True
