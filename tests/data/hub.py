"""A real HTTP server on this machine that serves shards, badly on request."""

from __future__ import annotations

import hashlib
import random
import re
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from nanofed.data.writing import write_shards


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Hub:
    """What is served, how it misbehaves, and what it was asked for.

    `faults[name]` are used up one a GET, then the file is served well; `always` is the fault of every GET.
    """

    files: dict[str, bytes]
    faults: defaultdict[str, deque[str]] = field(default_factory=lambda: defaultdict(deque))
    always: str = ""
    redirect_to: str | None = None
    linked: tuple[str, ...] = ()
    etags: bool = True
    head_length: int | None = None
    retry_after: str | None = None
    bytes_per_second: float | None = None
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def gets(self, name: str) -> list[Request]:
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(name)]

    def etag(self, name: str) -> str:
        return '"' + hashlib.md5(self.files[name]).hexdigest() + '"'


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def do_CONNECT(self) -> None:  # as a proxy for https: noted and refused
        self.hub.requests.append(Request("CONNECT", self.path, dict(self.headers)))
        self._status("502")

    def _answer(self, head: bool) -> None:
        hub, name = self.hub, self.path.rsplit("/", 1)[-1]
        hub.requests.append(Request(self.command, self.path, dict(self.headers)))
        if name not in hub.files:
            return self._status("404")
        if hub.redirect_to:
            return self._redirect(name)
        content = hub.files[name]
        if head:
            self.send_response(200)
            self.send_header("Content-Length", str(hub.head_length or len(content)))
            self.end_headers()
            return None
        queue = hub.faults[name]
        fault = queue.popleft() if queue else hub.always
        if fault.isdecimal():
            return self._status(fault)
        return self._file(name, content, fault)

    def _status(self, status: str) -> None:
        self.send_response(int(status))
        if self.hub.retry_after is not None:
            self.send_header("Retry-After", self.hub.retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _redirect(self, name: str) -> None:
        self.send_response(302)
        self.send_header("Location", f"{self.hub.redirect_to}/{name}")
        if "hash" in self.hub.linked:
            self.send_header("X-Linked-ETag", '"' + hashlib.sha256(self.hub.files[name]).hexdigest() + '"')
        if "size" in self.hub.linked:
            self.send_header("X-Linked-Size", str(len(self.hub.files[name])))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, name: str, content: bytes, fault: str) -> None:
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range") in (None, self.hub.etag(name))
        if asked and same and fault != "ignore range":
            start = int(asked[1])
            if start >= len(content):
                return self._status("416")
        body, total = content[start:], len(content)
        if fault == "flip":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 0x10]) + body[middle + 1 :]
        elif fault == "page":
            body = (b"<html>please sign in</html>" * (len(body) // 20))[: len(body)]
        elif fault == "short length":
            body = body[: len(body) // 2]
        self.send_response(206 if start else 200)
        if start:
            first = start + 5 if fault == "wrong range" else start
            self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
        if self.hub.etags:
            self.send_header("ETag", self.hub.etag(name))
        if fault == "compressed":
            self.send_header("Content-Encoding", "gzip")
        if fault == "no length":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body) + (1000 if fault == "long length" else 0)))
        self.end_headers()
        self._send(body[: len(body) // 2] if fault == "drop" else body)
        if fault in ("drop", "long length", "no length"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        return None

    def _send(self, body: bytes) -> None:
        rate = self.hub.bytes_per_second
        if rate is None:
            self.wfile.write(body)
            return
        for at in range(0, len(body), 4096):
            self.wfile.write(body[at : at + 4096])
            time.sleep(4096 / rate)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hangs up is part of the tests


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def make_files(folder: Path, shards: int = 3) -> dict[str, bytes]:
    """Return shards of random text that hardly compresses, under the names of the real ones."""
    draw = random.Random(0)
    documents = [draw.randbytes(3000).hex() for _ in range(64 * (shards + 1))]
    dataset = write_shards(documents, folder, num_shards=shards, rows_per_group=16)
    files = {shard.name: shard.path.read_bytes() for shard in dataset.train}
    return {**files, "shard_01822.parquet": dataset.validation.path.read_bytes()}
