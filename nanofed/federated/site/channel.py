"""The local protocol between Flower's short-lived client process and the site's long-lived trainer.

One connection to an AF_UNIX socket is one call: a request, "accepted" when the trainer takes it up, and an answer. The client
keeps its connection open meanwhile, so each side sees at once when the other is gone. A message is the length of a JSON header,
the header, and where there are arrays the descriptor of a file in memory that holds their bytes one after the other: it has
no name, so a process that dies leaves nothing behind. The listening end is `listener.py`.

Nothing but the standard library and NumPy: Flower starts the client end anew for every message.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import socket
import stat
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from nanofed.errors import NanofedError
from nanofed.federated.wire.freight import layout_of

Arrays = list[npt.NDArray[np.generic]]

MAX_HEADER = 32 << 20  # bytes of JSON; instructions and reports are at most half of it
MAX_ARRAYS = 1 << 16
POLL = 0.1  # seconds between two tries to reach a trainer that is not there
_LENGTH = struct.Struct(">I")
_CREDENTIALS = struct.Struct("3i")  # process, user, group


class Packed(NamedTuple):
    """Arrays as they are sent: dtype and shape of each, and the descriptor of the file that holds their bytes."""

    layout: list[Any]
    file: int | None


class ChannelError(NanofedError):
    """The call came to nothing: there is no trainer, it died, or it answered with this error."""


def call(
    path: Path,
    kind: str,
    config: dict[str, Any],
    arrays: Sequence[npt.NDArray[np.generic]] | Packed = (),
    wait: float = 60.0,
) -> tuple[Arrays, int, dict[str, Any]]:
    """Have the trainer do something and return its answer.

    Args:
        path: the trainer's socket.
        kind: `fit`, `evaluate`, `get_properties`, `ping` or `abort`.
        config: plain values.
        arrays: the weights of a `fit` or `evaluate`; where they are packed already, their file is closed.
        wait: seconds in which the trainer has to be there and take the request up; what it does then takes as long as it takes.

    Returns:
        Arrays (read-only), the number of examples and the metrics.

    Raises:
        ChannelError: no trainer took the request in time, it died, or it could not do it: with its reason.
    """
    end = time.monotonic() + wait
    layout, file = _packed(arrays)
    request = {"kind": kind, "config": config, "arrays": layout}
    try:
        while True:
            with _connect(path, end, wait) as connection:
                try:
                    _write(connection, request, file)
                    header, answer = read(connection)
                except TimeoutError:
                    raise ChannelError(f"the trainer at {path} did not take {kind} up within {wait:g} s") from None
                except (EOFError, OSError) as error:  # it ended before it began: the next one may do it
                    if time.monotonic() + POLL > end:
                        raise ChannelError(f"the trainer at {path} ended before it took {kind} up") from error
                    time.sleep(POLL)
                    continue
                if header.get("accepted"):
                    connection.settimeout(None)
                    if file is not None:  # the trainer has it: no need to hold the memory
                        os.close(file)
                        file = None
                    try:
                        header, answer = read(connection)
                    except (EOFError, OSError) as error:
                        raise ChannelError(f"the trainer at {path} died while it did {kind}") from error
                if "error" in header:
                    raise ChannelError(str(header["error"]))
                return answer, int(header["num_examples"]), dict(header["metrics"])
    finally:
        if file is not None:
            os.close(file)


def why_not_private(folder: Path) -> str | None:
    """Return why what is in a folder may be another user's, None where it is this user's alone.

    Raises:
        OSError: the folder is not there.
    """
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} is a link or no folder: remove it"
    if found.st_uid != os.getuid():
        return f"{folder} is another user's"
    if found.st_mode & 0o077:
        return f"{folder} must be its owner's alone: chmod 700 {folder}"
    return None


def is_this_user(connection: socket.socket) -> bool:
    """Tell whether the process at the other end is this user's; where the system does not say, the folder has to do."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(credentials)[1] == os.getuid())


@contextlib.contextmanager
def _connect(path: Path, end: float, wait: float) -> Iterator[socket.socket]:
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(max(POLL, end - time.monotonic()))
        try:
            if why := why_not_private(path.parent):
                connection.close()
                raise ChannelError(f"the trainer's socket cannot be trusted: {why}")
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError, TimeoutError, BlockingIOError):
            connection.close()
            if time.monotonic() + POLL > end:
                raise ChannelError(f"there is no trainer at {path}, and none came within {wait:g} s") from None
            time.sleep(POLL)
        except OSError as error:
            connection.close()
            raise ChannelError(f"the trainer's socket {path} cannot be used: {error}") from error
        else:
            with connection:
                if not is_this_user(connection):
                    raise ChannelError(f"the trainer's socket cannot be trusted: another user listens at {path}")
                yield connection
            return


