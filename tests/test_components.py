"""Variance components: known ones are found again, and those that the design cannot tell apart have no number."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from workflow_src.analysis import components as vc


def judgements(repeats: int = 3, policies: int = 8, per_task: int = 40, seed: int = 0, judges: int = 1, **sd: float):
    """Scores (not 0 and 1: the method does not ask for it) with effects of the standard deviations in `sd`."""
    generator = np.random.default_rng(seed)
    tasks = np.repeat(["lift", "push", "stack"], per_task)
    shape = (policies, len(tasks), repeats)
    effects = {
        "policy": (policies, 1, 1), "policy x task": (policies, 3, 1), "first frame": (1, len(tasks), 1),
        "policy x frame": (policies, len(tasks), 1), "sampling": shape,
    }  # fmt: skip
    value = np.repeat([0.1, 0.5, 0.9], per_task)[None, :, None] + np.zeros(shape)
    for name, size in effects.items():
        effect = sd.get(name, 0.0) * generator.standard_normal(size)
        value = value + (np.repeat(effect, per_task, 1) if name == "policy x task" else effect)
    rows = []
    for j in range(judges):
        seen = value + sd.get("judge", 0.0) * generator.standard_normal(shape)
        for p, f, r in np.ndindex(shape):
            rows.append(("world_model", f"judge{j}", f"p{p}", f"{tasks[f]}/{f:03d}", tasks[f], r, seen[p, f, r], True))
    return pd.DataFrame(
        rows, columns=["world", "judge", "policy", "trial_id", "task", "repeat", "success_at_end", "valid"]
    )


def found(table, judge="judge0"):
    return pd.DataFrame(vc.components(table, "world_model", judge), columns=vc.COLUMNS).set_index("component")


def test_known_components_are_found():
    sd = {"policy": 0.5, "policy x task": 0.3, "first frame": 0.3, "policy x frame": 0.4, "sampling": 0.6}
    runs = [found(judgements(seed=seed, **sd))["variance"] for seed in range(12)]
    mean = pd.concat(runs, axis=1).mean(axis=1)
    for name, size in sd.items():
        # Three tasks, fixed: a third of the interaction's variance is the policy's mean.
        expected = size**2 * (2 / 3 if name == "policy x task" else 1) + (0.3**2 / 3 if name == "policy" else 0)
        assert mean[name] == pytest.approx(expected, rel=0.25), name
    assert found(judgements(**sd))["share"].drop("judge").sum() == pytest.approx(1)


def test_without_repeats_sampling_has_no_number():
    rows = found(judgements(repeats=1, **{"policy x frame": 0.4, "sampling": 0.3}))
    assert np.isnan(rows.loc["sampling", "variance"]) and "repeats = 1" in rows.loc["sampling", "note"]
    assert rows.loc["policy x frame", "variance"] == pytest.approx(0.25, rel=0.1)  # both together
    assert np.isnan(rows.loc["judge", "variance"]) and "one judge" in rows.loc["judge", "note"]


def test_disagreement_of_judges():
    rows = found(judgements(judges=2, judge=0.2, sampling=0.1))
    assert rows.loc["judge", "variance"] == pytest.approx(0.04, rel=0.1) and rows.loc["judge", "levels"] == 2


def test_a_component_below_zero_is_said_to_be():
    rows = [found(judgements(seed=seed, per_task=5, policies=3, sampling=1.0)) for seed in range(8)]
    notes = pd.concat(rows)["note"]
    assert (pd.concat(rows)["variance"].dropna() >= 0).all() and notes.str.contains("below zero").any()


def test_frames_that_some_policy_lacks_are_left_out():
    table = judgements(repeats=2, policies=3, per_task=4, sampling=0.3)
    table.loc[(table["policy"] == "p1") & (table["trial_id"] == "lift/000"), "valid"] = False
    assert found(table).loc["first frame", "levels"] == 11
    assert found(table.assign(valid=table["policy"] != "p1")).loc["policy", "levels"] == 2
    assert found(table[table["task"] == "none"]).empty


def test_one_policy_still_shows_its_frames():
    rows = found(judgements(policies=1, **{"first frame": 0.5, "sampling": 0.2}))
    assert rows.loc["first frame", "variance"] == pytest.approx(0.25, rel=0.4)
    assert np.isnan(rows.loc["policy", "variance"]) and "one policy" in rows.loc["policy", "note"]
