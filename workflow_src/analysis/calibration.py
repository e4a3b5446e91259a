"""How far each judge can be trusted: confusion matrices, sensitivity, specificity, and what they make of success rates.

Lab video and generated video are kept apart throughout: a judge's errors on one say nothing of its errors on the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workflow_src.analysis import correction, records
from workflow_src.analysis import statistics as st
from workflow_src.analysis.correction import HUMAN, labelled
from workflow_src.analysis.records import IMAGINED, KEY, LAB, TRUTH
from workflow_src.analysis.study import rates_of
from workflow_src.analysis.tables import write_csv
from workflow_src.common.config import load_stage
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.process import die_with_parent

if TYPE_CHECKING:
    import pandas as pd

CALIBRATION_COLUMNS = [
    "judge", "video", "labels", "clips", "policy", "n",
    "true_positive", "false_negative", "false_positive", "true_negative", "undecided",
    "sensitivity", "sensitivity_low", "sensitivity_high", "specificity", "specificity_low", "specificity_high",
    "still_success", "note",
]  # fmt: skip
VIDEO = {LAB: "lab", IMAGINED: "generated"}
AS_RECORDED, REVERSED = "recorded", "reversed"
ORDER_NOT_READ = "does not read the order of frames: most reversed successes are still called successes"
PROBE_COLUMNS = ["judge", "probe", "policy", "trial_id", "repeat", "label", "success_at_end"]


# ---- one confusion matrix -------------------------------------------------------------------------------------------


def row(table: pd.DataFrame, undecided: int, confidence: float, **names: Any) -> dict[str, Any]:
    """One row of `calibration.csv` from decided clips `said, label, weight, policy, trial_id`."""
    said, label = table["said"].to_numpy(bool), table["label"].to_numpy(bool)
    counts = {
        "true_positive": (said & label).sum(), "false_negative": (~said & label).sum(),
        "false_positive": (said & ~label).sum(), "true_negative": (~said & ~label).sum(),
    }  # fmt: skip
    found = names | {"n": len(table), "undecided": undecided, "note": ""} | counts
    for name, (rate, interval) in _rates(table, confidence).items():
        if not np.isnan(rate):
            found |= {name: rate, f"{name}_low": float(interval[0]), f"{name}_high": float(interval[1])}
    return found


def _rates(table: pd.DataFrame, confidence: float) -> dict[str, tuple[float, tuple[float, float]]]:
    """Sensitivity and specificity with intervals: of a weighted sample, or of clips that are all labelled."""
    if (table["weight"] != 1).any():
        rates = correction.judge_rates(table)
        return dict(
            zip(("sensitivity", "specificity"), zip((rates.q1, rates.q0), correction.rate_intervals(table, confidence)))
        )
    found = {}
    for name, part in (("sensitivity", table[table["label"]]), ("specificity", table[~table["label"]])):
        hits = (part["said"] == part["label"]).astype(float).groupby(part["trial_id"]).agg(["sum", "count"])
        # A first frame that is seen often counts less, as far as it misleads the judge alike.
        size = st.effective_size(hits["sum"].to_numpy(), hits["count"].to_numpy())
        rate = hits["sum"].sum() / hits["count"].sum() if len(part) else np.nan
        found[name] = (rate, st.wilson(rate, size, confidence) if len(part) else (np.nan, np.nan))
    return found


# ---- calibration.csv ------------------------------------------------------------------------------------------------


def calibration_table(judgements: pd.DataFrame, probes: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """`calibration.csv`: every judge against the lab's truth, on probes, and against human labels of either video."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for judge in sorted(set(judgements["judge"]) - {TRUTH}):
        rows += _against_truth(judgements, judge, confidence)
        rows += _on_probes(probes[probes["judge"] == judge], judge, confidence)
        if judge != HUMAN:
            rows += _against_people(judgements, judge, confidence)
    return pd.DataFrame(rows, columns=CALIBRATION_COLUMNS)


def _against_truth(judgements: pd.DataFrame, judge: str, confidence: float) -> Iterator[dict[str, Any]]:
    lab = judgements[judgements["world"] == LAB]
    truth = lab[(lab["judge"] == TRUTH) & lab["valid"]].set_index(KEY)["success_at_end"].rename("label") >= 0.5
    rows = lab[lab["judge"] == judge].join(truth, on=KEY, how="inner")
    if len(rows):
        valid = rows[rows["valid"]]
        valid = valid.assign(said=valid["success_at_end"] >= 0.5, weight=1.0)
        names = {"judge": judge, "video": "lab", "labels": "lab truth", "clips": "all", "policy": "all"}
        yield row(valid, len(rows) - len(valid), confidence, **names)


def _against_people(judgements: pd.DataFrame, judge: str, confidence: float) -> Iterator[dict[str, Any]]:
    for world, video in VIDEO.items():
        table = labelled(judgements, judge, world)
        names = {"judge": judge, "video": video, "labels": "human", "clips": "labelled"}
        if table.empty:
            if world == IMAGINED:
                yield names | {"policy": "all", "n": 0, "note": correction.NO_LABELS}
            continue
        for policy, part in [("all", table), *(table.groupby("policy") if world == IMAGINED else ())]:
            yield row(part, 0, confidence, **names, policy=policy)


