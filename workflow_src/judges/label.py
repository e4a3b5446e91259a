"""Make a page on which a person labels rollouts: blind to policy and world, drawn so that judges can be calibrated.

Clips are drawn at random within strata (policy × what the judge said), the same number from each as far as there are as many.
Every stratum is thus seen, and the weights in `sample.csv` undo the uneven shares. A few lab clips among them show how
often the labeller agrees with the lab's own truth.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import atomic_path, digest, write_text
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import Progress
from workflow_src.common.seeds import rng
from workflow_src.common.video import enlarge, write_video
from workflow_src.judges.human import SAMPLE_COLUMNS, read_table
from workflow_src.judges.interface import KEY
from workflow_src.rollouts.records import read_frames, read_records

PAGE = Path(__file__).with_name("label.html")
HEIGHT = 336  # pixels of the videos on the page, at most; smaller ones are enlarged
GENERATED = "world_model"
WORLDS = {GENERATED: "count", "lab": "lab_count"}  # world → which option says how many clips

EXAMPLES = """examples:
  python -m workflow_src.judges.label --rollouts results/rollouts/*/*/shard_*/rollouts.parquet \\
      --judgements results/judgements/learned.parquet --judge classifier --out labelling
  then open labelling/page/index.html, label, save the CSV, and set in the configuration
      judges: {human: {labels: [labels.csv], sample: labelling/sample.csv}}
"""


def candidates(rollouts: Sequence[Path], judgements: Sequence[Path], judge: str) -> pd.DataFrame:
    """All rollouts that `judge` decided, as `read_records` gives them, with a column `stratum`."""
    records = pd.concat([read_records(table) for table in rollouts], ignore_index=True)
    try:
        verdicts = pd.concat([pd.read_parquet(file) for file in judgements], ignore_index=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{judgements[0]}: not a readable table of judgements ({error})") from None
    if judge not in set(verdicts["judge"]):
        raise UserError(f"--judge: {judge!r} judged nothing here; known: {', '.join(sorted(set(verdicts['judge'])))}")
    decided = verdicts[(verdicts["judge"] == judge) & verdicts["success_at_end"].notna()]
    table = records.merge(decided[[*KEY, "success_at_end"]], on=KEY, suffixes=("_lab", ""))
    outcome = np.where(table["success_at_end"].astype(bool), "success", "failure")
    table["stratum"] = table["world"] + "/" + table["policy"] + "/" + outcome
    return table


def allocate(sizes: dict[str, int], count: int) -> dict[str, int]:
    """How many of `count` clips each stratum gives: the same from each, except that none gives more than it has."""
    given = dict.fromkeys(sorted(sizes), 0)
    left = min(count, sum(sizes.values()))
    while left:
        open_strata = [name for name in given if given[name] < sizes[name]]
        share = max(1, left // len(open_strata))
        for name in open_strata[:left]:
            more = min(share, sizes[name] - given[name])
            given[name], left = given[name] + more, left - more
    return given


def draw(table: pd.DataFrame, counts: dict[str, int], seed: int) -> pd.DataFrame:
    """The sample in the order of the page, as `sample.csv` holds it: `counts` clips of each world.

    Raises `UserError` when there are fewer generated clips than strata: what is not seen cannot be weighted.
    """
    strata = table.loc[table["world"] == GENERATED, "stratum"].nunique()
    if counts[GENERATED] < strata:
        raise UserError(
            f"--count: {counts[GENERATED]} clips are too few for {strata} strata (policy × verdict); give at least {strata}, "
            "better ten times as many"
        )
    parts = []
    for world, count in counts.items():
        groups = dict(iter(table[table["world"] == world].sort_values(KEY, ignore_index=True).groupby("stratum")))
        for stratum, number in allocate({name: len(group) for name, group in groups.items()}, count).items():
            group = groups[stratum]
            chosen = rng(seed, "label", stratum).permutation(len(group))[:number]
            parts.append(group.iloc[chosen].assign(stratum_size=len(group), drawn=number))
    if not parts or not sum(map(len, parts)):
        raise UserError("--rollouts: no rollout that the judge decided; nothing can be labelled")
    drawn = pd.concat(parts, ignore_index=True)
    drawn["weight"] = drawn["stratum_size"] / drawn["drawn"]
    drawn = drawn.iloc[rng(seed, "order of the page").permutation(len(drawn))].reset_index(drop=True)
    # Clip names tell nothing but which sample they belong to.
    name = digest([*drawn[[*KEY, "sha256"]].astype(str).to_numpy().tolist(), seed])[:6]
    drawn["clip"] = [f"{name}-{number:04d}" for number in range(1, len(drawn) + 1)]
    return drawn


def write_page(drawn: pd.DataFrame, out: Path) -> None:
    """Write `sample.csv` and `page/` with videos and, last, `index.html`."""
    page, sample = out / "page", out / "sample.csv"
    if sample.is_file() and set(read_table(sample, SAMPLE_COLUMNS)["clip"]) != set(drawn["clip"]):
        raise UserError(f"{sample}: is another sample, and labels of its page need it; choose another --out")
    cards = []
    with Progress(len(drawn), "labelling page", "clip") as progress:
        for row, frames in read_frames(drawn):
            write_video(page / f"{row.clip}.mp4", enlarge(frames, HEIGHT), row.control_hz, lossless=False)
            criterion = None if pd.isna(row.partial_credit_criteria) else row.partial_credit_criteria
            cards.append({"clip": row.clip, "instruction": row.instruction, "criterion": criterion})
            progress.update()
    with atomic_path(sample) as temporary:
        drawn[SAMPLE_COLUMNS].to_csv(temporary, index=False, float_format="%.9g")
    # A `</script>` inside the data would end it early.
    data = json.dumps({"sample": drawn["clip"][0].split("-")[0], "clips": cards}).replace("</", "<\\/")
    write_text(page / "index.html", PAGE.read_text(encoding="utf-8").replace("/*DATA*/", data))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.judges.label",
        description=__doc__.strip(),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rollouts", type=Path, nargs="+", required=True, help="rollouts.parquet files")
    parser.add_argument("--judgements", type=Path, nargs="+", required=True, help="parquet files of judgements")
    parser.add_argument("--judge", required=True, help="judge whose verdicts make the strata: the one to be calibrated")
    parser.add_argument("--out", type=Path, required=True, help="folder to write: page/ and sample.csv")
    parser.add_argument("--count", type=int, default=260, help="generated clips (default: %(default)s)")
    parser.add_argument("--lab-count", type=int, default=26, help="lab clips among them (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws another sample (default: %(default)s)")
    options = parser.parse_args()
    die_with_parent()
    table = candidates(options.rollouts, options.judgements, options.judge)
    counts = {world: getattr(options, name) for world, name in WORLDS.items()}
    write_page(draw(table, counts, options.seed), options.out)


if __name__ == "__main__":
    run_cli(main)
