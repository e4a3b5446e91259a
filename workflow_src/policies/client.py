"""The rollout's side of the policy wire: wait for a server, ask it for actions, and say in one line what went wrong.

with connect("results/run/endpoint.json", deadline=900) as policy:
    reply = policy.infer({"image": …, "prompt": …, "episode": …, "step": …, "seed": …})
"""

from __future__ import annotations

import json
import socket
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import websockets
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as open_websocket

from workflow_src.common.addresses import is_loopback
from workflow_src.common.errors import UserError
from workflow_src.common.process import alive
from workflow_src.common.progress import say
from workflow_src.policies import wire
from workflow_src.policies.foreign import Translator
from workflow_src.policies.lifecycle import WAITING_FOR_GPU

POLL = 0.2  # seconds between two looks at a server that is loading
FILE_DEADLINE = 10.0  # seconds to wait for an endpoint file; a server writes it within one
LOG_LINES = 8
ACTION = 7


class PolicyError(UserError):
    """A policy that cannot go on. `row` is the row of the batch it happened in, where that is known."""

    def __init__(self, message: str, row: int | None = None):
        super().__init__(message)
        self.row = row


class _Peer:
    """Where a server is, and what can be found out about its process."""

    def __init__(self, endpoint: str | Path, token: str | None, policy: str, allow_plaintext: bool):
        self.file = None if str(endpoint).startswith(("ws://", "wss://")) else Path(endpoint)
        self.pid, self.log = None, None
        if self.file is None:
            self.url, self.token, self.policy = str(endpoint), token, policy or str(endpoint)
        else:
            content = _read_endpoint(self.file, policy)
            self.url, self.token = f"ws://{content['host']}:{content['port']}", token or content["token"]
            self.pid, self.log = content["pid"], content.get("log")
            self.policy = policy or content["policy"]
        parts = urllib.parse.urlsplit(self.url)
        self.loopback = is_loopback(parts.hostname or "")
        if parts.scheme == "ws" and not self.loopback and not allow_plaintext:
            raise UserError(
                f"policy {self.policy}: {self.url} is another machine; use wss:// or set allow_plaintext: true"
            )

    def devices(self) -> list[str]:
        """Accelerators that its server was granted. It may have waited for them until it was ready."""
        return [] if self.file is None else _read_endpoint(self.file, self.policy).get("devices") or []

    def gone(self) -> bool:
        return self.pid is not None and not alive(self.pid)

    def error(self, what: str, row: int | None = None) -> PolicyError:
        """One clear line; below it the last lines of the server's log where that can be read."""
        return PolicyError(f"policy {self.policy}: {what}{self._log_tail()}", row)

    def _log_tail(self) -> str:
        try:
            lines = (
                Path(self.log).read_text(encoding="utf-8", errors="replace").strip().splitlines() if self.log else []
            )
        except OSError:
            lines = []
        if not lines:
            return ""
        return "".join(f"\n    {line}" for line in [f"last lines of {self.log}:", *lines[-LOG_LINES:]])


def _read_endpoint(path: Path, policy: str) -> dict[str, Any]:
    end = time.monotonic() + FILE_DEADLINE
    while not path.is_file():
        if time.monotonic() > end:
            raise PolicyError(
                f"policy {policy or path}: endpoint file {path} is not there: its server has ended or never began"
            )
        time.sleep(POLL)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: content[key] for key in ("host", "port", "token", "pid", "policy")} | content
    except (ValueError, KeyError, TypeError) as problem:
        raise PolicyError(f"policy {policy or path}: endpoint file {path} is not readable: {problem!r}") from None


def connect(
    endpoint: str | Path,
    deadline: float = 900.0,
    token: str | None = None,
    *,
    policy: str = "",
    step_timeout: float = 120.0,
    allow_plaintext: bool = False,
    translator: Translator | None = None,
) -> PolicyClient:
    """Connects to the server at `endpoint` (endpoint file, or ws://…, wss://… URL) once it has loaded its policy.

    `deadline`: seconds the server may take to load; `step_timeout`: seconds for one answer; `token`: overrides the
    endpoint file's; `policy`: name used in errors; `translator`: for a server that speaks otherwise. Raises PolicyError: at
    once when the server's process is gone, with the last lines of its log, or when the deadline is over or the token is
    refused.
    """
    peer = _Peer(endpoint, token, policy, allow_plaintext)
    end = time.monotonic() + deadline
    _wait_for_health(peer, end, deadline)
    connection = _open(peer, max(1.0, end - time.monotonic()))
    return PolicyClient(connection, peer, step_timeout, translator)


