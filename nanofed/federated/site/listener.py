"""The trainer's end of the channel: threads answer what needs no training at once, and hand rounds to the main thread."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from nanofed.errors import ConfigError
from nanofed.federated.site.channel import Arrays, ChannelError, Packed, is_this_user, read, send, why_not_private

logger = logging.getLogger(__name__)

WORK = ("fit", "evaluate")  # what is queued for the main thread
REQUEST_SECONDS = 10.0  # for a whole request to arrive: it comes from this machine
SEND_SECONDS = 30  # for a client to take its answer
MAX_CONNECTIONS = 32

Quick = Callable[[dict[str, Any]], dict[str, Any]]


class Request:
    """A round that a client asks for.

    Attributes:
        kind: `fit` or `evaluate`.
        config: as the client sent it.
        arrays: likewise; read-only, and gone once the request is answered.
        arrived: when it was complete, in seconds of the monotonic clock.
        cancelled: why nobody wants the answer any more, None as long as somebody does.
        answered: an answer has been sent, or an error.
    """

    def __init__(self, connection: socket.socket, kind: str, config: dict[str, Any], arrays: Arrays) -> None:
        self.kind = kind
        self.config = config
        self.arrays = arrays
        self.arrived = time.monotonic()
        self.cancelled: str | None = None
        self._connection = connection
        self._lock = threading.Lock()
        self.answered = False

    def cancel(self, reason: str) -> None:
        """Say that the answer is not wanted any more; the first reason stays."""
        self.cancelled = self.cancelled or reason

    def accept(self) -> bool:
        """Tell the client that its request is taken up; False if it is not there to hear it."""
        return self._send({"accepted": True})

    def answer(
        self, arrays: Sequence[npt.NDArray[np.generic]] | Packed, num_examples: int, metrics: Mapping[str, Any]
    ) -> bool:
        """Send what came of it; False if the client is gone."""
        return self._finish({"num_examples": num_examples, "metrics": dict(metrics)}, arrays)

    def refuse(self, reason: str) -> bool:
        """Send an error; False if the client is gone."""
        return self._finish({"error": reason})

    def _finish(self, header: dict[str, Any], arrays: Sequence[npt.NDArray[np.generic]] | Packed = ()) -> bool:
        with self._lock:
            if self.answered:
                return False
            self.answered = True
        sent = self._send(header, arrays)
        self.arrays = []
        with contextlib.suppress(OSError):  # ends the thread that watches the client; what was sent can still be read
            self._connection.shutdown(socket.SHUT_RDWR)
        return sent

    def _send(self, header: dict[str, Any], arrays: Sequence[npt.NDArray[np.generic]] | Packed = ()) -> bool:
        try:
            send(self._connection, header, arrays)
        except OSError as error:
            logger.warning("an answer cannot be handed over: %s", error)
            return False
        return True


class Listener:
    """Owns the socket: at most one trainer listens on it, and at most one round is under way.

    A newer request cancels those before it, waiting or under way, rather than queue behind them.

    Args:
        path: of the socket, in a folder that only its owner may enter (made if it is not there).
        quick: kind of request -> what answers it at once, in a thread of its own.

    Raises:
        ConfigError: another trainer listens there, or the place cannot be used.
    """

    def __init__(self, path: Path, quick: Mapping[str, Quick]) -> None:
        self._path = path
        self._quick = quick
        self._changed = threading.Condition()
        self._waiting: Request | None = None
        self._running: Request | None = None
        self._open = threading.Semaphore(MAX_CONNECTIONS)
        self._lock_file = self._take(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.unlink(missing_ok=True)  # of a trainer that is dead: its lock is gone
            self._socket.bind(str(path))
            path.chmod(0o600)
            self._socket.listen(MAX_CONNECTIONS)
        except OSError as error:
            self._socket.close()
            os.close(self._lock_file)
            raise ConfigError(
                f"the socket {path} cannot be made: {error}; choose another, of at most 100 letters"
            ) from error
        threading.Thread(target=self._listen, name="nanofed-listener", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening and remove the socket; whoever waits for an answer sees that the trainer is gone."""
        self._path.unlink(missing_ok=True)
        self._socket.close()
        os.close(self._lock_file)

    @staticmethod
    def _take(path: Path) -> int:
        folder = path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if why := why_not_private(folder):
                raise ConfigError(f"the socket cannot be made: {why}")
            file = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"the socket's folder {folder} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            raise ConfigError(f"another trainer listens at {path}: end it, or choose another socket") from None
        return file

    def next(self) -> Request:
        """Wait for a round that a client asks for and take it up."""
        while True:
            with self._changed:
                self._running = None
                while self._waiting is None:
                    self._changed.wait()
                request, self._waiting = self._waiting, None
                self._running = request
            if request.cancelled is None and request.accept():
                return request

    def abort(self, reason: str) -> bool:
        """Cancel the round that waits or is under way; False if there is none."""
        return self._replace(None, reason)

    def _replace(self, request: Request | None, reason: str) -> bool:
        with self._changed:
            waiting, self._waiting = self._waiting, request
            running = self._running
            self._changed.notify()
        if running is not None:
            running.cancel(reason)  # its thread looks, and answers
        if waiting is not None:
            waiting.cancel(reason)
            waiting.refuse(reason)
        return waiting is not None or (running is not None and not running.answered)

    def _listen(self) -> None:
        while True:
            self._open.acquire()
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            if not is_this_user(connection):
                logger.warning("another user's process is not answered")
                connection.close()
                self._open.release()
                continue
            threading.Thread(target=self._serve, args=(connection,), name="nanofed-client", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                self._converse(connection)
        except (EOFError, OSError) as error:  # of this client only
            logger.debug("a client is gone: %r", error)
        except ChannelError as error:
            logger.warning("a request is refused: %s", error)
        finally:
            self._open.release()

    def _converse(self, connection: socket.socket) -> None:
        connection.settimeout(REQUEST_SECONDS)
        try:
            header, arrays = read(connection)
            kind, config = header.get("kind"), header.get("config")
            if not isinstance(kind, str) or not isinstance(config, dict):
                raise ChannelError("a request has a `kind` and a `config`")
            if kind not in WORK and kind not in self._quick:
                raise ChannelError(f"{kind[:80]!r} is no request: there are {', '.join(sorted([*WORK, *self._quick]))}")
        except ChannelError as error:
            send(connection, {"error": f"the trainer cannot read the request: {error}"})
            raise
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
        if kind in self._quick:
            try:
                metrics = self._quick[kind](config)
            except Exception as error:
                logger.exception("%s failed", kind)
                send(connection, {"error": f"{type(error).__name__}: {error}"})
                return
            send(connection, {"num_examples": 0, "metrics": metrics})
            return
        request = Request(connection, kind, config, arrays)
        del arrays
        self._replace(request, "a newer round arrived")
        with contextlib.suppress(OSError):
            connection.recv(1)  # returns when the client is gone, or the request answered
        request.cancel("its client is gone")
