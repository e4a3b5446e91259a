"""A web server on loopback that cuts, changes and refuses, for tests that fetch."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`; each entry of `faults` is spent on one request: a status, or the bytes after which it hangs up."""

    def do_GET(self):
        server = self.server
        server.seen.append((self.path, dict(self.headers)))
        fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, str):
            self.send_response(302)
            self.send_header("Location", fault)
            return self.end_headers()
        if isinstance(fault, int) and fault < 600:
            self.send_response(fault)
            return self.end_headers()
        content, start = server.content, 0
        if isinstance(content, dict):
            content = content.get(self.path)
        if content is None:
            self.send_response(404)
            return self.end_headers()
        asked = self.headers.get("Range")
        if asked and self.headers.get("If-Range") == server.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start + server.shift}-{len(content) - 1}/{len(content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : fault or None])
        return None

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(content: bytes | dict[str, bytes]) -> Iterator[http.server.ThreadingHTTPServer]:
    """A server of `content`, the same at every path or by path. Attributes: `url`, `seen` (requests), and what may be set."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.content, server.etag, server.faults, server.seen, server.shift = content, '"v1"', [], [], 0
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/file.bin"
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def ranges(server: http.server.ThreadingHTTPServer) -> list[str | None]:
    """The range that each request asked for."""
    return [headers.get("Range") for _, headers in server.seen]
