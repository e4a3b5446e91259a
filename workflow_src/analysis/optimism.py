"""Failure optimism: how often the world model lets spoiled actions look like successes.

From replays of recorded successes, as they were and corrupted (`rollouts/corruptions.py`), judged like any rollout. A
*false success* is a replay that fails in the lab and is judged a success in imagination. Beside it stands how often the
same judge calls such a failure a success on the lab's own video: that part is the judge's fault.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workflow_src.analysis import records, style
from workflow_src.analysis import statistics as st
from workflow_src.analysis.contact_sheet import save_sheet
from workflow_src.analysis.pairs import Pair
from workflow_src.analysis.records import IMAGINED, LAB, TRUTH
from workflow_src.common import seeds
from workflow_src.common.config import load_stage
from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import atomic_path
from workflow_src.common.process import die_with_parent

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

UNSPOILED = "as_recorded"
COLUMNS = [
    "corruption", "task", "judge", "n", "success_real", "success_imagined", "n_failed",
    "false_success", "false_success_low", "false_success_high", "judge_false_success", "auroc", "auroc_low", "auroc_high",
]  # fmt: skip
RESAMPLES = 1000
SHOWN = 2  # examples per corruption


def joined(judgements: pd.DataFrame, judge: str) -> pd.DataFrame:
    """One row per replay: corruption, task, trial_id, `real`, `imagined`, `judged_real` (0 or 1), `score` in imagination.

    `score` is the judge's probability of success, or its verdict where it gives none. Replays without a valid judgement
    in imagination are left out.
    """
    key = ["policy", "task", "trial_id"]
    valid = judgements[judgements["valid"]]

    def side(world: str, by: str, name: str) -> pd.DataFrame:
        rows = valid[(valid["world"] == world) & (valid["judge"] == by)]
        return rows.set_index(key)[["success_at_end"]].rename(columns={"success_at_end": name})

    rows = valid[(valid["world"] == IMAGINED) & (valid["judge"] == judge)].set_index(key)
    if not len(rows):
        raise UserError(f"judgements: none by {judge!r} of imagined replays; score them first")
    scores = rows["score"].astype("Float64").to_numpy(float, na_value=np.nan) if "score" in rows else np.nan
    table = rows[["success_at_end"]].rename(columns={"success_at_end": "imagined"}).assign(score=scores)
    table["score"] = table["score"].fillna(table["imagined"])
    table = table.join(side(LAB, TRUTH, "real"), how="inner").join(side(LAB, judge, "judged_real"))
    return table.reset_index().rename(columns={"policy": "corruption"})


def optimism_table(
    judgements: pd.DataFrame, judges: Sequence[str], tasks: Sequence[str], confidence: float, seed: int
) -> pd.DataFrame:
    """`failure_optimism.csv`: one row per corruption, task (and `all`) and judge."""
    import pandas as pd

    rows = []
    for judge in judges:
        table = joined(judgements, judge)
        generator = seeds.rng(seed, "optimism", judge)
        for corruption in dict.fromkeys(table["corruption"]):
            for task in ("all", *tasks):
                part = table if task == "all" else table[table["task"] == task]
                spoiled = part[part["corruption"] == corruption]
                if len(spoiled):
                    head = {"corruption": corruption, "task": task, "judge": judge}
                    genuine = part[part["corruption"] == UNSPOILED]
                    rows.append(head | _row(spoiled, genuine, confidence, generator))
    return pd.DataFrame(rows, columns=COLUMNS)


def _row(
    spoiled: pd.DataFrame, genuine: pd.DataFrame, confidence: float, generator: np.random.Generator
) -> dict[str, Any]:
    failed = spoiled[spoiled["real"] < 0.5]
    row = {
        "n": len(spoiled), "success_real": spoiled["real"].mean(), "success_imagined": spoiled["imagined"].mean(),
        "n_failed": len(failed),
    }  # fmt: skip
    if len(failed):
        rate = failed["imagined"].mean()
        low, high = st.wilson(rate, len(failed), confidence)
        row |= {"false_success": rate, "false_success_low": float(low), "false_success_high": float(high),
                "judge_false_success": failed["judged_real"].mean()}  # fmt: skip
    positives = genuine[genuine["real"] >= 0.5]
    if len(failed) and len(positives) and (spoiled["corruption"] != UNSPOILED).all():
        row |= dict(zip(("auroc", "auroc_low", "auroc_high"), auroc(positives, failed, confidence, generator)))
    return row


def auroc(
    positives: pd.DataFrame, negatives: pd.DataFrame, confidence: float, generator: np.random.Generator
) -> tuple[float, float, float]:
    """Chance that an unspoiled success scores above a spoiled failure in imagination (ties half), and its interval.

    Percentile bootstrap over first frames, which both kinds of replay share.
    """
    above = positives["score"].to_numpy()[:, None] - negatives["score"].to_numpy()[None]
    above = (above > 0) + 0.5 * (above == 0)
    frames = sorted(set(positives["trial_id"]) | set(negatives["trial_id"]))
    counts = generator.multinomial(len(frames), np.full(len(frames), 1 / len(frames)), RESAMPLES).astype(float)
    one, other = (
        counts[:, [frames.index(trial) for trial in part["trial_id"]]] for part in (positives, negatives)
    )  # (B, number of replays)
    total = one.sum(1) * other.sum(1)
    drawn = ((one @ above) * other).sum(1)[total > 0] / total[total > 0]
    low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
    value = float(above.mean())
    return value, min(float(low), value), max(float(high), value)


# ---- examples -------------------------------------------------------------------------------------------------------


def examples(rollouts: pd.DataFrame, table: pd.DataFrame) -> list[Pair]:
    """Replays to look at: of every corruption some false successes where there are any, else some that fail in both.

    The videos of both worlds, from the same first frame with the same actions.
    """
    videos = rollouts.set_index(["world", "policy", "trial_id"])
    pairs = []
    for corruption in dict.fromkeys(table["corruption"]):
        rows = table[table["corruption"] == corruption]
        wrong = rows[(rows["real"] < 0.5) & (rows["imagined"] >= 0.5)].sort_values("score", ascending=False)
        fitting = wrong if len(wrong) else rows[rows["real"] == rows["imagined"]]
        # Different tasks first.
        turn = fitting.groupby("task", sort=False).cumcount()
        for row in fitting.assign(turn=turn).sort_values("turn", kind="stable").head(SHOWN).itertuples():
            imagined, real = (videos.loc[(world, corruption, row.trial_id)] for world in (IMAGINED, LAB))
            pairs.append(Pair(
                corruption.replace("_", " "), row.task, row.trial_id, 0, imagined.instruction, imagined.control_hz,
                imagined.video, real.video, row.imagined >= 0.5, row.real >= 0.5,
            ))  # fmt: skip
    return pairs


def draw(table: pd.DataFrame) -> Figure:
    """False successes per corruption with intervals, over all tasks, by the first judge of `table`."""
    import matplotlib.pyplot as plt

    rows = table[(table["task"] == "all") & (table["judge"] == table["judge"].iloc[0]) & (table["n_failed"] > 0)]
    figure, axes = plt.subplots(figsize=(7.4, 1.6 + 0.42 * len(rows)), layout="constrained")
    height, rate = np.arange(len(rows))[::-1], rows["false_success"].to_numpy()
    arms = np.maximum([rate - rows["false_success_low"], rows["false_success_high"] - rate], 0)
    axes.barh(height, rate, height=0.6, color=style.IMAGINED_COLOUR, xerr=arms, label="in imagination",
              error_kw={"elinewidth": 1.1, "ecolor": "#333333"})  # fmt: skip
    axes.scatter(rows["judge_false_success"], height, marker="D", s=34, color=style.REAL_COLOUR, zorder=3,
                 label="on the lab's own video (the judge's mistakes)")  # fmt: skip
    for y, row in zip(height, rows.itertuples()):
        score = "" if np.isnan(row.auroc) else f"   AUROC {row.auroc:.2f}"
        axes.annotate(f"n = {row.n_failed}{score}", (1.02, y), xycoords=("axes fraction", "data"), va="center",
                      fontsize=9.5, color="#444444", annotation_clip=False)  # fmt: skip
    axes.set_yticks(height, [name.replace("_", " ") for name in rows["corruption"]])
    axes.set(xlim=(-0.02, 1.02), xlabel="share of replays that really fail and are judged a success")
    axes.set_title("Failure optimism")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9.5)
    return figure


# ---- command line ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.analysis.optimism",
        description="From replays of corrupted actions to false-success rates and examples.",
        epilog="example:\n  python -m workflow_src.analysis.optimism --config results/config/analysis.json "
        "--rollouts results/corrupted/*/*/rollouts.parquet --judgements results/corrupted/judgements.parquet "
        "--out results/tables/failure_optimism.csv --out-dir results/figures",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="stage file")
    parser.add_argument("--rollouts", type=Path, nargs="+", required=True, help="rollouts.parquet files of the replays")
    parser.add_argument("--judgements", type=Path, required=True, help="parquet file written by judges.score")
    parser.add_argument("--out", type=Path, required=True, help="CSV to write")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder for the figure and the sheet of examples")
    options = parser.parse_args()
    die_with_parent()
    stage = load_stage(options.config)
    judgements, rollouts = records.load_judgements([options.judgements]), records.load_rollouts(options.rollouts)
    records.check_judged(rollouts, judgements)
    primary = stage.judges.primary
    judges = [primary, *sorted(set(judgements["judge"]) - {TRUTH, primary})]
    table = optimism_table(judgements, judges, stage.lab.tasks, stage.analysis.confidence, stage.seed)
    save_sheet(options.out_dir / "failure_examples.png", examples(rollouts, joined(judgements, primary)))
    style.use_style()
    style.save(draw(table), options.out_dir, "failure_optimism")
    with atomic_path(options.out) as temporary:
        table.to_csv(temporary, index=False, float_format="%.9g")


if __name__ == "__main__":
    run_cli(main)
