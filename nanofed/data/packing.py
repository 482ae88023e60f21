"""From documents to rows of `sequence_len + 1` tokens: pure packers over one stream, whose state is a few document names.

A packer never stores tokens in its state: it names the documents that it still holds (`pending`) and where in the first
one it stands (`offset`). Tokenizing them again gives the same buffer, so a state fits into every batch and every message.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanofed.data.rows import Row

BUFFER_SIZE = 128  # documents from which the best-fit packer chooses

Tokens = npt.NDArray[np.int32]
Read = Callable[[Row], Tokens]  # the tokens of a document, begin-of-sequence token first


@dataclass(frozen=True)
class StreamState:
    """Where one stream stands."""

    position: Row | None = None  # the next row to look at; None before the first
    pending: tuple[Row, ...] = ()  # documents read but not used up, in the order they arrived
    offset: int = 0  # tokens of the first pending document that are used up (contiguous packing)


class Exhausted(Exception):
    """The stream's rows cannot fill another row of tokens: a lease came to its end."""


class ContiguousPacker:
    """Lay documents end to end and cut rows from them (nanochat, October 2025): no token is lost.

    Consecutive rows share one token: the last target of a row is the first input of the next.
    """

    def __init__(self, rows: Iterator[Row], read: Read, state: StreamState, sequence_len: int) -> None:
        self.cropped_tokens = 0
        self._rows = rows
        self._read = read
        self._length = sequence_len
        self._start = state.position
        self._last: Row | None = None  # the last row read
        self._held = deque(state.pending)
        self._documents = deque(read(row) for row in state.pending)  # of the rows held
        self._offset = state.offset
        self._available = sum(map(len, self._documents)) - state.offset

    @property
    def state(self) -> StreamState:
        """Where the stream stands after the last row."""
        return StreamState(_after(self._last, self._start), tuple(self._held), self._offset)

    def next_row(self) -> Tokens:
        """Return the next row, shape (sequence_len + 1,).

        Raises:
            Exhausted: the rows ran out; what was read of them is pending in the state, nothing is lost.
        """
        while self._available < self._length + 1:
            row = next(self._rows, None)
            if row is None:
                raise Exhausted  # what was read is held, and so pending in the state
            tokens = self._read(row)
            self._last = row
            self._held.append(row)
            self._documents.append(tokens)
            self._available += len(tokens)
        out = np.empty(self._length + 1, np.int32)
        filled, offset = 0, self._offset
        for tokens in self._documents:
            part = tokens[offset : offset + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled, offset = filled + len(part), 0
            if filled == len(out):
                break
        self._offset += self._length
        while self._offset >= len(self._documents[0]):
            self._offset -= len(self._documents.popleft())
            self._held.popleft()
        self._available -= self._length
        return out


class BestFitPacker:
    """Start every row with a whole document and fill it with the largest that still fit; crop one when none does.

    The packing of today's nanochat: no row begins in the middle of a document, at the price of the cropped tokens, which are
    counted in `cropped_tokens`.

    Args:
        buffer_size: documents to choose from; more where they are too short to fill a row.
    """

    def __init__(
        self, rows: Iterator[Row], read: Read, state: StreamState, sequence_len: int, *, buffer_size: int = BUFFER_SIZE
    ) -> None:
        self.cropped_tokens = 0
        self._rows = rows
        self._read = read
        self._length = sequence_len
        self._buffer_size = buffer_size
        self._start = state.position
        self._last: Row | None = None  # the last row read
        self._arrivals = 0
        self._available = 0  # tokens of all documents held
        self._by_length: list[tuple[int, int]] = []  # (tokens, arrival), sorted: best fit is a bisection
        self._held: dict[int, Row] = {}  # by arrival, in that order
        self._documents: dict[int, Tokens] = {}
        for row in state.pending:
            self._add(row)

    @property
    def state(self) -> StreamState:
        """Where the stream stands after the last row."""
        return StreamState(_after(self._last, self._start), tuple(self._held.values()))

    def _add(self, row: Row) -> None:
        tokens = self._read(row)
        arrival = self._arrivals
        self._held[arrival] = row
        self._documents[arrival] = tokens
        bisect.insort(self._by_length, (len(tokens), arrival))
        self._arrivals += 1
        self._available += len(tokens)

    def _refill(self, tokens: int) -> None:
        while len(self._held) < self._buffer_size or self._available < tokens:
            row = next(self._rows, None)
            if row is None:
                return
            self._add(row)
            self._last = row

    def next_row(self) -> Tokens:
        """Return the next row, shape (sequence_len + 1,)."""
        room = self._length + 1
        self._refill(room)
        if self._available < room:
            raise Exhausted
        out = np.empty(room, np.int32)
        while room:
            # The longest document that fits; of equal ones the first to arrive.
            index = bisect.bisect_left(self._by_length, (room + 1, -1)) - 1
            # If none fits, crop the shortest.
            index = bisect.bisect_left(self._by_length, (self._by_length[index][0], -1)) if index >= 0 else 0
            size, arrival = self._by_length.pop(index)
            tokens = self._documents.pop(arrival)
            del self._held[arrival]
            used = min(size, room)
            out[len(out) - room : len(out) - room + used] = tokens[:used]
            self.cropped_tokens += size - used
            self._available -= size
            room -= used
            if room:
                self._refill(room)
        return out


def most_pending(sequence_len: int) -> int:
    """Return how many documents a packer holds at most: a row of the shortest ones, or the best-fit packer's choice of them."""
    return max(sequence_len + 1, BUFFER_SIZE) + 1


def _after(last: Row | None, start: Row | None) -> Row | None:
    """Return the next row to look at after the last one read; `start` where none was read yet."""
    return start if last is None else last._replace(row=last.row + 1)


Packer = ContiguousPacker | BestFitPacker
PACKERS: dict[str, type[ContiguousPacker] | type[BestFitPacker]] = {
    "contiguous": ContiguousPacker,
    "best_fit": BestFitPacker,
}
