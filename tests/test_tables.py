"""From judgement files to tables: what is counted, what is refused, and how it is said."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest

from tests import analysis_data as data
from tests.chain import ROOT
from workflow_src.analysis import cells, records, scatter, summary, tables
from workflow_src.analysis.study import family, open_study
from workflow_src.common.config import load_stage
from workflow_src.common.errors import UserError
from workflow_src.common.sections import Policy

POLICIES = list(data.POLICIES)


def study(folder, table, **options):
    """A `Study` of in-memory judgements, read back through files."""
    files = data.write_run(folder / "results", table)
    stage = load_stage(data.stage_file(folder, **options))
    return open_study(stage, records.load_judgements(files["judgements"]))


def run(folder, monkeypatch, table, **options):
    """The command line; returns the tables by name."""
    files = data.write_run(folder / "results", table)
    config = data.stage_file(folder, **options)
    names = ("ranking", "per-task", "agreement", "judge", "comparisons", "prediction-powered", "variance")
    outputs = [folder / "results" / "tables" / f"{'policy_ranking' if n == 'ranking' else n.replace('-', '_')}.csv"
               for n in names]  # fmt: skip
    arguments = ["tables", "--config", config, "--judgements", *files["judgements"], "--rollouts", *files["rollouts"]]
    for name, path in zip(names, outputs):
        arguments += [f"--out-{name}", path]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    tables.main()
    return {name: pd.read_csv(path) for name, path in zip(names, outputs)}


# ---- what the tables say --------------------------------------------------------------------------------------------


def test_ranking_table(tmp_path, monkeypatch):
    found = run(tmp_path, monkeypatch, data.judgements())
    ranking, per_task, comparisons = (found[name] for name in ("ranking", "per-task", "comparisons"))
    assert ranking["policy"][0] in ("late", "scripted") and sorted(ranking["policy"]) == sorted(POLICIES)
    assert ranking["rank_imagined"].is_monotonic_increasing and ranking["rank_imagined"].iloc[0] == 1
    assert (ranking["n_imagined"] == 30).all() and (ranking["n_real"] == 30).all()
    for side in ("imagined", "real"):
        rate = ranking[f"success_{side}"]
        assert ((ranking[f"success_{side}_low"] <= rate) & (rate <= ranking[f"success_{side}_high"])).all()
    assert ranking["success_corrected"].isna().all()
    assert (ranking["corrected_note"] == "no labels on generated video").all()
    families = ranking.set_index("policy")["family"].to_dict()
    assert families == {"early": "trained", "middle": "trained", "late": "trained", "shaky": "perturbed",
                        "scripted": "scripted", "random": "random"}  # fmt: skip
    assert ranking.set_index("policy").loc["middle", ["network", "snapshot"]].tolist() == ["bc", 200]
    assert len(per_task) == len(POLICIES) * len(data.TASKS) and (per_task["n_real"] == 10).all()
    means = per_task.groupby("policy")["success_real"].mean()
    assert means[ranking["policy"]].to_numpy() == pytest.approx(ranking["success_real"].to_numpy())
    assert set(found["agreement"]["scope"]) == {"all policies", "trained policies", "policy x task cells",
                                       "all policies, partial credit", "cells, partial credit",
                                       "trained policy x task cells", "state judge", "within tasks",
                                       "trials"}  # fmt: skip
    assert set(found["judge"]["judge"]) == {"classifier", "state"}
    assert comparisons["side"].value_counts().to_dict() == {"imagined": 15, "real": 15}
    assert set(comparisons["test"]) == {"exact McNemar, first frames as clusters"} and (comparisons["n"] == 30).all()
    assert set(found["prediction-powered"]["policy"]) == set(POLICIES)
    assert (found["prediction-powered"]["n_real"] == 12).all()
    assert set(found["variance"]["component"]) == {
        "policy",
        "policy x task",
        "first frame",
        "policy x frame",
        "sampling",
        "judge",
    }
    groups = ranking.set_index("policy")["group_real"]
    assert not set(groups["late"]) & set(groups["random"])


def test_rates_are_those_of_the_rollouts(tmp_path):
    table = data.judgements(per_task=4)
    found = tables.ranking(study(tmp_path, table)).set_index("policy")
    for policy in POLICIES:
        for side, world, judge in (("imagined", "world_model", "classifier"), ("real", "lab", "truth")):
            rows = table[(table["policy"] == policy) & (table["world"] == world) & (table["judge"] == judge)]
            assert found.loc[policy, f"success_{side}"] == pytest.approx(rows["success_at_end"].mean())
            assert found.loc[policy, f"partial_{side}"] == pytest.approx(rows["partial"].mean())


def test_equal_policies_share_a_rank(tmp_path):
    table = data.judgements(per_task=3)
    table.loc[table["policy"].isin(["early", "random"]), "success_at_end"] = False
    found = tables.ranking(study(tmp_path, table)).set_index("policy")
    assert found.loc["early", "rank_imagined"] == found.loc["random", "rank_imagined"]
    assert found.loc["early", "success_imagined_high"] > 0.2  # 0 of 9 is not certainty


def test_agreement_of_a_perfect_world_model(tmp_path):
    table = data.judgements()
    key = ["policy", "trial_id", "repeat"]
    truth = table[table["judge"] == "truth"].set_index(key)["success_at_end"].rename("truth")
    imagined = table["world"] == "world_model"
    table.loc[imagined, "success_at_end"] = table[imagined].join(truth, on=key)["truth"]
    rows = tables.agreement_table(study(tmp_path, table)).set_index(["scope", "statistic"])
    for scope in ("all policies", "trained policies", "policy x task cells"):
        assert rows.loc[(scope, "pearson"), "value"] == pytest.approx(1)
        assert rows.loc[(scope, "mmrv"), ["value", "high"]].tolist() == [
            0,
            0,
        ]  # same frames: no noise between the sides
        assert rows.loc[(scope, "pearson_ceiling"), "value"] < 1  # other frames would show some
    assert rows.loc[("trials", "agreement"), ["value", "low", "high", "n"]].tolist() == [1, 1, 1, imagined.sum() / 2]
    assert rows.loc[("trials", "kappa"), "value"] == 1 > rows.loc[("trials", "agreement_by_chance"), "value"]
    assert rows.loc[("all policies", "regret"), "value"] == 0
    assert rows.loc[("all policies", "pearson"), "n"] == 6 and rows.loc[("trained policies", "pearson"), "n"] == 3


def test_same_seed_same_tables_whatever_the_order_of_rows(tmp_path):
    table = data.judgements(per_task=5)
    first = tables.agreement_table(study(tmp_path / "a", table))
    second = tables.agreement_table(study(tmp_path / "b", table.sample(frac=1, random_state=1)))
    pd.testing.assert_frame_equal(first, second)


def test_repeats_do_not_shrink_the_interval_when_they_agree(tmp_path):
    once = data.judgements(per_task=8)
    thrice = pd.concat([once.assign(repeat=repeat) for repeat in range(3)])
    a, b = (tables.ranking(study(tmp_path / name, table)) for name, table in (("once", once), ("thrice", thrice)))
    assert (b["n_imagined"] == 3 * a["n_imagined"]).all()
    assert b["success_imagined_low"].to_numpy() == pytest.approx(a["success_imagined_low"].to_numpy())


def test_unreadable_judgements_are_neither_success_nor_failure(tmp_path):
    table = data.judgements(per_task=10)
    late = (table["policy"] == "late") & (table["world"] == "world_model") & (table["judge"] == "classifier")
    table.loc[late, "success_at_end"] = True
    table["success_at_end"] = table["success_at_end"].astype("boolean")
    table.loc[table.index[late][:4], "success_at_end"] = pd.NA
    table.loc[table.index[late][4:6], ["success_at_end", "error"]] = [False, "timeout"]
    row = tables.ranking(study(tmp_path, table)).set_index("policy").loc["late"]
    assert (row["success_imagined"], row["n_imagined"], row["unjudged_imagined"]) == (1, 24, 6)


def test_judge_accuracy_on_lab_videos(tmp_path):
    table = data.judgements(per_task=10)
    lab = table["world"] == "lab"
    truth = table[table["judge"] == "truth"].set_index(["policy", "trial_id"])["success_at_end"].rename("truth")
    judged = lab & (table["judge"] == "classifier")
    table.loc[judged, "success_at_end"] = table[judged].join(truth, on=["policy", "trial_id"])["truth"]
    wrong = table.index[judged & (table["policy"] == "middle") & ~table["success_at_end"].astype(bool)][:3]
    table.loc[wrong, "success_at_end"] = True
    found = tables.judge_table(study(tmp_path, table).judgements, POLICIES, data.TASKS, 0.95)
    found = found[found["judge"] == "classifier"].set_index(["policy", "task"])
    assert found.loc[("all", "all"), "accuracy"] == pytest.approx(1 - 3 / 180)
    middle = found.loc[("middle", "all")]
    assert middle["sensitivity"] == 1 and middle["specificity"] == pytest.approx(1 - 3 / middle["n_specificity"])
    assert middle["accuracy_low"] < middle["accuracy"] < middle["accuracy_high"]
    assert found.loc[("late", "all"), "accuracy"] == 1


def test_ranking_without_a_lab(tmp_path, monkeypatch):
    table = data.judgements(per_task=3)
    found = run(tmp_path, monkeypatch, table[table["world"] == "world_model"])
    ranking = found["ranking"]
    assert ranking["success_imagined"].notna().all() and ranking["success_real"].isna().all()
    assert found["per-task"]["success_real"].isna().all() and ranking["group_real"].isna().all()
    assert all(found[name].empty for name in ("agreement", "judge", "prediction-powered"))
    assert set(found["comparisons"]["side"]) == {"imagined"} and set(found["variance"]["world"]) == {"world_model"}
    assert "no real results" in summary.summary(tmp_path / "results")


def test_summary_names_policies_agreement_and_places(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, data.judgements(per_task=5))
    (tmp_path / "results" / "benchmarks" / "roll_out").mkdir(parents=True)
    for name, text in (("train.jsonl", '{"s": 12.5}\n'), ("roll_out/a.jsonl", '{"s": 2}\n'),
                       ("roll_out/b.tsv", "s\th:m:s\n3.5\t0:00:03\n"), ("cut.jsonl", '{"s": ')):  # fmt: skip
        (tmp_path / "results" / "benchmarks" / name).write_text(text)
    text = summary.summary(tmp_path / "results", seconds=20.0)
    assert all(policy in text for policy in POLICIES)
    assert "Pearson" in text and "policy_ranking.csv" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "roll_out 5.5 s (2 jobs)" in lines and "sum of all jobs 18.0 s" in lines
    assert "this run, wall time 20.0 s" in lines


def test_family_of_a_policy():
    assert family(Policy(endpoint="ws://localhost:8000", adapter="tabletop_random")) == "trained"
    assert family(Policy(adapter="tabletop_scripted", options={"noise": 0.1})) == "scripted"


# ---- real results from a file ---------------------------------------------------------------------------------------


def reality(folder, change=lambda table: table):
    """A CSV of real results, perhaps damaged by `change`."""
    generator = np.random.default_rng(5)
    rows = [{"policy": policy, "task": task, "success": round(generator.random(), 1), "n": 10, "source": "made up"}
            for policy in POLICIES for task in data.TASKS]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    change(pd.DataFrame(rows)).to_csv(folder / "reality.csv", index=False)
    return str(folder / "reality.csv")


def test_reality_from_a_csv(tmp_path):
    file = reality(tmp_path)
    opened = study(tmp_path, data.judgements(per_task=4), reality=file)
    found = tables.ranking(opened)
    expected = pd.read_csv(file).groupby("policy")["success"].mean()
    assert found["success_real"].to_numpy() == pytest.approx(expected[found["policy"]].to_numpy())
    assert (found["n_real"] == 30).all() and found["partial_real"].isna().all()
    assert set(tables.agreement_table(opened)["pairing"]) == {"same tasks, other first frames"}
    compared = tables.comparison_table(opened).groupby("side")["test"].unique()
    assert compared["real"].tolist() == ["Barnard exact"] and "McNemar" in compared["imagined"][0]


def test_what_reality_does_not_cover_is_named_and_still_ranked(tmp_path, capsys):
    """A policy without one cell, a task and a policy of somebody else's: the rest is compared."""

    def change(table):
        stranger = table.iloc[:1].assign(policy="other")
        return pd.concat([table.iloc[1:], stranger, stranger.assign(policy="late", task="fly")])

    file = reality(tmp_path, change)
    opened = study(tmp_path, data.judgements(per_task=4), reality=file)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition("csv: ")[2] for line in said] == [
        "other, put_on_plate is not ranked here", "late, fly is not ranked here",
        "no complete real results for policy early",
    ]  # fmt: skip
    table = tables.ranking(opened).set_index("policy")
    assert table["rank_imagined"].notna().all() and table.index[table["rank_real"].isna()].tolist() == ["early"]
    assert sorted(table["rank_real"].dropna()) == list(range(1, len(POLICIES)))
    cells = tables.per_task(opened).set_index("policy")
    assert cells["n_real"].isna().groupby("policy").all().to_dict() == {name: name == "early" for name in POLICIES}
    agreed = tables.agreement_table(opened)
    assert (agreed[agreed["scope"] == "all policies"]["n"].dropna() <= len(POLICIES) - 1).all()
    compared = tables.comparison_table(opened)
    assert "early" not in set(compared[compared["side"] == "real"]["policy_a"])
    grouped = tables.comparisons.add_groups(tables.ranking(opened), compared).set_index("policy")["group_real"]
    assert pd.isna(grouped["early"]) and grouped.drop("early").notna().all()
    tables.write_csv(tables.ranking(opened), tmp_path / "ranking.csv")
    tables.write_csv(tables.per_task(opened), tmp_path / "per_task.csv")
    lines = summary.ranking_lines(summary.read_rows(tmp_path / "ranking.csv"))
    assert [line.count("]") for line in lines[1:-1]] == [1 if " early " in line else 2 for line in lines[1:-1]]
    written = [pd.read_csv(tmp_path / name) for name in ("ranking.csv", "per_task.csv")]
    for draw in (scatter.scatter, scatter.reliability):
        figure = draw(*written, agreed)
        figure.canvas.draw()  # what has no real results is not drawn, and nothing breaks


