"""The merge of a round: the mean by default, folded into one accumulator whatever the number of clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanofed.federated.server.folding import Merger, PseudoGradient
from nanofed.federated.server.robust import Median, TrimmedMean
from nanofed.federated.server.updates import Base, update_norm
from nanofed.federated.wire.blocks import BLOCK, flat, over_blocks
from nanofed.federated.wire.codec import Codec, Weights

__all__ = ["Mean", "Merger", "Method", "PseudoGradient", "make_merger", "update_norm"]

Method = Literal["mean", "median", "trimmed_mean"]


class Mean(Merger):
    """The weighted mean: each reply is added to one accumulator and forgotten.

    What is added is what travels: local weights, from whose mean the base is taken off at the end, or updates. The sum is in
    the order of arrival, so another order differs by rounding, in fp64 or with a lossy codec in fp32.
    """

    def __init__(self, base: Base, spool: Path) -> None:
        super().__init__(base, spool)
        kind = np.float64 if base.dtype == torch.float64 else np.float32
        # NumPy's zeros take no memory before use, and then, in one piece, huge pages: of small ones the first fold took 2 s a GB.
        self._sums = list(torch.split(flat(np.zeros(sum(base.sizes), kind)), base.sizes))
        self._total = 0.0
        self._scaled = 0.0  # the total of shares times scales

    def _fold(self, client: str, opened: Sequence[Sequence[Tensor]], weight: float, scale: float) -> None:
        up = self._base.up
        factor = weight * scale * (1 if up.lossless else -1)  # of updates, local - base, base - local is wanted

        def worker() -> Callable[[int, slice], None]:
            buffer = torch.empty(BLOCK, dtype=self._base.dtype)

            def add(index: int, part: slice) -> None:
                values = buffer[: part.stop - part.start]
                up.read(opened[index], part, values)
                self._sums[index][part].add_(values, alpha=factor)

            return add

        over_blocks(self._base.sizes, worker)
        self._total += weight
        self._scaled += weight * scale

    def _merge(self) -> list[Tensor]:
        def updates() -> Callable[[int, slice], None]:
            def finish(index: int, part: slice) -> None:
                self._sums[index][part].div_(self._total)

            return finish

        def weights() -> Callable[[int, slice], None]:
            buffer = torch.empty(BLOCK, dtype=self._base.dtype)

            def finish(index: int, part: slice) -> None:
                base = buffer[: part.stop - part.start]
                self._base.read(index, part, base)
                mean = self._sums[index][part].div_(self._total)
                # +0.0: where nothing moved, a weight of -0.0 stays one.
                torch.sub(base.mul_(self._scaled / self._total), mean, out=mean).add_(0.0)

            return finish

        over_blocks(self._base.sizes, weights if self._base.up.lossless else updates)
        return self._sums

    def close(self) -> None:
        """Let the accumulator go, and what was held."""
        self._sums = []
        self._spool.close()


def make_merger(
    method: Method,
    weights: Weights,
    down_payload: Sequence[npt.NDArray[np.generic]],
    down: Codec,
    up: Codec,
    spool: Path,
    *,
    trim: float = 0.2,
) -> Merger:
    """Return the merge of one round.

    Args:
        method: `mean`, `median` or `trimmed_mean`.
        weights: the global weights: names and shapes.
        down_payload: what the clients are sent, `down.encode(weights)`.
        down: the codec of that.
        up: the codec of their replies.
        spool: the folder in which median and trimmed mean keep the replies of the round, and the mean those that it holds; what
            is left there of an earlier one is removed.
        trim: of the trimmed mean: the share of clients cut on each side, below 0.5.

    Raises:
        NanofedError: the spool folder cannot be used.
    """
    base = Base(weights, down_payload, down, up)
    if method == "mean":
        return Mean(base, spool)
    return Median(base, spool) if method == "median" else TrimmedMean(base, spool, trim)
