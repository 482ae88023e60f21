"""Standard streams that may be closed, full, without a reader, or unable to say a character."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any

from nanofed.errors import NanofedError

NUMBERS = {"stdin": 0, "stdout": 1, "stderr": 2}


class ReaderGone(BrokenPipeError):
    """Whoever read standard output (head, say) has gone."""


def hold_descriptors() -> None:
    """Open /dev/null in the place of standard streams that are closed.

    The next files to be opened would take their numbers, and whatever a library or a child process writes to a standard stream
    would go into a checkpoint.
    """
    for number in NUMBERS.values():
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)


class _Output(io.FileIO):
    """The raw side of a standard stream: once its descriptor takes nothing more, it is pointed at /dev/null.

    Args:
        number: the descriptor's number; the descriptor stays open when this object is closed.
        lasting: whether what is written after that is lost without an error.

    Raises:
        ReaderGone: nobody reads any more, and the stream is not lasting.
        NanofedError: the output cannot be written (to a full disk, say), and the stream is not lasting.
    """

    def __init__(self, number: int, *, lasting: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._lasting = lasting

    def write(self, data: Any, /) -> int:
        """Write bytes and return how many; a pipe that does not block is waited for."""
        try:
            while (written := super().write(data)) is None:
                select.select([], [self], [])
            return written
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # else Python's own flush at exit would stumble over it again
            os.close(null)
            if self._lasting:
                return memoryview(data).nbytes
            if error.errno == errno.EPIPE:
                raise ReaderGone(*error.args) from error
            raise NanofedError(f"the output cannot be written: {error.strerror}") from error


def secure(*, lasting: bool) -> None:
    """Make this process's standard output and standard error fit for whatever is at their other end.

    Characters that their encoding cannot say are written as escapes. Where they are closed, what is written is lost.
    Standard error never raises. Streams that are something else than the process's own, as in a notebook, are left alone.

    Args:
        lasting: standard output does not raise either: the command goes on without readers and on a full disk. Else it raises
            ReaderGone or NanofedError.
    """
    hold_descriptors()
    for name in ("stdout", "stderr"):
        old, number = getattr(sys, name), NUMBERS[name]
        try:
            if old is not None and old.fileno() != number:
                continue
        except (OSError, ValueError, AttributeError):  # closed, or no file
            continue
        raw = _Output(number, lasting=lasting or name == "stderr")
        if old is not None:
            with contextlib.suppress(OSError):
                old.flush()
        by_line = name == "stderr" or (old is not None and (old.line_buffering or old.write_through))
        encoding = "utf-8" if old is None else old.encoding
        new = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=by_line)
        setattr(sys, name, new)