def test_reality_by_trials_and_under_other_names(tmp_path):
    """One row per trial, names of the lab's own, partial credit: rates are means over trials."""
    rows = [{"policy": policy.upper(), "task": task, "trial_id": f"{i}", "success": int(i < 2), "partial": 0.5, "source": "us"}
            for policy in POLICIES for task in data.TASKS for i in range(5)]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "reality.csv", index=False)
    names = {policy.upper(): policy for policy in POLICIES}
    found = cells.load_reality(tmp_path / "reality.csv", list(POLICIES), data.TASKS, names)
    assert found.left_out == [] and (found.rate == 0.4).all() and (found.n == 5).all() and (found.partial == 0.5).all()


@pytest.mark.parametrize("source", ["lab", "csv"])
def test_agreement_of_partial_credit(tmp_path, source):
    """Credit that is half of success plus a half correlates like success, and errs half as much."""
    credit = lambda table: table.assign(partial=0.5 + 0.5 * table["success"])  # noqa: E731
    given = {"reality": reality(tmp_path, credit)} if source == "csv" else {}
    opened = study(tmp_path, data.judgements(per_task=4), **given)
    found = tables.agreement_table(opened).set_index(["scope", "statistic"])
    for scope in ("all policies", "policy x task cells"):
        credited = f"{scope.replace('policy x task ', '')}, partial credit"
        for name, part in (("pearson", 1.0), ("spearman", 1.0), ("mae", 0.5), ("bias", 0.5)):
            value = found.loc[(credited, name), "value"]
            assert value == pytest.approx(part * found.loc[(scope, name), "value"], abs=1e-6)
            assert found.loc[(credited, name), "low"] <= value <= found.loc[(credited, name), "high"]