class MemoryRoom:
    """Room for an answer in a file in memory, from which it is sent without a copy; a `with` block lets it go."""

    def __init__(self) -> None:
        self._file: int | None = None

    def __call__(self, size: int) -> mmap.mmap:
        """Return a buffer of so many bytes.

        Raises:
            OSError: there is no memory for it.
        """
        self.close()
        self._file = memory_file()
        os.ftruncate(self._file, size)
        return mmap.mmap(self._file, size)

    def packed(self, arrays: Sequence[npt.NDArray[np.generic]]) -> Packed:
        """Return arrays that fill the buffer, one after the other, ready to be sent; their file is the receiver's then."""
        file, self._file = self._file, None
        return Packed(layout_of(arrays), file)

    def close(self) -> None:
        """Close the file, if it was not sent."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def send(
    connection: socket.socket, header: dict[str, Any], arrays: Sequence[npt.NDArray[np.generic]] | Packed = ()
) -> None:
    """Send one message; the file of arrays that are packed already is closed.

    Raises:
        OSError: the other side is gone, or there is no memory for the arrays.
    """
    layout, file = _packed(arrays)
    try:
        _write(connection, {**header, "arrays": layout}, file)
    finally:
        if file is not None:
            os.close(file)


def _write(connection: socket.socket, header: dict[str, Any], file: int | None) -> None:
    text = json.dumps(header).encode()
    if len(text) > MAX_HEADER:
        raise ChannelError(f"a header of {len(text)} bytes is too long: {MAX_HEADER} are allowed")
    length = _LENGTH.pack(len(text))
    if file is None:
        connection.sendall(length)
    else:  # it travels with the first byte
        sent = socket.send_fds(connection, [length], [file])
        connection.sendall(length[sent:])
    connection.sendall(text)


def read(connection: socket.socket) -> tuple[dict[str, Any], Arrays]:
    """Return the next message.

    Raises:
        EOFError: the other side has closed the connection.
        OSError: it broke, or nothing came in time (TimeoutError).
        ChannelError: what came is no message.
    """
    files: list[int] = []
    try:
        head = b""
        while len(head) < _LENGTH.size:
            data, more, _, _ = socket.recv_fds(connection, _LENGTH.size - len(head), 1)
            for file in more:
                os.set_inheritable(file, False)
            files += more
            if not data:
                raise EOFError
            head += data
        (length,) = _LENGTH.unpack(head)
        if length > MAX_HEADER:
            raise ChannelError(f"a header of {length} bytes is announced: {MAX_HEADER} are allowed")
        text = bytearray()
        while len(text) < length:
            data = connection.recv(min(length - len(text), 1 << 20))
            if not data:
                raise EOFError
            text += data
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ChannelError(f"a header is no JSON: {error}") from error
        if not isinstance(header, dict):
            raise ChannelError(f"a header is a JSON object, not a {type(header).__name__}")
        return header, unpack(header.pop("arrays", []), files[0] if files else None)
    finally:
        for file in files:
            os.close(file)


def _packed(arrays: Sequence[npt.NDArray[np.generic]] | Packed) -> Packed:
    return arrays if isinstance(arrays, Packed) else pack(arrays)


def pack(arrays: Sequence[npt.NDArray[np.generic]]) -> Packed:
    """Write arrays into a file in memory: return their dtypes and shapes, and its descriptor, None where there are none."""
    if not arrays:
        return Packed([], None)
    layout = layout_of(arrays)
    file = memory_file()
    try:
        for array in arrays:
            whole: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            rest = memoryview(whole)
            while rest:
                rest = rest[os.write(file, rest) :]
    except BaseException:
        os.close(file)
        raise
    return Packed(layout, file)


def memory_file() -> int:
    """Return the descriptor of a new file in memory, which has no name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("nanofed")
    with tempfile.TemporaryFile() as file:  # elsewhere than on Linux
        return os.dup(file.fileno())


def unpack(layout: Any, file: int | None) -> Arrays:
    """Return arrays over the mapped file, read-only; it stays mapped as long as one of them lives.

    Raises:
        ChannelError: the layout is none, or does not describe this file.
    """
    described = [_array_kind(entry) for entry in _as_list(layout)]
    size = bytes_of(layout)
    if file is None:
        if described:
            raise ChannelError(f"{len(described)} arrays are announced and none came")
        return []
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_size != size:
        raise ChannelError(f"arrays of {size} bytes are announced, the file has {found.st_size}")
    mapped: Any = mmap.mmap(file, size, access=mmap.ACCESS_READ) if size else b""
    arrays: Arrays = []
    offset = 0
    for dtype, shape in described:
        count = math.prod(shape)
        arrays.append(np.frombuffer(mapped, dtype, count, offset).reshape(shape) if count else np.empty(shape, dtype))
        offset += count * dtype.itemsize
    return arrays


def bytes_of(layout: Any) -> int:
    """Return how many bytes the arrays of a layout have together.

    Raises:
        ChannelError: it is none.
    """
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in map(_array_kind, _as_list(layout)))


def _as_list(layout: Any) -> list[Any]:
    if not isinstance(layout, list) or len(layout) > MAX_ARRAYS:
        raise ChannelError(f"the arrays of a header are a list of at most {MAX_ARRAYS} dtypes and shapes")
    return layout


def _array_kind(entry: Any) -> tuple[np.dtype[Any], tuple[int, ...]]:
    try:
        name, shape = entry
        dtype = np.dtype(name)
        # Numbers only: whatever else NumPy can describe would be made of foreign bytes. Its own limit is 64 dimensions.
        if dtype.kind in "biuf" and len(shape) <= 32 and all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
            return dtype, tuple(shape)
    except (TypeError, ValueError, SyntaxError):  # NumPy parses descriptions of dtypes
        pass
    raise ChannelError(f"{repr(entry)[:80]} describes no array of numbers")
