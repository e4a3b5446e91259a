"""Fetch a file from the network: resumable, retried, verified, and whole or absent.

    python -m workflow_src.common.fetch https://host/file.bin --out data/file.bin --sha256 …
    python -m workflow_src.common.fetch hf://owner/name@revision/path/in/repository --out …
    python -m workflow_src.common.fetch https://drive.google.com/file/d/ID/view --out …

A download that was cut continues where it stopped, as long as the server still has the same file (its ETag or date says
so). Tokens come from the environment (`HF_TOKEN`), go to no other host, and appear in no message.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workflow_src.common.errors import UserError, disk_full, run_cli
from workflow_src.common.files import digest, sha256_file
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import Progress, say

HUB = "https://huggingface.co"
DRIVE = "https://drive.usercontent.google.com/download"
BLOCK = 1 << 18  # bytes per read; of a cut download at most so many come twice
MEGABYTE = 1e6
TRIES = 5
TIMEOUT = 30.0  # seconds without a byte
RETRIED = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Source:
    """Where a file really is: `url`, the query's `parameters`, and `headers` for that host alone.

    `page`: where its licence can be accepted, for files on the Hugging Face hub.
    """

    url: str
    parameters: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    page: str = ""


class _Again(Exception):
    """Worth another try; the message says what went wrong."""


class _Changed(_Again):
    """The server has another file now: what has come is of no use."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Fetch a file: resumable, retried, verified.",
        epilog=__doc__.split("\n\n")[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("address", help="http(s) URL, Google Drive link, or hf://owner/name[@revision]/path")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--sha256", default="", help="what the content must be; without it only the size is checked")
    options = parser.parse_args()
    die_with_parent()
    say(f"{options.out}: sha256 {fetch(options.address, options.out, options.sha256)}")


def resolve(address: str) -> Source:
    """What to ask whom for. Raises UserError for an address of another kind."""
    if address.startswith("hf://"):
        found = re.fullmatch(r"hf://((?:datasets/)?[\w.-]+/[\w.-]+)(?:@([\w.-]+))?/(.+)", address)
        if not found:
            raise UserError(f"{address}: not of the form hf://owner/name[@revision]/path")
        repository, revision, path = found.groups()
        token = os.environ.get("HF_TOKEN", "")
        hub = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
        return Source(f"{hub}/{repository}/resolve/{revision or 'main'}/{path}", page=f"{HUB}/{repository}",
                      headers={"Authorization": f"Bearer {token}"} if token else {})  # fmt: skip
    if re.match(r"https?://drive\.google\.com/", address):
        found = re.search(r"/file/d/([\w-]+)|[?&]id=([\w-]+)", address)
        if not found:
            raise UserError(f"{address}: no file identifier in this Google Drive link; share the file, not a folder")
        # `confirm` answers the page that warns of files too large for the virus scan.
        return Source(DRIVE, {"id": found[1] or found[2], "export": "download", "confirm": "t"})
    if not re.match(r"https?://[^/]+/", address):
        raise UserError(f"{address}: not an address to fetch from; give http(s)://…, hf://… or a Google Drive link")
    return Source(address)


def fetch(address: str, out: str | Path, sha256: str = "", *, tries: int = TRIES, pause: float = 1.0) -> str:
    """Make `out` the file at `address`; its sha256. Nothing is asked for when a file with that checksum is there.

    `pause`: seconds before the first retry, doubled each time. Raises UserError when the file cannot be had, is too
    short, or is another one than `sha256` says; `out` is then untouched.
    """
    out, sha256 = Path(out), sha256.strip().lower()
    if sha256 and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise UserError(f"--sha256: {sha256!r} is not a sha256; give 64 hexadecimal digits")
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; name the file to write")
    if sha256 and out.is_file() and sha256_file(out) == sha256:
        return sha256
    source, partial = resolve(address), out.with_name(f".{out.name}.part")
    with _alone(out, partial):
        _insist(source, address, out, partial, tries, pause)
        found = sha256_file(partial)
        if sha256 and found != sha256:
            _forget(partial)
            raise UserError(f"{shown(address)}: sha256 is {found}, not {sha256}: another file, or damaged on the way")
        with open(partial, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, out)
        _forget(partial)
    return found


def shown(address: str) -> str:
    """`address` for messages: without user, password and query, where secrets stand."""
    return re.sub(r"^(\w+://)[^/@]*@", r"\1", address).partition("?")[0]


@contextlib.contextmanager
def _alone(out: Path, partial: Path) -> Iterator[None]:
    """One process at a time per file: two would append to the same beginning."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        handle = open(partial.with_name(f"{partial.name}.lock"), "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror})") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--out: another process is fetching {out}; wait for it") from None
        try:
            yield
        finally:
            Path(handle.name).unlink(missing_ok=True)


def _insist(source: Source, address: str, out: Path, partial: Path, tries: int, pause: float) -> None:
    for attempt in range(tries):
        try:
            return _download(source, address, partial)
        except _Again as error:
            if isinstance(error, _Changed):
                _forget(partial)
            if attempt + 1 == tries:
                raise UserError(
                    f"{shown(address)}: {error}, {tries} times; what came is kept, the same command continues, or put "
                    f"the file at {out} yourself"
                ) from None
            say(f"{out.name}: {error}; again in {pause:.3g} s")
            time.sleep(pause)
            pause *= 2
    return None


def _download(source: Source, address: str, partial: Path) -> None:
    """Bring `partial` to its end, from where it is. Raises `_Again` or UserError."""
    import requests

    begun = _begun(partial, address)
    headers = {**source.headers, "Accept-Encoding": "identity"}
    if begun["bytes"]:
        headers |= {"Range": f"bytes={begun['bytes']}-", "If-Range": begun["version"]}
    try:
        with requests.get(
            source.url, params=source.parameters, headers=headers, stream=True, timeout=TIMEOUT
        ) as answer:
            if answer.status_code == 416 and answer.headers.get("Content-Range") == f"bytes */{begun['bytes']}":
                return  # everything had come; only the verdict was missing
            _check(answer, source, address)
            resumed = answer.status_code == 206
            start = begun["bytes"] if resumed else 0
            length = answer.headers.get("Content-Length")
            total = start + int(length) if length else None
            if resumed and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise _Changed("the server answered another range than asked for")
            if not resumed:
                partial.unlink(missing_ok=True)  # before its version is: old bytes must not pass for new ones
                _remember(partial, address, answer.headers)
            if _receive(answer, partial, start, total) < (total or 0):
                raise _Again("the file came short")
    except requests.exceptions.ChunkedEncodingError as error:
        raise _Again(f"the connection ended after {partial.stat().st_size} of {total or '?'} bytes") from error
    except requests.RequestException as error:
        raise _Again(f"connection failed ({type(error).__name__})") from error


def _check(answer: Any, source: Source, address: str) -> None:
    code = answer.status_code
    if code == 416:
        raise _Changed("the server has another file now")
    if code in RETRIED:
        raise _Again(f"the server answered {code}")
    if code in (401, 403):
        raise UserError(f"{shown(address)}: the server refuses it ({code}); {_remedy(code, source)}")
    if code not in (200, 206):
        raise UserError(f"{shown(address)}: the server answered {code}; check the address")
    if source.url == DRIVE and answer.headers.get("Content-Type", "").startswith("text/html"):
        raise UserError(
            f"{shown(address)}: Google Drive sent a page instead of the file: not shared with everyone, or its daily quota "
            "is used up; fetch it in a browser"
        )


def _remedy(code: int, source: Source) -> str:
    """What helps against a refusal. The hub answers 401 without a good token, 403 where the account has no access."""
    if not source.page:
        return "it is not public"
    if not source.headers:
        return f"accept its licence at {source.page}, and set HF_TOKEN to a token of that account"
    if code == 403:
        return f"the account of HF_TOKEN has to accept its licence at {source.page}, or its token may not read it"
    return f"HF_TOKEN is not a valid token, or there is no {source.page}"


def _receive(answer: Any, partial: Path, start: int, total: int | None) -> int:
    """Append what comes; the size then."""
    label = partial.name.removeprefix(".").removesuffix(".part")[:24]
    size = max(1, round((total or 0) / MEGABYTE))
    with open(partial, "ab" if start else "wb") as handle, Progress(size, label, "MB") as progress:
        progress.skip(round(start / MEGABYTE))
        done = start
        for block in answer.iter_content(BLOCK):
            try:
                handle.write(block)
            except OSError as error:
                if disk_full(error):
                    raise OSError(error.errno, error.strerror, str(partial)) from error
                raise
            before, done = done, done + len(block)
            progress.update(round(done / MEGABYTE) - round(before / MEGABYTE))
    return done


# ---- what is known of a download that was begun ---------------------------------------------------------------------


def _note(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _remember(partial: Path, address: str, headers: Any) -> None:
    """Which version of the file the coming bytes belong to. Weak ETags do not promise equal bytes."""
    etag = headers.get("ETag", "")
    version = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")
    _note(partial).write_text(json.dumps({"address": digest(address), "version": version}), encoding="utf-8")


def _begun(partial: Path, address: str) -> dict[str, Any]:
    """Bytes that are there, and of which version; none when they cannot be trusted."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        note = json.loads(_note(partial).read_text(encoding="utf-8"))
        if note["address"] == digest(address) and note["version"]:
            return {"bytes": partial.stat().st_size, "version": note["version"]}
    return {"bytes": 0, "version": ""}


def _forget(partial: Path) -> None:
    for path in (partial, _note(partial)):
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    run_cli(main)