def _wait_for_health(peer: _Peer, end: float, deadline: float) -> None:
    shown = ""
    while True:
        stage = _health(peer)
        if stage is None:
            return
        if peer.gone():
            raise peer.error("its server ended while loading")
        if stage == WAITING_FOR_GPU:  # other jobs have them, perhaps for hours
            end = time.monotonic() + deadline
        if time.monotonic() > end:
            raise peer.error(f"its server was not ready within {deadline:g} s (last stage: {stage})")
        if stage != shown:
            say(f"policy {peer.policy}: {stage}")
            shown = stage
        time.sleep(POLL)


def _health(peer: _Peer) -> str | None:
    """None when the server is ready, else what it is doing.

    Servers without `/healthz` count as ready once they answer.
    """
    # Loopback never goes through a proxy that the environment may name for the outside.
    handlers = [urllib.request.ProxyHandler({})] if peer.loopback else []
    url = "http" + peer.url.removeprefix("ws").rstrip("/") + "/healthz"
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=10):
            return None
    except urllib.error.HTTPError as answer:
        return answer.read(200).decode(errors="replace").strip() or "loading" if answer.code == 503 else None
    except (OSError, ValueError) as problem:
        return f"not reachable ({getattr(problem, 'reason', problem)})"


def _open(peer: _Peer, timeout: float) -> ClientConnection:
    headers = {"Authorization": f"Api-Key {peer.token}"} if peer.token else None
    try:
        # Entered by hand because the conversation outlives this function; `PolicyClient.close` ends it.
        return open_websocket(
            peer.url,
            additional_headers=headers,
            compression=None,
            max_size=wire.MAX_MESSAGE,
            open_timeout=timeout,
            close_timeout=2,
            ping_interval=None,  # a busy framework may not answer pings; every answer has its own deadline
            proxy=None if peer.loopback else True,
        ).__enter__()
    except websockets.InvalidStatus as answer:
        if answer.response.status_code == 401:
            raise peer.error("its server refused the token") from None
        raise peer.error(f"its server refused the connection (HTTP {answer.response.status_code})") from None
    except (OSError, TimeoutError, websockets.WebSocketException) as problem:
        raise peer.error(f"cannot connect to {peer.url}: {problem}") from None


