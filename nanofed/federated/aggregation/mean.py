"""The weighted mean of the clients' updates: one accumulator, whatever the number of clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanofed.federated.aggregation.aggregator import Aggregator
from nanofed.federated.aggregation.update import SentWeights
from nanofed.federated.wire.blocks import BLOCK, flat, over_blocks


class Mean(Aggregator):
    """The weighted mean of updates: each reply is added to one accumulator and forgotten.

    Lossless replies hold local weights, which are added as they are; the sent weights are subtracted from their mean once, at
    the end. Lossy replies hold updates. Replies are added in the order of arrival, so another order changes the rounding.
    """

    def __init__(self, sent: SentWeights, spool: Path) -> None:
        super().__init__(sent, spool)
        kind = np.float64 if sent.dtype == torch.float64 else np.float32
        # NumPy's zeros take no memory before use, and then, in one piece, huge pages: of small ones the first fold took 2 s a GB.
        self._sums = list(torch.split(flat(np.zeros(sum(sent.sizes), kind)), sent.sizes))
        self._total = 0.0
        self._scaled = 0.0  # the sum of shares times scales

    def _fold(self, client: str, opened: Sequence[Sequence[Tensor]], weight: float, scale: float) -> None:
        up = self._sent.up
        # Lossy replies hold updates, local minus global weights; the pseudo-gradient has the opposite sign.
        factor = weight * scale * (1 if up.lossless else -1)

        def worker() -> Callable[[int, slice], None]:
            buffer = torch.empty(BLOCK, dtype=self._sent.dtype)

            def add(index: int, part: slice) -> None:
                values = buffer[: part.stop - part.start]
                up.read(opened[index], part, values)
                self._sums[index][part].add_(values, alpha=factor)

            return add

        over_blocks(self._sent.sizes, worker)
        self._total += weight
        self._scaled += weight * scale

    def _result(self) -> list[Tensor]:
        def worker() -> Callable[[int, slice], None]:
            buffer = torch.empty(BLOCK, dtype=self._sent.dtype)

            def finish(index: int, part: slice) -> None:
                mean = self._sums[index][part].div_(self._total)
                if self._sent.up.lossless:
                    base = buffer[: part.stop - part.start]
                    self._sent.read(index, part, base)
                    # +0.0: where nothing moved, a weight of -0.0 stays one.
                    torch.sub(base.mul_(self._scaled / self._total), mean, out=mean).add_(0.0)

            return finish

        over_blocks(self._sent.sizes, worker)
        return self._sums
