"""A server on loopback that speaks OpenAI's wire format (chat completions, files, batches), faults to order included."""

from __future__ import annotations

import base64
import http.server
import io
import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

USAGE = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}


def shown_frames(body: dict[str, Any]) -> list[np.ndarray]:
    """The images of a request, decoded."""
    parts = [part for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    urls = [part["image_url"]["url"].removeprefix("data:image/jpeg;base64,") for part in parts]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url)))) for url in urls]


def by_brightness(body: dict[str, Any]) -> str:
    """Says success where the last frame is bright."""
    return json.dumps({"reasoning": "looked", "score": int(shown_frames(body)[-1].mean() > 127)})


def completion(content: Any, **more: Any) -> dict[str, Any]:
    """A chat completion as OpenAI words it."""
    message = {"role": "assistant", "content": content, "refusal": None}
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "stub-2026-01-01", "usage": USAGE,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}], **more,
    }  # fmt: skip


class VlmServer(http.server.ThreadingHTTPServer):
    """Answers with `answer(body)`. Each entry of `faults` is spent on one chat request, see `Handler._fault`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Callable[[dict[str, Any]], Any] = by_brightness
        self.faults: list[Any] = []
        self.key: str | None = None  # the only one that is accepted
        self.bodies: list[dict[str, Any]] = []  # of all chat requests that were answered with a completion
        self.seen: list[tuple[str, dict[str, str]]] = []  # path and headers (lower case) of all requests
        self.times: list[float] = []  # when chat requests came
        self.at_once = self.most_at_once = 0
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.batch_statuses: list[str] = []  # what a batch says before it is completed, one per look
        self.batch_end, self.batch_refuses = "completed", ()  # positions of requests that a batch answers with an error
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> VlmServer:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: VlmServer

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._welcome():
            return
        if self.path == "/v1/chat/completions":
            self._chat(json.loads(content))
        elif self.path == "/v1/files":
            # The file's part of the multipart form, between its headers' empty line and the next boundary.
            boundary = b"\r\n--" + re.search(r"boundary=(\S+)", self.headers["Content-Type"])[1].encode()
            name = f"file-{len(self.server.files)}"
            self.server.files[name] = content.split(b"filename=")[1].split(b"\r\n\r\n", 1)[1].split(boundary)[0]
            self._reply({"id": name, "object": "file", "bytes": 1, "created_at": 1, "filename": "x", "purpose": "batch",
                         "status": "processed"})  # fmt: skip
        else:
            self._new_batch(json.loads(content))

    def do_GET(self) -> None:
        if not self._welcome():
            return
        if self.path.startswith("/v1/batches?"):
            self._reply({"object": "list", "data": list(self.server.batches.values()), "has_more": False})
        elif self.path.startswith("/v1/batches/"):
            self._reply(self._look(self.path.rsplit("/", 1)[1]))
        else:
            self._send(200, self.server.files[self.path.split("/")[3]], {"Content-Type": "application/octet-stream"})

    def _welcome(self) -> bool:
        server = self.server
        server.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            self._error(401, f"Incorrect API key provided: {self.headers.get('Authorization')}", "invalid_api_key")
            return False
        return True

    # ---- chat ----

    def _chat(self, body: dict[str, Any]) -> None:
        server = self.server
        with server.lock:
            server.times.append(time.monotonic())
            fault = server.faults.pop(0) if server.faults else None
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            if fault is None:
                reply = completion(server.answer(body))
                server.bodies.append(body)
                self._reply(reply)
            else:
                self._fault(fault)
        finally:
            with server.lock:
                server.at_once -= 1

    def _fault(self, fault: Any) -> None:
        if isinstance(fault, dict):  # another reply with status 200
            self._reply(fault)
        elif isinstance(fault, tuple):  # (status, headers or code)
            status, more = fault
            headers = more if isinstance(more, dict) else {}
            self._error(status, "try later" if headers else "no", more if isinstance(more, str) else None, headers)
        elif fault == "truncated":  # the connection ends in the middle of the body
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b'{"id": "chatcmpl-1", "choi')
            self.close_connection = True
        elif fault == "damaged":  # a whole body that is no JSON
            self._send(200, b'{"id": "chatcmpl-1", "choi', {"Content-Type": "application/json"})
        else:  # seconds of silence
            time.sleep(fault)
            self._reply(completion("late"))

    # ---- batches ----

    def _new_batch(self, wanted: dict[str, Any]) -> None:
        name = f"batch_{len(self.server.batches)}"
        self.server.batches[name] = {
            "id": name, "object": "batch", "endpoint": wanted["endpoint"], "status": "validating", "created_at": 1,
            "input_file_id": wanted["input_file_id"], "completion_window": "24h", "metadata": wanted.get("metadata"),
        }  # fmt: skip
        self._reply(self.server.batches[name])

    def _look(self, name: str) -> dict[str, Any]:
        server, batch = self.server, self.server.batches[name]
        if batch["status"] not in ("completed", "expired", "failed"):
            batch["status"] = server.batch_statuses.pop(0) if server.batch_statuses else server.batch_end
            if batch["status"] in ("completed", "expired"):
                self._work(batch)
        return batch

    def _work(self, batch: dict[str, Any]) -> None:
        good, bad = [], []
        for i, line in enumerate(self.server.files[batch["input_file_id"]].splitlines()):
            request = json.loads(line)
            if i in self.server.batch_refuses:
                error = {"status_code": 400, "body": {"error": {"message": "image refused"}}}
                bad.append({"id": "r", "custom_id": request["custom_id"], "response": error, "error": None})
                continue
            self.server.bodies.append(request["body"])
            answer = {"status_code": 200, "body": completion(self.server.answer(request["body"]))}
            good.append({"id": "r", "custom_id": request["custom_id"], "response": answer, "error": None})
        for kind, lines in (("output", good), ("error", bad)):
            if lines:
                name = batch[f"{kind}_file_id"] = f"file-{len(self.server.files)}"
                self.server.files[name] = "".join(json.dumps(line) + "\n" for line in lines).encode()

    # ---- plumbing ----

    def _reply(self, content: dict[str, Any]) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> None:
        error = {"error": {"message": message, "type": "error", "param": None, "code": code}}
        self._send(status, json.dumps(error).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass
