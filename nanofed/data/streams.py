"""The run's fixed streams and the batches made from them: the same global batches at any number of ranks.

A run has S streams (the canonical nodes of MosaicML Streaming). Row g of the run comes from stream g mod S, and rank k of W
takes the rows g with g mod W = k; as W divides S, a rank owns whole streams and nobody else reads them.
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections import OrderedDict
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from nanofed.data.packing import PACKERS, Exhausted, Packer, StreamState, Tokens
from nanofed.data.prefetch import made_ahead
from nanofed.data.rows import Row, RowPlan
from nanofed.data.shards import Shard, read_texts
from nanofed.errors import ConfigError

if TYPE_CHECKING:
    from nanofed.tokenizer.bpe import Tokenizer

KEPT_CHARACTERS = 1 << 26  # about twelve row groups of FineWeb-Edu


@dataclass(frozen=True)
class DataState:
    """Where the data of a run stands: rows made so far over all ranks, and the state of every stream (of this rank)."""

    rows: int
    streams: Mapping[int, StreamState]

    def to_plain(self) -> dict[str, Any]:
        """Return lists, numbers and strings only: for JSON, and for checkpoints that load with `weights_only`."""
        return {
            "rows": self.rows,
            "streams": [
                [stream, at.position and list(at.position), [list(row) for row in at.pending], at.offset]
                for stream, at in sorted(self.streams.items())
            ],
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> DataState:
        """Rebuild a state from `to_plain`'s output, which may have come from elsewhere.

        Raises:
            ValueError: it is not of that form.
        """
        try:
            streams = {
                _count(stream): StreamState(
                    None if position is None else _row(position), tuple(map(_row, pending)), _count(offset)
                )
                for stream, position, pending, offset in plain["streams"]
            }
            if len(streams) != len(plain["streams"]):
                raise ValueError("a stream is named twice")
            return cls(_count(plain["rows"]), streams)
        except (TypeError, KeyError) as error:
            raise ValueError(f"{str(plain)[:80]} is no data position: {error!r:.80}") from error

    @classmethod
    def merge(cls, parts: Sequence[DataState]) -> DataState:
        """Join the states of all ranks, taken at the same optimizer step, into the one of the run."""
        return cls(parts[0].rows, {stream: state for part in parts for stream, state in part.streams.items()})


NO_DATA = DataState(0, {})


def _count(plain: object) -> int:
    if type(plain) is not int or plain < 0:
        raise ValueError(f"{str(plain)[:80]} is no count")
    return plain


def _row(plain: Any) -> Row:
    epoch, shard, row = plain
    if type(shard) is not str:
        raise ValueError(f"{str(plain)[:80]} is no [epoch, shard, row]")
    return Row(_count(epoch), shard, _count(row))


@dataclass
class Batch:
    """A micro-batch: `inputs` and `targets` (rows, sequence_len), int64.

    Attributes:
        inputs: token ids.
        targets: the ids that follow them; -1 where a position does not count.
        state: where the training data stands after it; `NO_DATA` in a validation, which moves nothing on.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    state: DataState

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """Move the tensors to a device."""
        inputs = self.inputs.to(device, non_blocking=non_blocking)
        return Batch(inputs, self.targets.to(device, non_blocking=non_blocking), self.state)


