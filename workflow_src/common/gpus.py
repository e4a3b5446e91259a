"""GPUs of one machine, each for one job at a time.

Snakemake counts GPUs and assigns none: every job would see all of them and take the first. A lease assigns. It is a lock on a
file per device, held by the process that works there and freed by the kernel however that process ends. All who lease on a
machine, also from other working directories and for other users, use the same files.

    python -m workflow_src.common.gpus 2 torchrun --standalone --nproc-per-node=2 …

waits for two devices, shows the command these alone (`CUDA_VISIBLE_DEVICES`), and becomes it. Standard library only: policy
environments import this too.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from workflow_src.common.errors import UserError, run_cli
from workflow_src.common.process import die_with_parent
from workflow_src.common.progress import say

MASK = "CUDA_VISIBLE_DEVICES"
POOL = (
    "REHEARSAL_GPUS"  # the workflow's shell prefix tells its jobs what there is, so that not every job asks the driver
)
# Not in $TMPDIR, which may be another one for every job. Containers that share GPUs have to share it.
FOLDER = Path(os.environ.get("REHEARSAL_LEASES") or "/tmp/rehearsal-gpus")
POLL = 0.2  # seconds between two looks for a free device
# Set by Snakemake to a job's threads; several processes share those.
THREADS = ("OMP", "GOTO", "OPENBLAS", "MKL", "VECLIB_MAXIMUM", "NUMEXPR")
EXAMPLES = """examples:
  python -m workflow_src.common.gpus 1 python train.py
  CUDA_VISIBLE_DEVICES=2,3 python -m workflow_src.common.gpus 2 torchrun --standalone --nproc-per-node=2 train.py"""


# ---- what there is --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """A device that CUDA can be shown: a GPU, or an instance of one that is split (MIG)."""

    id: str  # GPU-… or MIG-…
    name: str
    index: int  # of the whole GPU


def parse_listing(text: str) -> list[Gpu]:
    """The devices in the output of `nvidia-smi -L`. A split GPU is not among them, its instances are."""
    found: list[Gpu] = []
    for line in text.splitlines():
        if whole := re.match(r"GPU (\d+): (.*) \(UUID: (\S+)\)", line):
            found.append(Gpu(whole[3], whole[2], int(whole[1])))
        elif part := re.match(r"\s+MIG (\S+)\s.*\(UUID: (\S+)\)", line):
            parent = found[-1]
            if not parent.id.startswith("MIG-"):
                found.pop()
            found.append(Gpu(part[2], f"{parent.name.split(' MIG ')[0]} MIG {part[1]}", parent.index))
    return found


def installed_gpus() -> list[Gpu]:
    """What the driver's `nvidia-smi` lists; nothing without it."""
    if not shutil.which("nvidia-smi"):
        return []
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_listing(done.stdout) if done.returncode == 0 else []


def visible_gpus() -> list[str]:
    """Ids of the devices that this process may use: those in `CUDA_VISIBLE_DEVICES`, or all that are installed.

    Like CUDA, ends at the first entry of the mask that names no device. Indices become ids, so that two masks which mean
    the same device lock the same file. Where no driver can be asked, indices and ids stay as they are given.
    """
    mask, installed = os.environ.get(MASK), installed_gpus()
    if mask is None:
        return [gpu.id for gpu in installed]
    found: list[str] = []
    for entry in (word.strip() for word in mask.split(",")):
        if installed:
            # By index a split GPU means its first instance; ids may be abbreviated.
            named = [g.id for g in installed if entry and (str(g.index) == entry or g.id.startswith(entry))]
        else:
            named = [entry] if re.fullmatch(r"\d+|(GPU|MIG)-\S+", entry) else []
        if not named:
            break
        found += [named[0]] if named[0] not in found else []
    return found


# ---- the lease ------------------------------------------------------------------------------------------------------


def lease(count: int, pool: Sequence[str], folder: Path = FOLDER, poll: float = POLL) -> list[str]:
    """`count` devices of `pool` for this process and what it becomes by `exec`, until its end. Waits for them.

    First come, first served: whoever waits keeps later ones off every device that might become its own, so a job that
    needs several is not starved by many that need one. Devices are taken all at once or not at all, so nobody waits
    for another while holding what that one needs. Raises UserError when the pool is too small.
    """
    if count > len(pool):
        raise UserError(
            f"{count} GPUs are asked for and {len(pool)} visible ({', '.join(pool) or 'none'}); ask for fewer"
        )
    if count > 1 and any(device.startswith("MIG-") for device in pool):
        raise UserError(
            f"{count} GPUs are asked for, but a process can use only one instance of a split GPU (MIG); ask for 1"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):  # somebody else's, who has done it
        folder.chmod(0o1777)
    with _queued(folder, pool) as number:
        waited = False
        while True:
            with _desk(folder):
                promised = _promised(folder, number)
                taken = _take(folder, count, [name for name in pool if name not in promised])
            if taken:
                return list(taken)
            if not waited:
                say(f"waiting for {count} of {len(pool)} GPU(s): in use")
                waited = True
            time.sleep(poll)


