"""Which rows of which shards are read, in which order: the whole training set epoch after epoch, or what is on lease."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nanofed.data.shards import Dataset, Shard
from nanofed.errors import DataError


class Row(NamedTuple):
    """One document: row `row` of shard `shard`, read for the `epoch`-th time (from 0)."""

    epoch: int
    shard: str
    row: int


@dataclass(frozen=True)
class RowRange:
    """Rows `start` to `stop` (exclusive) of a shard in one epoch."""

    shard: str
    start: int
    stop: int
    epoch: int = 0


def locate(ranges: Sequence[RowRange], position: Row, *, any_epoch: bool = False) -> int | None:
    """Return the index of the range from which a stream at `position` (the next row to look at) has read last, None if none.

    That range holds the row before: `position` itself may be the first row of another range, or lie behind the last one.
    """
    for index, part in enumerate(ranges):
        same_epoch = any_epoch or part.epoch == position.epoch
        if same_epoch and part.shard == position.shard and part.start < position.row <= part.stop:
            return index
    return None


class RowPlan:
    """An ordered list of row ranges that streams walk: stream s of S takes the rows r with r mod S = s.

    Args:
        ranges: what to read, in order; a range names a shard of `shards`.
        shards: the shards by name.
        repeat: start over with the next epoch at the end (the vanilla path); else the plan ends (a lease).
    """

    def __init__(self, ranges: Sequence[RowRange], shards: Iterable[Shard], *, repeat: bool) -> None:
        self.shards = {shard.name: shard for shard in shards}
        self.ranges = tuple(ranges)
        self.repeat = repeat
        for part in self.ranges:
            shard = self.shards.get(part.shard)
            if shard is None:
                raise DataError(f"rows of shard {part.shard!r} are asked for, which is not in the dataset")
            if not 0 <= part.start < part.stop <= shard.num_rows:
                raise DataError(
                    f"rows {part.start} to {part.stop} of {part.shard} are asked for, which has rows 0 to {shard.num_rows}"
                )

    @classmethod
    def whole(cls, dataset: Dataset) -> RowPlan:
        """Read every training shard from first to last, epoch after epoch."""
        return cls([RowRange(s.name, 0, s.num_rows) for s in dataset.train], dataset.train, repeat=True)

    def check_streams(self, streams: int) -> None:
        """Refuse a repeating plan that gives some stream nothing: it would search for ever."""
        served = {
            row % streams for part in self.ranges for row in range(part.start, min(part.stop, part.start + streams))
        }
        if self.repeat and len(served) < streams:
            raise DataError(
                f"the dataset has too few rows for {streams} streams (streams {sorted(set(range(streams)) - served)} would "
                "get none): use fewer streams or larger shards"
            )

    def locate(self, row: Row) -> int | None:
        """Return the index of the range in which a stream that is at `row` goes on, None if no range holds it."""
        return locate(self.ranges, row, any_epoch=self.repeat)

    def holds(self, row: Row) -> bool:
        """Tell whether the plan still contains a row (a lease may have lost it)."""
        return locate(self.ranges, row._replace(row=row.row + 1), any_epoch=self.repeat) is not None

    def walk(self, stream: int, streams: int, start: Row | None) -> Iterable[Row]:
        """Yield the rows of one stream from `start` (the next row to look at) on; without one, from the first range."""
        index = self.locate(start) if start is not None else None
        if start is None or index is None:
            index, epoch, first = 0, 0, None
        else:
            epoch, first = start.epoch, start.row
        while self.ranges:
            if index == len(self.ranges):
                if not self.repeat:
                    return
                index, epoch = 0, epoch + 1
            part = self.ranges[index]
            begin = part.start if first is None else first
            in_epoch = epoch if self.repeat else part.epoch
            for row in range(begin + (stream - begin) % streams, part.stop, streams):
                yield Row(in_epoch, part.shard, row)
            index, first = index + 1, None
