"""Files that are either whole or absent: atomic writes, digests, and journals of finished work."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from workflow_src.common.errors import disk_full


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure.

    The temporary name keeps the suffix, because writers choose their format by it. The file reaches the disk before the
    rename, so after a crash `path` is the old file or the whole new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except Exception as error:
        if disk_full(error):
            # Libraries report it each in its own way; the user wants to know which disk.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def copy_file(source: str | Path, target: str | Path) -> None:
    """Copy a file's content atomically; nothing happens when both are the same file."""
    if Path(source).resolve() != Path(target).resolve():
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Give a finished file a second name, replacing what had it. Where the disk is another one, copy it there."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}.tmp{target.suffix}")
    try:
        os.link(source, temporary)
    except OSError:
        copy_file(source, target)
    else:
        os.replace(temporary, target)
        temporary.unlink(missing_ok=True)  # there still, where both names are the same file's already


def create_array(path: str | Path, shape: tuple[int, ...], dtype: type) -> np.memmap:
    """A new writable `.npy` file, mapped into memory, whose disk space is taken at once.

    A mapped write into a sparse file on a full disk kills the process without a word; this raises OSError instead.
    """
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        try:
            with open(path, "r+b") as handle:
                os.posix_fallocate(handle.fileno(), 0, os.fstat(handle.fileno()).st_size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
    return array


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically. NaN is refused: other readers would choke on it."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_if_changed(path: str | Path, text: str) -> bool:
    """Write `text` unless the file already says so. An unchanged file keeps its time stamp, so nothing reruns for it."""
    path = Path(path)
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    write_text(path, text)
    return True


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(handle)


def _sha256(handle) -> str:
    # Python 3.10, which some policy environments need, has no `file_digest`.
    digest = hashlib.sha256()
    while block := handle.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def digest(value: Any) -> str:
    """16 hex digits that identify a JSON-able value or dataclass, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


class Journal:
    """Finished items of a resumable stage, as JSON lines, valid for one key only.

    `key` is the digest of everything the items depend on. A journal written under another key counts as empty, and is
    started anew by the first `record`. A last line cut off by a crash is ignored.
    """

    def __init__(self, path: str | Path, key: str):
        self.path, self.key = Path(path), key
        self.done: dict[str, dict[str, Any]] = {}
        self._valid = False
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        lines = self.path.read_text(encoding="utf-8").split("\n")
        # A whole journal ends in a newline, so the last piece is empty; anything else there was cut off.
        complete = lines[:-1]
        try:
            self._valid = bool(complete) and json.loads(complete[0]).get("key") == self.key
            if not self._valid:
                return
            for line in complete[1:]:
                entry = json.loads(line)
                self.done[entry.pop("item")] = entry
        except (json.JSONDecodeError, KeyError, AttributeError):
            # What could be read up to the damage stays; the file is rewritten so that appends are readable again.
            self._rewrite()
            return
        if lines[-1]:
            self._rewrite()

    def _rewrite(self) -> None:
        lines = [json.dumps({"key": self.key})]
        lines += [json.dumps({"item": item, **fields}) for item, fields in self.done.items()]
        write_text(self.path, "\n".join(lines) + "\n")
        self._valid = True

    def __contains__(self, item: str) -> bool:
        return item in self.done

    def record(self, item: str, **fields: Any) -> None:
        """Note `item` as finished; on disk when this returns."""
        if not self._valid:
            self._rewrite()
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"item": item, **fields}) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        self.done[item] = fields
