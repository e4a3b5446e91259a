"""The tables of a run: ranking, per-task rates, agreement with reality, comparisons of policies, judges' accuracy."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workflow_src.analysis import (
    agreement,
    comparisons,
    components,
    correction,
    posterior,
    prediction_powered,
    records,
    resampling,
)
from workflow_src.analysis import statistics as st
from workflow_src.analysis.records import IMAGINED, LAB, TRUTH, Outcomes
from workflow_src.analysis.resampling import Paired
from workflow_src.analysis.study import Rates, Study, family, open_study, rates_of
from workflow_src.common import seeds
from workflow_src.common.config import load_stage
from workflow_src.common.errors import run_cli
from workflow_src.common.files import atomic_path
from workflow_src.common.process import die_with_parent

if TYPE_CHECKING:
    import pandas as pd

RANKING_COLUMNS = [
    "policy", "family", "network", "snapshot", "judge",
    "rank_imagined", "success_imagined", "success_imagined_low", "success_imagined_high", "n_imagined",
    "rank_real", "success_real", "success_real_low", "success_real_high", "n_real",
    "success_corrected", "success_corrected_low", "success_corrected_high", "n_labels", "corrected_note",
    "success_imagined_state",
    "partial_imagined", "partial_real", "success_ever_imagined", "success_ever_real", "unjudged_imagined",
]  # fmt: skip
AGREEMENT_COLUMNS = ["scope", "statistic", "value", "low", "high", "n", "interval", "estimand", "pairing", "convention"]


# ---- ranking and per task -------------------------------------------------------------------------------------------


def ranking(study: Study) -> pd.DataFrame:
    """`policy_ranking.csv`: one row per policy, best imagined first."""
    import pandas as pd

    configured = [study.stage.policies[name] for name in study.policies]
    imagined = rates_of(study.imagined)
    table = pd.DataFrame({
        "policy": study.policies, "family": [family(policy) for policy in configured],
        "network": [policy.network for policy in configured],
        "snapshot": [policy.snapshot or None for policy in configured], "judge": study.stage.judges.primary,
        "success_imagined_state": np.nan if study.state is None else rates_of(study.state).rate.mean(1),
        "unjudged_imagined": _unjudged(study),
    })  # fmt: skip
    table["snapshot"] = table["snapshot"].astype("Int64")
    labels = correction.labelled(study.judgements, study.stage.judges.primary)
    size = imagined.mean_size()
    right = correction.correct_policies(labels, study.policies, imagined.rate.mean(1), size, study.confidence)
    table = table.join(right.drop(columns="policy"))
    for side, rates in (("imagined", imagined), ("real", study.real)):
        whose = study.policies if side == "imagined" else study.real_policies
        _add_rates(table, side, rates, study.confidence, whose)
        judge = study.stage.judges.primary if side == "imagined" else TRUTH
        known = side == "imagined" or study.truth is not None
        for name, column in (("partial", "partial"), ("success_ever", "success_ever")):
            table[f"{name}_{side}"] = _means(study, judge, side, column) if known else np.nan
    if study.reality is not None and study.real_policies:
        partial = dict(zip(study.real_policies, study.reality.partial.mean(1)))
        table["partial_real"] = table["policy"].map(partial).astype(float)
    table = table.sort_values(["rank_imagined", "policy"], kind="stable", ignore_index=True)
    return table[RANKING_COLUMNS]


def _add_rates(table: pd.DataFrame, side: str, rates: Rates | None, confidence: float, policies: Sequence[str]) -> None:
    """Add the columns of one side; nothing for those that are not among its `policies`."""
    import pandas as pd

    names = [f"rank_{side}", f"success_{side}", f"success_{side}_low", f"success_{side}_high", f"n_{side}"]
    if rates is None:
        table[names] = pd.NA
        return
    rate, low, high = rates.means(confidence)
    for name, values in zip(names, (st.competition_ranks(rate), rate, low, high, rates.n.sum(1).astype(int))):
        if list(policies) == table["policy"].tolist():
            table[name] = values
        else:
            whole = pd.Series(values, index=list(policies)).reindex(table["policy"])
            table[name] = whole.astype("Int64" if values.dtype.kind == "i" else float).to_numpy()


def _means(study: Study, judge: str, side: str, column: str) -> np.ndarray:
    """Mean of another column of the judgements per policy, each task counting alike; NaN where it is not given."""
    world = IMAGINED if side == "imagined" else LAB
    rows = study.judgements[(study.judgements["world"] == world) & (study.judgements["judge"] == judge)]
    if column not in rows or not rows[column].notna().any():
        return np.full(len(study.policies), np.nan)
    rate, _ = records.outcomes(study.judgements, world, judge, study.policies, study.tasks, column).cells()
    return rate.mean(1)


def _unjudged(study: Study) -> list[int]:
    rows = study.judgements
    rows = rows[(rows["world"] == IMAGINED) & (rows["judge"] == study.stage.judges.primary) & ~rows["valid"]]
    return rows["policy"].value_counts().reindex(study.policies).fillna(0).astype(int).tolist()


def per_task(study: Study) -> pd.DataFrame:
    """`per_task.csv`: one row per policy and task, in the configured order."""
    import pandas as pd

    shape = (len(study.policies), len(study.tasks))
    p, k = np.indices(shape).reshape(2, -1)
    table = pd.DataFrame({"policy": np.array(study.policies)[p], "task": np.array(study.tasks)[k]})
    table["family"] = [family(study.stage.policies[name]) for name in table["policy"]]
    for side, rates in (("imagined", rates_of(study.imagined)), ("real", study.real)):
        names = (f"success_{side}", f"success_{side}_low", f"success_{side}_high", f"n_{side}")
        if rates is None:
            table[list(names)] = pd.NA
            continue
        whose = (study.policies, study.tasks) if side == "imagined" else (study.real_policies, study.real_tasks)
        low, high = rates.intervals(study.confidence)
        for name, value in zip(names, (rates.rate, low, high, rates.n.astype(int))):
            grid = pd.DataFrame(value, *map(list, whose))
            if grid.shape != shape:
                grid = grid.astype("Int64" if value.dtype.kind == "i" else float).reindex(
                    study.policies, columns=study.tasks
                )
            table[name] = grid.to_numpy().ravel()
    table["success_imagined_state"] = np.nan if study.state is None else rates_of(study.state).rate.ravel()
    return table


# ---- agreement ------------------------------------------------------------------------------------------------------


def agreement_table(study: Study) -> pd.DataFrame:
    """`agreement.csv`: one row per scope and statistic; only the header without real results."""
    import pandas as pd

    if study.real is None:
        return pd.DataFrame(columns=AGREEMENT_COLUMNS)
    generator = seeds.rng(study.stage.seed, "agreement")
    weights = None
    if study.truth is None:
        rows = _scopes(study, lambda found: _against_a_csv(study, rates_of(found), study.real.rate), generator)
    else:
        weights = resampling.frame_weights(study.imagined.tasks, study.stage.analysis.resamples, generator)
        rows = _scopes(study, lambda found: _on_same_frames(study, found, weights), generator)
        rows += agreement.trial_rows(study.imagined, study.truth, weights, study.confidence)
    if credit := _partial_credit(study, weights):
        rows += agreement.credit_rows(credit, study.confidence)
    return pd.DataFrame(rows, columns=AGREEMENT_COLUMNS)


def _on_same_frames(study: Study, found: Outcomes, weights: np.ndarray) -> Paired:
    rates = rates_of(found)
    draws = (resampling.frame_draws(outcomes, weights) for outcomes in (found, study.truth))
    truth = None
    if found is study.imagined:
        # The frames that both worlds share correlate their noise a little; the posterior takes it as independent.
        generator = seeds.rng(study.stage.seed, "posterior")
        truth = posterior.sample(rates.rate, study.real.rate, rates.size, study.real.size, generator)
    return Paired(
        tuple(study.policies), tuple(study.tasks), rates.rate, study.real.rate, rates.n, study.real.n, *draws,
        resampling.SAME_FRAMES, resampling.BOOTSTRAP, truth,
    )  # fmt: skip


def _against_a_csv(study: Study, rates: Rates, real: np.ndarray) -> Paired:
    generator = seeds.rng(study.stage.seed, "posterior")
    block = np.ix_(*(
        [every.index(name) for name in some]
        for every, some in ((study.policies, study.real_policies), (study.tasks, study.real_tasks))
    ))  # fmt: skip
    return resampling.from_cells(
        study.real_policies,
        study.real_tasks,
        rates.rate[block],
        real,
        rates.size[block],
        study.real.n,
        generator,
    )


def _partial_credit(study: Study, weights: np.ndarray | None) -> Paired | None:
    """Partial credit on both sides; None unless the primary judge and reality give it for every policy and task."""

    def credit(world: str, judge: str) -> Outcomes | None:
        if "partial" not in study.judgements:
            return None
        found = records.outcomes(study.judgements, world, judge, study.policies, study.tasks, "partial")
        return found if (found.cells()[1] > 0).all() else None

    imagined = credit(IMAGINED, study.stage.judges.primary)
    if imagined is None:
        return None
    if study.truth is None:
        known = not np.isnan(study.reality.partial).any()
        return _against_a_csv(study, rates_of(imagined), study.reality.partial) if known else None
    real = credit(LAB, TRUTH)
    if real is None:
        return None
    (imagined_rate, n_imagined), (real_rate, n_real) = imagined.cells(), real.cells()
    draws = (resampling.frame_draws(side, weights) for side in (imagined, real))
    return Paired(
        tuple(study.policies), tuple(study.tasks), imagined_rate, real_rate, n_imagined, n_real, *draws,
        resampling.SAME_FRAMES, resampling.BOOTSTRAP, None,
    )  # fmt: skip


def _scopes(study: Study, paired: Callable[[Outcomes], Paired], generator: np.random.Generator) -> list[dict[str, Any]]:
    whole = paired(study.imagined)
    trained = [name for name in study.trained() if name in study.real_policies]
    rows = agreement.policy_rows(whole, "all policies", study.confidence, generator)
    if len(trained) > 1:
        rows += agreement.policy_rows(whole.only(trained), "trained policies", study.confidence, generator)
    rows += agreement.cell_rows(whole, "policy x task cells", study.confidence, generator)
    if len(trained) > 1:
        some = whole.only(trained)
        rows += agreement.cell_rows(some, "trained policy x task cells", study.confidence, generator)
    if study.state is not None:
        rows += agreement.policy_rows(paired(study.state), "state judge", study.confidence, generator)
    return rows + agreement.within_rows(whole)


def comparison_table(study: Study) -> pd.DataFrame:
    """`comparisons.csv`: every pair of policies in imagination, and in reality where there are real results."""
    rows = comparisons.paired_rows(study.imagined, study.policies, "imagined", study.confidence)
    if study.truth is not None:
        rows += comparisons.paired_rows(study.truth, study.policies, "real", study.confidence)
    elif study.real is not None:
        rows += comparisons.unpaired_rows(study.real.rate, study.real.n, study.real_policies, "real", study.confidence)
    return comparisons.comparison_table(rows)


def prediction_powered_table(study: Study) -> pd.DataFrame:
    """`prediction_powered.csv`: had only `analysis.real_trials` trials of each task been tried in the lab."""
    rows = []
    if study.truth is not None:
        rows = prediction_powered.rows_of_run(
            study.imagined, study.truth, study.policies, study.stage.analysis.real_trials, study.stage.seed,
            study.confidence,
        )  # fmt: skip
    return prediction_powered.table_of(rows, [*prediction_powered.COLUMNS, "success_all"])


def variance_table(study: Study) -> pd.DataFrame:
    """`variance.csv`: where the scatter of imagined rollouts comes from, and that of the lab's."""
    sides = [(IMAGINED, study.stage.judges.primary)] + ([(LAB, TRUTH)] if study.truth is not None else [])
    return components.variance_table(study.judgements, sides)


