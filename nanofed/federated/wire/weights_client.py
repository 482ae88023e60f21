"""How a site fetches a round's weights from its server and delivers its own: piece by piece, whatever the link does."""

from __future__ import annotations

import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import requests
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from urllib3.exceptions import HTTPError

from nanofed.errors import NanofedError
from nanofed.federated.wire.codec import Arrays, arrays_over, bytes_of
from nanofed.federated.wire.messages import StoredWeights
from nanofed.federated.wire.weights_calls import LENGTH, OBJECT, OCTETS, OFFSET, PIECE_BYTES, PULL, PUSH

CONNECTIONS = 2  # pieces under way at a time: one fills the pause in which the other is answered
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0  # seconds between two tries
SILENCE_SECONDS = 30.0  # without a byte, after which a connection is given up
ANSWER_SECONDS = 90.0  # without a byte once all is sent: some of that waits in buffers, and the server takes its time
BLOCK_BYTES = 64 << 10  # a time limit counts for all of what is sent at once
# A server that says that it cannot is asked again for this long: then the site still tells it why the round failed.
UNABLE_SECONDS = 15.0
UNABLE = (HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.INSUFFICIENT_STORAGE)
AGAIN = (429, HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)  # 429: too many calls

Piece = tuple[int, list[memoryview]]  # the first byte of it, and its bytes


class WeightsError(NanofedError):
    """Weights could not be fetched or delivered."""


class RoundOver(WeightsError):
    """What was asked for is not at the server any more: the round is over."""


class _Unable(OSError):
    """The server says that it cannot."""


