"""Merges that a minority of hostile or broken clients cannot steer: median and trimmed mean of every coordinate."""

from __future__ import annotations

import itertools
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanofed.errors import NanofedError
from nanofed.federated.server.folding import Merger
from nanofed.federated.server.updates import Base
from nanofed.federated.wire.blocks import BLOCK, flat, over_blocks

logger = logging.getLogger(__name__)

SUFFIX = ".update"
ALIGNMENT = 64  # bytes: every array in a file begins at a multiple of it
ROWS = 8 * BLOCK  # elements of all clients in a thread's buffers: more clients make smaller blocks, not more memory


def comparators(n: int) -> Iterator[tuple[int, int]]:
    """Yield the pairs i < j that, compared and exchanged in this order, sort any n values.

    Batcher's merge exchange (Knuth, The Art of Computer Programming, vol. 3, 5.2.2, algorithm M). A network of minima and maxima
    sorts all coordinates of a block at once, at the speed of vector units.
    """
    top = 1 << max(0, (n - 1).bit_length() - 1)
    p = top if n > 1 else 0
    while p:
        q, r, d = top, 0, p
        while d:
            yield from ((i, i + d) for i in range(n - d) if i & p == r)
            d, q, r = q - p, q // 2, p
        p //= 2


class Sorted(Merger):
    """A merge of each coordinate's values in their order: replies are kept on disk in wire form until all are there.

    The result does not depend on the order of arrival. Shares in the mean have no meaning here and are ignored: every client
    counts alike, or a hostile one would count more by claiming more. Memory is one accumulator and a few buffers a thread,
    for any number of clients; beside it the kernel maps one weight's arrays of all replies at a time from their files.

    Args:
        base: what the clients were sent.
        spool: the folder for the replies; files that an earlier round left there are removed.

    Raises:
        NanofedError: the folder cannot be used.
    """

    def __init__(self, base: Base, spool: Path) -> None:
        super().__init__(base)
        self._spool = spool
        self._replies: dict[str, tuple[Path, float]] = {}  # client -> the file of its update and what it is scaled by
        self._dropped = 0
        self._broken: OSError | None = None
        try:
            spool.mkdir(parents=True, exist_ok=True)
            for left in spool.glob(f"*{SUFFIX}"):
                left.unlink()
        except OSError as error:
            raise self._unusable(error) from error

    def drop(self, client: str) -> None:
        """Leave out a client that was folded in, before `result`."""
        file, _ = self._replies.pop(client)
        del self._samples[client]
        self._dropped += 1
        self._remove(file)

    def _fold(self, client: str, opened: Sequence[Sequence[Tensor]], weight: float, scale: float) -> None:
        if self._broken:  # not a merge of those who came after it
            raise self._unusable(self._broken)
        file = self._spool / f"{len(self._replies) + self._dropped:05d}{SUFFIX}"
        self._replies[client] = file, scale
        try:
            with file.open("wb") as out:
                for array in itertools.chain.from_iterable(opened):
                    out.write(array.numpy().view(np.uint8).data)
                    out.write(bytes(-array.nbytes % ALIGNMENT))
        except OSError as error:
            self._broken = error
            self.close()
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> NanofedError:
        return NanofedError(
            f"the round cannot be merged: its replies cannot be kept in {self._spool} "
            f"({getattr(error, 'strerror', None) or error}); make room there for a payload of every client, or set "
            "federation.merge=mean, which needs none"
        )

    def close(self) -> None:
        """Remove the replies."""
        for file, _ in self._replies.values():
            self._remove(file)
        self._replies.clear()

    def _remove(self, file: Path) -> None:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s stays behind: %s", file, error.strerror)

    def _merge(self) -> list[Tensor]:
        if self._broken:
            raise self._unusable(self._broken)
        try:
            return self._over_files()
        except (OSError, ValueError) as error:  # a file that is shorter than it was
            raise self._unusable(error) from error
        finally:
            self.close()

    def _over_files(self) -> list[Tensor]:
        out, offset = [], 0
        scales = [scale for _, scale in self._replies.values()]
        for index, shape in enumerate(self._base.shapes.values()):
            layout = self._base.up.layout(shape)
            replies = [_map(file, layout, offset) for file, _ in self._replies.values()]
            out.append(self._merge_weight(index, replies, scales))
            offset += sum(_padded(*field) for field in layout)
        return out

    def _merge_weight(self, index: int, replies: Sequence[Sequence[Tensor]], scales: Sequence[float]) -> Tensor:
        """Return the pseudo-gradient of one weight."""
        base, clients = self._base, len(replies)
        network = list(comparators(clients))
        block = max(1024, min(BLOCK, ROWS // (clients + 1) // 1024 * 1024))
        out = torch.empty(base.sizes[index], dtype=base.dtype)

        def worker() -> Callable[[int, slice], None]:
            read = base.reader(base.dtype, block)
            buffers = torch.empty(clients + 1, block, dtype=base.dtype)

            def merge(_: int, part: slice) -> None:
                *rows, spare = buffers[:, : part.stop - part.start]
                for reply, row, scale in zip(replies, rows, scales, strict=True):
                    read(reply, index, part, row)
                    if scale != 1:
                        row.mul_(scale)
                for i, j in network:
                    torch.minimum(rows[i], rows[j], out=spare)
                    torch.maximum(rows[i], rows[j], out=rows[j])
                    rows[i], spare = spare, rows[i]
                self._choose(rows, out[part])
                # Of local - base is made base - local; and of zeros of both signs, which sort as equals, one.
                out[part].neg_().add_(0.0)

            return merge

        over_blocks([out.numel()], worker, block=block)
        return out

    @abstractmethod
    def _choose(self, rows: Sequence[Tensor], out: Tensor) -> None:
        """Write the merged values into `out`, from those of all clients, the smallest of every coordinate first."""


class Median(Sorted):
    """The median of every coordinate (Yin et al. 2018, arXiv:1803.01498), of an even number the mean of the middle two.

    Fewer than half of the clients cannot move it beyond what the others span. Of one client it is the client's own update, and of
    two their mean, which protects from nothing.
    """

    def _choose(self, rows: Sequence[Tensor], out: Tensor) -> None:
        low, high = rows[(len(rows) - 1) // 2], rows[len(rows) // 2]
        if low is high:
            out.copy_(low)
        else:
            torch.add(low, high, out=out).div_(2)


class TrimmedMean(Sorted):
    """The mean of every coordinate without its k smallest and k largest values (Yin et al. 2018, arXiv:1803.01498).

    k is trim times the number of clients, rounded down: so many hostile clients cannot move it beyond what the others span.
    Where k is 0, as for 0.2 below five clients, it is the plain mean and protects from nothing; that is logged. Who was
    dropped counts among the clients: as many are cut of the others, half of them at most.

    Args:
        base: what the clients were sent.
        spool: the folder for the replies.
        trim: share of the clients cut on each side, in [0, 0.5).

    Raises:
        ValueError: trim makes no sense.
        NanofedError: the folder cannot be used.
    """

    def __init__(self, base: Base, spool: Path, trim: float = 0.2) -> None:
        if not 0 <= trim < 0.5:
            raise ValueError(f"trim must be in [0, 0.5), not {trim}")
        super().__init__(base, spool)
        self._trim = trim

    def _merge(self) -> list[Tensor]:
        clients = len(self._replies)
        if not self._cut(clients):
            logger.warning(
                "a trimmed mean with trim %g of %d clients cuts nothing off: a plain mean", self._trim, clients
            )
        return super()._merge()

    def _cut(self, clients: int) -> int:
        # 0.29 of 100 are 29, though the product is 28.999999999999996
        return min(math.floor(self._trim * (clients + self._dropped) + 1e-9), max(0, clients - 1) // 2)

    def _choose(self, rows: Sequence[Tensor], out: Tensor) -> None:
        cut = self._cut(len(rows))
        kept = rows[cut : len(rows) - cut]
        out.copy_(kept[0])
        for row in kept[1:]:
            out.add_(row)
        out.div_(len(kept))


def _padded(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> int:
    size = dtype.itemsize * math.prod(shape)
    return size + -size % ALIGNMENT


def _map(file: Path, layout: Sequence[tuple[np.dtype[np.generic], tuple[int, ...]]], offset: int) -> list[Tensor]:
    """Return the arrays of one weight in a reply's file, mapped, one-dimensional."""
    arrays = []
    for dtype, shape in layout:
        size = math.prod(shape)
        mapped = np.memmap(file, dtype, "r", offset, (size,)) if size else np.empty(0, dtype)
        arrays.append(flat(mapped))
        offset += _padded(dtype, shape)
    return arrays
