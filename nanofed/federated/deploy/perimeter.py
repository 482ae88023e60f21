"""What faces the network: the SuperLink's application behind TLS, for the calls of registered sites and nothing else.

A SuperLink answers three APIs on one port: Fleet (the sites'), Control (submit a run: have code run on every site) and Runtime
(the ServerApp's). It parses bodies before it knows who sent them, and takes a signature again within 310 seconds. So it is served
whole on loopback only; on the public address, TLS ends here, and each request is checked before Flower sees it.

What is covered, and by what:

- Eavesdropping and meddling on the way: TLS 1.2 or later, with a certificate of the federation's own authority (`keys.py`).
- Strangers: each request carries a site's public key and its signature over a time (Flower's SuperNode authentication); key,
  time and signature are checked here, before the body is read, and once more by Flower. A site whose `NAME.pub` is taken away is
  refused within seconds.
- Replays: a signature counts once (`signatures.py`). It covers a time only, not the path or the body, so this matters only where
  TLS was broken or a site leaks its own traffic. What was signed before the perimeter began is refused, since it cannot know
  whether it was used. Flower signs each attempt of a call anew, so nobody who retries is refused; what is refused for this is
  told to try again (503).
- Control and Runtime calls, documentation, registering by oneself: not among the twelve paths that are answered, letter by
  letter.
- Ambiguous requests: one strict parser (h11) reads them; chunked bodies, upgrades, HTTP other than 1.1 and headers that stand
  twice are refused, and Flower sees known headers only.
- Exhaustion: bytes of a head and a body, seconds of a handshake, a head, a body and an idle connection, connections in all and an
  address, handshakes and requests a second and an address, bytes of a site's bodies at a time (`admission.py`).

What is not:

- A site that is trusted and lies. It holds a valid key; which calls it may make is decided by `fleet_rules.py`, and what it sends
  is checked by `server/validation.py`.
- A stolen site key, until its file is taken away. A stolen authority: everything.
- A flood that fills the line or comes from very many addresses.
- Whoever may run processes as this user on the server's machine, or reaches its loopback: Control needs no credentials there.
- What the sites can learn: TLS ends here, the server reads every update. There is no secure aggregation, no differential privacy.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.deploy.admission import Admission, Limits, Visitor
from nanofed.federated.deploy.keys import Keys, expiry_warning
from nanofed.federated.deploy.signatures import RefusedRequest, Signatures
from nanofed.federated.wire.weights_calls import LENGTH, OBJECT, OCTETS, OFFSET, PULL, PUSH
from nanofed.files import write_atomically

logger = logging.getLogger(__name__)

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Application = Callable[[Event, Receive, Send], Awaitable[None]]

# What FleetHttpClient of Flower calls with a key that the operator has registered (`register-node` and `unregister-node` are for
# SuperNodes without one), and our own two, which move weights in pieces of 16 MB.
PROTOBUF = "application/protobuf"
FLEET = "activate-node deactivate-node send-node-heartbeat pull-messages push-messages get-run get-fab push-object pull-object"
CALLS = {f"/v1/fleet/{call}": PROTOBUF for call in [*FLEET.split(), "confirm-message-received"]} | {
    PULL: OCTETS,
    PUSH: OCTETS,
}
LARGE = ("/v1/fleet/push-object", PUSH)  # calls whose bodies may be large
OTHERS = {b"control": "control_call", b"runtime": "runtime_call", b"register-node": "registration"}
PASSED = (b"accept", b"content-type", b"content-length", *(name.encode() for name in (OBJECT, OFFSET, LENGTH)))
FLOWER = b"flwr-"  # what its own headers begin with, which are passed too
NEVER = (b"upgrade", b"expect", b"trailer", b"te", b"http2-settings", b"content-encoding")
PATIENCE = 1.0  # seconds that a request over the rate may wait
LINGER_SECONDS = 1.0  # to read on after a refusal: closed with bytes unread, a connection is reset, the answer lost
SHUTDOWN_SECONDS = 1.0  # for the other side's part of ending TLS
GRACE_SECONDS = 3  # for requests under way at the end
PART_BYTES = 256 << 10  # of an answer, between two looks whether the site takes it
WARN_SECONDS = 86400.0  # between two warnings that the certificate ends soon
PARENT = os.getppid()  # on import, right after the start: it lives then


def check(scope: Event, limits: Limits) -> dict[bytes, bytes]:
    """Return the headers of a request that is one of the fleet's calls, written as they are.

    Raises:
        RefusedRequest: it is not.
    """
    if scope["http_version"] != "1.1":
        raise RefusedRequest("http_version", HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "only HTTP/1.1 is spoken here")
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    call = target.decode("latin-1")
    if call not in CALLS:
        reason = next((reason for part, reason in OTHERS.items() if part in target.lower()), "other_path")
        raise RefusedRequest(
            reason, HTTPStatus.NOT_FOUND, "only the fleet's calls of a registered SuperNode are answered"
        )
    if scope["method"] != "POST":
        raise RefusedRequest("method", HTTPStatus.METHOD_NOT_ALLOWED, "the fleet's calls are POST")
    if sum(len(name) + len(value) for name, value in scope["headers"]) > limits.head:
        raise _large_head(limits)
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name == b"transfer-encoding":
            raise RefusedRequest(
                "chunked", HTTPStatus.LENGTH_REQUIRED, "a body needs a Content-Length, not this encoding"
            )
        if name in NEVER or name in headers:
            detail = f"the header {name.decode()!r:.80} is not taken, or stands there twice"
            raise RefusedRequest("header", HTTPStatus.BAD_REQUEST, detail)
        headers[name] = value
    length = headers.get(b"content-length", b"")
    if not (length.isdigit() and len(length) <= 15):
        raise RefusedRequest("length", HTTPStatus.LENGTH_REQUIRED, "a body needs a Content-Length")
    most = limits.body if call in LARGE else limits.small_body
    if int(length) > most:
        detail = f"a body of {int(length)} bytes is more than the {most} that {call} may have"
        raise RefusedRequest("body_too_large", HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)
    if headers.get(b"content-type", b"").lower() != CALLS[call].encode():
        raise RefusedRequest("content_type", HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"a body is {CALLS[call]}")
    return headers


def _large_head(limits: Limits) -> RefusedRequest:
    detail = f"a head is at most {limits.head} bytes"
    return RefusedRequest("head_too_large", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, detail)


class Connection(H11Protocol):
    """A site's connection: uvicorn's, which waits for no head longer than it may take, and says why it refuses a request.

    Args:
        perimeter: The perimeter that accepted the connection.
        visitor: The address from which the site connects.
    """

    def __init__(self, perimeter: Perimeter, visitor: Visitor) -> None:
        super().__init__(perimeter.config, perimeter.state, {})
        self.app = functools.partial(perimeter.answer, self)
        self.visitor, self.closed = visitor, self.loop.create_future()
        self.site = ""  # which has called
        self._limits, self._admission = perimeter.limits, perimeter.admission
        self._head: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first head."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Parse what has come; the time of a head begins with its first byte."""
        if self._refused:
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._head is None:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go whoever waits for the end."""
        super().connection_lost(exc)
        self._forget_head()
        if not self.closed.done():
            self.closed.set_result(None)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or more of it than a head may have."""
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:
            self._refused = True  # in a chunked body, which is being refused
            return
        error = sys.exception()
        large = getattr(error, "error_status_hint", 0) == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        malformed = RefusedRequest("malformed", HTTPStatus.BAD_REQUEST, f"no HTTP: {error}")
        self.refuse(_large_head(self._limits) if large else malformed)

    def refuse(self, refused: RefusedRequest) -> None:
        """Answer in the form of Flower's own errors, and end; what else was sent is passed over."""
        self._refused = True
        self._forget_head()
        self._admission.refuse(refused.reason, self.visitor, refused.detail)
        body = json.dumps({"code": int(refused.status), "detail": f"nanofed's perimeter: {refused.detail}"}).encode()
        lines = [
            f"HTTP/1.1 {refused.status:d} {refused.status.phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
        ]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        if self.cycle is not None:
            self.cycle.disconnected = True  # to uvicorn: nobody waits for another answer
        self.flow.resume_reading()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _await_head(self) -> None:
        self._head = self.loop.call_later(self._limits.head_seconds, self._head_is_late)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _head_is_late(self) -> None:
        if self.conn.trailing_data[0]:
            self.refuse(RefusedRequest("slow_head", HTTPStatus.REQUEST_TIMEOUT, "the head takes too long"))
        else:
            self._admission.refuse("silent", self.visitor)
            self.transport.close()