class DocumentReader:
    """Reads documents as tokens, and keeps the texts of a row group until its own streams have read them.

    Streams drift apart as their documents differ in length, so a row group is kept for the last of them: reading it anew for
    each would cost more than a tenth of the time. Texts beyond `KEPT_CHARACTERS` are dropped again, those of the row group
    longest not used first, but for one row group a stream.

    Args:
        shards: the shards by name.
        tokenizer: encodes the documents.
        own: the streams that read here.
        streams: the number of fixed streams of the run.
    """

    def __init__(self, shards: Mapping[str, Shard], tokenizer: Tokenizer, own: Collection[int], streams: int) -> None:
        self._shards = shards
        self._tokenizer = tokenizer
        self._own = frozenset(own)
        self._streams = streams
        self._kept: OrderedDict[tuple[str, int], dict[int, str]] = OrderedDict()
        self._characters = 0
        self._ends = {name: list(itertools.accumulate(shard.row_group_rows)) for name, shard in shards.items()}

    def __call__(self, row: Row) -> Tokens:
        """Return the tokens of one document, shape (n + 1,), begin-of-sequence token first."""
        group = bisect.bisect_right(self._ends[row.shard], row.row)
        key = (row.shard, group)
        texts = self._kept.get(key)
        if texts is None or row.row not in texts:
            self._drop(key)  # a document is read once an epoch, but twice around a resume
            texts = self._kept[key] = self._read(row.shard, group)
            self._characters += sum(map(len, texts.values()))
            while self._characters > KEPT_CHARACTERS and len(self._kept) > len(self._own) + 2:
                self._drop(next(iter(self._kept)))
        self._kept.move_to_end(key)
        text = texts.pop(row.row)
        self._characters -= len(text)
        if not texts:
            del self._kept[key]
        return self._tokenizer.encode_document(text)

    def _read(self, shard: str, group: int) -> dict[int, str]:
        """Return the texts of a row group that the own streams read, by row."""
        texts = read_texts(self._shards[shard], group)
        first = self._ends[shard][group] - len(texts)
        return {row: text for row, text in enumerate(texts, first) if row % self._streams in self._own}

    def _drop(self, key: tuple[str, int]) -> None:
        self._characters -= sum(map(len, self._kept.pop(key, {}).values()))


@dataclass
class Wait:
    """Counts the seconds that whoever iterates has waited for batches."""

    seconds: float = 0.0


