"""Fetch a registered data set as its authors publish it, into `<output-dir>/<name>/`.

Resumable by file and within files; every record's checksum is verified. `download.json` is written last.
"""

from __future__ import annotations

import argparse
import shutil
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.fetch import fetch, shown
from workflow_src.common.files import Journal, digest, sha256_file, write_json
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import Progress, say
from workflow_src.episodes.registry import REGISTRY, Dataset, lookup
from workflow_src.episodes.rlds import Rlds, Shard
from workflow_src.episodes.tfrecord import read_records

EXAMPLES = """examples:
  python -m workflow_src.episodes.download --dataset-name rt_1 --output-dir data
  python -m workflow_src.episodes.download --dataset-name bridge_v2 --output-dir data --jobs 8
"""
DESCRIPTIONS = ("dataset_info.json", "features.json")
DONE, JOURNAL = "download.json", "download.jsonl"
MEGABYTE = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset-name", required=True, help="name in the registry")
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="folder of data sets; a folder of that name in it"
    )
    parser.add_argument("--registry", default=str(REGISTRY), help="file of data sets (default: config/datasets.yaml)")
    parser.add_argument("--jobs", type=int, default=4, help="files fetched at once")
    arguments = parser.parse_args()
    die_with_parent()
    entry = lookup(arguments.dataset_name, arguments.registry)
    download(arguments.dataset_name, entry, arguments.output_dir / arguments.dataset_name, max(1, arguments.jobs))


def download(name: str, entry: Dataset, folder: Path, jobs: int = 4, tries: int = 5, pause: float = 1.0) -> None:
    """Make `folder` a verified copy of the set. `tries` and `pause` as in `fetch`.

    Raises UserError that names the set, its address and size, and where to put a copy that came another way.
    """
    if not entry.address:
        raise UserError(f"{name}.address: is empty, so there is nothing to fetch; {_by_hand(name, folder)}")

    def bring(file: str, sha256: str = "") -> str:
        try:
            return fetch(f"{entry.address}/{file}", folder / file, sha256, tries=tries, pause=pause)
        except UserError as error:
            size = f"{entry.bytes / 1e9:.1f} GB" if entry.bytes else "of unknown size"
            raise UserError(f"{name} ({size}) cannot be fetched from {shown(entry.address)}: {error}; without network, "
                            f"{_by_hand(name, folder)}") from None  # fmt: skip

    if entry.files:
        for file, sha256 in entry.files.items():
            bring(file, sha256)
        files = {
            file: {"sha256": sha256, "bytes": (folder / file).stat().st_size} for file, sha256 in entry.files.items()
        }
        return _finish(name, entry, folder, files)
    for file in DESCRIPTIONS:  # of one version they do not change
        if not (folder / file).is_file():
            bring(file)
    rlds = Rlds(folder)
    journal = Journal(folder / JOURNAL, digest([entry.address, rlds.identity]))
    shards = {shard.path.name: shard for shard in rlds.shards()}
    missing = {file: shard for file, shard in shards.items() if not _there(journal, file, shard)}
    _check_room(name, rlds, shards, missing, folder)

    def one(file: str) -> None:
        shard = shards[file]
        if shard.path.is_file() and not damage(shard):
            return  # finished beside another that failed, or put there by hand
        sha256 = bring(file)
        if damage(shard):
            shard.path.unlink()
            again = bring(file)
            if (wrong := damage(shard)) and again != sha256:
                raise UserError(f"{shard.path}: {wrong}, and otherwise the first time; start again")
            if wrong:
                say(f"{file}: {wrong}; its source is like that, and conversion will leave out what is damaged")

    total = rlds.num_bytes()
    with ThreadPoolExecutor(jobs) as pool, Progress(round(total / MEGABYTE), f"fetch {name}"[:24], "MB") as progress:
        progress.skip(round(sum(journal.done[file]["bytes"] for file in shards if file not in missing) / MEGABYTE))
        futures = {pool.submit(one, file): file for file in missing}
        try:
            for future in as_completed(futures):
                future.result()
                file = futures[future]
                journal.record(file, sha256=sha256_file(shards[file].path), bytes=shards[file].path.stat().st_size)
                progress.update(round(journal.done[file]["bytes"] / MEGABYTE))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return _finish(name, entry, folder, {file: journal.done[file] for file in shards})


def _finish(name: str, entry: Dataset, folder: Path, files: dict[str, dict]) -> None:
    write_json(folder / DONE, {"dataset": name, "address": entry.address, "version": entry.version,
                               "licence": entry.licence, "files": files})  # fmt: skip


def damage(shard: Shard) -> str:
    """What is wrong with a shard, by its checksums and the number of its records; empty: nothing."""
    count = 0
    for record in read_records(shard.path):
        if record.wrong:
            return f"record {record.number}: {record.wrong}"
        count += 1
    return "" if count == shard.episodes else f"holds {count} records where dataset_info.json says {shard.episodes}"


def _there(journal: Journal, file: str, shard: Shard) -> bool:
    return file in journal and shard.path.is_file() and shard.path.stat().st_size == journal.done[file]["bytes"]


def _check_room(name: str, rlds: Rlds, shards: dict[str, Shard], missing: dict[str, Shard], folder: Path) -> None:
    here = sum(shard.path.stat().st_size for file, shard in shards.items() if file not in missing)
    needed, free = max(0, rlds.num_bytes() - here), shutil.disk_usage(folder).free
    say(f"{name}: {len(missing)} of {len(shards)} files to fetch, {needed / 1e9:.2f} GB, {free / 1e9:.1f} GB free")
    if missing and needed > free:
        raise UserError(f"{folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free; make room, or choose "
                        "another folder")  # fmt: skip


def _by_hand(name: str, folder: Path) -> str:
    return (
        f"put a copy of its folder as its authors publish it anywhere and name it as "
        f"episodes.recorded.copies.{name}, or finish {folder}"
    )


if __name__ == "__main__":
    run_cli(main)
