"""Rates corrected for a judge's errors: the formula, its identity, its refusals, its coverage, and the tables made of it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests import analysis_data as data
from workflow_src.analysis import calibration, correction, records, tables
from workflow_src.analysis.correction import NO_LABELS, correct_policies, corrected, corrected_interval, stratified
from workflow_src.analysis.study import open_study
from workflow_src.common.config import load_stage

# ---- formulas -------------------------------------------------------------------------------------------------------


def test_worked_values():
    """θ by hand; intervals from an independent implementation of Lang and Reiczigel's formulas."""
    assert corrected(0.6, 0.9, 0.8) == pytest.approx(0.5 / 0.7)
    assert corrected(0.235, 0.97, 0.81) == pytest.approx(0.205 / 0.78)
    assert corrected(0.02, 0.96, 0.95) == 0 and corrected(0.99, 0.95, 0.9) == 1
    assert corrected_interval(0.6, 100, 0.9, 50, 0.8, 50, 0.95) == pytest.approx((0.5409940, 0.9146175), abs=1e-7)
    assert corrected_interval(0.235, 170, 0.97, 200, 0.81, 60, 0.95) == pytest.approx((0.1805301, 0.3671415), abs=1e-7)


@pytest.mark.parametrize(("q0", "q1"), [(0.5, 0.5), (0.3, 0.4), (0.6, 0.5), (np.nan, 0.9)])
def test_a_judge_that_says_too_little_is_refused(q0, q1):
    with pytest.raises(ValueError, match=r"is at most 1\.1"):
        corrected(0.5, q0, q1)
    with pytest.raises(ValueError, match=r"is at most 1\.1"):
        corrected_interval(0.5, 10, q0, 10, q1, 10, 0.95)


def labels_of(rows):
    """Labels from (policy, said, label, number, weight)."""
    expanded = [
        {"policy": policy, "trial_id": f"lift/{policy}{said}{label}{i}", "said": said, "label": label, "weight": weight}
        for policy, said, label, number, weight in rows
        for i in range(number)
    ]
    return pd.DataFrame(expanded).astype({"said": bool, "label": bool, "weight": float})


def test_labels_drawn_by_verdict_give_theta_of_their_weighted_rates():
    """60 of 200 judged a success, 20 of each verdict labelled: 18 of the successes and 3 of the failures are true."""
    labels = labels_of([("a", True, True, 18, 3.0), ("a", True, False, 2, 3.0), ("a", False, True, 3, 7.0),
                        ("a", False, False, 17, 7.0)])  # fmt: skip
    rates = correction.judge_rates(labels)
    assert rates.q1 == pytest.approx(54 / 75) and rates.q0 == pytest.approx(119 / 125)
    (row,) = correct_policies(labels, ["a"], np.array([0.3]), np.array([200.0]), 0.95).to_dict("records")
    assert row["success_corrected"] == pytest.approx(75 / 200)
    assert row["success_corrected"] == pytest.approx(corrected(0.3, rates.q0, rates.q1))
    assert row["success_corrected_low"] < 0.375 < row["success_corrected_high"] and row["n_labels"] == 40
    # Unweighted, as if drawn by truth, the rates would be others.
    assert correction.judge_rates(labels.assign(weight=1.0)).q1 == pytest.approx(18 / 21)


def test_a_perfect_judge_changes_nothing():
    rate, low, high = stratified(np.array(0.3), np.array(100.0), np.array([0.0, 1.0]), np.array([1e9, 1e9]), 0.95)
    wilson = tables.st.wilson(0.3, 100.0)
    assert float(rate) == pytest.approx(0.3) and (float(low), float(high)) == pytest.approx(wilson, abs=1e-4)


def test_jeffreys_intervals():
    """Worked values of Beta(k + 1/2, n - k + 1/2); at 0 and n the interval is closed there."""
    low, high = correction.jeffreys(np.array([0.1, 0.0, 1.0, 0.0]), np.array([10, 20, 5, 0]), 0.95)
    assert low == pytest.approx([0.0110117, 0, 0.6206229, 0], abs=1e-7)
    assert high == pytest.approx([0.3813148, 0.1166390, 1, 1], abs=1e-7)


def test_more_labels_narrow_the_interval_but_not_beyond_the_rollouts_own():
    widths = []
    for m in (5, 20, 80, 10**7):
        _, low, high = stratified(np.array(0.4), np.array(100.0), np.array([0.1, 0.9]), np.array([m, m]), 0.95)
        widths.append(float(high - low))
    assert widths == sorted(widths, reverse=True) and widths[-1] > 0.1


