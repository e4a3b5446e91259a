"""Take over a split of an episode store that Snakemake has fetched from a bucket, once every file is what its table says.

Snakemake's copy is removed when this is done, or when it is damaged: a download that was killed leaves half of one, which
Snakemake would take for the whole.
"""

from __future__ import annotations

import argparse
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.files import link_or_copy, sha256_file
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import Progress
from workflow_src.episodes.store import TABLE, EpisodeStore, episode_paths

EXAMPLES = """example:
  python -m workflow_src.buckets.fetch_store .snakemake/storage/s3/lab/bridge/train \\
      --out results/episodes/bridge/train/episodes.parquet
"""
READERS = 8  # files that are hashed at once


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("copy", type=Path, help="folder of the split, as fetched")
    parser.add_argument("--out", type=Path, required=True, help="the table, in the folder of the split")
    arguments = parser.parse_args()
    die_with_parent()
    take_over(arguments.copy, arguments.out)


def take_over(copy: Path, out: Path) -> None:
    """Link (or copy) the store in `copy` into the folder of `out`, the table last.

    Raises UserError for a store that is incomplete or damaged, and removes it.
    """
    if out.name != TABLE:
        raise UserError(f"--out: {out} is not called {TABLE}")
    try:
        _verify(EpisodeStore(copy / TABLE))
    except UserError as error:
        shutil.rmtree(copy, ignore_errors=True)
        raise UserError(
            f"{error}; this copy is removed: run again, and if that does not help mend the bucket"
        ) from None
    for path in sorted(copy.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name != TABLE:
            link_or_copy(path, out.with_name(path.name))
    link_or_copy(copy / TABLE, out)


def _verify(store: EpisodeStore) -> None:
    """Raise UserError for the first file that is missing or not what the table says."""
    rows = store.table[["index", "sha256_video", "sha256_arrays"]].itertuples(index=False)
    files = [pair for index, *sums in rows for pair in zip(episode_paths(store.root, index), sums)]

    def check(pair: tuple[Path, str]) -> None:
        path, expected = pair
        if not path.is_file():
            raise UserError(f"{path}: missing")
        if sha256_file(path) != expected:
            raise UserError(f"{path}: is not the file that {TABLE} lists")

    with Progress(len(files), f"verify {store.root.name}", "file") as progress, ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(check, files):
            progress.update()


if __name__ == "__main__":
    run_cli(main)
