"""The two calls of `weights_calls.py`, answered in the SuperLink's process from the files of a weight store.

They stand before Flower's application: who calls has been checked by the perimeter, like every site's call (without keys the port
is on loopback), and has to know a file's name, which is 128 random bits.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from nanofed.federated.wire import weights_calls as calls


class WeightsServer:
    """ASGI middleware that answers the two calls for weights and passes on all others.

    Args:
        app: The application that answers all other calls.
        folder: The folder of the weight store.
    """

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self._app = app
        self._folder = folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] not in (calls.PULL, calls.PUSH):
            await self._app(scope, receive, send)
            return
        response: Response
        try:
            response = Response(await self._answer(Request(scope, receive)), media_type=calls.OCTETS)
        except HTTPException as refused:
            response = JSONResponse({"code": refused.status_code, "detail": refused.detail}, refused.status_code)
        except ClientDisconnect:
            return
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> bytes:
        if request.method != "POST":
            raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, "calls for weights are POST")
        if _number(request, "content-length") > calls.PIECE_BYTES:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a piece is of {calls.PIECE_BYTES} bytes at most")
        body = await request.body()
        ticket, offset = request.headers.get(calls.OBJECT, ""), _number(request, calls.OFFSET)
        if not calls.TICKET.fullmatch(ticket):
            raise HTTPException(HTTPStatus.BAD_REQUEST, f"the header {calls.OBJECT} holds no ticket")
        if request.scope["path"] == calls.PULL:
            return await asyncio.to_thread(
                _read, self._folder / calls.DOWN / ticket, offset, _number(request, calls.LENGTH)
            )
        await asyncio.to_thread(_write, self._folder / calls.UP / ticket, offset, body)
        return b""


def _number(request: Request, name: str) -> int:
    text = request.headers.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) <= 15):
        raise HTTPException(HTTPStatus.BAD_REQUEST, f"the header {name} holds no number")
    return int(text)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """Open a file of the store; what goes wrong with it is the answer to the site."""
    try:
        file = os.open(path, flags | os.O_CLOEXEC)
        try:
            yield file
        finally:
            os.close(file)
    except (FileNotFoundError, BlockingIOError):
        raise HTTPException(HTTPStatus.NOT_FOUND, "there is no such file: its round is over") from None
    except OSError as error:
        raise HTTPException(HTTPStatus.INSUFFICIENT_STORAGE, f"the server's disk: {error.strerror}") from error


def _read(path: Path, offset: int, length: int) -> bytes:
    with _opened(path, os.O_RDONLY) as file:
        content = os.pread(file, min(length, calls.PIECE_BYTES), offset)
    if len(content) != length:
        raise HTTPException(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"there are no {length} bytes from {offset} on")
    return content


def _write(path: Path, offset: int, body: bytes) -> None:
    """Write a piece, unless the round loop has taken the file up already, or takes it up now."""
    with _opened(path, os.O_RDWR) as file:  # to read, too: where the folder is on NFS, the lock needs it
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        found = os.fstat(file)
        if found.st_nlink == 0:
            raise FileNotFoundError
        if offset + len(body) > found.st_size:
            detail = f"{len(body)} bytes from {offset} on are more than the {found.st_size} that are expected"
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)
        rest = memoryview(body)
        while rest:
            written = os.pwrite(file, rest, offset)
            rest, offset = rest[written:], offset + written