@pytest.mark.parametrize("policies", ["four", "weak"])
@pytest.mark.parametrize("alike", [True, False])
def test_intervals_cover_the_truth(policies, alike):
    """1,000 resamplings of rollouts, verdicts and labels, 10 (5) labels per policy and verdict; errors may differ by policy."""
    truth, n, k = {"four": ([0.05, 0.3, 0.6, 0.9], 100, 10), "weak": ([0.02, 0.1, 0.2, 0.5], 102, 5)}[policies]
    theta = np.array(truth)
    q1, q0 = np.full(4, 0.85), np.full(4, 0.95)
    if not alike:
        q1, q0 = q1 + np.array([-0.1, 0.1, 0.0, 0.05]), q0 - np.array([-0.03, 0.1, 0.05, 0.0])
    generator, size = np.random.default_rng(1), (1000, 4)
    p = theta * q1 + (1 - theta) * (1 - q0)
    said = np.stack([n - (yes := generator.binomial(n, p, size)), yes], -1)
    true = np.stack([theta * (1 - q1) / (1 - p), theta * q1 / p], -1)
    m = np.minimum(said, k)
    found = generator.binomial(m, np.broadcast_to(true, m.shape)) / np.maximum(m, 1)
    _, low, high = stratified(said[..., 1] / n, np.full(size, n), found, m, 0.95)
    covered = ((low <= theta) & (theta <= high)).mean(0)
    assert (covered >= 0.93).all(), covered


def test_a_few_labels_that_stand_for_many_leave_the_rates_open():
    """One of 102 judged a success, and true; of the others two are labelled, and neither is."""
    labels = labels_of([("a", True, True, 1, 1.0), ("a", False, False, 2, 50.5)])
    rates = correction.judge_rates(labels)
    (low, high), (low0, _) = correction.rate_intervals(labels, 0.95)
    assert rates.q1 == rates.q0 == 1 and low < 0.1 and high > 0.9 and low0 > 0.95
    assert correction.rate_intervals(labels[labels["said"]], 0.95) == ((0.0, 1.0), (0.0, 1.0))


def test_intervals_of_sensitivity_and_specificity_cover_them():
    generator, (theta, q1, q0, n, k) = np.random.default_rng(0), (0.3, 0.85, 0.95, 300, 20)
    p, covered = theta * q1 + (1 - theta) * (1 - q0), np.zeros(2)
    for _ in range(200):
        yes = generator.binomial(n, p)
        hits = generator.binomial(k, [theta * q1 / p, theta * (1 - q1) / (1 - p)])
        labels = labels_of([
            ("a", said, label, number, size / k)
            for said, size, hit in ((True, yes, hits[0]), (False, n - yes, hits[1]))
            for label, number in ((True, hit), (False, k - hit))
        ])  # fmt: skip
        intervals = correction.rate_intervals(labels, 0.95)
        covered += [low <= rate <= high for (low, high), rate in zip(intervals, (q1, q0))]
    assert (covered / 200 >= 0.93).all()


# ---- from judgements to tables --------------------------------------------------------------------------------------


def with_labels(table, per_cell, flip=None, weights=True):
    """`table` with human labels on generated video: `per_cell` of each policy and verdict, `flip(row)` where wrong."""
    imagined = table[(table["world"] == "world_model") & (table["judge"] == "classifier")]
    rows = []
    for _, part in imagined.groupby(["policy", "success_at_end"]):
        chosen = part.sample(min(per_cell, len(part)), random_state=0)
        for row in chosen.to_dict("records"):
            truth = row["success_at_end"] ^ bool(flip(row) if flip else False)
            weight = len(part) / len(chosen) if weights else None
            rows.append(row | {"judge": "human", "success_at_end": truth, "weight": weight})
    return pd.concat([table, pd.DataFrame(rows)], ignore_index=True)


def study_of(folder, table):
    files = data.write_run(folder / "results", table)
    return open_study(load_stage(data.stage_file(folder)), records.load_judgements(files["judgements"]))


def test_the_ranking_is_corrected_where_people_have_labelled(tmp_path):
    """The judge calls failures of `early` successes half of the time, as only labels can tell."""
    table = data.judgements(per_task=40, skill={**data.SKILL, "early": 0.5})

    def wrong(row):
        return row["policy"] == "early" and row["success_at_end"] and int(row["trial_id"][-3:]) % 2

    found = tables.ranking(study_of(tmp_path, with_labels(table, 20, wrong))).set_index("policy")
    assert (found["corrected_note"] == "").all() and (found["n_labels"] > 15).all()
    assert found.loc["early", "success_corrected"] < 0.7 * found.loc["early", "success_imagined"]
    others = found.drop("early")  # the errors on one policy are not held against another
    assert np.allclose(others["success_corrected"], others["success_imagined"])
    inside = (found["success_corrected_low"] <= found["success_corrected"]) & (
        found["success_corrected"] <= found["success_corrected_high"]
    )
    assert inside.all()


