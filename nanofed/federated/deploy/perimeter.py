"""What faces the network: the SuperLink's application behind TLS, for the calls of registered sites and nothing else.

A SuperLink answers three APIs on one port: Fleet (the sites'), Control (submit a run: have code run on every site) and Runtime
(the ServerApp's). It parses bodies before it knows who sent them, and takes a signature again within 310 seconds. So it is served
whole on loopback only; on the public address, TLS 1.2 or later ends here, and each request is checked before Flower sees it:

- It is one of twelve calls, letter by letter, as HTTP/1.1 that can be read in one way only: one strict parser (h11) reads it;
  chunked bodies, upgrades and headers that stand twice are refused, and Flower sees known headers only.
- A registered site has signed it with its key (Flower's SuperNode authentication), and a signature counts once (`signatures.py`).
  Flower signs each attempt of a call anew, so what is refused for this is told to try again (503).
- Its size and its seconds are bounded, and the requests and connections of its address (`Limits`).

What a site with a valid key may call is decided by `fleet_rules.py`, and what it sends is checked by `server/validation.py`. Not
covered are a stolen key, until its file is taken away; a flood that fills the line, or of TLS handshakes that are begun and not
ended (README.md says what can be put in front); and whoever reaches the server's loopback, where Control needs no credentials.
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
from pathlib import Path
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.deploy.admission import LOG_SECONDS, Admission, Limits, Throttle, address_of
from nanofed.federated.deploy.keys import Keys
from nanofed.federated.deploy.signatures import RefusedRequest, Signatures
from nanofed.federated.wire.weights_calls import LENGTH, OBJECT, OCTETS, OFFSET, PULL, PUSH
from nanofed.files import write_atomically

logger = logging.getLogger(__name__)

# What FleetHttpClient of Flower calls with a key that the operator has registered (`register-node` and `unregister-node` are for
# SuperNodes without one), and our own two, which move weights in pieces of 16 MB.
PROTOBUF = "application/protobuf"
FLEET = (
    "activate-node deactivate-node send-node-heartbeat get-run get-fab "
    "pull-messages push-messages confirm-message-received pull-object push-object"
)
CALLS = {f"/v1/fleet/{call}": PROTOBUF for call in FLEET.split()} | {PULL: OCTETS, PUSH: OCTETS}
LARGE = ("/v1/fleet/push-object", PUSH)  # calls whose bodies may be large
OTHERS = {b"control": "control_call", b"runtime": "runtime_call", b"register-node": "registration"}
PASSED = (b"accept", b"content-type", b"content-length", *(name.encode() for name in (OBJECT, OFFSET, LENGTH)))
FLOWER = b"flwr-"  # what its own headers begin with, which are passed too
NEVER = (b"upgrade", b"expect", b"trailer", b"te", b"http2-settings", b"content-encoding")
PATIENCE = 1.0  # seconds that a request over the rate may wait
LINGER_SECONDS = 1.0  # to read on after a refusal: closed with bytes unread, a connection is reset, the answer lost
BACKLOG = 512  # connections that wait to be accepted
SHUTDOWN_SECONDS = 1.0  # for the other side's part of ending TLS
GRACE_SECONDS = 3  # for requests under way at the end
PART_BYTES = 256 << 10  # of an answer, between two looks whether the site takes it
WARN_SECONDS = 86400.0  # between two warnings that the certificate ends soon
PARENT = os.getppid()  # on import, right after the start: it lives then


def check(scope: Scope, limits: Limits) -> dict[bytes, bytes]:
    """Return the headers of a request that is one of the fleet's calls, written as they are.

    Raises:
        RefusedRequest: it is not.
    """
    if scope["http_version"] != "1.1":
        raise RefusedRequest("http_version", 505, "only HTTP/1.1 is spoken here")
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    call = target.decode("latin-1")
    if call not in CALLS:
        reason = next((reason for part, reason in OTHERS.items() if part in target.lower()), "other_path")
        raise RefusedRequest(reason, 404, "only the fleet's calls of a registered SuperNode are answered")
    if scope["method"] != "POST":
        raise RefusedRequest("method", 405, "the fleet's calls are POST")
    if sum(len(name) + len(value) for name, value in scope["headers"]) > limits.head:
        raise _large_head(limits)
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name == b"transfer-encoding":
            raise RefusedRequest("chunked", 411, "a body needs a Content-Length, not this encoding")
        if name in NEVER or name in headers:
            detail = f"the header {name.decode()!r:.80} is not taken, or stands there twice"
            raise RefusedRequest("header", 400, detail)
        headers[name] = value
    length = headers.get(b"content-length", b"")
    if not (length.isdigit() and len(length) <= 15):
        raise RefusedRequest("length", 411, "a body needs a Content-Length")
    most = limits.body if call in LARGE else limits.small_body
    if int(length) > most:
        detail = f"a body of {int(length)} bytes is more than the {most} that {call} may have"
        raise RefusedRequest("body_too_large", 413, detail)
    if headers.get(b"content-type", b"").lower() != CALLS[call].encode():
        raise RefusedRequest("content_type", 415, f"a body is {CALLS[call]}")
    return headers


def _large_head(limits: Limits) -> RefusedRequest:
    return RefusedRequest("head_too_large", 431, f"a head is at most {limits.head} bytes")


class Connection(H11Protocol):
    """A site's connection: uvicorn's, which waits for no head longer than it may take, and says why it refuses a request.

    Args:
        perimeter: The perimeter that accepted the connection.
    """

    def __init__(self, perimeter: Perimeter) -> None:
        super().__init__(perimeter.config, perimeter.state, {})
        self.app = functools.partial(perimeter.answer, self)
        self.address = ""
        self.site = ""  # which has called
        self._perimeter = perimeter
        self._head: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first head, after TLS's handshake."""
        super().connection_made(transport)
        self.address = address_of(transport.get_extra_info("peername")[0])
        self._await_head()
        self._perimeter.enter(self)

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
        """Make room for another connection."""
        super().connection_lost(exc)
        self._forget_head()
        self._perimeter.connections.pop(self, None)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or more of it than a head may have."""
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:
            self._refused = True  # in a chunked body, which is being refused
            return
        error = sys.exception()
        large = getattr(error, "error_status_hint", 0) == 431
        malformed = RefusedRequest("malformed", 400, f"no HTTP: {error}")
        self.refuse(_large_head(self._perimeter.limits) if large else malformed)

    def refuse(self, refused: RefusedRequest) -> None:
        """Answer in the form of Flower's own errors, and end; what else was sent is passed over."""
        self._refused = True
        self._forget_head()
        self._perimeter.admission.refuse(refused.reason, self.address, refused.detail)
        body = json.dumps({"code": int(refused.status), "detail": f"nanofed's perimeter: {refused.detail}"}).encode()
        head = (
            f"HTTP/1.1 {refused.status:d} {refused.status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        if self.cycle is not None:
            self.cycle.disconnected = True  # to uvicorn: nobody waits for another answer
        self.flow.resume_reading()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _await_head(self) -> None:
        self._head = self.loop.call_later(self._perimeter.limits.head_seconds, self._head_is_late)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _head_is_late(self) -> None:
        if self.conn.trailing_data[0]:
            self.refuse(RefusedRequest("slow_head", 408, "the head takes too long"))
        else:
            self._perimeter.admission.refuse("silent", self.address)
            self.transport.close()


class Perimeter:
    """The public address of an application.

    Args:
        app: The ASGI application that answers a request that has passed.
        listen: The public host and port; port 0 takes a free one.
        keys: The federation's keys and certificate, whose files are read again when they change.
        folder: The folder for the counters (`perimeter.json`).
        limits: The sizes, rates and times that are allowed; None takes the defaults of `Limits`.
        tick: The seconds between two looks at the key files, and between two writings of the counters.

    Raises:
        ConfigError: The certificate or its key is missing, damaged or past its end.
        NanofedError: The address cannot be listened on.
    """

    def __init__(
        self,
        app: ASGIApp,
        listen: tuple[str, int],
        keys: Keys,
        folder: Path,
        limits: Limits | None = None,
        tick: float = 1.0,
    ) -> None:
        self.limits = limits = limits or Limits()
        self.admission = Admission(limits)
        self.connections: dict[Connection, None] = {}  # in the order in which they came
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
        self._files = self._read_certificate()
        self._under_way: Counter[str] = Counter()  # bytes of bodies, by site
        self._listener = _listen(*listen)
        self.port = int(self._listener.getsockname()[1])
        self._warnings, self._faults = Throttle(WARN_SECONDS), Throttle(LOG_SECONDS)

    async def open(self, state: ServerState) -> asyncio.Server:
        """Begin to serve, in the running event loop, as a part of uvicorn's server whose state is given."""
        self.state = state
        self._keeper = asyncio.create_task(self._keep())
        server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self),
            sock=self._listener,
            backlog=BACKLOG,
            ssl=self._context,
            ssl_handshake_timeout=self.limits.handshake_seconds,
            ssl_shutdown_timeout=SHUTDOWN_SECONDS,
        )
        logger.info("sites are served on port %d: %s", self.port, ", ".join(self._keys.names()) or "none yet")
        return server

    def enter(self, connection: Connection) -> None:
        """Let a connection in, or end it where there are too many, all of which sites have called on."""
        neighbours = [other for other in self.connections if other.address == connection.address]
        if not self._make_room(neighbours, self.limits.address_connections):
            reason = "address_connections"
        elif not self._make_room(list(self.connections), self.limits.connections):
            reason = "connections"
        else:
            self.connections[connection] = None
            return
        self.admission.refuse(reason, connection.address)
        connection.transport.abort()

    def _make_room(self, others: list[Connection], most: int) -> bool:
        """Tell whether there is room beside others; the oldest of them on which no site has called gives way."""
        if len(others) < most:
            return True
        silent = next((other for other in others if not other.site), None)
        if silent is None:
            return False
        del self.connections[silent]
        self.admission.refuse("silent", silent.address, "another connection needed its place")
        silent.transport.abort()
        return True

    async def answer(self, connection: Connection, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request of a connection: the application's ASGI interface, behind all checks."""
        try:
            if (wait := self.admission.requests(connection.address).take(PATIENCE)) is None:
                detail = "too many requests from this address: slow down"
                raise RefusedRequest("request_rate", 503, detail)
            await asyncio.sleep(wait)
            headers = check(scope, self.limits)
            site = connection.site = self._signatures.identify(headers)
            length = int(headers[b"content-length"])
            if self._under_way[site] + length > self.limits.site_bytes:
                raise RefusedRequest("site_bytes", 503, f"{site} sends too much at a time")
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
            raise RefusedRequest("slow_body", 408, "the body takes too long") from None
        raise RefusedRequest("broken_off", 400, "the body is not whole")  # which nobody reads any more

    async def _pass(
        self, connection: Connection, scope: Scope, waiting: list[bytes], receive: Receive, send: Send
    ) -> None:
        """Let the application answer a request, and count it once the site has taken the answer."""
        up, down, deadline = len(waiting[0]), 0, 0.0

        async def receive_body() -> Message:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False} if waiting else await receive()

        async def send_parts(event: Message) -> None:
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
                self.admission.refuse("slow_reader", connection.address)
                connection.transport.abort()
                return
            down += len(content)
            if not event.get("more_body") and connection in self.connections:
                self.admission.count(connection.site, scope["path"].rpartition("/")[2], up, down)

        await self._app(scope, receive_body, send_parts)

    async def _keep(self) -> None:
        """Follow the files of keys, and say what was counted, through errors: there is another look."""
        while True:
            try:
                gone = self._signatures.read()
                for connection in self.connections:
                    if connection.site in gone:
                        connection.transport.abort()
                self._renew_certificate()
                # In a thread: a disk that is busy must not hold connections up.
                await asyncio.to_thread(self._write_status, self._figures())
            except Exception as error:  # no file handle left, a network disk that is away
                if self._faults.due(self._keys.folder):
                    logger.error("the files of keys cannot be followed just now: %s", error)
            await asyncio.sleep(self._tick)

    def _renew_certificate(self) -> None:
        """Take a changed certificate over; where it cannot be used, that is said, and the old one stays."""
        if (files := self._read_certificate()) == self._files:
            return
        self._files = files
        try:
            _context(self._keys)  # or a key that does not fit would spoil the context that is served with
            self._context.load_cert_chain(self._keys.certificate, self._keys.key)
        except (NanofedError, OSError) as error:
            logger.error("the changed certificate is not taken over: %s", error)

    def _read_certificate(self) -> list[bytes]:
        """Return what the files of certificate and key hold; nothing while they are missing."""
        with contextlib.suppress(OSError):
            return [path.read_bytes() for path in (self._keys.certificate, self._keys.key)]
        return []

    def _figures(self) -> dict[str, Any]:
        figures = {**self.admission.figures(), "connections": len(self.connections), "port": self.port}
        figures |= {"pid": os.getpid(), "written": round(time.time(), 3)}
        with contextlib.suppress(ConfigError):  # just being replaced
            figures["certificate_ends"] = self._keys.expiry().isoformat()
            if (warning := self._keys.warning()) and self._warnings.due(self._keys.certificate):
                logger.warning("%s", warning)
        return figures

    def _write_status(self, figures: dict[str, Any]) -> None:
        try:
            write_atomically(self._status, json.dumps(figures))
        except OSError as error:  # a full disk must not end the perimeter
            if self._faults.due(self._status):
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
            self.servers.append(await self._perimeter.open(self.server_state))

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end."""
        return await super().on_tick(counter) or os.getppid() != PARENT


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=host == "::")
    except OSError as error:
        raise NanofedError(f"cannot listen on {host}, port {port}: {error.strerror}") from error


def _context(keys: Keys) -> ssl.SSLContext:
    if ended := keys.warning(0):
        raise ConfigError(ended)
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