# ---- judges ---------------------------------------------------------------------------------------------------------


def judge_table(
    judgements: pd.DataFrame, policies: Sequence[str], tasks: Sequence[str], confidence: float
) -> pd.DataFrame:
    """`judge.csv`: accuracy, sensitivity and specificity of every judge on lab videos, where truth is known.

    Rows with policy 'all' and task 'all' are over everything. Nothing here says how a judge does on generated video.
    """
    import pandas as pd

    columns = ["judge", "policy", "task"]
    for measure in ("accuracy", "sensitivity", "specificity"):
        columns += [measure, f"{measure}_low", f"{measure}_high", f"n_{measure}"]
    lab = judgements[judgements["world"] == LAB]
    truth = lab[(lab["judge"] == TRUTH) & lab["valid"]].set_index(records.KEY)["success_at_end"].rename("truth")
    rows = []
    for judge in sorted(set(lab["judge"]) - {TRUTH}):
        judged = lab[lab["judge"] == judge].join(truth, on=records.KEY, how="inner")
        groups = [("all", "all")] + [(policy, "all") for policy in policies] + [("all", task) for task in tasks]
        for policy, task in groups:
            chosen = (judged["policy"] == policy) | (policy == "all")
            part = judged[chosen & ((judged["task"] == task) | (task == "all"))]
            rows.append({"judge": judge, "policy": policy, "task": task} | _accuracy(part, confidence))
    return pd.DataFrame(rows, columns=[*columns, "unjudged"])


