"""A SuperLink with TLS and node authentication on loopback, the proxy before it, and a client that is not bound to be polite."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nanofed import runtime
from nanofed.federated.deploy.keys import Keys
from nanofed.federated.deploy.process import stop_marked
from nanofed.federated.deploy.proxy.guard import Limits
from nanofed.federated.deploy.proxy.service import Options

HOST = "127.0.0.1"
LINK = "perimeter"


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


class Perimeter:
    """A running proxy.

    Args:
        folder: for its counters and its log.
        keys: the federation's.
        upstream: port of what is behind it.
        plain: there is no TLS behind it.
        limits: other than the usual.
    """

    def __init__(
        self, folder: Path, keys: Keys, upstream: int, *, plain: bool = False, limits: Limits | None = None
    ) -> None:
        self.keys, self.upstream = keys, upstream
        self.port = free_port()
        self.status = folder / f"proxy-{self.port}.json"
        self.log = folder / f"proxy-{self.port}.log"
        self.options = Options(
            f"{HOST}:{self.port}",
            f"{HOST}:{upstream}",
            keys.certificate,
            keys.key,
            keys.sites,
            None if plain else keys.ca,
            self.status,
            tick=0.05,
            limits=limits or Limits(),
        )
        self.trust = ssl.create_default_context(cafile=str(keys.ca))

    @contextlib.contextmanager
    def running(self) -> Iterator[Perimeter]:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.options.command(), stdout=log, stderr=log, env=runtime.environment())
        try:
            wait_until(self.status.exists, 20, f"the proxy starts ({self.log})")
            yield self
        finally:
            self.process.send_signal(signal.SIGTERM)
            try:
                assert self.process.wait(20) == 0, self.log.read_text()
                assert "Traceback" not in self.log.read_text(), self.log.read_text()
            finally:
                self.process.kill()
                self.process.wait()

    def figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = json.loads(self.status.read_text())
        return figures

    def refused(self, reason: str) -> int:
        return int(self.figures()["refused"].get(reason, 0))

    @contextlib.contextmanager
    def counts(self, reason: str, times: int = 1) -> Iterator[None]:
        """The block makes the proxy count just so many refusals for a reason, and none for another."""
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


def read_reply(channel: ssl.SSLSocket) -> Reply:
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


class Flower:
    """A SuperLink and Flower's commands, in a Flower home of their own."""

    def __init__(self, folder: Path, keys: Keys) -> None:
        self.keys, self.folder, self.port = keys, folder, free_port()
        self.log = folder / "flower.log"
        home = folder / "flower"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{LINK}"\n[superlink.{LINK}]\naddress = "{HOST}:{self.port}"\n'
            f'root-certificates = "{keys.ca}"\n'
        )
        self.marker = f"FLWR_HOME={home}"
        self.environment = runtime.environment(
            PATH=f"{Path(sys.executable).parent}:{runtime.environment().get('PATH', '')}",
            FLWR_HOME=str(home),
            FLWR_TELEMETRY_ENABLED="0",
            FLWR_DISABLE_UPDATE_CHECK="1",
            FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
            PYTHONUNBUFFERED="1",
        )

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [str(Path(sys.executable).with_name(command[0])), *command[1:]],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @contextlib.contextmanager
    def running(self) -> Iterator[Flower]:
        keys = self.keys
        options = ["--ssl-ca-certfile", keys.ca, "--ssl-certfile", keys.certificate, "--ssl-keyfile", keys.key]
        process = self.start(
            "flower-superlink",
            *map(str, options),
            "--enable-supernode-auth",
            "--host",
            HOST,
            "--port",
            str(self.port),
        )
        try:
            wait_until(lambda: self.answers(process), 90, f"the SuperLink starts ({self.log})")
            yield self
        finally:
            stop_marked(process, self.marker, 3)

    def answers(self, process: subprocess.Popen[bytes]) -> bool:
        assert process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), timeout=1):
            return True
        return False

    def command(self, *arguments: str) -> dict[str, Any]:
        done = subprocess.run(
            [str(Path(sys.executable).with_name("flwr")), *arguments, "--format", "json"],
            cwd=self.folder,
            env=self.environment,
            text=True,
            capture_output=True,
            timeout=60,
            check=True,
        )
        answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        return answer

    def register(self, site: str) -> int:
        """Register a site's key, as the operator does, and return its node id."""
        answer = self.command("supernode", "register", str(self.keys.public_key(site)), LINK)
        return int(answer["node-id"])

    def nodes(self) -> dict[int, str]:
        """The status of each node."""
        return {int(node["node-id"]): node["status"] for node in self.command("supernode", "list", LINK)["nodes"]}


class Recorder:
    """Stands behind a proxy and writes down what arrives there; it takes every request at its word, as the proxy wrote it."""

    def __init__(self, port: int = 0) -> None:
        self.requests: list[tuple[bytes, bytes]] = []
        self.wait = 0.0  # seconds before an answer
        self.answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/protobuf\r\ncontent-length: 2\r\n\r\nok"
        self._listener = socket.create_server((HOST, port))
        self.port = int(self._listener.getsockname()[1])
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()

    def hang_up(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as file:
            while top := self._head(file):
                length = int(re.search(rb"content-length: (\d+)", top.lower())[1])  # type: ignore[index]
                self.requests.append((top, file.read(length)))
                time.sleep(self.wait)
                connection.sendall(self.answer)

    @staticmethod
    def _head(file: BinaryIO) -> bytes:
        lines = []
        while (line := file.readline()) not in (b"", b"\r\n"):
            lines.append(line)
        return b"".join(lines)
