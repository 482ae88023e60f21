"""The two calls of `weights_calls.py`, answered in the SuperLink's process from the files of a weight store.

They stand before Flower's application: who calls has been checked by the perimeter, like every site's call (without keys the port
is on loopback), and has to know a file's name, which is 128 random bits.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from nanofed.federated.wire.weights_calls import (
    DOWN,
    LENGTH,
    OBJECT,
    OCTETS,
    OFFSET,
    PIECE_BYTES,
    PULL,
    PUSH,
    TICKET,
    UP,
)

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Application = Callable[[Event, Receive, Send], Awaitable[None]]


class _HttpError(Exception):
    def __init__(self, status: HTTPStatus, detail: str) -> None:
        super().__init__(detail)
        self.status = status


def _over() -> _HttpError:
    return _HttpError(HTTPStatus.NOT_FOUND, "there is no such file: its round is over")


class WeightsServer:
    """ASGI middleware that answers the two calls for weights and passes on all others.

    Args:
        app: The application that answers all other calls.
        folder: The folder of the weight store.
    """

    def __init__(self, app: Application, folder: Path) -> None:
        self._app = app
        self._folder = folder

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] not in (PULL, PUSH):
            await self._app(scope, receive, send)
            return
        status, content = HTTPStatus.OK, b""
        try:
            if scope["method"] != "POST":
                raise _HttpError(HTTPStatus.METHOD_NOT_ALLOWED, "calls for weights are POST")
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            body = await _body(headers, receive)
            if body is None:
                return  # the site has gone
            ticket, offset = headers.get(OBJECT, ""), _number(headers, OFFSET)
            if not TICKET.fullmatch(ticket):
                raise _HttpError(HTTPStatus.BAD_REQUEST, f"the header {OBJECT} holds no ticket")
            if scope["path"] == PULL:
                length = _number(headers, LENGTH)
                content = await asyncio.to_thread(_read, self._folder / DOWN / ticket, offset, length)
            else:
                await asyncio.to_thread(_write, self._folder / UP / ticket, offset, body)
        except _HttpError as refused:
            status = refused.status
            content = json.dumps({"code": int(status), "detail": str(refused)}).encode()
        kind = OCTETS if status == HTTPStatus.OK else "application/json"
        head = [(b"content-type", kind.encode()), (b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": int(status), "headers": head})
        await send({"type": "http.response.body", "body": content})


async def _body(headers: MutableMapping[str, str], receive: Receive) -> bytes | None:
    if _number(headers, "content-length") > PIECE_BYTES:
        raise _HttpError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a piece is of {PIECE_BYTES} bytes at most")
    pieces = []
    while True:
        event = await receive()
        if event["type"] != "http.request":
            return None
        pieces.append(event.get("body", b""))
        if not event.get("more_body", False):
            return b"".join(pieces)


def _number(headers: MutableMapping[str, str], name: str) -> int:
    text = headers.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) <= 15):
        raise _HttpError(HTTPStatus.BAD_REQUEST, f"the header {name} holds no number")
    return int(text)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except FileNotFoundError:
        raise _over() from None
    except OSError as error:
        raise _disk(error) from error


def _disk(error: OSError) -> _HttpError:
    return _HttpError(HTTPStatus.INSUFFICIENT_STORAGE, f"the server's disk: {error.strerror}")


def _read(path: Path, offset: int, length: int) -> bytes:
    file = _open(path, os.O_RDONLY)
    try:
        content = os.pread(file, min(length, PIECE_BYTES), offset)
    except OSError as error:
        raise _disk(error) from error
    finally:
        os.close(file)
    if len(content) != length:
        raise _HttpError(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"there are no {length} bytes from {offset} on")
    return content


def _write(path: Path, offset: int, body: bytes) -> None:
    """Write a piece, unless the round loop has taken the file up already, or takes it up now."""
    file = _open(path, os.O_RDWR)  # to read, too: where the folder is on NFS, the lock needs it
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        found = os.fstat(file)
        if found.st_nlink == 0:
            raise _over()
        if offset + len(body) > found.st_size:
            detail = f"{len(body)} bytes from {offset} on are more than the {found.st_size} that are expected"
            raise _HttpError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)
        rest = memoryview(body)
        while rest:
            written = os.pwrite(file, rest, offset)
            rest, offset = rest[written:], offset + written
    except BlockingIOError:
        raise _over() from None
    except OSError as error:
        raise _disk(error) from error
    finally:
        os.close(file)