@contextlib.contextmanager
def _desk(folder: Path) -> Iterator[None]:
    """One at a time, for a moment."""
    handle = _lock(folder / "desk")
    try:
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _queued(folder: Path, pool: Sequence[str]) -> Iterator[int]:
    """A place in the queue, which a lock on a file of that number keeps: whoever died there waits no longer."""
    with _desk(folder):
        number = 1 + max((int(file.stem) for file in folder.glob("*.waiting")), default=0)
        file = folder / f"{number}.waiting"
        handle = _lock(file)
        file.write_text(json.dumps(list(pool)), encoding="utf-8")
    try:
        yield number
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)


def _promised(folder: Path, number: int) -> set[str]:
    """Devices that somebody before `number` in the queue may get."""
    names: set[str] = set()
    for file in folder.glob("*.waiting"):
        if int(file.stem) >= number:
            continue
        with contextlib.suppress(FileNotFoundError):
            if (handle := _lock(file, wait=False)) is None:
                names.update(json.loads(file.read_text(encoding="utf-8")))
                continue
            with contextlib.suppress(PermissionError):  # another user's; it counts for nothing
                file.unlink()
            os.close(handle)
    return names


def _take(folder: Path, count: int, names: Sequence[str]) -> dict[str, int]:
    """Locks `count` free devices, which stay so across `exec`; none when fewer are free."""
    held: dict[str, int] = {}
    for name in names:
        if len(held) < count and (handle := _lock(folder / f"{name.replace('/', '_')}.gpu", wait=False)) is not None:
            held[name] = handle
    if len(held) < count:
        for handle in held.values():
            os.close(handle)
        return {}
    for handle in held.values():
        os.set_inheritable(handle, True)
    return held


def _lock(path: Path, wait: bool = True) -> int | None:
    """A descriptor that holds the lock on a file; None when somebody else has it and `wait` is false."""
    while True:
        try:
            # The system may refuse to open with O_CREAT what another user has made in a folder for all.
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            handle = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
            with contextlib.suppress(PermissionError):  # made by somebody else in between
                os.fchmod(handle, 0o644)  # whatever the umask: other users lock it as well
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Who cleans up old files may have removed this one in between: then others would lock a new one.
            if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        os.close(handle)


# ---- launcher -------------------------------------------------------------------------------------------------------


def take(count: int) -> list[str]:
    """Lease `count` devices and show them, and nothing else, to this process. Call before a framework is imported.

    Returns their ids. In a job of Slurm, which has been given its own devices, these are returned as they are; without
    GPUs there is nothing to do.
    """
    if POOL in os.environ:
        pool = os.environ[POOL].split(",")
    elif "SLURM_JOB_ID" in os.environ:
        return [device for device in os.environ.get(MASK, "").split(",") if device]
    else:
        pool = visible_gpus()
    if not pool:
        return []
    devices = lease(count, pool) if count else []
    os.environ[MASK] = ",".join(devices)
    return devices


def share_threads(processes: int) -> None:
    """Divide the threads that Snakemake has set for a job among its processes."""
    for name in (f"{library}_NUM_THREADS" for library in THREADS):
        with contextlib.suppress(KeyError, ValueError):
            os.environ[name] = str(max(1, int(os.environ[name]) // max(1, processes)))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_src.common.gpus",
        description="Run a command on GPUs that no other job uses meanwhile.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("count", type=int, help="number of GPUs; processes of the command, which share its threads")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, with its arguments")
    options = parser.parse_args()
    if options.count < 0 or not options.command:
        parser.error("give a number of GPUs, 0 or more, and a command")
    die_with_parent()  # while it waits; what it becomes does so by itself
    take(options.count)
    share_threads(options.count)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as it was before Python
    try:
        os.execvp(options.command[0], options.command)
    except OSError as problem:
        raise UserError(f"{options.command[0]}: cannot be run: {problem.strerror}") from None


if __name__ == "__main__":
    run_cli(main)