def _on_probes(probes: pd.DataFrame, judge: str, confidence: float) -> Iterator[dict[str, Any]]:
    key = ["policy", "trial_id", "repeat"]
    before = probes[(probes["probe"] == AS_RECORDED) & probes["label"]].set_index(key)["success_at_end"]
    for kind, part in probes.groupby("probe", sort=False):
        valid = part[part["success_at_end"].notna()]
        table = valid.assign(said=valid["success_at_end"].astype(bool), weight=1.0)
        names = {"judge": judge, "video": "lab", "labels": "lab truth", "clips": str(kind), "policy": "all"}
        found = row(table, len(part) - len(valid), confidence, **names)
        if kind != AS_RECORDED:
            pairs = table.join(before.rename("before").astype("boolean"), on=key, how="inner").dropna(subset=["before"])
            credited = pairs[pairs["before"].astype(bool)]
            found["still_success"] = float(credited["said"].mean()) if len(credited) else np.nan
            found["note"] = ORDER_NOT_READ if kind == REVERSED and found["still_success"] > 0.5 else ""
        yield found


# ---- corrected.csv --------------------------------------------------------------------------------------------------


def corrected_table(judgements: pd.DataFrame, stage: Any) -> pd.DataFrame:
    """`corrected.csv`: every judge's success rates on generated video, corrected where labels allow it.

    `success_if_alike` pools the labels of all policies: right only if the judge errs alike on all of them. The lowest and
    highest raw rate among the judges stand beside it: how far judges disagree needs no labels.
    """
    import pandas as pd

    policies, tasks, confidence = list(stage.policies), list(stage.lab.tasks), stage.analysis.confidence
    imagined = judgements[judgements["world"] == IMAGINED]
    judges = [
        judge for judge in sorted(set(imagined["judge"]) - {HUMAN}) if _complete(imagined, judge, policies, tasks)
    ]
    tables = []
    for judge in judges:
        rates = rates_of(records.outcomes(judgements, IMAGINED, judge, policies, tasks))
        p, low, high = rates.means(confidence)
        labels = labelled(judgements, judge)
        part = pd.DataFrame(
            {"judge": judge, "success_judged": p, "success_judged_low": low, "success_judged_high": high}
        )
        part["n_judged"] = rates.n.sum(1).astype(int)
        part = part.join(correction.correct_policies(labels, policies, p, rates.mean_size(), confidence))
        tables.append(part.assign(**_if_alike(labels, p, rates.mean_size(), confidence)))
    table = pd.concat(tables, ignore_index=True)
    grouped = table.groupby("policy")["success_judged"]
    for name, extreme in (("lowest", grouped.idxmin()), ("highest", grouped.idxmax())):
        found = table.loc[extreme].set_index("policy")
        table[f"{name}_judge"], table[f"success_{name}"] = (
            table["policy"].map(found[column]) for column in ("judge", "success_judged")
        )
    return table[["policy", *(column for column in table if column != "policy")]]


def _complete(imagined: pd.DataFrame, judge: str, policies: Sequence[str], tasks: Sequence[str]) -> bool:
    """Whether `judge` has a valid verdict in every cell: a rate over some tasks only is another quantity."""
    rows = imagined[(imagined["judge"] == judge) & imagined["valid"]]
    return set(zip(rows["policy"], rows["task"])) >= {(policy, task) for policy in policies for task in tasks}


def _if_alike(labels: pd.DataFrame, p: np.ndarray, n: np.ndarray, confidence: float) -> dict[str, Any]:
    rates = correction.judge_rates(labels)
    found = {"sensitivity": rates.q1, "specificity": rates.q0}
    names = ["success_if_alike", "success_if_alike_low", "success_if_alike_high"]
    if correction.refusal(rates):
        return found | dict.fromkeys(names, np.nan)
    values = [
        (
            correction.corrected(one, rates.q0, rates.q1),
            *correction.corrected_interval(one, size, rates.q0, rates.m0, rates.q1, rates.m1, confidence),
        )
        for one, size in zip(p, n)
    ]
    return found | dict(zip(names, np.array(values).T))


# ---- command line ---------------------------------------------------------------------------------------------------


def load_probes(files: Sequence[str]) -> pd.DataFrame:
    """All judges' verdicts on probes."""
    import pandas as pd

    tables = []
    for file in files:
        try:
            tables.append(pd.read_parquet(file))
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not a readable table of probes ({error}); delete it and run again") from None
        if missing := [column for column in PROBE_COLUMNS if column not in tables[-1]]:
            raise UserError(f"{file}: has no column {', '.join(missing)}; delete it and run again")
    return pd.concat(tables, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Say how far each judge can be trusted, and correct success rates where labels allow it.",
        epilog="example:\n  python -m workflow_src.analysis.calibration --config results/config/analysis.json "
        "--judgements results/judgements/*.parquet --probes results/calibration/*.parquet "
        "--out-calibration results/tables/calibration.csv --out-corrected results/tables/corrected.csv",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="stage file")
    parser.add_argument("--judgements", nargs="+", required=True, help="parquet files of judgements")
    parser.add_argument("--probes", nargs="+", required=True, help="parquet files written by judges.calibrate")
    parser.add_argument("--out-calibration", required=True, help="CSV to write: judges against labels")
    parser.add_argument("--out-corrected", required=True, help="CSV to write: corrected success rates")
    arguments = parser.parse_args()
    die_with_parent()
    stage, judgements = load_stage(arguments.config), records.load_judgements(arguments.judgements)
    write_csv(corrected_table(judgements, stage), arguments.out_corrected)
    table = calibration_table(judgements, load_probes(arguments.probes), stage.analysis.confidence)
    write_csv(table, arguments.out_calibration)


if __name__ == "__main__":
    run_cli(main)