def test_labels_on_lab_video_correct_nothing(tmp_path):
    """Sensitivity and specificity measured on real video are never used on generated video."""
    table = data.judgements()
    lab = table[(table["world"] == "lab") & (table["judge"] == "truth")].assign(judge="human", weight=1.0)
    found = tables.ranking(study_of(tmp_path, pd.concat([table, lab], ignore_index=True)))
    assert found["success_corrected"].isna().all() and (found["corrected_note"] == NO_LABELS).all()
    assert (found["n_labels"] == 0).all()


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda labels: labels[labels["policy"] != "late"], f"{NO_LABELS} of this policy"),
        (
            lambda labels: labels[(labels["policy"] != "late") | labels["said"]],
            "no labels where the judge says failure",
        ),
        (
            lambda labels: labels[(labels["policy"] != "late") | ~labels["said"]],
            "no labels where the judge says success",
        ),
        (lambda labels: labels[labels["label"]], "refused: no failure among the labels on generated video"),
        (lambda labels: labels[:0], NO_LABELS),
        (lambda labels: labels.assign(label=np.arange(len(labels)) % 2 == 0), "refused: sensitivity + specificity = "),
    ],
)
def test_what_cannot_be_corrected_says_why(change, note):
    labels = labels_of([(name, said, label, number, 1.0) for name in ("early", "late")
                        for said, label, number in ((True, True, 8), (True, False, 2), (False, False, 10))])  # fmt: skip
    found = correct_policies(change(labels), ["early", "late"], np.array([0.5, 0.5]), np.array([40.0, 40.0]), 0.95)
    row = found.set_index("policy").loc["late"]
    assert row["corrected_note"].startswith(note) and np.isnan(row["success_corrected"])


def test_calibration_keeps_lab_and_generated_video_apart(tmp_path):
    table = with_labels(data.judgements(), 5, weights=True)
    judgements = records.load_judgements(data.write_run(tmp_path, table)["judgements"])
    found = calibration.calibration_table(judgements, probes_of("classifier"), 0.95)
    classifier = found[found["judge"] == "classifier"].set_index(["video", "labels", "clips", "policy"])
    lab = classifier.loc[("lab", "lab truth", "all", "all")]
    judge = tables.judge_table(judgements, list(data.POLICIES), list(data.TASKS), 0.95).iloc[0]
    assert lab["n"] == judge["n_accuracy"] and lab["sensitivity"] == pytest.approx(judge["sensitivity"])
    assert lab["specificity_low"] == pytest.approx(judge["specificity_low"])
    generated = classifier.loc[("generated", "human", "labelled", "all")]
    assert generated["sensitivity"] == 1 and generated["false_positive"] == 0 and generated["n"] > 20
    assert set(classifier.loc["generated"].index.get_level_values("policy")) == {"all", *data.POLICIES}
    none = calibration.calibration_table(records.load_judgements(data.write_run(tmp_path / "b", data.judgements())
                                                                 ["judgements"]), probes_of("classifier"), 0.95)  # fmt: skip
    generated = none[none["video"] == "generated"]
    assert (generated["note"] == NO_LABELS).all() and generated["sensitivity"].isna().all() and len(generated) == 2


def probes_of(judge, reversed_said=True):
    """Ten successes and ten failures as recorded, all recognised; the same successes reversed."""
    rows = [("recorded", i, i < 10, i < 10) for i in range(20)] + [
        ("reversed", i, False, reversed_said) for i in range(10)
    ]
    return pd.DataFrame(
        [{"judge": judge, "probe": kind, "policy": "late", "task": "lift", "trial_id": f"lift/{i}", "repeat": 0,
          "label": label, "success_at_end": said} for kind, i, label, said in rows]
    ).astype({"success_at_end": "boolean"})  # fmt: skip


@pytest.mark.parametrize("blind", [True, False])
def test_a_judge_that_is_blind_to_the_order_of_frames_is_named(tmp_path, blind):
    judgements = records.load_judgements(data.write_run(tmp_path, data.judgements())["judgements"])
    found = calibration.calibration_table(judgements, probes_of("classifier", blind), 0.95)
    row = found[found["clips"] == "reversed"].iloc[0]
    assert (
        row["still_success"] == float(blind) and row["specificity"] == float(not blind) and np.isnan(row["sensitivity"])
    )
    assert row["note"] == (calibration.ORDER_NOT_READ if blind else "")


def test_corrected_table_shows_every_judge_and_how_far_they_disagree(tmp_path):
    table = with_labels(data.judgements(per_task=30), 12)
    files = data.write_run(tmp_path / "results", table)
    stage = load_stage(data.stage_file(tmp_path))
    found = calibration.corrected_table(records.load_judgements(files["judgements"]), stage)
    assert set(found["judge"]) == {"classifier", "state"} and len(found) == 2 * len(data.POLICIES)
    late = found[found["policy"] == "late"].set_index("judge")
    raw = late["success_judged"]
    assert (late["success_lowest"] == raw.min()).all() and (late["success_highest"] == raw.max()).all()
    assert (late["highest_judge"] == raw.idxmax()).all()
    assert (
        late.loc["classifier", "success_if_alike"] == pytest.approx(raw["classifier"]) and late["n_labels"].min() > 10
    )
    # Labels drawn by the classifier's verdicts serve the other judge too, by their weights.
    assert 0.5 < late.loc["state", "sensitivity"] <= 1 and late.loc["state", "corrected_note"] == ""
