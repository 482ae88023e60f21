"""Which rows a client has read, from where its streams stand in its lease."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nanofed.data.rows import RowRange, locate
from nanofed.data.streams import DataState

Rows = dict[tuple[int, str], npt.NDArray[np.int64]]  # (epoch, shard) -> row numbers


def rows_read(ranges: Sequence[RowRange], streams: int, state: DataState) -> Rows:
    """Return the rows of a lease that streams have begun to read, also those that are still pending.

    Args:
        ranges: of the lease, in reading order.
        streams: stream s reads the rows r with r mod streams = s.
        state: where they stand.
    """
    parts: dict[tuple[int, str], list[npt.NDArray[np.int64]]] = defaultdict(list)
    for stream, at in state.streams.items():
        index = None if at.position is None else locate(ranges, at.position)
        if at.position is None or index is None:
            continue
        for number, part in enumerate(ranges[: index + 1]):
            stop = part.stop if number < index else min(part.stop, at.position.row)
            first = part.start + (stream - part.start) % streams
            if first < stop:
                parts[part.epoch, part.shard].append(np.arange(first, stop, streams))
    return {key: np.concatenate(rows) for key, rows in parts.items()}


def rows_between(ranges: Sequence[RowRange], streams: int, before: DataState | None, after: DataState) -> Rows:
    """Return the rows whose tokens a client may have trained on from `before` to `after`: those read since, and those begun."""
    read = rows_read(ranges, streams, after)
    if before is None:
        return read
    done = rows_read(ranges, streams, before)
    begun: dict[tuple[int, str], list[int]] = defaultdict(list)
    for at in before.streams.values():
        for row in at.pending:
            begun[row.epoch, row.shard].append(row.row)
    out: Rows = {}
    for key in sorted(read.keys() | begun.keys()):
        new = np.setdiff1d(read.get(key, np.zeros(0, np.int64)), done.get(key, np.zeros(0, np.int64)))
        out[key] = np.union1d(new, np.array(begun.get(key, []), np.int64))
    return out