def test_partial_credit_that_is_not_given_everywhere_is_not_compared(tmp_path):
    judgements = data.judgements(per_task=4)
    judgements.loc[(judgements["task"] == "lift") & (judgements["judge"] == "classifier"), "partial"] = np.nan
    scopes = set(tables.agreement_table(study(tmp_path, judgements))["scope"])
    assert "all policies" in scopes and not any("partial" in scope for scope in scopes)


def test_a_published_table_is_real_results_too():
    names = {"OpenVLA": "openvla", "Put Carrot on Plate": "carrot_on_plate", "Lift Eggplant": "lift_eggplant"}
    found = cells.load_reality(
        ROOT / "config/published/openvla_bridge.csv",
        ["openvla", "mine"],
        ["lift_eggplant", "carrot_on_plate"],
        names,
    )
    assert found.policies == ["openvla"] and found.rate.tolist() == [[0.75, 0.8]] and (found.n == 10).all()


def test_real_results_of_one_policy_are_set_beside_it(tmp_path):
    file = reality(tmp_path, lambda table: table[table["policy"] == "late"])
    opened = study(tmp_path, data.judgements(per_task=2), reality=file)
    agreed = tables.agreement_table(opened).set_index(["scope", "statistic"])["value"]
    assert np.isnan(agreed["all policies", "pearson"]) and agreed["all policies", "mae"] >= 0
    assert tables.ranking(opened).set_index("policy")["rank_real"].dropna().to_dict() == {"late": 1}


