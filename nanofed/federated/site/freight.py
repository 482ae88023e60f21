"""A site's way to its server's depot: it fetches a round's weights and delivers its own, piece by piece, whatever the link does.

Nothing but the standard library and what Flower's client process has imported anyway: that process starts anew for every message.
"""

from __future__ import annotations

import http.client
import json
import mmap
import os
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from nanofed.federated.site.channel import ChannelError, Packed, bytes_of, memory_file
from nanofed.federated.site.lane import Lane, check_time
from nanofed.federated.wire.freight import LENGTH, OBJECT, OCTETS, OFFSET, PIECE_BYTES, PULL, PUSH, Freight

LANES = 2  # pieces under way at a time: one fills the pause in which the other is answered
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0  # between two tries
UNABLE_SECONDS = 15.0  # after which one who says that he cannot is believed, so that the server still hears why
UNABLE = (HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.INSUFFICIENT_STORAGE)
AGAIN = (
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)
MAX_ANSWER = 1 << 16  # bytes of a refusal that are read

Piece = tuple[int, list[memoryview]]  # the first byte of it, and its bytes


class Over(ChannelError):
    """What was asked for is not in the depot any more: the round is over."""


class _Unable(http.client.HTTPException):
    """The server says that it cannot."""


class Road:
    """The way to a server's depot.

    Args:
        server: `host:port`.
        authority: certificate of the server's CA; None for plain HTTP.
        key: the site's private key, where the server knows the public one.
    """

    def __init__(self, server: str, authority: Path | None = None, key: Path | None = None) -> None:
        host, _, port = server.rpartition(":")
        self._server = server
        self._address = host.strip("[]"), int(port)
        self._authority = authority
        self._key: Any = None if key is None else load_ssh_private_key(key.read_bytes(), None)
        self._began = time.monotonic()

    def fetch(self, freight: Freight) -> Packed:
        """Return the weights of a round in a file in memory.

        Raises:
            Over: the round is.
            ChannelError: the server cannot be reached in its time, or refuses.
        """
        size = bytes_of(freight.layout)
        file = memory_file()
        try:
            os.ftruncate(file, size)
            with mmap.mmap(file, size) as mapped, memoryview(mapped) as whole:
                pieces = list(_pieces([whole]))
                try:
                    self._move(pieces, freight, self._pull)
                finally:
                    for _, views in pieces:
                        for view in views:
                            view.release()
        except BaseException:
            os.close(file)
            raise
        return Packed(freight.layout, file)

    def deliver(self, freight: Freight, arrays: Sequence[npt.NDArray[np.generic]]) -> None:
        """Bring the answer to a round.

        Raises:
            Over: the round is.
            ChannelError: it is not of the size that is expected; or the server cannot be reached in time, or refuses.
        """
        size = sum(array.nbytes for array in arrays)
        if size != freight.answer_bytes:
            raise ChannelError(f"the answer has {size} bytes, the server expects {freight.answer_bytes}")
        views = [memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)) for array in arrays]  # type: ignore[arg-type]
        self._move(list(_pieces(views)), freight, self._push)

    def _move(self, pieces: Sequence[Piece], freight: Freight, move: Callable[[Lane, Freight, Piece], None]) -> None:
        """Move all pieces, several at a time, each again until it is there or the time is over."""
        queue = iter(pieces)
        failed: list[Exception] = []

        def lane() -> None:
            with Lane(self._address, self._authority) as connection:
                for piece in queue:
                    self._persist(freight, lambda: move(connection, freight, piece), failed)  # noqa: B023
                    if failed:
                        return

        with ThreadPoolExecutor(min(LANES, len(pieces))) as pool:
            for done in [pool.submit(lane) for _ in range(min(LANES, len(pieces)))]:
                try:
                    done.result()
                except ChannelError as error:
                    failed.append(error)
        if failed:
            raise failed[0]

    def _persist(self, freight: Freight, attempt: Callable[[], None], failed: Sequence[Exception]) -> None:
        pause, end = FIRST_PAUSE, self._end(freight)
        while not failed:
            try:
                attempt()
                return
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, _Unable) or str(error).startswith("Tunnel connection failed"):
                    end = min(end, time.monotonic() + UNABLE_SECONDS)
                if end - time.monotonic() < pause:
                    reason = str(error) or type(error).__name__
                    raise ChannelError(
                        f"the weights did not pass to or from {self._server} in time: {reason}"
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _end(self, freight: Freight) -> float:
        """Return when the round is over, on the monotonic clock."""
        return self._began + freight.seconds

    def _pull(self, lane: Lane, freight: Freight, piece: Piece) -> None:
        offset, (into,) = piece
        headers = self._headers(freight.ticket, offset) | {LENGTH: str(len(into))}
        with lane.asked(PULL, headers, [], self._end(freight)) as answer:
            self._check(answer)
            if answer.length != len(into):
                raise ChannelError(f"{self._server} answers with {answer.length} bytes, not with {len(into)}")
            done = 0
            while done < len(into):
                check_time(self._end(freight))
                with into[done:] as rest:  # let go whatever happens: the memory below is to be closed
                    count = answer.readinto(rest)
                if not count:
                    raise http.client.IncompleteRead(b"", len(into) - done)
                done += count

    def _push(self, lane: Lane, freight: Freight, piece: Piece) -> None:
        offset, views = piece
        with lane.asked(PUSH, self._headers(freight.answer, offset), views, self._end(freight)) as answer:
            self._check(answer)

    def _headers(self, ticket: str, offset: int) -> dict[str, str]:
        """Return the headers of a call: what it is about, and who makes it, signed as Flower's SuperNode signs its own."""
        headers = {OBJECT: ticket, OFFSET: str(offset), "Content-Type": OCTETS}
        if self._key is None:
            return headers
        timestamp = now().isoformat()
        signature = sign_message(self._key, timestamp.encode("ascii"))
        return headers | {
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(self._key.public_key())).decode("ascii"),
            TIMESTAMP_HEADER: timestamp,
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode("ascii"),
        }

    def _check(self, answer: http.client.HTTPResponse) -> None:
        if answer.status == HTTPStatus.OK:
            return
        said = answer.read(MAX_ANSWER)
        try:
            detail = str(json.loads(said)["detail"])[:300]
        except (ValueError, KeyError, TypeError):
            detail = f"HTTP status {answer.status}"
        if answer.status in UNABLE:
            raise _Unable(detail)
        if answer.status in AGAIN:
            raise http.client.HTTPException(detail)
        kind = Over if answer.status == HTTPStatus.NOT_FOUND else ChannelError
        raise kind(f"{self._server} refuses the weights' way: {detail}")


def _pieces(views: Sequence[memoryview]) -> Iterator[Piece]:
    """Cut bytes that follow each other into pieces."""
    offset, size, piece = 0, 0, list[memoryview]()
    for view in views:
        rest = view
        while len(rest):
            part = rest[: PIECE_BYTES - size]
            rest = rest[len(part) :]
            piece.append(part)
            size += len(part)
            if size == PIECE_BYTES:
                yield offset, piece
                offset, size, piece = offset + size, 0, []
    if piece:
        yield offset, piece