class PolicyClient:
    """One conversation with a policy server. Not for several threads."""

    def __init__(
        self, connection: ClientConnection, peer: _Peer, step_timeout: float, translator: Translator | None = None
    ):
        self._connection, self._peer, self._timeout, self._translator = connection, peer, step_timeout, translator
        # A stopped server does not read, so sending blocks once the buffers are full: that needs a deadline too.
        seconds = struct.pack("ll", int(step_timeout), int(step_timeout % 1 * 1e6))
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        said = wire.Metadata.from_wire(self._receive(time.monotonic()))
        self.metadata = translator.metadata(said) if translator else said
        self.metadata_digest: str = self.metadata.digest()
        self.devices: list[str] = peer.devices()  # accelerators the server was granted, for the rollouts as well
        if self.metadata.units != "metric":
            raise peer.error(f"its server speaks {self.metadata.units!r} actions; this one understands 'metric'")

    def infer(self, observation: dict[str, Any]) -> dict[str, np.ndarray]:
        """Actions for N rollouts.

        observation: `image` uint8 (N, H, W, 3), `prompt` list of N, `episode`, `step`, `seed` int (N,), optional others
        with N rows. Returns `actions` float32 (N, K, 7) metric, and where the policy gives them `base` float32 (N, K,
        3) and `terminate` bool (N, K). Servers that take no batches are asked row by row. Raises PolicyError for a
        dead, hanging or failing server and for malformed, non-finite or wrongly shaped answers.
        """
        rows = len(observation["image"])
        if self.metadata.batched:
            return self._checked(self._ask(observation), rows)
        replies = [self._ask_row(observation, row) for row in range(rows)]
        lengths = {reply["actions"].shape[1] for reply in replies}
        if len(lengths) > 1:
            raise self._peer.error(f"answers have different chunk lengths {sorted(lengths)} within one step")
        keys = set.intersection(*(set(reply) for reply in replies))
        return {key: np.concatenate([reply[key] for reply in replies]) for key in sorted(keys)}

    def close(self) -> None:
        """Ends the conversation. The server stays."""
        self._connection.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask_row(self, observation: dict[str, Any], row: int) -> dict[str, np.ndarray]:
        one = {key: value[row] for key, value in observation.items()}
        if self._translator:
            return self._checked(self._translated(one, row), 1, row)
        reply = self._ask(
            {key: int(value) if isinstance(value, np.integer) else value for key, value in one.items()}, row
        )
        arrays = {
            key: np.asarray(value)[None] for key, value in reply.items() if key in ("actions", "base", "terminate")
        }
        if "actions" in arrays and arrays["actions"].ndim == 2:  # one action instead of a chunk
            arrays = {key: value[:, None] for key, value in arrays.items()}
        return self._checked(arrays, 1, row)

    def _translated(self, one: dict[str, Any], row: int) -> dict[str, np.ndarray]:
        answer = self._ask(self._translator.observation(one), row)
        try:
            return {"actions": self._translator.actions(answer, one.get("pose"))[None]}
        except wire.WireError as problem:
            raise self._peer.error(str(problem), row) from None

    def _ask(self, message: dict[str, Any], row: int | None = None) -> dict:
        started = time.monotonic()
        try:
            self._connection.send(wire.pack(message))
        except websockets.ConnectionClosed:
            raise self._lost(started, row) from None
        reply = self._receive(started, row)
        if not isinstance(reply, dict):
            raise self._peer.error(f"malformed answer: expected a map, got {type(reply).__name__}", row)
        return reply

    def _receive(self, started: float, row: int | None = None) -> Any:
        try:
            message = self._connection.recv(timeout=max(0.0, started + self._timeout - time.monotonic()))
        except TimeoutError:
            raise self._hangs(row) from None
        except websockets.ConnectionClosed:
            raise self._lost(started, row) from None
        if isinstance(message, str):
            lines = message.strip().splitlines() or ["an empty text"]
            raise self._peer.error(f"its server failed: {lines[-1]}", row)
        try:
            return wire.unpack(message)
        except wire.WireError as problem:
            raise self._peer.error(f"malformed answer: {problem}", row) from None

    def _hangs(self, row: int | None) -> PolicyError:
        return self._peer.error(f"no answer within {self._timeout:g} s", row)

    def _lost(self, started: float, row: int | None) -> PolicyError:
        time.sleep(POLL)  # a killed process closes its connections a moment before it is gone
        if self._peer.gone():
            return self._peer.error("its server died", row)
        if time.monotonic() - started >= self._timeout:
            return self._hangs(row)
        return self._peer.error("its server closed the connection", row)

    def _checked(self, reply: dict, rows: int, row: int | None = None) -> dict[str, np.ndarray]:
        actions = reply.get("actions")
        if not isinstance(actions, np.ndarray) or actions.dtype.kind not in "fiu":
            raise self._peer.error("malformed answer: `actions` is not an array of numbers", row)
        chunk = self.metadata.chunk or (actions.shape[1] if actions.ndim == 3 else 0)
        if actions.shape != (rows, chunk, ACTION) or chunk < 1:
            wanted = f"({rows}, {chunk or 'K'}, {ACTION})"
            raise self._peer.error(f"wrong shape: `actions` is {actions.shape}, expected {wanted}", row)
        checked = {"actions": actions.astype(np.float32)}
        if (base := reply.get("base")) is not None:
            checked["base"] = self._shaped("base", base, (rows, chunk, 3), row).astype(np.float32)
        if (terminate := reply.get("terminate")) is not None:
            checked["terminate"] = self._shaped("terminate", terminate, (rows, chunk), row).astype(bool)
        for key, value in checked.items():
            if (bad := ~np.isfinite(value)).any():
                first = int(np.argwhere(bad)[0][0])
                raise self._peer.error(f"`{key}` is not finite (NaN or infinite)", first if row is None else row)
        return checked

    def _shaped(self, key: str, value: Any, shape: tuple[int, ...], row: int | None) -> np.ndarray:
        if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype.kind not in "bfiu":
            found = value.shape if isinstance(value, np.ndarray) else type(value).__name__
            raise self._peer.error(f"wrong shape: `{key}` is {found}, expected {shape}", row)
        return value
