"""One end of a connection: a buffer of fixed size with backpressure, read by the part."""

from __future__ import annotations

import asyncio
from typing import cast

BUFFER = 256 << 10  # what asyncio's TLS hands over at most
HEAD_END = b"\r\n\r\n"


class Closed(ConnectionError):
    """The other side has gone, in the middle of something.

    Args:
        reason: under which it is counted.
    """

    def __init__(self, reason: str = "broken_off") -> None:
        super().__init__(reason)
        self.reason = reason


class HeadTooLarge(Exception):
    """The other side sends more than a head may have."""


class Stream(asyncio.BufferedProtocol):
    """Reads into one buffer, without the copies of `asyncio.StreamReader`: bodies of gigabytes pass at the speed of TLS.

    Nothing is read from the network while the buffer is full; `write` waits while the other side does not read.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._buffer = memoryview(bytearray(BUFFER))
        self._start = self._end = 0
        self._full = self._stalled = False
        self._ended = self._lost = False
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._transport = cast(asyncio.Transport, None)

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where to read to; never empty, since nothing is read while the buffer is full."""
        if self._start == self._end:
            self._start = self._end = 0
        return self._buffer[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take note of what was read."""
        self._end += nbytes
        if self._end == BUFFER:
            self._full = True
            self._transport.pause_reading()
        self._wake(self._reader)

    def eof_received(self) -> None:
        """Take note that no more will come; with TLS the connection then closes."""
        self._ended = True
        self._wake(self._reader)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go whoever waits."""
        self._ended = self._lost = True
        self._transport = cast(asyncio.Transport, None)  # it knows us: kept, both would wait for the garbage collector
        self._wake(self._reader)
        self._wake(self._writer)

    def pause_writing(self) -> None:
        """Let `write` wait."""
        self._stalled = True

    def resume_writing(self) -> None:
        """Let `write` go on."""
        self._stalled = False
        self._wake(self._writer)

    @staticmethod
    def _wake(waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # we call these

    @property
    def pending(self) -> int:
        """Bytes that have arrived and were not taken."""
        return self._end - self._start

    @property
    def ended(self) -> bool:
        """Whether the other side will send no more than what is pending."""
        return self._ended

    @property
    def gone(self) -> bool:
        """Whether the connection is no more, or about to end."""
        return self._ended or self._transport.is_closing()

    @property
    def stalled(self) -> bool:
        """Whether the other side does not read what we write."""
        return self._stalled

    async def arrived(self) -> bool:
        """Wait until something is pending; False where the other side has ended instead."""
        while not self.pending and not self._ended:
            await self._more()
        return self.pending > 0

    async def head(self, limit: int) -> bytes:
        """Return the bytes up to the first empty line, and take them.

        Raises:
            HeadTooLarge: there is none within `limit` bytes.
            Closed: the other side has gone.
        """
        searched = 0
        while True:
            if searched == 0 and self._start:  # the whole buffer for the head
                self._compact()
            found = bytes(self._buffer[self._start : min(self._end, self._start + limit)])
            end = found.find(HEAD_END, max(0, searched - len(HEAD_END)))
            if end >= 0:
                return self.take(end + len(HEAD_END))
            if len(found) >= limit:
                raise HeadTooLarge
            if self._ended:
                raise Closed
            searched = len(found)
            await self._more()

    async def part(self, most: int) -> bytes:
        """Return what is pending, up to `most` bytes, and take it; waits until there is something.

        Raises:
            Closed: the other side has gone.
        """
        if not await self.arrived():
            raise Closed
        return self.take(most)

    def take(self, most: int) -> bytes:
        """Return up to `most` pending bytes, and take them."""
        stop = min(self._end, self._start + most)
        taken = bytes(self._buffer[self._start : stop])
        self._start = stop
        if self._start == self._end:
            self._read_on()
        return taken

    async def write(self, content: bytes) -> None:
        """Send, and wait while the other side does not read.

        Raises:
            Closed: the other side has gone.
        """
        if self._lost or self._transport.is_closing():  # not `gone`: who sends no more may still read
            raise Closed
        self._transport.write(content)
        while self._stalled and not self._lost:
            self._writer = self._loop.create_future()
            await self._writer

    def close(self) -> None:
        """Send what was written, and end."""
        if not self._lost:
            self._transport.close()

    def abort(self) -> None:
        """End at once."""
        if not self._lost:
            self._transport.abort()

    async def _more(self) -> None:
        self._reader = self._loop.create_future()
        await self._reader

    def _compact(self) -> None:
        size = self.pending
        self._buffer[:size] = bytes(self._buffer[self._start : self._end])
        self._start, self._end = 0, size
        if size < BUFFER:
            self._read_on()

    def _read_on(self) -> None:
        if self._full and not self._lost:
            self._full = False
            self._transport.resume_reading()