class Perimeter:
    """The public address of an application.

    Args:
        app: The ASGI application that answers a request that has passed.
        listen: The public host and port; port 0 takes a free one.
        keys: The federation's keys and certificate, whose files are read again when they change.
        folder: The folder for the counters (`perimeter.json`) and the sites' addresses (`perimeter.addresses.json`).
        limits: The sizes, rates and times that are allowed; None takes the defaults of `Limits`.
        tick: The seconds between two looks at the key files, and between two writings of the counters.

    Raises:
        ConfigError: The certificate or its key is missing, damaged or past its end.
        NanofedError: The address cannot be listened on.
    """

    def __init__(
        self,
        app: Application,
        listen: tuple[str, int],
        keys: Keys,
        folder: Path,
        limits: Limits | None = None,
        tick: float = 1.0,
    ) -> None:
        self.limits = limits = limits or Limits()
        self.admission = Admission(limits, folder / "perimeter.addresses.json")
        self.config = uvicorn.Config(
            app,
            ws="none",
            lifespan="off",
            log_config=None,
            server_header=False,
            timeout_keep_alive=limits.idle_seconds,  # type: ignore[arg-type]  # it takes parts of a second
            h11_max_incomplete_event_size=limits.head,
        )
        self._app, self._keys, self._tick, self._status = app, keys, tick, folder / "perimeter.json"
        self._signatures = Signatures(keys.sites)
        self._context = _context(keys)
        self._files = self._state_of_files()
        self._under_way: Counter[str] = Counter()  # bytes of bodies, by site
        self._tasks: set[asyncio.Task[None]] = set()  # one for each connection
        self._listener = _listen(*listen)
        self.port = int(self._listener.getsockname()[1])
        self._warned = -WARN_SECONDS
        self._unwritten = ""  # why the counters cannot be written, where it was said

    def open(self, state: ServerState) -> None:
        """Begin to serve, in the running event loop, as a part of uvicorn's server whose state is given."""
        self.state = state
        self._running = [asyncio.create_task(work()) for work in (self._accept, self._keep)]
        logger.info("sites are served on port %d: %s", self.port, ", ".join(self._keys.names()) or "none yet")

    def close(self) -> None:
        """Listen no more; uvicorn's server ends the connections."""
        for task in self._running:
            task.cancel()
        self._listener.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                channel, peer = await loop.sock_accept(self._listener)
            except OSError as error:  # out of file handles, or gone before it was accepted
                logger.warning("a connection cannot be accepted: %s", error.strerror)
                await asyncio.sleep(0.1)
                continue
            visitor = self.admission.enter(peer[0])
            if visitor is None:
                channel.close()
                continue
            connection = Connection(self, visitor)
            task = asyncio.create_task(self._connect(channel, connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            self.admission.watch(connection, visitor, task.cancel)

    async def _connect(self, channel: socket.socket, connection: Connection) -> None:
        """Shake hands on a connection, and wait for its end."""
        visitor = connection.visitor
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                channel,
                ssl=self._context,
                ssl_handshake_timeout=self.limits.handshake_seconds,
                ssl_shutdown_timeout=SHUTDOWN_SECONDS,
            )
            await connection.closed
        except OSError as error:  # of TLS, too
            reason = str(getattr(error, "reason", None) or error.strerror or error)
            self.admission.refuse("plain_http" if reason == "HTTP_REQUEST" else "handshake", visitor, reason)
        finally:
            if connection.transport is not None:  # there was a handshake
                connection.transport.close()
            self.admission.forget(connection)
            self.admission.leave(visitor)

    async def answer(self, connection: Connection, scope: Event, receive: Receive, send: Send) -> None:
        """Answer one request of a connection: the application's ASGI interface, behind all checks."""
        try:
            if (wait := connection.visitor.requests.take(PATIENCE)) is None:
                detail = "too many requests from this address: slow down"
                raise RefusedRequest("request_rate", HTTPStatus.SERVICE_UNAVAILABLE, detail)
            await asyncio.sleep(wait)
            headers = check(scope, self.limits)
            site = connection.site = self._signatures.identify(headers)
            self.admission.know(connection.visitor, site)
            self.admission.forget(connection)
            length = int(headers[b"content-length"])
            if self._under_way[site] + length > self.limits.site_bytes:
                raise RefusedRequest("site_bytes", HTTPStatus.SERVICE_UNAVAILABLE, f"{site} sends too much at a time")
            passed = [(name, value) for name, value in headers.items() if name in PASSED or name.startswith(FLOWER)]
            self._under_way[site] += length
            try:
                body = [await self._body(receive, length)]
                await self._pass(connection, {**scope, "headers": passed}, body, receive, send)
            finally:
                self._under_way[site] -= length
        except RefusedRequest as refused:
            connection.refuse(refused)

    async def _body(self, receive: Receive, length: int) -> bytes:
        parts = []
        try:
            async with asyncio.timeout(self.limits.body_seconds(length)):
                while (event := await receive())["type"] == "http.request":
                    parts.append(event["body"])
                    if not event["more_body"]:
                        return b"".join(parts)
        except TimeoutError:
            raise RefusedRequest("slow_body", HTTPStatus.REQUEST_TIMEOUT, "the body takes too long") from None
        raise RefusedRequest(
            "broken_off", HTTPStatus.BAD_REQUEST, "the body is not whole"
        )  # which nobody reads any more

    async def _pass(
        self, connection: Connection, scope: Event, waiting: list[bytes], receive: Receive, send: Send
    ) -> None:
        """Let the application answer a request, and count it once the site has taken the answer."""
        up, down, deadline = len(waiting[0]), 0, 0.0

        async def receive_body() -> Event:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False} if waiting else await receive()

        async def send_parts(event: Event) -> None:
            nonlocal down, deadline
            if event["type"] == "http.response.start":
                length = int(dict(event["headers"]).get(b"content-length", b"0"))
                deadline = connection.loop.time() + self.limits.body_seconds(length)
                await send(event)
                return
            content = memoryview(event.get("body", b""))
            try:
                async with asyncio.timeout_at(deadline):
                    for start in range(0, len(content), PART_BYTES):
                        await send({**event, "body": bytes(content[start : start + PART_BYTES]), "more_body": True})
                    await send({**event, "body": b""})
            except TimeoutError:
                self.admission.refuse("slow_reader", connection.visitor)
                connection.transport.abort()
                return
            down += len(content)
            if not event.get("more_body") and not connection.closed.done():
                self.admission.count(connection.site, scope["path"].rpartition("/")[2], up, down)

        await self._app(scope, receive_body, send_parts)

    async def _keep(self) -> None:
        """Follow the files of keys, and say what was counted."""
        while True:
            self._read_again()
            with contextlib.suppress(OSError):  # a full disk: as for the counters, which say so
                self.admission.keep_known()
            self._write_status()
            if time.monotonic() - self._warned >= WARN_SECONDS:
                self._warned = time.monotonic()
                with contextlib.suppress(ConfigError):  # just being replaced
                    if warning := expiry_warning(self._keys.certificate):
                        logger.warning("%s", warning)
            await asyncio.sleep(self._tick)

    def _read_again(self) -> None:
        """Take over certificates and keys that were changed; what cannot be read is said, and an old certificate stays."""
        if (files := self._state_of_files()) == self._files:
            return
        self._files = files
        gone = self._signatures.read()
        for site in gone:
            self.admission.forget_site(site)  # its addresses are a stranger's
        for connection in list(self.state.connections):
            if isinstance(connection, Connection) and connection.site in gone:
                connection.transport.abort()
        try:
            self._context = _context(self._keys)
        except (NanofedError, OSError) as error:
            logger.error("the changed certificate is not taken over: %s", error)
            return
        self._warned = -WARN_SECONDS

    def _state_of_files(self) -> list[tuple[str, int, int]]:
        state = []
        for path in (self._keys.certificate, self._keys.key, *sorted(self._keys.sites.glob("*.pub"))):
            with contextlib.suppress(OSError):
                found = path.stat()
                state.append((path.name, found.st_mtime_ns, found.st_ino))
        return state

    def _write_status(self) -> None:
        figures = {**self.admission.figures(), "port": self.port, "pid": os.getpid(), "written": round(time.time(), 3)}
        with contextlib.suppress(ConfigError):  # just being replaced
            figures["certificate_ends"] = self._keys.expiry().isoformat()
        try:
            write_atomically(self._status, json.dumps(figures))
            self._unwritten = ""
        except OSError as error:  # a full disk must not end the perimeter
            if self._unwritten != str(error):
                self._unwritten = str(error)
                logger.warning("the perimeter's counters cannot be written to %s: %s", self._status, error.strerror)


