"""The proxy as a process: listens, reads certificates and keys again when they change, says what it counted, ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import ssl
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

from nanofed import runtime
from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.deploy.keys import expiry_warning, read_certificate
from nanofed.federated.deploy.proxy.guard import Guard, Limits, Visitor
from nanofed.federated.deploy.proxy.relay import Relay, Upstream
from nanofed.federated.deploy.proxy.sites import Sites
from nanofed.federated.deploy.proxy.stream import Stream
from nanofed.files import write_atomically

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 1.0  # for the other side's part of ending TLS
GRACE_SECONDS = 5.0  # for requests under way when the proxy is told to end
DAY = 86400.0


@dataclass(frozen=True)
class Options:
    """How a proxy is started.

    Attributes:
        listen: host:port that faces the network; [host]:port for IPv6; port 0 takes a free one.
        upstream: host:port of the SuperLink.
        certificate: of the server.
        key: of the certificate.
        sites: folder of the sites' public keys, `NAME.pub`.
        upstream_ca: certificate of the authority that the SuperLink's certificate is of; None where it has no TLS, as in tests
            (Flower refuses node authentication then).
        status: file to which the counters are written at each tick, as JSON; none if left out.
        known: file in which the addresses of sites are kept; none if left out.
        parent: process id without which the proxy ends; none if left out.
        tick: seconds between two looks at files and parent.
        limits: what the proxy takes.
    """

    listen: str
    upstream: str
    certificate: Path
    key: Path
    sites: Path
    upstream_ca: Path | None = None
    status: Path | None = None
    known: Path | None = None
    parent: int | None = None
    tick: float = 1.0
    limits: Limits = field(default_factory=Limits)

    def command(self) -> list[str]:
        """Return the command that starts this proxy as a process."""
        options = []
        for name in (
            "listen",
            "upstream",
            "certificate",
            "key",
            "sites",
            "upstream_ca",
            "status",
            "known",
            "parent",
            "tick",
        ):
            if (value := getattr(self, name)) is not None:
                options += [f"--{name}", str(value)]
        for limit in fields(Limits):
            value = getattr(self.limits, limit.name)
            if value != limit.default:
                options += [f"--{limit.name}", str(value)]
        return runtime.python("-m", "nanofed.federated.deploy.proxy", *options)


class Proxy:
    """One listening proxy.

    Args:
        options: how it is started.

    Raises:
        ConfigError: a wrong address, or keys that are missing, damaged or ended.
        NanofedError: the address cannot be listened on.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.guard = Guard(options.limits, options.known)
        self._sites = Sites(options.sites)
        self._context = _server_context(options)
        host, port = parse_address(options.upstream)
        self._upstream = Upstream(host, port, _client_context(options))
        self._relay = Relay(self.guard, self._sites, self._upstream, options.limits)
        self._seen = self._state_of_files()
        self._warned = 0.0
        self._unwritten = ""  # why the counters cannot be written, where it was said
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener = _listen(*parse_address(options.listen))
        self.port = int(self._listener.getsockname()[1])

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set or the parent has gone."""
        accepting = asyncio.create_task(self._accept())
        logger.info("the proxy listens on %s, port %d, for %s", self.options.listen, self.port, self.options.upstream)
        try:
            while not stop.is_set() and not self._is_orphan():
                self._tick()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.options.tick):
                        await stop.wait()
                if accepting.done():
                    accepting.result()
        finally:
            accepting.cancel()
            self._listener.close()
            self._relay.end()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=GRACE_SECONDS)
            for task in self._tasks:
                task.cancel()
            self._upstream.close()
            self._write_status()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, peer = await loop.sock_accept(self._listener)
            except OSError as error:  # out of file handles, or gone before it was accepted
                logger.warning("a connection cannot be accepted: %s", error.strerror)
                await asyncio.sleep(0.1)
                continue
            visitor = self.guard.enter(peer[0])
            if visitor is None:
                connection.close()
                continue
            task = asyncio.create_task(self._serve(connection, visitor))
            self._tasks.add(task)
            self.guard.watch(task, visitor, task.cancel)
            task.add_done_callback(self.guard.forget)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket, visitor: Visitor) -> None:
        loop = asyncio.get_running_loop()
        stream: Stream | None = None
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _, stream = await loop.connect_accepted_socket(
                Stream,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=self.options.limits.handshake_seconds,
                ssl_shutdown_timeout=SHUTDOWN_SECONDS,
            )
            await self._relay.serve(stream, visitor)
        except (ssl.SSLError, OSError) as error:
            plain = isinstance(error, ssl.SSLError) and error.reason == "HTTP_REQUEST"
            self.guard.refuse("plain_http" if plain else "handshake", visitor, _reason(error))
        except Exception:  # a fault of ours must cost one connection only
            logger.exception("a connection of %s failed", visitor.name)
            self.guard.refuse("internal", visitor)
            if stream is not None:
                stream.abort()
        finally:
            self.guard.leave(visitor)

    def _tick(self) -> None:
        self._upstream.sweep()
        self._read_again()
        with contextlib.suppress(OSError):  # a full disk: as for the counters, which say so
            self.guard.keep_known()
        self._write_status()
        if time.monotonic() - self._warned > DAY or not self._warned:
            self._warned = time.monotonic()
            if warning := expiry_warning(self.options.certificate):
                logger.warning("%s", warning)

    def _is_orphan(self) -> bool:
        return self.options.parent is not None and os.getppid() != self.options.parent

    def _read_again(self) -> None:
        """Take over certificates and keys that were changed; what cannot be read is said, and an old certificate stays."""
        state = self._state_of_files()
        if state == self._seen:
            return
        self._seen = state
        self._relay.cut(self._sites.read())
        logger.info("the sites' keys are read again; sites: %s", ", ".join(self._sites.names()) or "none")
        try:
            context, upstream = _server_context(self.options), _client_context(self.options)
        except (NanofedError, OSError) as error:
            logger.error("the changed certificate is not taken over: %s", error)
            return
        self._context, self._upstream.context = context, upstream
        self._warned = 0.0

    def _state_of_files(self) -> tuple[tuple[str, int, int], ...]:
        options = self.options
        state = []
        for path in (options.certificate, options.key, options.upstream_ca, *sorted(options.sites.glob("*.pub"))):
            if path is None:
                continue
            with contextlib.suppress(OSError):
                stat = path.stat()
                state.append((path.name, stat.st_mtime_ns, stat.st_ino))
        return tuple(state)

    def _write_status(self) -> None:
        if self.options.status is None:
            return
        figures = {**self.guard.figures(), "port": self.port, "pid": os.getpid(), "written": round(time.time(), 3)}
        with contextlib.suppress(ConfigError):  # just being replaced
            ends = read_certificate(self.options.certificate).not_valid_after_utc
            figures["certificate_ends"] = ends.isoformat()
        try:
            write_atomically(self.options.status, json.dumps(figures))
            self._unwritten = ""
        except OSError as error:  # a full disk must not end the proxy
            if self._unwritten != str(error):
                self._unwritten = str(error)
                logger.warning("the proxy's counters cannot be written to %s: %s", self.options.status, error.strerror)


def parse_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port` or `[host]:port`.

    Raises:
        ConfigError: it is neither.
    """
    host, _, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or (":" in bare) != (bare != host) or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{address!r:.80} is no address: host:port, or [host]:port for IPv6")
    return bare, int(port)


def serve(options: Options) -> None:
    """Run a proxy in this process until SIGTERM, SIGINT or the end of its parent.

    Raises:
        ConfigError: see `Proxy`.
        NanofedError: see `Proxy`.
    """

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await Proxy(options).run(stop)

    asyncio.run(run())


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and host == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # IPv4 too
        listener.bind(address)
        listener.listen(512)
        listener.setblocking(False)
    except OSError as error:
        raise NanofedError(f"the proxy cannot listen on {host}, port {port}: {error.strerror}") from error
    return listener


def _server_context(options: Options) -> ssl.SSLContext:
    if warning := expiry_warning(options.certificate, 0):
        raise ConfigError(warning)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(options.certificate, options.key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"{options.certificate} and {options.key} do not go together: {_reason(error)}") from error
    return context


def _client_context(options: Options) -> ssl.SSLContext | None:
    if options.upstream_ca is None:
        return None
    try:
        return ssl.create_default_context(cafile=str(options.upstream_ca))
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"{options.upstream_ca} cannot be read as a certificate: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    return str(getattr(error, "reason", None) or error.strerror or error)