@dataclass(eq=False)
class TokenLoader:
    """An endless (or, over a lease, finite) iterable of this rank's micro-batches.

    With `prefetch` a thread makes them ahead. What it made and nobody took does not count: `state` is that of the last batch
    that was taken, from which the next iteration goes on. Where CUDA is in use the batches are in pinned memory, so that
    `Batch.to` copies them while the CPU goes on.

    Args:
        plan: the rows to read.
        tokenizer: encodes the documents.
        sequence_len: tokens in a row.
        device_batch_size: rows in a micro-batch of this rank.
        streams: the number of fixed streams of the run.
        rank: this rank's number, below `world_size`.
        world_size: the number of ranks; it must divide `streams`.
        packing: `contiguous` or `best_fit`.
        prefetch: micro-batches to make ahead; 0 makes each when it is asked for.
        wait: counts the seconds that iterating took: with `prefetch` those in which no batch was ready.

    Attributes:
        state: where the data stands after the last batch that was taken.
        packers: the packers of the newest iteration, by stream; with `prefetch` they are ahead of `state`.

    Raises:
        ConfigError: the ranks do not divide the streams, the packing is unknown, or `prefetch` is negative.
    """

    plan: RowPlan
    tokenizer: Tokenizer
    _: KW_ONLY
    sequence_len: int
    device_batch_size: int
    streams: int
    rank: int = 0
    world_size: int = 1
    packing: str = "contiguous"
    prefetch: int = 0
    wait: Wait = field(default_factory=Wait)
    state: DataState = field(init=False)
    packers: dict[int, Packer] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse ranks and a packing that do not fit."""
        streams, world_size = self.streams, self.world_size
        if streams % world_size:
            fits = [w for w in range(1, streams + 1) if streams % w == 0]
            nearest = sorted(fits, key=lambda w: abs(w - world_size))[:2]
            raise ConfigError(
                f"data.streams={streams} cannot be shared by {world_size} ranks: use {' or '.join(map(str, sorted(nearest)))} "
                f"ranks, or data.streams={streams // world_size * world_size or world_size}"
            )
        if self.packing not in PACKERS:
            raise ConfigError(f"data.packing={self.packing!r} is unknown: choose {' or '.join(PACKERS)}")
        self.plan.check_streams(streams)
        self.state = DataState(0, {stream: StreamState() for stream in range(self.rank, streams, world_size)})

    def load_state(self, state: DataState) -> None:
        """Go on where `state` (of the whole run, or of this rank) stands.

        Documents that a lease has lost are dropped; a stream whose place in the lease is lost starts at its begin, and drops
        what it holds, which it may meet again there.

        Raises:
            ConfigError: the state has other streams, or is of shards that the training set no longer has.
        """
        if not self.state.streams.keys() <= state.streams.keys() <= {*range(self.streams)}:
            raise ConfigError(
                f"the saved data position is of other streams: it has {len(state.streams)} of them, and this run has "
                f"data.streams={self.streams}"
            )
        own = {}
        for stream in self.state.streams:
            saved = state.streams[stream]
            found = saved.position is not None and self.plan.locate(saved.position) is not None
            if self.plan.repeat and saved.position is not None and not found:
                raise ConfigError(
                    f"the saved data position is in row {saved.position.row} of {saved.position.shard}, which the training "
                    "set no longer has: restore the shards, or data.num_shards, that the run was started with"
                )
            pending = tuple(row for row in saved.pending if found and self.plan.holds(row))
            offset = saved.offset if pending[:1] == saved.pending[:1] else 0
            own[stream] = StreamState(saved.position if found else None, pending, offset)
        self.state = DataState(state.rows, own)

    def __iter__(self) -> Generator[Batch, None, None]:
        return self.take()

    def take(self, limit: int | None = None) -> Generator[Batch, None, None]:
        """Yield the batches after `state`, at most `limit` of them: no more than those are made ahead."""
        made = itertools.islice(self._make(self.state, cuda_device()), limit)
        with made_ahead(made, self.prefetch) as batches:
            while True:
                started = time.perf_counter()
                batch = next(batches, None)
                self.wait.seconds += time.perf_counter() - started
                if batch is None:
                    return
                self.state = batch.state
                yield batch

    def _make(self, state: DataState, device: int | None) -> Iterator[Batch]:
        """Make the batches after `state`: no more shared with the loader than the packers, for it may be another thread."""
        reader = DocumentReader(self.plan.shards, self.tokenizer, state.streams, self.streams)
        packers: dict[int, Packer] = {
            stream: PACKERS[self.packing](
                iter(self.plan.walk(stream, self.streams, at.position)), reader, at, self.sequence_len
            )
            for stream, at in state.streams.items()
        }
        self.packers = packers
        shape = (self.device_batch_size, self.sequence_len)
        rows = state.rows
        while True:
            inputs, targets = empty_batch(shape, device)
            # numpy copies: torch would start its threads for this thread anew.
            into = zip(inputs.numpy(), targets.numpy(), strict=True)
            # The rows of this rank, also after a resume at another number of ranks, which need not divide the rows so far.
            first = rows + (self.rank - rows) % self.world_size
            rows += self.device_batch_size * self.world_size
            try:
                for number, (row_inputs, row_targets) in zip(itertools.count(first, self.world_size), into):
                    row = packers[number % self.streams].next_row()
                    row_inputs[:], row_targets[:] = row[:-1], row[1:]
            except Exhausted:
                return  # a part of a micro-batch is not delivered: its rows stay pending in the last state
            yield Batch(inputs, targets, DataState(rows, {stream: packer.state for stream, packer in packers.items()}))


def empty_batch(shape: tuple[int, int], device: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets of a micro-batch to be filled, in pinned memory where a CUDA `device` is in use."""
    if device is not None:
        torch.cuda.set_device(device)  # a thread begins on the first, and pinning would open it for this rank
    pinned = device is not None
    return tuple(torch.empty(shape, dtype=torch.int64, pin_memory=pinned) for _ in range(2))  # type: ignore[return-value]


def cuda_device() -> int | None:
    """Return the device of this rank where CUDA is in use, None elsewhere; asking must not open one."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