class Server(uvicorn.Server):
    """uvicorn on loopback, and a perimeter on the public address beside it; both end with the process's parent.

    Args:
        config: uvicorn's configuration of the application that is served on loopback.
        perimeter: The perimeter on the public address; None where nothing may come from the network.
    """

    def __init__(self, config: uvicorn.Config, perimeter: Perimeter | None) -> None:
        config.timeout_graceful_shutdown = GRACE_SECONDS
        super().__init__(config)
        self._perimeter = perimeter

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin on loopback, then on the public address."""
        await super().startup(sockets)
        if self.started and self._perimeter is not None:
            self._perimeter.open(self.server_state)

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end."""
        return await super().on_tick(counter) or os.getppid() != PARENT

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and end those that are there, of both addresses."""
        if self._perimeter is not None:
            self._perimeter.close()
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=512, dualstack_ipv6=host == "::")
    except OSError as error:
        raise NanofedError(f"cannot listen on {host}, port {port}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


def _context(keys: Keys) -> ssl.SSLContext:
    if warning := expiry_warning(keys.certificate, 0):
        raise ConfigError(warning)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(keys.certificate, keys.key)
    except OSError as error:  # of TLS, too
        reason = getattr(error, "reason", None) or error.strerror or error
        raise ConfigError(f"{keys.certificate} and {keys.key} do not go together: {reason}") from error
    return context
