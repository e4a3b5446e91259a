"""Published numbers: the files hold what was printed, and the analysis gives the values worked out from it."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest

from tests.chain import ROOT, run
from workflow_src.analysis import agreement, experiments, figures
from workflow_src.analysis import statistics as st
from workflow_src.analysis.cells import load_cells
from workflow_src.analysis.report import agreement_rows

FOLDER = ROOT / "config" / "published"
FILES = sorted(path.stem for path in FOLDER.glob("*.csv"))
GOOGLE, WIDOWX = load_cells(FOLDER / "simpler_google.csv"), load_cells(FOLDER / "simpler_widowx.csv")
WORLDGYM = load_cells(FOLDER / "worldgym.csv")
IMAGINED, REAL = WORLDGYM.imagined, WORLDGYM.real  # (3 policies, 17 tasks) each


def simpler(task: str) -> tuple[np.ndarray, np.ndarray]:
    """Simulated and real rates of the policies on one task."""
    cells = GOOGLE if task in GOOGLE.tasks else WIDOWX
    k = cells.tasks.index(task)
    return cells.imagined[:, k], cells.real[:, k]


# ---- the files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape", "trials", "real", "imagined"), [
    ("worldgym", (3, 17), (510, 510), 18.55, 18.15), ("openvla_bridge", (4, 17), (680, None), 27.15, None),
    ("openvla_google", (4, 12), (240, None), 26.8, None), ("simpler_google", (6, 5), (1296, 5184), 13.707, 10.557),
    ("simpler_widowx", (3, 4), (288, 864), 1.858, 1.861), ("wm_policyeval_cosmos", (3, 4), (240, 240), 3.65, 2.6),
    ("wm_policyeval_irasim", (3, 4), (240, 240), 3.65, 1.9),
])  # fmt: skip
def test_files_hold_what_was_printed(name, shape, trials, real, imagined):
    cells = load_cells(FOLDER / f"{name}.csv")
    assert cells.real.shape == shape and (cells.table["source"].str.len() > 10).all()
    found = [cells.n_real.sum(), cells.real.sum()]
    expected = [trials[0], real]
    if imagined is not None:
        found += [cells.n_imagined.sum(), cells.imagined.sum()]
        expected += [trials[1], imagined]
    assert found == pytest.approx(expected, abs=1e-9)
    assert (cells.imagined is None) == (imagined is None)


def test_every_file_is_checked_here():
    assert len(FILES) == 7


def test_worldgym_takes_its_real_side_from_openvla():
    bridge = load_cells(FOLDER / "openvla_bridge.csv")
    assert bridge.tasks == WORLDGYM.tasks and bridge.policies == (*WORLDGYM.policies, "RT-2-X")
    assert (bridge.real[:3] == REAL).all()
    assert 100 * bridge.real.mean(1) == pytest.approx([18.5, 20.0, 70.6, 50.6], abs=0.05)


def test_openvla_google_means():
    cells = load_cells(FOLDER / "openvla_google.csv")
    means = pd.Series(cells.table["real"]).groupby([cells.table["category"], cells.table["policy"]]).mean() * 100
    policies = ["RT-1-X", "Octo", "RT-2-X", "OpenVLA"]
    assert list(cells.policies) == policies
    assert 100 * cells.real.mean(1) == pytest.approx([33.3, 26.7, 78.3, 85.0], abs=0.05)
    assert means["in distribution"][policies].tolist() == pytest.approx([32, 44, 72, 88])
    assert means["out of distribution"][policies].tolist() == pytest.approx([34.3, 14.3, 82.9, 82.9], abs=0.05)


def test_experiments_agree_with_the_cells():
    table = pd.read_csv(FOLDER / "experiments" / "versions.csv").set_index("policy")["imagined"]
    means = dict(zip(WORLDGYM.policies, IMAGINED.mean(1)))
    assert table["OpenVLA-7B"] == pytest.approx(means["OpenVLA"], abs=5e-4)
    assert table["Octo-Base-1.5"] == pytest.approx(means["Octo-Base"], abs=5e-4)
    shifted = pd.read_csv(FOLDER / "experiments" / "out_of_distribution.csv")
    before = shifted[shifted["condition"] == "in distribution"].set_index("policy")["imagined"]
    after = shifted[shifted["condition"] == "distractors added"].set_index("policy")["imagined"]
    for policy, drop in (("RT-1-X", 0.51), ("Octo-Base", 0.83), ("OpenVLA", 0.415)):
        assert before[policy] == pytest.approx(means[policy], abs=5e-4)
        assert 1 - after[policy] / before[policy] == pytest.approx(drop, abs=0.005)


# ---- SIMPLER --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "mmrv", "swapped", "pearson"), [
    ("pick_coke_can", 0.0313, 0.0618, 0.9754), ("close_drawer", 0.1233, 0.1133, 0.7712),
    ("spoon_on_towel", 0.0, 0.0, 0.8269), ("carrot_on_plate", 0.1113, 0.0093, 0.5714),
    ("put_eggplant_in_basket", 0.0, 0.0, 0.9894),
])  # fmt: skip
def test_simpler_per_task(task, mmrv, swapped, pearson):
    imagined, real = simpler(task)
    assert st.mmrv(imagined, real) == pytest.approx(mmrv, abs=6e-5)
    assert st.mmrv(real, imagined) == pytest.approx(swapped, abs=6e-5)
    assert st.pearson(imagined, real) == pytest.approx(pearson, abs=6e-5)


@pytest.mark.parametrize(("cells", "mmrv", "pearson", "means", "pooled_mmrv", "pooled_pearson"), [
    (GOOGLE, 0.0531, 0.9110, 0.9736271622403364, 0.1559, 0.9158),
    (WIDOWX, 0.0278, 0.8469, 0.9498357332381226, 0.0549, 0.8368),
])  # fmt: skip
def test_simpler_suites(cells, mmrv, pearson, means, pooled_mmrv, pooled_pearson):
    imagined, real = cells.imagined, cells.real
    assert st.mmrv(imagined.T, real.T).mean() == pytest.approx(mmrv, abs=6e-5)
    assert st.pearson(imagined.T, real.T).mean() == pytest.approx(pearson, abs=6e-5)
    assert st.mmrv(imagined.mean(1), real.mean(1)) == 0
    assert st.pearson(imagined.mean(1), real.mean(1)) == pytest.approx(means, abs=1e-7)
    assert st.mmrv(imagined.ravel(), real.ravel()) == pytest.approx(pooled_mmrv, abs=6e-5)
    assert st.pearson(imagined.ravel(), real.ravel()) == pytest.approx(pooled_pearson, abs=6e-5)


def test_simpler_with_the_drawer_as_one_task():
    imagined, real = (np.mean([simpler(task)[side] for task in ("open_drawer", "close_drawer")], 0) for side in (0, 1))
    assert st.mmrv(imagined, real) == pytest.approx(0.0555, abs=6e-5)
    assert st.pearson(imagined, real) == pytest.approx(0.9159, abs=6e-5)
    three = [simpler("pick_coke_can"), simpler("move_near"), (imagined, real)]
    assert np.mean([st.mmrv(*pair) for pair in three]) == pytest.approx(0.0659, abs=6e-5)
    assert np.mean([st.pearson(*pair) for pair in three]) == pytest.approx(0.9158, abs=6e-5)


# ---- WM-PolicyEval --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "expected"), [
    ("cosmos", {"pearson": 0.719328, "spearman": 0.580645, "mmrv": 0.1625, "mmrv_sign": 0.154167, "mae": 0.1292}),
    ("irasim", {"pearson": 0.277248, "spearman": 0.349462, "mmrv": 0.295833, "mmrv_sign": 0.295833, "mae": 0.1958}),
])  # fmt: skip
def test_policyeval(model, expected):
    cells = load_cells(FOLDER / f"wm_policyeval_{model}.csv")
    for name, value in expected.items():
        assert getattr(st, name)(cells.imagined.ravel(), cells.real.ravel()) == pytest.approx(value, abs=6e-5), name


# ---- WorldGym -------------------------------------------------------------------------------------------------------


def test_worldgym_pooled_cells():
    imagined, real = IMAGINED.ravel(), REAL.ravel()
    assert st.pearson(imagined, real) == pytest.approx(0.7847863229, abs=1e-9)
    assert st.spearman(imagined, real) == pytest.approx(0.740, abs=5e-4)
    assert st.kendall(imagined, real) == pytest.approx(0.580, abs=5e-4)
    assert st.mmrv(imagined, real) == pytest.approx(0.361765, abs=5e-7)
    assert st.mmrv_sign(imagined, real) == pytest.approx(0.35, abs=5e-7)
    assert [100 * f(imagined, real) for f in (st.mae, st.rmse, st.bias)] == pytest.approx([15.1, 20.1, -0.8], abs=0.05)
    slope, intercept = st.least_squares(imagined, real)
    assert (slope, 100 * intercept) == pytest.approx((0.6946, 10.32), abs=0.005)
    assert st.fisher_interval(0.7847863229, 51) == pytest.approx((0.650, 0.872), abs=5e-4)
    near = [51 * st.share_within(imagined, real, points / 100) for points in (0, 5, 10, 20, 30)]
    assert near == pytest.approx([10, 15, 28, 41, 45])


def test_worldgym_means_and_what_the_pooled_value_hides():
    assert 100 * REAL.mean(1) == pytest.approx([18.5, 20.0, 70.6], abs=0.05)
    assert 100 * IMAGINED.mean(1) == pytest.approx([15.6, 23.8, 67.4], abs=0.05)
    errors = [100 * side.std(1, ddof=1) / np.sqrt(17) for side in (REAL, IMAGINED)]
    np.testing.assert_allclose(errors, [[4.0, 5.3, 6.1], [3.4, 4.3, 4.9]], atol=0.05)
    assert 100 * np.abs(IMAGINED.mean(1) - REAL.mean(1)).mean() == pytest.approx(3.33, abs=0.005)
    means = IMAGINED.mean(1), REAL.mean(1)
    assert st.pearson(*means) == pytest.approx(0.99235, abs=5e-6)
    assert st.permutation_p(*means) == pytest.approx(1 / 6)
    assert st.mmrv(*means) == 0
    assert st.pearson(st.within(IMAGINED, -1), st.within(REAL, -1)) == pytest.approx(0.465, abs=5e-4)
    assert st.pearson(st.within(IMAGINED, -2), st.within(REAL, -2)) == pytest.approx(0.841, abs=5e-4)
    trivial = [st.pearson(st.trivial_prediction(cells).ravel(), REAL.ravel()) for cells in (REAL, IMAGINED)]
    assert trivial == pytest.approx([0.758, 0.752], abs=5e-4)
    assert st.pearson(IMAGINED, REAL) == pytest.approx([0.516, 0.467, 0.442], abs=5e-4)
    assert st.mmrv(IMAGINED, REAL) == pytest.approx([0.226, 0.324, 0.394], abs=5e-4)


def test_worldgym_category_means():
    table = WORLDGYM.table.groupby(["category", "policy"])[["real", "imagined"]].mean() * 100
    expected = {
        "visual": [(8.0, 15.0), (29.0, 31.0), (87.0, 79.0)], "motion": [(25.0, 12.5), (7.5, 22.5), (60.0, 67.5)],
        "physical": [(10.0, 13.3), (20.0, 6.7), (76.7, 43.3)], "semantic": [(26.2, 20.0), (0.0, 15.0), (36.2, 52.5)],
        "language": [(30.0, 15.0), (40.0, 41.7), (90.0, 91.7)],
    }  # fmt: skip
    for category, means in expected.items():
        found = table.loc[category].loc[list(WORLDGYM.policies)].to_numpy()
        np.testing.assert_allclose(found, means, atol=0.051, err_msg=category)


def test_worldgym_within_tasks():
    imagined, real = IMAGINED.T, REAL.T
    each = [.896, .971, 1, 1, .995, .960, .730, .937, .327, .971, .866, -.189, 1, .995, .966, .994, .912]  # fmt: skip
    assert st.pearson(imagined, real) == pytest.approx(each, abs=5.1e-4)
    assert st.pearson(imagined, real).mean() == pytest.approx(0.843, abs=5e-4)
    assert st.mmrv(imagined, real).mean() == pytest.approx(0.0480, abs=5e-5)
    assert st.mmrv_sign(imagined, real).mean() == pytest.approx(0.0353, abs=5e-5)
    assert st.best_hit(imagined, real).sum() == 16
    assert np.flatnonzero(st.regret(imagined, real)).tolist() == [11]
    assert [int(part.sum()) for part in st.pairs(imagined, real)] == [40, 5, 4]


def test_worldgym_winner_over_all_choices_of_tasks():
    hits = st.best_hit_of_subsets(IMAGINED, REAL)
    assert len(hits) == 131_071 and (hits == 1).sum() == 131_068
    without_one = [st.best_hit(np.delete(IMAGINED, k, 1).mean(1), np.delete(REAL, k, 1).mean(1)) for k in range(17)]
    assert without_one == [1] * 17


def test_worldgym_ceiling_of_a_perfect_replica():
    n = np.full(REAL.shape, 10)
    imagined, real = st.replica_draws(REAL, n, n, 2000, np.random.default_rng(0))
    imagined, real = imagined.reshape(2000, -1), real.reshape(2000, -1)
    r = st.pearson(imagined, real)
    assert [r.mean(), *np.quantile(r, [0.025, 0.975])] == pytest.approx([0.878, 0.809, 0.931], abs=0.006)
    mae = 100 * st.mae(imagined, real)
    assert [mae.mean(), *np.quantile(mae, [0.025, 0.975])] == pytest.approx([11.6, 8.6, 14.7], abs=0.3)
    assert 100 * st.rmse(imagined, real).mean() == pytest.approx(16.5, abs=0.3)


# ---- the report -----------------------------------------------------------------------------------------------------


def report(name: str, out, monkeypatch, *more: str) -> dict[str, pd.DataFrame]:
    """The tables that the command line writes."""
    arguments = ["agreement", "--pairs", str(FOLDER / f"{name}.csv"), "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", arguments)
    agreement.main()
    return {path.stem: pd.read_csv(path) for path in out.glob("*.csv")}


def test_report_on_worldgym(tmp_path, monkeypatch, capsys):
    found = report("worldgym", tmp_path, monkeypatch)
    assert "Pearson 0.78" in capsys.readouterr().out
    rows = found["agreement"].set_index(["scope", "statistic"])
    value = rows["value"]
    assert value["policy x task cells", "pearson"] == 0.784786
    assert value["policy x task cells", "mmrv"] == 0.361765
    assert value["policy x task cells", "pearson_trivial_real"] == pytest.approx(0.758, abs=5e-4)
    assert value["policy x task cells", "pearson_ceiling"] == pytest.approx(0.878, abs=0.006)
    assert value["all policies", "permutation_p"] == pytest.approx(1 / 6)
    assert value["all policies", "best_policy_hit_any_tasks"] == pytest.approx(131_068 / 131_071, abs=5e-7)
    assert value["within tasks", "mmrv"] == pytest.approx(0.0480, abs=5e-5)
    assert value["within tasks", "best_policy_hit"] == pytest.approx(16 / 17, abs=1e-6)
    assert [value["within tasks", f"pairs_{how}"] for how in ("right", "wrong", "tied")] == [40, 5, 4]
    assert value["tasks of OpenVLA", "pearson"] == pytest.approx(0.442, abs=5e-4)
    # Tasks as a sample: the bootstrap over 17 tasks; without noise the cells agree better than they look.
    low, high = rows.loc[("policy x task cells", "pearson_new_tasks"), ["low", "high"]]
    assert (low, high) == pytest.approx((0.682, 0.869), abs=0.015)
    free = rows.loc[("policy x task cells", "pearson_noise_free")]
    assert 0.78 < free["value"] < 0.95 and free["low"] > 0.65 and free["high"] <= 1
    ranking = found["policy_ranking"].set_index("policy")
    assert ranking["rank_imagined"].to_dict() == {"OpenVLA": 1, "Octo-Base": 2, "RT-1-X": 3}
    assert ranking.loc["OpenVLA", ["success_real", "success_real_se_tasks"]].tolist() == pytest.approx(
        [0.706, 0.061], abs=5e-4
    )
    assert ranking["group_real"].to_dict() == {"OpenVLA": "a", "Octo-Base": "b", "RT-1-X": "b"}
    assert ranking["partial_credit"].all() and len(found["per_task"]) == 51
    for name in figures.FIGURES:
        assert (tmp_path / f"{name}.svg").is_file() and (tmp_path / f"{name}.png").is_file()


def test_report_on_real_results_alone(tmp_path, monkeypatch, capsys):
    found = report("openvla_google", tmp_path, monkeypatch)
    assert "no imagined results" in capsys.readouterr().out
    rows = found["agreement"].set_index(["scope", "statistic"])
    # With five trials per cell even a perfect world model would look like this.
    assert 0.75 < rows.loc[("policy x task cells", "pearson_ceiling"), "value"] < 0.95
    assert set(rows.index.get_level_values(1)) == {f"{name}_ceiling" for name in agreement.CEILINGS}
    ranking = found["policy_ranking"]
    assert ranking["policy"].tolist() == ["OpenVLA", "RT-2-X", "RT-1-X", "Octo"]
    assert ranking["success_imagined"].isna().all() and (ranking["n_real"] == 60).all()
    assert set(found["comparisons"]["side"]) == {"real"} and len(found["comparisons"]) == 6


def test_same_seed_same_report():
    one, two, other = (agreement_rows(WIDOWX, 0.95, seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(one, two)
    assert not one.equals(other)


def test_figures_of_experiments(tmp_path, monkeypatch):
    folder = FOLDER / "experiments"
    arguments = [
        "--versions",
        folder / "versions.csv",
        "--shifts",
        folder / "out_of_distribution.csv",
        "--out-dir",
        tmp_path,
    ]
    monkeypatch.setattr(sys, "argv", ["experiments", *map(str, arguments)])
    experiments.main()
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{suffix}" for name in ("versions", "out_of_distribution") for suffix in ("svg", "png")
    }
    figure = experiments.out_of_distribution(pd.read_csv(folder / "out_of_distribution.csv"))
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert shown == {"-51%", "-83%", "-42%"}


def test_the_rule_needs_nothing_but_the_file(tmp_path):
    done = run(tmp_path, "--dry-run", "results/published/worldgym/agreement.csv")
    assert "report_published" in done.stdout and "train" not in done.stdout