def test_no_real_results_at_all_rank_by_imagination(tmp_path):
    file = reality(tmp_path, lambda table: table.assign(policy="other").drop_duplicates(["policy", "task"]))
    opened = study(tmp_path, data.judgements(per_task=2), reality=file)
    assert tables.ranking(opened)["rank_real"].isna().all() and tables.agreement_table(opened).empty


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: pd.concat([t, t.iloc[:1]]), "early, put_on_plate appears twice"),
    (lambda t: t.assign(success=70.0), "success of early, put_on_plate is"),
    (lambda t: t.assign(n=0), "n of early, put_on_plate is"),
    (lambda t: t.assign(success="often"), "a rate between 0 and 1"),
    (lambda t: t.drop(columns="n"), "has no column n"),
])  # fmt: skip
def test_bad_reality_is_one_clear_line(tmp_path, change, message):
    file = reality(tmp_path, change)
    with pytest.raises(UserError) as error:
        study(tmp_path, data.judgements(per_task=2), reality=file)
    assert message in str(error.value) and "reality.csv" in str(error.value) and "\n" not in str(error.value)


# ---- bad judgements -------------------------------------------------------------------------------------------------


def without(table, **values):
    keep = pd.Series(False, index=table.index)
    for column, value in values.items():
        keep |= table[column] != value
    return table[keep]


