"""The websocket side of a policy server: health, token, metadata, then observation → reply (openpi's protocol)."""

from __future__ import annotations

import contextlib
import hmac
import http
import queue
import socket
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future

import websockets
from websockets.sync.server import Server, ServerConnection, serve

from workflow_src.common.progress import say
from workflow_src.policies import wire
from workflow_src.policies.adapter import Adapter, read_observation


class PolicyServer:
    """Answers on `listener` from the first moment; `run` loads the policy and then serves inference requests.

    All calls of the adapter happen in the one thread that calls `run`, one at a time: frameworks keep per-thread
    settings.
    """

    def __init__(self, listener: socket.socket, token: str):
        self.stage = "starting"
        self.adapter: Adapter | None = None
        self.connections = 0
        self.ever_connected = False
        self.last_activity = time.monotonic()
        self._token = token
        self._requests: queue.Queue[tuple[Callable, Future]] = queue.Queue()
        self._server: Server = serve(
            self._converse,
            sock=listener,
            process_request=self._gate,
            compression=None,
            max_size=wire.MAX_MESSAGE,
            # A framework may hold the interpreter for long; missed pings must not end a conversation. The client has a
            # deadline for every answer instead.
            ping_interval=None,
        )
        threading.Thread(target=self._server.serve_forever, name="websocket", daemon=True).start()

    def run(self, load: Callable[[], Adapter]) -> None:
        """Loads the policy, then answers requests for ever. What `load` raises ends it."""
        self.adapter = load()
        self.last_activity = time.monotonic()
        self.stage = "ready"
        while True:
            work, future = self._requests.get()
            try:
                future.set_result(work())
            except Exception as problem:
                future.set_exception(problem)

    def _gate(self, connection: ServerConnection, request: websockets.Request) -> websockets.Response | None:
        """Before the websocket handshake: `/healthz`, then the token, then readiness."""
        ready = self.adapter is not None
        if request.path.partition("?")[0] == "/healthz":
            status = http.HTTPStatus.OK if ready else http.HTTPStatus.SERVICE_UNAVAILABLE
            return connection.respond(status, "OK\n" if ready else f"{self.stage}\n")
        given = request.headers.get("Authorization", "")
        if self._token and not hmac.compare_digest(given.encode(), f"Api-Key {self._token}".encode()):
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "wrong or missing token (Authorization: Api-Key)\n")
        if not ready:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{self.stage}\n")
        return None

    def _converse(self, connection: ServerConnection) -> None:
        self.connections += 1
        self.ever_connected = True
        try:
            connection.send(wire.pack(self.adapter.metadata.to_wire()))
            for calls, message in enumerate(connection):
                self.last_activity = time.monotonic()
                if not self._answer(connection, message, calls):
                    return
        except websockets.ConnectionClosed:
            pass
        finally:
            self.connections -= 1
            self.last_activity = time.monotonic()

    def _answer(self, connection: ServerConnection, message: bytes | str, calls: int) -> bool:
        """One observation → one reply. A problem becomes a text frame and closes the connection, as with openpi."""
        try:
            observation, single = read_observation(wire.unpack(message), self.adapter.metadata.image_size, calls)
            future: Future = Future()
            self._requests.put((lambda: self.adapter.act(observation), future))
            reply = future.result()
            connection.send(wire.pack({key: value[0] for key, value in reply.items()} if single else reply))
            return True
        except websockets.ConnectionClosed:
            raise
        except wire.WireError as problem:
            self._refuse(connection, f"refused: {problem}", 1007)
        except Exception:
            self._refuse(connection, traceback.format_exc(), 1011)
        return False

    def _refuse(self, connection: ServerConnection, text: str, code: int) -> None:
        say(text)
        with contextlib.suppress(websockets.ConnectionClosed):
            connection.send(text)
            connection.close(code, "see the message before")
