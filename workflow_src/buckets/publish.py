"""Lay a folder of the results where Snakemake's storage plugin sends it from: hard links, where the disk is the same."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import link_or_copy
from workflow_src.common.process import die_with_parent

EXAMPLES = """example:
  python -m workflow_src.buckets.publish results/tables --out .snakemake/storage/s3/lab/run_7/tables
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a folder of the results")
    parser.add_argument("--out", type=Path, required=True, help="the same in Snakemake's copy of the bucket")
    arguments = parser.parse_args()
    die_with_parent()
    lay_out(arguments.folder, arguments.out)


def lay_out(folder: Path, out: Path) -> None:
    """Make `out` a copy of `folder`, without hidden files. Raises UserError where there is nothing to send."""
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    files = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not files:
        raise UserError(f"publish.parts: {folder} holds no files; leave {folder.name} out")
    shutil.rmtree(out, ignore_errors=True)  # of a run that was killed
    for name in files:
        link_or_copy(folder / name, out / name)


if __name__ == "__main__":
    run_cli(main)