def nothing_valid(table):
    hit = (table["policy"] == "late") & (table["task"] == "lift") & (table["world"] == "world_model")
    return table.assign(error=np.where(hit, "timeout", None))


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: pd.concat([t, t.iloc[:1]]), "duplicate"),
    (lambda t: without(t, policy="late", world="world_model"), "none for late"),
    (lambda t: without(t, policy="late", world="lab"), "none for late"),
    (lambda t: without(t, policy="late", trial_id="lift/000"), "incomplete, the first is late, lift/000"),
    (lambda t: t.replace({"policy": {"late": "unknown"}}), "late"),
    (lambda t: pd.concat([t, t[t["policy"] == "late"].assign(policy="stranger")]), "stranger not in `policies`"),
    (lambda t: t[t["task"] != "lift"], "no trial of task 'lift'"),
    (lambda t: t.assign(success_at_end=1.5), "between 0 and 1"),
    (lambda t: t[t["judge"] != "classifier"], "primary judge 'classifier'"),
    (nothing_valid, "n = 0"),
    (lambda t: t.drop(columns="judge"), "has no column judge"),
])  # fmt: skip
def test_bad_judgements_are_one_clear_line(tmp_path, change, message):
    with pytest.raises(UserError) as error:
        study(tmp_path, change(data.judgements(per_task=2)))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_judgements_of_another_run_are_noticed(tmp_path):
    files = data.write_run(tmp_path, data.judgements(per_task=2))
    judgements = records.load_judgements(files["judgements"])
    rollouts = records.load_rollouts(files["rollouts"])
    records.check_judged(rollouts, judgements)
    with pytest.raises(UserError, match="rollout without judgement"):
        records.check_judged(rollouts, judgements[judgements["policy"] != "late"])


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    for file in ("broken.parquet", "absent.parquet"):
        with pytest.raises(UserError, match=file):
            records.load_judgements([tmp_path / file])
