"""Copies of training data on a machine's own disk, for clusters whose shared file system is slow.

    <local_cache>/rehearsal-<user id>/<digest of the folder's path and files>/<data set>/<split>/   a copied folder
    <local_cache>/rehearsal-<user id>/<digest>.json   what was copied, written last: without it a copy does not count

Every process of a training asks for the same folders; the first on each machine copies, the others wait for it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from workflow_src.common.errors import UserError, disk_full
from workflow_src.common.files import digest, sha256_file, write_json
from workflow_src.common.progress import Progress, say

VARIABLE = "REHEARSAL_LOCAL_CACHE"  # folder, set by the workflow from `local_cache`; may name further variables
COPIERS = 8  # files on their way at once: a shared file system answers late, but many at a time
DAYS = 7  # copies that no training has used for so long are removed
_in_use: list[TextIO] = []  # open while this process lives, so that nobody removes what it reads


def localise(paths: Sequence[Path]) -> list[Path]:
    """`paths` (files that stand for their folder, or folders) inside copies of their folders on this machine's disk.

    The paths themselves where no cache is configured, or where it cannot be used, with a warning: they hold the same.
    Raises UserError when a copy differs from its original.
    """
    root = _root()
    if root is None or not paths:
        return list(paths)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clean(root)
        return [_localise(path, root) for path in paths]
    except OSError as error:
        if disk_full(error):
            error = OSError(f"no space left in {root}")
        say(f"warning: local_cache: {error}; reading from where the data lies")
        return list(paths)


def _root() -> Path | None:
    given = os.environ.get(VARIABLE, "")
    folder = os.path.expanduser(os.path.expandvars(given))
    if "$" in folder:
        say(f"warning: local_cache: {given} is not set on this machine; reading from where the data lies")
        return None
    # Others may cache on this machine too.
    return Path(folder) / f"rehearsal-{os.getuid()}" if folder else None


def _localise(path: Path, root: Path) -> Path:
    if not path.exists():
        return path  # whoever reads it says so
    folder = path if path.is_dir() else path.parent
    files = {str(file.relative_to(folder)): file.stat() for file in sorted(folder.rglob("*")) if file.is_file()}
    # A store that was recorded anew is another one, though it has the same path.
    key = digest([str(folder.resolve()), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files.items()]])
    copy, record = root / key, root / f"{key}.json"
    place = copy.joinpath(*folder.resolve().parts[-2:])  # a data set is known by its folder's name
    _in_use.append((root / f"{key}.used").open("a"))
    fcntl.flock(_in_use[-1], fcntl.LOCK_SH)
    with _locked(root / f"{key}.copying", fcntl.LOCK_EX):
        if not record.is_file():
            size = sum(stat.st_size for stat in files.values())
            free = shutil.disk_usage(root).free
            if size > free:
                raise OSError(f"{folder} needs {size / 1e9:.1f} GB, {root} has {free / 1e9:.1f} GB")
            shutil.rmtree(copy, ignore_errors=True)  # left behind by a process that was killed
            _copy(folder, place, list(files))
            write_json(record, {"folder": str(folder.resolve()), "files": len(files), "bytes": size})
        os.utime(record)  # its age is the time since its last use
    return place / path.relative_to(folder)


def _copy(folder: Path, place: Path, names: list[str]) -> None:
    def one(name: str) -> str:
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target)
        if sha256_file(target) != sha256_file(folder / name):
            raise UserError(f"{target}: is not what {folder / name} holds; look after that disk, or unset local_cache")
        return name

    with Progress(len(names), f"copying {folder.name}", "file") as progress, ThreadPoolExecutor(COPIERS) as pool:
        for _ in pool.map(one, names):
            progress.update()


def _clean(root: Path) -> None:
    """Remove copies that nobody has begun to use for long, and that nobody uses."""
    for record in root.glob("*.json"):
        with suppress(FileNotFoundError, BlockingIOError):
            if time.time() - record.stat().st_mtime < DAYS * 86400:
                continue
            with _locked(record.with_suffix(".used"), fcntl.LOCK_EX | fcntl.LOCK_NB):
                say(f"removing {record.with_suffix('')}: not used for {DAYS} days")
                record.unlink()
                shutil.rmtree(record.with_suffix(""), ignore_errors=True)


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    with open(path, "a") as handle:
        fcntl.flock(handle, how)
        yield