def _accuracy(part: pd.DataFrame, confidence: float) -> dict[str, Any]:
    valid = part[part["valid"]]
    right = (valid["success_at_end"] >= 0.5) == (valid["truth"] >= 0.5)
    positive = valid["truth"] >= 0.5
    row: dict[str, Any] = {"unjudged": int((~part["valid"]).sum())}
    for measure, chosen in (("accuracy", right | ~right), ("sensitivity", positive), ("specificity", ~positive)):
        hits = right[chosen].astype(float).groupby(valid["trial_id"][chosen]).agg(["sum", "count"])
        n = int(hits["count"].sum())
        row[f"n_{measure}"] = n
        if n:
            # The same first frame seen under several policies counts once as far as it misleads the judge alike.
            size = st.effective_size(hits["sum"].to_numpy(), hits["count"].to_numpy())
            row[measure] = hits["sum"].sum() / n
            row[f"{measure}_low"], row[f"{measure}_high"] = map(float, st.wilson(row[measure], size, confidence))
    return row


# ---- command line ---------------------------------------------------------------------------------------------------


def write_csv(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table atomically, nine digits at most, nothing for what is not known."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.9g")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Turn judgements into tables: ranking, per task, agreement, comparisons, judges and more.",
        epilog="example:\n  python -m workflow_src.analysis.tables --config results/config/analysis.json "
        "--judgements results/judgements/*/*/*.parquet --rollouts results/rollouts/*/*/*/rollouts.parquet "
        "--out-ranking results/tables/policy_ranking.csv --out-per-task results/tables/per_task.csv "
        "--out-agreement results/tables/agreement.csv --out-judge results/tables/judge.csv "
        "--out-comparisons results/tables/comparisons.csv "
        "--out-prediction-powered results/tables/prediction_powered.csv --out-variance results/tables/variance.csv",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="stage file")
    parser.add_argument("--judgements", nargs="+", required=True, help="parquet files written by judges.score")
    parser.add_argument("--rollouts", nargs="+", required=True, help="rollouts.parquet files")
    for name in ("ranking", "per-task", "agreement", "judge", "comparisons", "prediction-powered", "variance"):
        parser.add_argument(f"--out-{name}", required=True, help="CSV to write")
    arguments = parser.parse_args()
    die_with_parent()
    stage = load_stage(arguments.config)
    judgements = records.load_judgements(arguments.judgements)
    records.check_judged(records.load_rollouts(arguments.rollouts), judgements)
    study = open_study(stage, judgements)
    write_csv(per_task(study), arguments.out_per_task)
    write_csv(agreement_table(study), arguments.out_agreement)
    write_csv(judge_table(judgements, study.policies, study.tasks, study.confidence), arguments.out_judge)
    write_csv(prediction_powered_table(study), arguments.out_prediction_powered)
    write_csv(variance_table(study), arguments.out_variance)
    compared = comparison_table(study)
    write_csv(compared, arguments.out_comparisons)
    write_csv(comparisons.add_groups(ranking(study), compared), arguments.out_ranking)


if __name__ == "__main__":
    run_cli(main)
