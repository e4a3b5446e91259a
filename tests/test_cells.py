"""Anybody's table of real and imagined success rates: what is read, and one clear line for everything else."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest

from workflow_src.analysis import agreement, report
from workflow_src.analysis.cells import load_cells
from workflow_src.common.errors import UserError

POLICIES, TASKS = ("rt1", "octo", "vla"), ("lift", "push")


def table() -> pd.DataFrame:
    rows = [(p, t, 0.1 * i, 0.2 * i, 10, 20) for i, p in enumerate(POLICIES) for t in TASKS]
    return pd.DataFrame(rows, columns=["policy", "task", "real", "imagined", "n_real", "n_imagined"])


def write(folder, rows: pd.DataFrame):
    rows.to_csv(folder / "mine.csv", index=False)
    return folder / "mine.csv"


def test_rates_and_counts_by_policy_and_task(tmp_path):
    rows = table().assign(lab="ours")
    cells = load_cells(write(tmp_path, rows.sample(frac=1, random_state=0)))
    assert set(cells.policies) == set(POLICIES) and set(cells.tasks) == set(TASKS)
    p, k = cells.policies.index("vla"), cells.tasks.index("push")
    found = [side[p, k] for side in (cells.real, cells.imagined, cells.n_real, cells.n_imagined)]
    assert found == pytest.approx([0.2, 0.4, 10, 20])
    assert (cells.table["lab"] == "ours").all()


def test_order_is_the_file_s(tmp_path):
    cells = load_cells(write(tmp_path, table()))
    assert cells.policies == POLICIES and cells.tasks == TASKS


def test_names_that_look_like_numbers_stay_names(tmp_path):
    rows = table().assign(task=lambda t: t["task"].map({"lift": 1, "push": 2}))
    assert load_cells(write(tmp_path, rows)).tasks == ("1", "2")


def test_real_results_alone(tmp_path):
    cells = load_cells(write(tmp_path, table().drop(columns=["imagined", "n_imagined"])))
    assert cells.imagined is None and cells.n_imagined is None and cells.real.shape == (3, 2)


def blank(rows, column, policy=None, task=None):
    where = (rows["policy"] == policy) if policy else pd.Series(True, rows.index)
    where &= (rows["task"] == task) if task else True
    return rows.assign(**{column: rows[column].where(~where)})


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.iloc[1:], "no row for rt1, lift; add the cell"),
    (lambda t: pd.concat([t, t.iloc[:1]]), "rt1, lift appears twice; give one row per policy and task"),
    (lambda t: blank(t, "imagined", policy="octo"), "policy 'octo' has no imagined at all; every policy needs both"),
    (lambda t: blank(t, "real", policy="octo"), "policy 'octo' has no real at all; every policy needs both sides"),
    (lambda t: blank(t, "imagined", task="push"), "task 'push' has no imagined at all"),
    (lambda t: blank(t, "imagined", policy="octo", task="push"), "no imagined for octo, push; fill in the cell"),
    (lambda t: t.assign(real=100 * t["real"]), "real of octo, lift is 10.0; it must be a rate between 0 and 1"),
    (lambda t: t.assign(imagined=-0.5), "imagined of rt1, lift is -0.5; it must be a rate between 0 and 1"),
    (lambda t: t.assign(real="often"), "real of rt1, lift is 'often'; it must be a rate between 0 and 1"),
    (lambda t: t.assign(n_real=0), "n_real of rt1, lift is 0; it must be a whole number of trials, at least 1"),
    (lambda t: t.assign(n_imagined=2.5), "n_imagined of rt1, lift is 2.5; it must be a whole number of trials"),
    (lambda t: t.drop(columns="n_real"), "has no column n_real; columns: policy, task, real, imagined, n_real, n_im"),
    (lambda t: t.drop(columns="n_imagined"), "has a column imagined but no column n_imagined; add it, or leave out"),
    (lambda t: t.assign(policy=t["policy"].where(t["task"] == "lift")), "line 3 names no policy; fill it in"),
    (lambda t: t.iloc[:0], "holds no row"),
])  # fmt: skip
def test_a_bad_table_is_one_clear_line(tmp_path, change, message):
    file = write(tmp_path, change(table()))
    with pytest.raises(UserError) as error:
        load_cells(file)
    assert message in str(error.value) and "mine.csv" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"absent\.csv: no such file; give a CSV with columns policy, task"):
        load_cells(tmp_path / "absent.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UserError, match=r"empty\.csv: not a readable CSV"):
        load_cells(tmp_path / "empty.csv")


def test_nothing_is_written_for_a_bad_table(tmp_path, monkeypatch):
    file = write(tmp_path, table().assign(n_real=0))
    monkeypatch.setattr(sys, "argv", ["agreement", "--pairs", str(file), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError):
        agreement.main()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rate", [0.0, 1.0, 0.5])
def test_a_table_without_differences_is_reported_all_the_same(tmp_path, rate):
    """Correlations of constant sides are undefined, and said to be, not guessed."""
    cells = load_cells(write(tmp_path, table().assign(real=rate, imagined=rate)))
    rows = report.agreement_rows(cells, 0.95, 0).set_index(["scope", "statistic"])["value"]
    assert np.isnan(rows["policy x task cells", "pearson"]) and rows["policy x task cells", "mae"] == 0


def test_one_policy_on_one_task(tmp_path, monkeypatch):
    file = write(tmp_path, table().iloc[-1:])
    monkeypatch.setattr(sys, "argv", ["agreement", "--pairs", str(file), "--out", str(tmp_path / "out")])
    agreement.main()
    rows = pd.read_csv(tmp_path / "out" / "agreement.csv").set_index(["scope", "statistic"])["value"]
    assert rows["all policies", "bias"] == pytest.approx(0.2) and np.isnan(rows["all policies", "pearson"])
