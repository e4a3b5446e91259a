"""How a policy server begins and ends.

Standard library only: the endpoint file must exist before any framework is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import select
import signal
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from workflow_src.common.errors import UserError
from workflow_src.common.files import atomic_path
from workflow_src.common.process import alive, descendants

GRACE = 4.0  # seconds between SIGTERM and the hard end
MISSES = 3  # looks in a row, one a second, without the endpoint file

WAITING_FOR_GPU = "waiting for a GPU"  # the stage of a server that has not begun to load; no deadline runs


@dataclass(frozen=True)
class Endpoint:
    """Content of the endpoint file: how to reach a server, and how to find out what became of it."""

    host: str
    port: int
    token: str
    pid: int
    devices: list[str]  # ids of the accelerators it was granted, for policy and world model; final once it is ready
    policy: str
    log: str  # absolute path; empty: the terminal it was started in

    def write(self, path: Path) -> None:
        """Writes the file atomically, readable by its owner alone because of the token."""
        with atomic_path(path) as temporary:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
                json.dump(dataclasses.asdict(self), handle)

    def grant(self, path: Path, devices: list[str]) -> None:
        """Says in the file what `devices` server and rollouts work on. The server sees all but the last of several."""
        if len(devices) > 1:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices[:-1])
        dataclasses.replace(self, devices=devices).write(path)

    def remove(self, path: Path) -> None:
        """Removes the file unless a newer server has written its own there."""
        try:
            if json.loads(path.read_text(encoding="utf-8")).get("token") == self.token:
                path.unlink()
        except (OSError, ValueError):
            pass


def bind(host: str, port: int, policy: str, log: Path | None) -> tuple[socket.socket, Endpoint]:
    """A listening socket (port 0: any free one) and the endpoint that describes it, with a fresh token."""
    try:
        listener = socket.create_server((host, port))
    except OSError as problem:
        raise UserError(
            f"cannot listen on {host}:{port}: {problem.strerror}; choose another --host or --port"
        ) from None
    devices = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    address = listener.getsockname()
    where = str(log.absolute()) if log else ""
    return listener, Endpoint(host, address[1], secrets.token_hex(16), os.getpid(), devices, policy, where)


def redirect_output(log: Path) -> None:
    """Sends stdout and stderr, also those of C libraries and children, to `log`, started anew."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def start_guardian(endpoint_file: Path, parents: Iterable[int] = (), grace: float = GRACE) -> None:
    """Forks a small process that ends this one by SIGKILL when it is still there `grace` seconds after a SIGTERM.

    A handler in Python cannot do that alone: while a C extension holds the interpreter lock, no Python code runs in any
    thread. But the C part of the signal handler writes to the wake-up descriptor at once, and the guardian listens
    there. A framework that ignores or blocks SIGTERM keeps even that from happening; therefore the endpoint file is a
    lease as well: Snakemake removes it when the rollouts are done, whether or not they failed, and a server whose file
    is gone (or belongs to another server) has to go too. So has one whose `parents` are dead.

    The guardian ends with this process, whose end closes the pipe. Call before threads, sockets and frameworks exist.
    """
    guarded = os.getpid()
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            os.close(writer)
            _guard(guarded, reader, grace, _Lease(endpoint_file, guarded, tuple(parents)))
        finally:
            os._exit(0)
    os.close(reader)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)


class _Lease:
    """Whether anybody still wants the server `pid`."""

    def __init__(self, file: Path, pid: int, parents: tuple[int, ...]):
        self._file, self._pid, self._parents = file, pid, parents
        self._written, self._misses = False, 0

    def over(self) -> bool:
        """To be asked every second."""
        if not all(map(alive, self._parents)):
            return True
        try:
            mine = json.loads(self._file.read_text(encoding="utf-8")).get("pid") == self._pid
        except FileNotFoundError:
            mine = False
        except (OSError, ValueError):
            return False  # a network file system's hiccup says nothing
        self._written = self._written or mine
        # Several looks in a row: network file systems may lose sight of a file for a moment.
        self._misses = 0 if mine or not self._written else self._misses + 1
        return self._misses >= MISSES


def _guard(guarded: int, reader: int, grace: float, lease: _Lease) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # signals to the group must not end the guardian before the guarded
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)  # whoever reads our output must not wait for the guardian
    while True:
        if select.select([reader], [], [], 1.0)[0]:
            received = os.read(reader, 64)
            if not received:
                return
            if signal.SIGTERM in received:
                break
        elif lease.over():
            os.kill(guarded, signal.SIGTERM)
            break
    while select.select([reader], [], [], grace)[0]:
        if not os.read(reader, 64):
            return
    family = descendants(guarded)
    for pid in [guarded, *(pid for pid in family if pid != os.getpid())]:
        _kill(pid)


def end(code: int, cleanup: Callable[[], None]) -> None:
    """Ends this process now: `cleanup`, then children, then itself, without waiting for what frameworks do at exit."""
    cleanup()
    for pid in descendants(os.getpid()):
        _kill(pid)
    os._exit(code)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
