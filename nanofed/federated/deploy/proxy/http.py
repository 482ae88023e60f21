"""HTTP as Flower's SuperNodes speak it, and nothing more: what a head may say, and how it is passed on.

Heads are parsed by h11, which keeps to RFC 9112, and written anew from what it understood; bodies are counted and passed as they
are. (h11 could parse bodies too, but it copies each byte twice more.)
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus

import h11

from nanofed.federated.wire.weights_calls import LENGTH, OBJECT, OCTETS, OFFSET, PULL, PUSH

LARGE, SMALL = "large", "small"
# What FleetHttpClient of Flower calls with a key that the operator has registered (`register-node` and `unregister-node` are for
# SuperNodes without one), and our own two, which move weights in pieces of 16 MB.
CALLS = {
    b"/v1/fleet/activate-node": SMALL,
    b"/v1/fleet/deactivate-node": SMALL,
    b"/v1/fleet/send-node-heartbeat": SMALL,
    b"/v1/fleet/pull-messages": SMALL,
    b"/v1/fleet/push-messages": SMALL,
    b"/v1/fleet/get-run": SMALL,
    b"/v1/fleet/get-fab": SMALL,
    b"/v1/fleet/push-object": LARGE,
    b"/v1/fleet/pull-object": SMALL,
    b"/v1/fleet/confirm-message-received": SMALL,
    PULL.encode(): SMALL,
    PUSH.encode(): LARGE,
}
PROTOBUF = b"application/protobuf"
CONTENT = {PULL.encode(): OCTETS.encode(), PUSH.encode(): OCTETS.encode()}  # of all others, PROTOBUF
PASSED = (
    b"accept",
    b"content-type",
    *(name.encode() for name in (OBJECT, OFFSET, LENGTH)),
)  # and Flower's own, which begin with:
FLOWER = b"flwr-"
NEVER = (b"upgrade", b"expect", b"trailer", b"te", b"http2-settings", b"content-encoding")
OTHERS = {b"control": "control_call", b"runtime": "runtime_call", b"register-node": "registration"}


class Refused(Exception):
    """A request is not passed on.

    Args:
        reason: under which it is counted.
        status: of the answer. Flower's client tries again after 502, 503 and 504, ends its SuperNode after 401, and after 403
            thinks that the run has ended.
        detail: for whoever reads the site's log.
    """

    def __init__(self, reason: str, status: HTTPStatus, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.status, self.detail = reason, status, detail


@dataclass(frozen=True)
class Request:
    """A head that may be passed on.

    Attributes:
        path: one of `CALLS`.
        headers: name and value of those that are passed, each once.
        length: bytes of the body.
        last: the client will send no other request on this connection.
    """

    path: bytes
    headers: dict[bytes, bytes]
    length: int
    last: bool

    def head(self, host: bytes) -> tuple[h11.Connection, bytes]:
        """Return the head for the upstream, and the parser of its answer."""
        headers = [(b"host", host), *self.headers.items(), (b"content-length", b"%d" % self.length)]
        parser = h11.Connection(h11.CLIENT)
        head = parser.send(h11.Request(method=b"POST", target=self.path, headers=headers))
        assert head is not None
        return parser, head


def parse(head: bytes, large: int, small: int) -> Request:
    """Return what a head asks for.

    Args:
        head: up to and with the empty line.
        large: most bytes of a body of a LARGE call.
        small: most bytes of any other.

    Raises:
        Refused: it is not one of the fleet's calls, or not written as they are.
    """
    lines = head.split(b"\r\n")
    if any(mark in line for line in lines for mark in (b"\n", b"\r", b"\0")):
        raise Refused("malformed", HTTPStatus.BAD_REQUEST, "a line of the head ends in something else than CR LF")
    if any(line[:1] in (b" ", b"\t") for line in lines):
        raise Refused("malformed", HTTPStatus.BAD_REQUEST, "a line of the head is folded or begins with a space")
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=len(head) + 1)
    try:
        parser.receive_data(head)
        event = parser.next_event()
    except h11.RemoteProtocolError as error:
        raise Refused("malformed", HTTPStatus.BAD_REQUEST, f"no HTTP: {error}") from error
    if not isinstance(event, h11.Request):
        raise Refused("malformed", HTTPStatus.BAD_REQUEST, "no HTTP")
    if event.http_version != b"1.1":
        raise Refused("http_version", HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "only HTTP/1.1 is spoken here")
    size = CALLS.get(event.target)
    if size is None:
        reason = next((reason for part, reason in OTHERS.items() if part in event.target.lower()), "other_path")
        raise Refused(reason, HTTPStatus.NOT_FOUND, "only the fleet's calls of a registered SuperNode are passed")
    if event.method != b"POST":
        raise Refused("method", HTTPStatus.METHOD_NOT_ALLOWED, "the fleet's calls are POST")
    headers = _headers(line for line in lines[1:] if line)
    return _request(event.target, headers, large if size is LARGE else small)


def _headers(lines: Iterable[bytes]) -> dict[bytes, bytes]:
    headers: dict[bytes, bytes] = {}
    for line in lines:
        name, _, value = line.partition(b":")  # h11 has checked their form
        name = name.lower()
        if name == b"transfer-encoding":
            raise Refused(
                "chunked", HTTPStatus.LENGTH_REQUIRED, "a body needs a Content-Length, and no Transfer-Encoding"
            )
        if name in NEVER:
            raise Refused("header", HTTPStatus.BAD_REQUEST, f"the header {name.decode()} is not passed")
        if name in headers:
            raise Refused("header", HTTPStatus.BAD_REQUEST, f"the header {name.decode()!r:.80} stands there twice")
        headers[name] = value.strip(b" \t")
    return headers


def _request(path: bytes, headers: dict[bytes, bytes], most: int) -> Request:
    length = headers.get(b"content-length", b"")
    if not (length.isdigit() and len(length) <= 15):
        raise Refused("length", HTTPStatus.LENGTH_REQUIRED, "a body needs a Content-Length")
    if int(length) > most:
        detail = f"a body of {int(length)} bytes is more than the {most} that {path.decode()} may have"
        raise Refused("body_too_large", HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)
    content = CONTENT.get(path, PROTOBUF)
    if headers.get(b"content-type", b"").lower() != content:
        raise Refused("content_type", HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"a body is {content.decode()}")
    passed = {name: value for name, value in headers.items() if name in PASSED or name.startswith(FLOWER)}
    return Request(path, passed, int(length), headers.get(b"connection", b"").lower() == b"close")


class BadAnswer(Exception):
    """The upstream's answer is not one that can be passed on."""


