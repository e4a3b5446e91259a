"""Process life cycle: nobody outlives the run, nobody ignores SIGTERM for long."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None, poll: float = 1.0, on_death: Callable[[], None] | None = None) -> None:
    """End this process soon after its parent ends, even by `kill -9`.

    The kernel sends SIGTERM when the parent *thread* dies (Linux); a polling thread covers other systems, a parent that died
    before this call, and a SIGTERM that was ignored. `parent` names another process to watch as well, because a shell or a
    launcher may stand between; by default the one in `REHEARSAL_PARENT`, which the workflow's shell prefix sets to
    Snakemake's. `on_death` runs before the hard exit.
    """
    own_parent = os.getppid()
    parent = parent or int(os.environ.get("REHEARSAL_PARENT") or 0) or None
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == own_parent and (parent is None or alive(parent)):
            time.sleep(poll)
        if on_death is not None:
            on_death()
        os._exit(143)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def alive(pid: int) -> bool:
    """Whether process `pid` exists and is not a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as handle:
            # The state follows the command name, which is in parentheses and may hold spaces.
            return handle.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return not sys.platform.startswith("linux")


def descendants(pid: int) -> list[int]:
    """Process ids of all children and grandchildren (Linux; elsewhere none)."""
    found = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in listing.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def start_watchdog_on_sigterm(seconds: float = 5.0, cleanup: Callable[[], None] | None = None) -> None:
    """On SIGTERM: run `cleanup`, leave by SystemExit, and be gone by `os._exit` after `seconds` whatever hangs.

    A frame deep inside a C extension never sees a Python exception; the timer thread ends the process all the same.
    """

    def handle(_signal: int, _frame: object) -> None:
        timer = threading.Timer(seconds, os._exit, args=(143,))
        timer.daemon = True
        timer.start()
        if cleanup is not None:
            cleanup()
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, handle)
