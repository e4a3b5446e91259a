"""The judge `human`: read labels that people gave, and turn them into judgements.

Two kinds of CSV are read. A labelling page saves `clip, label, labeller, seconds`; `sample.csv` beside the page says which
rollout a clip is and how many it stands for. Anybody's own CSV names rollouts itself: `world, policy, trial_id, repeat, label`
and, if several people labelled, `labeller`; each rollout then stands for itself. With a column `sha256` (of the video; pages
have it), labels of a video that has been made anew since are refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.process import die_with_parent
from workflow_src.judges.interface import KEY, Judgement, write_judgements
from workflow_src.judges.votes import decide
from workflow_src.rollouts.records import read_records

NAME = "human"
LABELS = {"0": 0.0, "0.5": 0.5, "½": 0.5, "1": 1.0, "skip": None, "": None}
SAMPLE_COLUMNS = ["clip", *KEY, "sha256", "stratum", "stratum_size", "drawn", "weight"]


def read_table(path: str | Path, needed: Sequence[str]) -> pd.DataFrame:
    """A CSV as text. Raises `UserError` naming the file and what it lacks."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable CSV ({' '.join(str(error).split())})") from None
    if missing := [column for column in needed if column not in table]:
        raise UserError(f"{path}: has no column {', '.join(missing)}")
    return table


def read_labels(files: Sequence[str | Path], sample: str | Path | None) -> pd.DataFrame:
    """All labels: `world, policy, trial_id, repeat, labeller, vote`, and `stratum, stratum_size` where there is a sample.

    `vote` is 0, 0.5 or 1, NaN where the labeller skipped. Raises `UserError` for an unknown label or clip, and for one
    labeller's two labels of one rollout.
    """
    tables = [_read_file(file, sample is not None) for file in files]
    table = pd.concat(tables, ignore_index=True)
    if sample is not None:
        drawn = read_table(sample, SAMPLE_COLUMNS).set_index("clip")
        if unknown := sorted(set(table["clip"]) - set(drawn.index)):
            raise UserError(f"{sample}: has no clip {unknown[0]!r}; these labels belong to another labelling page")
        table = table.join(drawn[[*KEY, "sha256", "stratum", "stratum_size"]], on="clip")
        table["stratum_size"] = table["stratum_size"].astype(int)
    table["repeat"] = pd.to_numeric(table["repeat"], errors="coerce").fillna(-1).astype("int64")
    double = table[table.duplicated([*KEY, "labeller"])]
    if len(double):
        row = double.iloc[0]
        raise UserError(
            f"labels: {row.world}, {row.policy}, {row.trial_id} has two labels by {row.labeller or 'nobody'!r}; give each "
            "file once, and each labeller a name"
        )
    return table


def _read_file(file: str | Path, from_page: bool) -> pd.DataFrame:
    table = read_table(file, ["clip", "label"] if from_page else [*KEY, "label"])
    unknown = sorted(set(table["label"]) - set(LABELS))
    if unknown:
        raise UserError(f"{file}: label {unknown[0]!r} is unknown; allowed: 0, 0.5, 1, skip")
    labeller = table.get("labeller", "")
    return table.assign(vote=table["label"].map(LABELS).astype(float), labeller=labeller)


def judgements_of(labels: pd.DataFrame) -> list[Judgement]:
    """One judgement per labelled rollout: the majority of its labellers. `weight`: rollouts it stands for.

    A stratum's weight is shared by those of its clips that got a decision, so skipped ones distort nothing.
    """
    found = []
    for key, part in labels.groupby(KEY, sort=True):
        votes = [None if pd.isna(vote) else vote for vote in part["vote"]]
        found.append((key, decide(votes, len(votes)), part.iloc[0]))
    decided = pd.Series(
        [row.stratum for _, decision, row in found if decision.success is not None] if "stratum" in labels else []
    ).value_counts()
    return [
        Judgement(
            trial_id=trial, policy=policy, world=world, repeat=int(repeat), judge=NAME,
            success_at_end=decision.success, success_ever=None, partial=decision.partial, score=decision.share,
            votes=decision.valid, invalid=decision.invalid, tie=decision.tie,
            weight=row.stratum_size / decided[row.stratum] if decision.success is not None and len(decided) else None,
        )
        for (world, policy, trial, repeat), decision, row in found
    ]  # fmt: skip


def check_rollouts(labels: pd.DataFrame, rollouts: Sequence[str | Path]) -> None:
    """Raise `UserError` when a label is about no rollout of this run, or about a video that was made anew since."""
    records = pd.concat([read_records(table)[[*KEY, "sha256"]] for table in rollouts], ignore_index=True)
    known = labels.merge(records, on=KEY, how="left", suffixes=("", "_now"), indicator=True)
    strange = known[known["_merge"] == "left_only"]
    if len(strange):
        raise UserError(f"labels: {len(strange)} are about no rollout of this run, the first: {_name(strange)}")
    if "sha256" in labels and len(changed := known[known["sha256"] != known["sha256_now"]]):
        raise UserError(
            f"labels: {len(changed)} are about videos that were made anew since, the first: {_name(changed)}; label them again"
        )


def _name(rows: pd.DataFrame) -> str:
    return ", ".join(map(str, rows.iloc[0][KEY]))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.judges.human",
        description=__doc__.strip(),
        epilog="examples:\n  python -m workflow_src.judges.human --labels anna.csv ben.csv --sample labelling/sample.csv \\\n"
        "      --rollouts results/rollouts/*/*/shard_*/rollouts.parquet --out results/judgements/human.parquet",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--labels", type=Path, nargs="+", required=True, help="CSV files of labels")
    parser.add_argument("--sample", type=Path, help="sample.csv of the labelling page that the labels come from")
    parser.add_argument("--rollouts", type=Path, nargs="+", required=True, help="rollouts.parquet files")
    parser.add_argument("--out", type=Path, required=True, help="parquet to write, one row per labelled rollout")
    options = parser.parse_args()
    die_with_parent()
    labels = read_labels(options.labels, options.sample)
    check_rollouts(labels, options.rollouts)
    write_judgements(options.out, judgements_of(labels))


if __name__ == "__main__":
    run_cli(main)
