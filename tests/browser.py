"""A real headless Chromium, driven through its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

WAIT = 30  # seconds until a test gives up
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required"]  # fmt: skip
# Key name → what the browser wants to know of it besides.
KEYS = {"ArrowLeft": {"code": "ArrowLeft", "windowsVirtualKeyCode": 37}, " ": {"code": "Space", "text": " "}}


class Page:
    """One tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._number = socket, 0
        self.errors: list[str] = []  # uncaught exceptions in the page
        self.call("Page.enable")
        self.call("Runtime.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command and its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=WAIT))
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(message["params"]["exceptionDetails"]))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def open(self, address: str) -> None:
        """Load a page, to the end of its scripts."""
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is, as plain values."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + WAIT
        while not self.value(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        """Type keys, as a person would."""
        for key in keys:
            more = KEYS.get(key, {"text": key})
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **more)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **{k: v for k, v in more.items() if k != "text"})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A browser with an empty profile in `folder`; downloads go there as well."""
    profile = folder / "profile"
    command = ["chromium", "--headless", "--no-sandbox", *QUIET, f"--user-data-dir={profile}", "--window-size=900,1000",
               "--remote-debugging-port=0", "about:blank"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            port = _port(profile / "DevToolsActivePort", process)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=WAIT) as reply:
                address = next(tab["webSocketDebuggerUrl"] for tab in json.load(reply) if tab["type"] == "page")
            with connect(address, max_size=None, proxy=None) as socket:
                page = Page(socket)
                page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
                yield page
                assert page.errors == []
        finally:
            process.kill()


def _port(file: Path, process: subprocess.Popen) -> int:
    end = time.monotonic() + WAIT
    while not file.is_file() or "\n" not in file.read_text():
        assert process.poll() is None and time.monotonic() < end, "the browser did not start"
        time.sleep(0.05)
    return int(file.read_text().split("\n")[0])
