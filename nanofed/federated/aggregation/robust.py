"""Aggregations that a minority of hostile or broken clients cannot steer: median and trimmed mean of every coordinate."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanofed.federated.aggregation.aggregator import Aggregator
from nanofed.federated.aggregation.update import SentWeights
from nanofed.federated.wire.blocks import BLOCK, over_blocks

logger = logging.getLogger(__name__)

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


class Sorted(Aggregator):
    """An aggregation of each coordinate's sorted values: replies wait on disk, encoded, until all of them are there.

    The result does not depend on the order of arrival. Shares in the mean have no meaning here and are ignored: every client
    counts alike, or a hostile one would count more by claiming more. Memory is one accumulator and a few buffers a thread,
    for any number of clients; beside it the kernel maps one weight's arrays of all replies at a time from their files.

    Raises:
        NanofedError: The folder for the replies cannot be used.
    """

    def __init__(self, sent: SentWeights, spool: Path) -> None:
        super().__init__(sent, spool)
        self._spool.make()
        self._scales: dict[str, float] = {}
        self._dropped = 0

    def hold(self, client: str, arrays: Sequence[npt.NDArray[np.generic]], weight: float) -> None:
        """Take a client's reply, which waits on disk as all of them do."""
        self.fold(client, arrays, weight)

    def release(self, client: str, scale: float) -> None:
        """Scale the update of a client."""
        self._scales[client] = scale

    def drop(self, client: str) -> None:
        """Leave out a client that was folded in, before `result`."""
        self._spool.remove(client)
        del self._samples[client], self._scales[client]
        self._dropped += 1

    def _fold(self, client: str, opened: Sequence[Sequence[Tensor]], weight: float, scale: float) -> None:
        self._spool.write(client, opened)
        self._scales[client] = scale

    def _result(self) -> list[Tensor]:
        try:
            scales = list(self._scales.values())
            return [
                self._merge_weight(index, [self._spool.read(client, index) for client in self._scales], scales)
                for index in range(len(self._sent.sizes))
            ]
        finally:
            self.close()

    def _merge_weight(self, index: int, replies: Sequence[Sequence[Tensor]], scales: Sequence[float]) -> Tensor:
        """Return the pseudo-gradient of one weight."""
        sent, clients = self._sent, len(replies)
        network = list(comparators(clients))
        block = max(1024, min(BLOCK, ROWS // (clients + 1) // 1024 * 1024))
        out = torch.empty(sent.sizes[index], dtype=sent.dtype)

        def worker() -> Callable[[int, slice], None]:
            read = sent.reader(sent.dtype, block)
            buffers = torch.empty(clients + 1, block, dtype=sent.dtype)

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
                # An update is local - base, the pseudo-gradient base - local. Zeros of both signs sort as equals: make them one.
                out[part].neg_().add_(0.0)

            return merge

        over_blocks([out.numel()], worker, block=block)
        return out

    @abstractmethod
    def _choose(self, rows: Sequence[Tensor], out: Tensor) -> None:
        """Write the result into `out`, from one row a client in which each coordinate is sorted, the smallest first."""


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
        trim: The share of the clients that is cut off on each side, in [0, 0.5).
    """

    def __init__(self, sent: SentWeights, spool: Path, trim: float = 0.2) -> None:
        super().__init__(sent, spool)
        self._trim = trim

    def _result(self) -> list[Tensor]:
        clients = len(self._scales)
        if not self._cut(clients):
            logger.warning(
                "a trimmed mean with trim %g of %d clients cuts nothing off: a plain mean", self._trim, clients
            )
        return super()._result()

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