class WeightsClient:
    """Fetches and delivers weights.

    Args:
        server: `host:port`.
        authority: certificate of the server's CA; None for plain HTTP.
        key: the site's private key, where the server knows the public one.
    """

    def __init__(self, server: str, authority: Path | None = None, key: Path | None = None) -> None:
        self._server = server
        self._url = f"{'http' if authority is None else 'https'}://{server}"
        self._authority = authority
        self._key: Any = None if key is None else load_ssh_private_key(key.read_bytes(), None)

    def fetch(self, stored: StoredWeights, end: float) -> Arrays:
        """Return the weights of a round, until `end` on the monotonic clock.

        Raises:
            RoundOver: The weights are not there any more.
            WeightsError: the server cannot be reached in the round's time, or refuses.
        """
        layout = tuple((np.dtype(name), tuple(shape)) for name, shape in stored.layout)
        whole: Any = np.empty(bytes_of(layout), np.uint8)
        self._move(_pieces([memoryview(whole)]), stored, self._pull, end)
        return arrays_over(whole, layout)

    def deliver(self, stored: StoredWeights, arrays: Sequence[npt.NDArray[np.generic]], end: float) -> None:
        """Bring the answer to a round, until `end` on the monotonic clock.

        Raises:
            RoundOver: Nobody waits for it any more.
            WeightsError: The answer is not of the size that is expected, or the server cannot be reached in time, or refuses.
        """
        size = sum(array.nbytes for array in arrays)
        if size != stored.answer_bytes:
            raise WeightsError(f"the answer has {size} bytes, the server expects {stored.answer_bytes}")
        views = [memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)) for array in arrays]  # type: ignore[arg-type]
        self._move(_pieces(views), stored, self._push, end)

    def _move(
        self,
        pieces: Iterator[Piece],
        stored: StoredWeights,
        move: Callable[[requests.Session, StoredWeights, Piece, float], None],
        end: float,
    ) -> None:
        """Move all pieces, several at a time, each again until it is there or the time is over."""
        failed = threading.Event()

        def persist(piece: Piece) -> None:
            try:
                self._persist(partial(move, session, stored, piece, end), end, failed)
            except BaseException:
                failed.set()
                raise

        with requests.Session() as session, ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(persist, pieces))

    def _persist(self, attempt: Callable[[], None], end: float, failed: threading.Event) -> None:
        pause = FIRST_PAUSE
        while not failed.is_set():
            try:
                attempt()
                return
            except (OSError, HTTPError) as error:  # requests' own are OSErrors
                if isinstance(error, ValueError):  # a proxy of a kind that requests does not know, or no address at all
                    raise WeightsError(f"{self._server} cannot be called: {error}") from error
                if isinstance(error, (requests.exceptions.ProxyError, _Unable)):
                    end = min(end, time.monotonic() + UNABLE_SECONDS)
                if end - time.monotonic() < pause:
                    reason = str(error) or type(error).__name__
                    raise WeightsError(
                        f"the weights did not pass to or from {self._server} in time: {reason}"
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _pull(self, session: requests.Session, stored: StoredWeights, piece: Piece, end: float) -> None:
        offset, (into,) = piece
        headers = self._headers(stored.ticket, offset) | {LENGTH: str(len(into))}
        with self._post(session, PULL, headers, b"", end) as answer:
            announced = answer.headers.get("Content-Length")
            if announced != str(len(into)):
                raise WeightsError(f"{self._server} answers with {announced} bytes, not with {len(into)}")
            done = 0
            for block in answer.iter_content(1 << 20):
                _check_time(end)
                into[done : done + len(block)] = block
                done += len(block)
            if done < len(into):
                raise OSError(f"{self._server} ended after {done} of {len(into)} bytes")

    def _push(self, session: requests.Session, stored: StoredWeights, piece: Piece, end: float) -> None:
        offset, views = piece
        self._post(session, PUSH, self._headers(stored.answer, offset), _Body(views, end), end).close()

    def _post(
        self, session: requests.Session, path: str, headers: dict[str, str], body: Any, end: float
    ) -> requests.Response:
        """Make a call and return its answer, whose body is still to be read; an OSError means that it may be made again."""
        _check_time(end)
        answer = session.post(
            self._url + path,
            data=body,
            headers=headers,
            timeout=(SILENCE_SECONDS, min(ANSWER_SECONDS, max(1.0, end - time.monotonic()))),
            verify=str(self._authority) if self._authority else True,
            allow_redirects=False,
            stream=True,
        )
        if answer.status_code == HTTPStatus.OK:
            return answer
        with answer:
            try:
                detail = str(answer.json()["detail"])[:300]
            except (ValueError, KeyError, TypeError):
                detail = f"HTTP status {answer.status_code}"
        if answer.status_code in (*UNABLE, *AGAIN):
            raise _Unable(detail) if answer.status_code in UNABLE else OSError(detail)
        kind = RoundOver if answer.status_code == HTTPStatus.NOT_FOUND else WeightsError
        raise kind(f"{self._server} refuses weights: {detail}")

    def _headers(self, ticket: str, offset: int) -> dict[str, str]:
        """Return the headers of a call: what it is about, and who makes it, signed as Flower's SuperNode signs its own."""
        headers = {OBJECT: ticket, OFFSET: str(offset), "Content-Type": OCTETS, "Accept-Encoding": "identity"}
        if self._key is None:
            return headers
        timestamp = now().isoformat()
        signature = sign_message(self._key, timestamp.encode("ascii"))
        return headers | {
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(self._key.public_key())).decode("ascii"),
            TIMESTAMP_HEADER: timestamp,
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode("ascii"),
        }


class _Body:
    """The bytes of a piece, as requests streams them: with a length, in blocks."""

    def __init__(self, views: Sequence[memoryview], end: float) -> None:
        self._views = views
        self._end = end

    def __len__(self) -> int:
        return sum(map(len, self._views))

    def __iter__(self) -> Iterator[memoryview]:
        for view in self._views:
            for start in range(0, len(view), BLOCK_BYTES):
                _check_time(self._end)
                yield view[start : start + BLOCK_BYTES]


def _check_time(end: float) -> None:
    if time.monotonic() > end:
        raise TimeoutError("the round is over")


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
