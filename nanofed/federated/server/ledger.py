"""Who may read which rows: leases of rows, committed with the merge.

Every row of a shard is, in each epoch, free, on lease to one client, or merged; so a training row is merged at most once an
epoch. A client keeps reading where it stands; one of which nothing was merged for `UNMERGED_ROUNDS` gives back what it holds.

Leases are stretches of the least-progressed shard, or with a stride, every n-th stretch of all shards in their order. Where
every site trains on its own text there is one such ledger a client. What a client reports is held against the text of its
lease up to where it says that its streams stand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from nanofed.data.datamodule import TokenDataModule
from nanofed.data.rows import RowRange, locate
from nanofed.data.shards import Shard, read_texts
from nanofed.data.streams import DataState
from nanofed.errors import DataError
from nanofed.federated.config import FederationConfig
from nanofed.federated.server.validation import RefusedReply
from nanofed.federated.wire.messages import Instructions, Report, SiteShard

FREE, LEASED, MERGED = 0, 1, 2
TEXT_BYTES_PER_TOKEN = 5.0  # more than tokenizers give: a lease is rather too long than too short
LEAST_BYTES_PER_TOKEN = 2.0  # fewer than tokenizers make of a lot of text; of a single document there may be one
# A lease of more parts than these is for text too small, or for a claim too large, to be worth the server's time.
MAX_EXTENSIONS = 128  # by which one call makes a lease longer
MAX_RANGES = 1024  # that a client holds where its lease is of stretches
UNMERGED_ROUNDS = 10  # in a row without a merge, after which others may read what a client holds
MAX_SCATTERED = 64  # parts of one call that lack rows of some stream; after them only whole stretches are looked for


Rows = dict[tuple[int, str], npt.NDArray[np.int64]]  # (epoch, shard) -> row numbers


@dataclass
class _Client:
    ranges: list[RowRange] = field(default_factory=list)  # in reading order; merged ones leave from the front only
    reached: int = 0  # index of the last range that a stream has reached: those after it are unread
    data: DataState | None = None  # where its streams stand, as merged; None: at the begin of its ranges
    unmerged: int = 0  # rounds in a row in which nothing of it was merged


class Ledger:
    """The rows of all training shards and the clients that hold them.

    Args:
        shards: The training shards, of which name, number of rows and bytes of text are read.
        streams: The number of streams of every client: stream s reads the rows r with r mod streams = s.

    Attributes:
        own_text: Every client has text of its own, of which the server has none.
    """

    own_text = False

    def __init__(self, shards: Iterable[Shard | SiteShard], streams: int) -> None:
        self._shards = {shard.name: shard for shard in shards}
        self._streams = streams
        self._text_bytes = sum(shard.text_bytes for shard in self._shards.values())
        self._row_bytes = max(1.0, self._text_bytes / sum(shard.num_rows for shard in self._shards.values()))
        self._rows: dict[tuple[int, str], npt.NDArray[np.uint8]] = {}  # opened (epoch, shard) -> state of every row
        self._epoch = dict.fromkeys(self._shards, 0)  # newest epoch opened, or to be opened, of every shard
        self._clients: dict[str, _Client] = {}

    def admit(self, client: str, shards: Sequence[SiteShard]) -> None:
        """Do nothing: all clients read these shards, which are compared when a client says hello."""

    def of(self, client: str) -> Ledger:
        """Return the ledger of the shards that a client reads, which is this one."""
        return self

    def share(self, clients: int) -> int:
        """Return about how many tokens an equal share of all shards has, at `TEXT_BYTES_PER_TOKEN`."""
        return int(self._text_bytes / TEXT_BYTES_PER_TOKEN / clients)

    def merged_rows(self) -> int:
        """Return the rows merged so far, over all epochs: those of epochs that are closed and forgotten, and of the open ones."""
        counted = sum(newest * self._shards[name].num_rows for name, newest in self._epoch.items())
        return counted + sum(
            int((rows == MERGED).sum()) - len(rows) * (epoch < self._epoch[name])
            for (epoch, name), rows in self._rows.items()
        )

    def lease(
        self, client: str, tokens: int, *, spare_rows: int = 0, stride: tuple[int, int] | None = None
    ) -> tuple[RowRange, ...]:
        """Return the rows that a client may read, in order, with text that nobody else reads.

        Streams do not advance evenly, as one's documents are longer than another's: each of them gets enough. The lease is
        shorter than what is asked for where it would take more than `MAX_EXTENSIONS` parts or more than `MAX_RANGES` in all,
        as a text of a few rows would for a long round. What clients gave back may be single rows, most of them of a few streams:
        after `MAX_SCATTERED` of these the lease goes on with whole stretches, so that no stream is left without text.

        Args:
            client: The client that is to read.
            tokens: About how many tokens it will train on.
            spare_rows: The rows a stream beyond them, since documents vary and packers read ahead.
            stride: (i, n) to read the whole set as the i-th of n clients: of each n stretches of one row a stream, the i-th,
                shard after shard; what absent or slower clients leave over of an epoch is read before the next begins.
                By default the least-progressed shard is read on.
        """
        held = self._clients.setdefault(client, _Client())
        wanted = tokens / self._streams * TEXT_BYTES_PER_TOKEN / self._row_bytes + spare_rows
        unread = sum((self._unread(part) for part in held.ranges), np.zeros(self._streams))
        while len(held.ranges) - 1 > held.reached and (unread - self._unread(held.ranges[-1])).min() >= wanted:
            last = held.ranges.pop()  # leased before the client's speed was known: more than it needs
            unread -= self._unread(last)
            self._part(last)[:] = FREE
        scattered = 0
        for _ in range(MAX_EXTENSIONS):
            if unread.min() >= wanted or (stride is None and len(held.ranges) >= MAX_RANGES):
                break
            turns = int(wanted - unread.min()) + 1
            whole = scattered >= MAX_SCATTERED
            if stride is None or whole:
                new = [self._extend(held, turns, whole=whole)]
            else:
                new = self._extend_by_stride(held, turns, *stride)
            gained = sum(map(self._unread, new), np.zeros(self._streams))
            scattered += not gained.all()
            unread += gained
        return tuple(held.ranges)

    def _unread(self, part: RowRange) -> npt.NDArray[np.float64]:
        """Return how many rows of a range each stream has still to finish."""
        rows = part.start + np.flatnonzero(self._part(part) == LEASED)
        return np.bincount(rows % self._streams, minlength=self._streams).astype(np.float64)

    def _extend(self, held: _Client, turns: int, *, whole: bool) -> RowRange:
        """Lease up to `turns` more rows a stream: on from where the client reads, else from the least-progressed shard.

        With `whole`, the second choice is where there are free rows of every stream in a row.
        """
        last = held.ranges[-1] if held.ranges else None
        start = last.stop if last is not None else 0
        if last is not None and self._is_free(last.epoch, last.shard, start):
            epoch, shard = last.epoch, last.shard
        elif whole:
            epoch, shard, start = self._first_stretch()
        else:
            progress = self._progress()
            shard = min(progress, key=lambda name: (progress[name], name))
            epoch = progress[shard][0]
            start = int(np.argmax(self._open(epoch, shard) == FREE))
        rows = self._open(epoch, shard)
        count = turns * self._streams
        taken = np.flatnonzero(rows[start : start + count] != FREE)
        stop = start + int(taken[0]) if len(taken) else min(start + count, len(rows))
        return self._take(held, RowRange(shard, start, stop, epoch))

    def _first_stretch(self) -> tuple[int, str, int]:
        """Return epoch, shard and first row of the oldest free rows that hold one of every stream.

        Where no open epoch has any, they are the first rows of an epoch that nobody has begun.
        """
        for (epoch, shard), rows in sorted(self._rows.items(), key=lambda item: item[0]):
            edges = np.flatnonzero(np.diff(rows == FREE, prepend=False, append=False))
            for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                if stop - start >= self._streams:
                    return epoch, shard, start
        following = {name: newest + ((newest, name) in self._rows) for name, newest in self._epoch.items()}
        shard = min(following, key=lambda name: (following[name], name))
        return following[shard], shard, 0

    def _extend_by_stride(self, held: _Client, turns: int, part: int, parts: int) -> list[RowRange]:
        """Lease up to `turns` more rows a stream, of the part-th of each `parts` stretches of the first shard that has some."""
        turn = {name: at for name, (at, _) in sorted(self._progress().items())}
        epoch = min(turn.values())
        for own in (True, False):
            for shard in (name for name, at in turn.items() if at == epoch):
                free = np.flatnonzero(self._open(epoch, shard) == FREE)
                stretch = free // self._streams
                if own:
                    free, stretch = free[stretch % parts == part], stretch[stretch % parts == part]
                if not len(free):
                    continue
                taken = free[stretch < np.unique(stretch)[:turns][-1] + 1]
                runs = np.split(taken, np.flatnonzero(np.diff(taken) != 1) + 1)
                return [self._take(held, RowRange(shard, int(run[0]), int(run[-1]) + 1, epoch)) for run in runs]
        raise AssertionError("an epoch with free rows has none")

    def _take(self, held: _Client, part: RowRange) -> RowRange:
        """Lease a range, as the end of a client's last one where it goes on there."""
        self._open(part.epoch, part.shard)[part.start : part.stop] = LEASED
        last = held.ranges[-1] if held.ranges else None
        if last is not None and (last.epoch, last.shard, last.stop) == (part.epoch, part.shard, part.start):
            held.ranges[-1] = RowRange(part.shard, last.start, part.stop, part.epoch)
        else:
            held.ranges.append(part)
        return part

    def _is_free(self, epoch: int, shard: str, row: int) -> bool:
        rows = self._rows.get((epoch, shard))
        return rows is not None and row < len(rows) and rows[row] == FREE

    def _progress(self) -> dict[str, tuple[int, float]]:
        """Return the epoch in which every shard is read on, and which part of that is merged or on lease.

        It is the oldest epoch that has free rows (a client may have given some back long after the next epoch began), or else the
        next one, which is opened when it is leased from.
        """
        unread = {name: (newest + ((newest, name) in self._rows), 0.0) for name, newest in self._epoch.items()}
        first: dict[str, int] = {}
        for (epoch, name), rows in self._rows.items():
            if epoch < first.get(name, epoch + 1) and (rows == FREE).any():
                first[name] = epoch
        return unread | {name: (at, float((self._rows[at, name] != FREE).mean())) for name, at in first.items()}

    def _open(self, epoch: int, shard: str) -> npt.NDArray[np.uint8]:
        self._epoch[shard] = max(self._epoch[shard], epoch)
        return self._rows.setdefault((epoch, shard), np.zeros(self._shards[shard].num_rows, np.uint8))

    def clients(self) -> tuple[str, ...]:
        """Return the clients that hold rows."""
        return tuple(self._clients)

    def held(self, client: str) -> tuple[RowRange, ...]:
        """Return the rows that a client holds."""
        return tuple(self._clients[client].ranges) if client in self._clients else ()

    def data(self, client: str) -> DataState | None:
        """Return where a client's streams stand in what it holds; None at its begin."""
        return self._clients[client].data if client in self._clients else None

    def believed(self, report: Report, asked: Instructions) -> Report:
        """Return a client's report as it is, if there is so much text between the client's old and new positions.

        Mean lengths settle it nearly always; where they do not (a few rows, one of them a book), the rows are read.

        Raises:
            RefusedReply: It claims more tokens than the rows that the client has read have bytes of text.
        """
        rows = _rows_between(asked.lease, self._streams, asked.data, report.data)
        means = (
            len(found) * self._shards[name].text_bytes / self._shards[name].num_rows
            for (_, name), found in rows.items()
        )
        if report.tokens * LEAST_BYTES_PER_TOKEN > sum(means):
            text = sum(_text_bytes(cast(Shard, self._shards[name]), found) for (_, name), found in rows.items())
            if report.tokens > text:
                count = sum(map(len, rows.values()))
                reason = f"it claims {report.tokens} tokens; the {count} rows that it has read hold {text} bytes"
                raise RefusedReply("tokens", reason)
        return report

    def commit(self, client: str, state: DataState) -> int:
        """Mark as merged what a client has read to its last token, and return the number of rows.

        The rows before its streams' positions are merged, except those still pending.
        """
        held = self._clients[client]
        held.data, held.unmerged = state, 0
        pending = {row for stream in state.streams.values() for row in stream.pending}
        merged = 0
        for at in state.streams.values():
            index = None if at.position is None else locate(held.ranges, at.position)
            held.reached = max(held.reached, index or 0)
        for (epoch, shard), read in _rows_read(held.ranges, self._streams, state).items():
            rows = self._rows[(epoch, shard)]
            kept = [r.row for r in pending if (r.epoch, r.shard) == (epoch, shard)]
            read = read[(rows[read] == LEASED) & ~np.isin(read, kept)]
            rows[read] = MERGED
            merged += len(read)
        # From the front only: a stream that stands behind a range that left must find the next one first in its plan.
        while held.ranges and (self._part(held.ranges[0]) == MERGED).all():
            held.ranges.pop(0)
            held.reached = max(0, held.reached - 1)
        self._close()
        return merged

    def _part(self, part: RowRange) -> npt.NDArray[np.uint8]:
        return self._rows[(part.epoch, part.shard)][part.start : part.stop]

    def _close(self) -> None:
        """Forget the rows of an epoch that is merged whole."""
        for epoch, name in [key for key, rows in self._rows.items() if (rows == MERGED).all()]:
            if any(part.shard == name and part.epoch == epoch for c in self._clients.values() for part in c.ranges):
                continue  # its place in a client's plan still counts
            del self._rows[(epoch, name)]
            self._epoch[name] = max(self._epoch[name], epoch + 1)

    def miss(self, client: str) -> None:
        """Count a round in which a client was away or not merged; after `UNMERGED_ROUNDS` in a row its rows are free for others.

        If they were free at once, the next client would read the documents that this one has begun from their beginning, and
        train again on text that is merged already: a large part of a short round. Who was never merged has begun none.
        """
        held = self._clients.get(client)
        if held is None:
            return
        held.unmerged += 1
        if held.data is None or held.unmerged >= UNMERGED_ROUNDS:
            self.release(client)

    def release(self, client: str) -> int:
        """Take back what a client holds and has not merged, and return the number of rows."""
        held = self._clients.pop(client, None)
        returned = 0
        for part in held.ranges if held else ():
            rows = self._part(part)
            returned += int((rows == LEASED).sum())
            rows[rows == LEASED] = FREE
        self._close()
        return returned

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger as plain values: runs of equal rows, and the clients' ranges."""
        return {
            "epoch": dict(self._epoch),
            "rows": [[epoch, name, _runs(rows)] for (epoch, name), rows in self._rows.items()],
            "clients": {
                name: {
                    "ranges": [[p.shard, p.start, p.stop, p.epoch] for p in c.ranges],
                    "reached": c.reached,
                    "data": c.data.to_plain() if c.data else None,
                    **({"absent": c.unmerged} if c.unmerged else {}),
                }
                for name, c in self._clients.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved ledger.

        Raises:
            DataError: The ledger is over other shards than these.
        """
        if "rows" not in state:
            raise DataError("the saved ledger is of the sites' own shards: it was made with federation.sharding=local")
        sizes = {name: sum(length for _, length in runs) for _, name, runs in state["rows"]}
        if set(state["epoch"]) != set(self._shards) or any(
            rows != self._shards[name].num_rows for name, rows in sizes.items()
        ):
            raise DataError("the saved ledger is over other shards than data.path and data.num_shards give now")
        self._epoch = {name: int(epoch) for name, epoch in state["epoch"].items()}
        self._rows = {
            (int(epoch), name): np.repeat(*np.array(runs, np.int64).reshape(-1, 2).T).astype(np.uint8)
            for epoch, name, runs in state["rows"]
        }
        self._clients = {
            name: _Client(
                [RowRange(*part) for part in saved["ranges"]],
                saved["reached"],
                DataState.from_plain(saved["data"]) if saved["data"] else None,
                saved.get("absent", 0),  # as this was called before; older ledgers have none
            )
            for name, saved in state["clients"].items()
        }


def _rows_read(ranges: Sequence[RowRange], streams: int, state: DataState) -> Rows:
    """Return the rows of a lease that streams have begun to read, also those that are still pending."""
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


def _rows_between(ranges: Sequence[RowRange], streams: int, before: DataState | None, after: DataState) -> Rows:
    """Return the rows whose tokens a client may have trained on from `before` to `after`: those read since, and those begun."""
    read = _rows_read(ranges, streams, after)
    if before is None:
        return read
    done = _rows_read(ranges, streams, before)
    begun: dict[tuple[int, str], list[int]] = defaultdict(list)
    for at in before.streams.values():
        for row in at.pending:
            begun[row.epoch, row.shard].append(row.row)
    out: Rows = {}
    for key in sorted(read.keys() | begun.keys()):
        new = np.setdiff1d(read.get(key, np.zeros(0, np.int64)), done.get(key, np.zeros(0, np.int64)))
        out[key] = np.union1d(new, np.array(begun.get(key, []), np.int64))
    return out


def _text_bytes(shard: Shard, rows: npt.NDArray[np.int64]) -> int:
    """Return the UTF-8 bytes of rows, with one more each for the token that begins a document."""
    total = first = 0
    for group, size in enumerate(shard.row_group_rows):
        wanted = rows[(first <= rows) & (rows < first + size)] - first
        if len(wanted):
            texts = read_texts(shard, group)
            total += sum(len(texts[row].encode()) + 1 for row in wanted.tolist())
        first += size
    return total


def _runs(rows: npt.NDArray[np.uint8]) -> list[list[int]]:
    """Return runs of equal values as [value, length]."""
    ends = np.append(np.flatnonzero(np.diff(rows)) + 1, len(rows))
    return [[int(rows[end - 1]), int(length)] for end, length in zip(ends, np.diff(ends, prepend=0), strict=True)]


class _SiteLedger(Ledger):
    """The ledger of one site's own shards, whose text the server cannot read."""

    def believed(self, report: Report, asked: Instructions) -> Report:
        """Return a client's report with no more tokens, and steps of them, than there are bytes of text in what it has read.

        Raises:
            RefusedReply: The client has read no row.
        """
        held = self._clients[report.client]
        rows = _rows_between(held.ranges, self._streams, held.data, report.data)
        possible = int(sum(len(found) for found in rows.values()) * self._row_bytes)
        if possible < 1:
            raise RefusedReply("tokens", f"it claims {report.tokens} tokens and has read no row")
        steps = max(1, min(report.steps, possible * report.steps // report.tokens))
        ahead = report.ahead * steps // report.steps
        return replace(report, tokens=min(report.tokens, possible), steps=steps, ahead=ahead)


class LocalLedger(Ledger):
    """The ledgers of sites that each train on their own text.

    The server knows names, sizes and fingerprints of a site's shards and leases rows of them; no text leaves the site.

    Args:
        streams: The number of streams of every client.
    """

    own_text = True

    def __init__(self, streams: int) -> None:
        self._streams = streams
        self._own: dict[str, tuple[SiteShard, ...]] = {}
        self._ledgers: dict[str, Ledger] = {}

    def admit(self, client: str, shards: Sequence[SiteShard]) -> None:
        """Take up what a client says that it has; what it said first stays.

        Raises:
            DataError: It has no text, too few rows for its streams, or other text than it had.
        """
        if not shards or max(shard.num_rows for shard in shards) < self._streams:
            raise DataError(f"its own text has no shard of {self._streams} rows, one a stream")
        known = self._own.setdefault(client, tuple(shards))
        if {shard.name: shard for shard in known} != {shard.name: shard for shard in shards}:
            changed = sorted({shard.name for shard in set(known) ^ set(shards)})
            raise DataError(f"its own text is not what it was in this run: {', '.join(changed)[:200]} differ")
        self._ledgers.setdefault(client, _SiteLedger(known, self._streams))

    def of(self, client: str) -> Ledger:
        """Return the ledger of a client's own shards."""
        return self._ledgers[client]

    def merged_rows(self) -> int:
        """Return the rows merged so far, over all clients."""
        return sum(ledger.merged_rows() for ledger in self._ledgers.values())

    def clients(self) -> tuple[str, ...]:
        """Return the clients that hold rows."""
        return tuple(client for client, ledger in self._ledgers.items() if ledger.clients())

    def state_dict(self) -> dict[str, Any]:
        """Return the ledgers as plain values."""
        return {
            "local": {
                client: {
                    "shards": [list(vars(shard).values()) for shard in self._own[client]],
                    "ledger": ledger.state_dict(),
                }
                for client, ledger in self._ledgers.items()
            }
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up saved ledgers.

        Raises:
            DataError: The ledgers are of a run that leased the server's shards.
        """
        if "local" not in state:
            raise DataError(
                "the saved ledger leases the server's own shards: it was not made with federation.sharding=local"
            )
        for client, saved in state["local"].items():
            self._own[client] = tuple(SiteShard(*shard) for shard in saved["shards"])
            self._ledgers[client] = _SiteLedger(self._own[client], self._streams)
            self._ledgers[client].load_state_dict(saved["ledger"])


def make_ledger(config: FederationConfig, data: TokenDataModule) -> Ledger:
    """Return the empty ledger of a federation."""
    if config.sharding == "local":
        return LocalLedger(data.streams)
    return Ledger(data.dataset.train, data.streams)


def ledger_figures(saved: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, dict[str, float]]]:
    """Return what a saved ledger says to those who look on.

    Args:
        saved: A ledger's `state_dict`, of either kind.

    Returns:
        The rows that each client holds, and for each shard how often it was merged (1.25 is once, and a quarter of the second
        epoch) and how many of its rows are on lease. A shard of a site's own is named `client/shard`.
    """
    held: dict[str, int] = {}
    shards: dict[str, dict[str, float]] = {}
    for client, own in sorted(saved.get("local", {}).items()):
        rows, figures = ledger_figures(own["ledger"])
        held |= rows
        shards |= {f"{client}/{name}": figure for name, figure in figures.items()}
    for client, parts in saved.get("clients", {}).items():
        held[client] = sum(stop - start for _, start, stop, _ in parts["ranges"])
    for name, epoch in sorted(saved.get("epoch", {}).items()):
        opened = {at: np.array(runs).reshape(-1, 2) for at, shard, runs in saved["rows"] if shard == name}
        closed = sum(at not in opened for at in range(epoch))
        merged = [int(runs[runs[:, 0] == MERGED, 1].sum()) / max(1, int(runs[:, 1].sum())) for runs in opened.values()]
        leased = sum(int(runs[runs[:, 0] == LEASED, 1].sum()) for runs in opened.values())
        shards[name] = {"epochs_merged": closed + sum(merged), "rows_leased": leased}
    return held, shards
