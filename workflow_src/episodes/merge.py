"""Make the table of one split of a converted data set from the results of all its shard groups.

Writes `rejected.parquet` (file, record, reason), `provenance.json` and, last, `episodes.parquet`, unless more was rejected
than is allowed. Episodes that no group lists, left by an earlier conversion, are removed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd

from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import atomic_path, write_json
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import say
from workflow_src.episodes.store import TABLE, write_table

EXAMPLES = """example:
  python -m workflow_src.episodes.merge --groups results/episodes/viola/groups/*.json \\
      --split train --out results/episodes/viola/train/episodes.parquet
"""
REJECTED = ("index", "file", "record", "reason", "damaged")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=Path, nargs="+", required=True, help="results of `convert`, of all groups")
    parser.add_argument("--split", required=True, help="train, validation, val or test")
    parser.add_argument("--max-rejected", type=float, default=0.02, help="share of damaged episodes that is tolerated")
    parser.add_argument("--out", type=Path, required=True, help="the table, in the folder of the split")
    arguments = parser.parse_args()
    die_with_parent()
    merge(arguments.groups, arguments.split, arguments.max_rejected, arguments.out)


def merge(groups: list[Path], split: str, max_rejected: float, out: Path) -> None:
    """Write the table `out` of `split`. Raises UserError where groups are missing or too much was rejected."""
    if out.name != TABLE:
        raise UserError(f"--out: {out} is not called {TABLE}")
    results = _load(groups)
    rows = [row for result in results for row in result["episodes"] if row["split"] == split]
    rejected = [row for result in results for row in result["rejected"] if row["split"] == split]
    out.parent.mkdir(parents=True, exist_ok=True)
    _clean(out.parent, {row["index"] for row in rows})
    with atomic_path(out.with_name("rejected.parquet")) as temporary:
        table = pd.DataFrame(rejected, columns=list(REJECTED)).sort_values("index", ignore_index=True)
        table.astype({"index": "int64", "record": "int64", "damaged": "bool"}).to_parquet(temporary, index=False)
    name, total, damaged = results[0]["dataset"], len(rows) + len(rejected), sum(row["damaged"] for row in rejected)
    say(f"{name} {split}: {len(rows)} episodes, {len(rejected)} rejected, of which {damaged} damaged")
    if not rows:
        raise UserError(f"{out.parent}: no usable episode in the split {split} of {name}, {len(rejected)} rejected")
    if damaged > max_rejected * total:
        worst = next(row for row in rejected if row["damaged"])
        raise UserError(
            f"{out.with_name('rejected.parquet')}: {damaged} of {total} episodes of {name} are damaged, more than "
            f"{max_rejected:.2%} (--max-rejected), as in {worst['file']}, record {worst['record']}: {worst['reason']}; mend "
            f"the files, delete {groups[0].parent} and start again, or tolerate more"
        )
    facts = {key: results[0][key] for key in ("dataset", "entry", "size", "gripper")}
    write_json(out.with_name("provenance.json"), facts | {"episodes": len(rows), "rejected": len(rejected)})
    write_table(out, rows)


def _load(groups: list[Path]) -> list[dict[str, Any]]:
    results = []
    for path in groups:
        try:
            results.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable result of a shard group ({error}); convert it again") from error
    if len({result["key"] for result in results}) > 1:
        raise UserError(f"{groups[0].parent}: its groups were converted differently; convert them all again")
    count = results[0]["group"][1]
    missing = sorted(set(range(1, count + 1)) - {result["group"][0] for result in results})
    if missing or len(results) != count:
        raise UserError(f"--groups: {len(results)} of {count} groups; missing {', '.join(map(str, missing)) or 'none'}")
    return results


def _clean(folder: Path, indices: set[int]) -> None:
    kept = {f"{index:09d}{suffix}" for index in indices for suffix in (".mp4", ".npz")}
    for path in folder.iterdir():
        if (path.is_file() and path.name.startswith(".")) or (
            path.suffix in (".mp4", ".npz") and path.name not in kept
        ):
            path.unlink()


if __name__ == "__main__":
    run_cli(main)
