"""A perimeter with something behind it, and a client that is not bound to be polite."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.types import ASGIApp, Receive, Scope, Send

from nanofed.federated.deploy.admission import Limits
from nanofed.federated.deploy.keys import Keys
from nanofed.federated.deploy.perimeter import Perimeter, Server

HOST = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)
    return value


@dataclass
class Site:
    """Signs requests as Flower's SuperNode does."""

    keys: Keys
    name: str

    def __post_init__(self) -> None:
        private = serialization.load_ssh_private_key(self.keys.private_key(self.name).read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        self.private = private
        self.public = private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def headers(self, at: datetime.datetime | None = None) -> dict[str, str]:
        timestamp = (at or datetime.datetime.now(datetime.UTC)).isoformat()
        signature = self.private.sign(timestamp.encode(), ec.ECDSA(hashes.SHA256()))
        return {
            "flwr-public-key": b64encode(self.public).decode(),
            "flwr-timestamp": timestamp,
            "flwr-signature": b64encode(signature).decode(),
        }

    def request(self, call: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
        return head(f"/v1/fleet/{call}", {**self.headers(), "content-length": str(len(body)), **(headers or {})}) + body


def head(path: str, headers: Mapping[str, str], method: str = "POST", version: str = "HTTP/1.1") -> bytes:
    usual = {"host": "fed.example.org", "content-type": "application/protobuf"}
    lines = [f"{method} {path} {version}", *(f"{name}: {value}" for name, value in {**usual, **headers}.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes

    @classmethod
    def parse(cls, raw: bytes) -> Reply:
        top, _, body = raw.partition(b"\r\n\r\n")
        return cls(int(top.split(b" ", 2)[1]) if top else 0, body)


class Client:
    """Calls a perimeter, politely or not, and reads what it counts.

    Args:
        folder: in which the perimeter keeps its counters.
        keys: the federation's.
        port: of the perimeter.
    """

    running: Running  # where it is in this process

    def __init__(self, folder: Path, keys: Keys, port: int) -> None:
        self.keys, self.port, self.status = keys, port, folder / "perimeter.json"
        self.trust = ssl.create_default_context(cafile=str(keys.ca))
        wait_until(self.status.exists, 20, "the perimeter starts")

    def figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = json.loads(self.status.read_text())
        return figures

    def refused(self, reason: str) -> int:
        return int(self.figures()["refused"].get(reason, 0))

    @contextlib.contextmanager
    def counts(self, reason: str, times: int = 1) -> Iterator[None]:
        """The block makes the perimeter count just so many refusals for a reason, and none for another."""
        before = self.settled()
        yield
        expected = {**before, reason: before.get(reason, 0) + times}
        wait_until(lambda: self.figures()["refused"].get(reason, 0) >= expected[reason], 10, f"{reason} is counted")
        assert self.settled() == expected

    def settled(self) -> dict[str, int]:
        """The refusals once all that was done until now must have been counted."""
        now = time.time()
        wait_until(lambda: self.figures()["written"] > now, 10, "counters are written")
        refused: dict[str, int] = self.figures()["refused"]
        return refused

    @contextlib.contextmanager
    def connection(self, seconds: float = 10) -> Iterator[ssl.SSLSocket]:
        with (
            socket.create_connection((HOST, self.port), timeout=seconds) as plain,
            self.trust.wrap_socket(plain, server_hostname="localhost") as channel,
        ):
            yield channel

    def send(self, *parts: bytes) -> Reply:
        """Send, and return the first answer; the connection's end without one, be it in the handshake, is status 0."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError), self.connection() as channel:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
                for part in parts:
                    channel.sendall(part)
            return read_reply(channel)
        return Reply.parse(b"")


def read_reply(channel: socket.socket) -> Reply:
    """Return one answer: its head and as many bytes as it announces."""
    raw = b""
    with contextlib.suppress(ConnectionResetError, ssl.SSLEOFError):
        while b"\r\n\r\n" not in raw:
            if not (part := channel.recv(65536)):
                return Reply.parse(raw)
            raw += part
        top = raw.partition(b"\r\n\r\n")[0].lower()
        length = int(top.partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
        while len(raw) < len(top) + 4 + length:
            if not (part := channel.recv(65536)):
                break
            raw += part
    return Reply.parse(raw)


class Recorder:
    """An ASGI application that writes down what arrives."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []  # path, headers, body
        self.wait = 0.0  # seconds before an answer
        self.answer = b"ok"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            event = await receive()
            body, more = body + event["body"], event["more_body"]
        self.requests.append((scope["path"], {n.decode(): v.decode("latin-1") for n, v in scope["headers"]}, body))
        await asyncio.sleep(self.wait)
        head = [(b"content-length", b"%d" % len(self.answer)), (b"content-type", b"application/protobuf")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": self.answer})


class Running:
    """A perimeter that serves an application in a thread of this process.

    Args:
        folder: for its counters.
        keys: the federation's.
        app: what is behind it.
        limits: other than the usual.
    """

    def __init__(self, folder: Path, keys: Keys, app: ASGIApp, **limits: Any) -> None:
        folder.mkdir(exist_ok=True)
        perimeter = Perimeter(app, (HOST, 0), keys, folder, Limits(**limits), tick=0.05)
        loopback = uvicorn.Config(app, host=HOST, port=0, ws="none", lifespan="off", log_config=None)
        self.server = Server(loopback, perimeter)
        self.thread = threading.Thread(target=self.server.run)
        self.faults = Faults()
        self._folder, self._keys, self._port = folder, keys, perimeter.port

    def __enter__(self) -> Client:
        logging.getLogger().addHandler(self.faults)
        self.thread.start()
        client = Client(self._folder, self._keys, self._port)
        client.running = self
        return client

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()
        logging.getLogger().removeHandler(self.faults)
        assert not self.faults.said


class Faults(logging.Handler):
    """Notes every exception that is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.said.append(f"{record.getMessage()}: {record.exc_info[1]!r}")