@dataclass(frozen=True)
class Answer:
    """The head of an upstream's answer.

    Attributes:
        status: its code.
        headers: name and value of those that are passed.
        length: bytes of the body.
        last: the upstream ends the connection after it.
    """

    status: int
    headers: list[tuple[bytes, bytes]]
    length: int
    last: bool

    def head(self, *, close: bool) -> bytes:
        """Return the head for the client."""
        lines = [b"HTTP/1.1 %d %s" % (self.status, _phrase(self.status))]
        lines += [name + b": " + value for name, value in self.headers]
        lines += [b"content-length: %d" % self.length, b"connection: " + (b"close" if close else b"keep-alive")]
        return b"\r\n".join(lines) + b"\r\n\r\n"


def parse_answer(parser: h11.Connection, head: bytes) -> Answer | None:
    """Return the head of an answer; None where it only says that another will follow.

    Raises:
        BadAnswer: no HTTP, or a body of unknown length.
    """
    try:
        parser.receive_data(head)
        event = parser.next_event()
    except h11.RemoteProtocolError as error:
        raise BadAnswer(f"no HTTP: {error}") from error
    if isinstance(event, h11.InformationalResponse):
        return None
    if not isinstance(event, h11.Response):
        raise BadAnswer("no HTTP")
    headers = dict(event.headers)
    if b"transfer-encoding" in headers or b"content-length" not in headers:
        raise BadAnswer("its body has no Content-Length")
    passed = [(name, value) for name, value in headers.items() if name in PASSED or name.startswith(FLOWER)]
    last = headers.get(b"connection", b"").lower() == b"close"
    return Answer(event.status_code, passed, int(headers[b"content-length"]), last)


def refusal(refused: Refused) -> bytes:
    """Return the whole answer to a request that is not passed on, in the form of Flower's own errors."""
    body = json.dumps({"code": int(refused.status), "detail": f"nanofed's proxy: {refused.detail}"}).encode()
    headers = [(b"content-type", b"application/json")]
    return Answer(int(refused.status), headers, len(body), True).head(close=True) + body


def _phrase(status: int) -> bytes:
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b"Unknown"
