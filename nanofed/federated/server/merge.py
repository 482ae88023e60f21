"""Folding clients' weights into one pseudo-gradient: one accumulator, whatever the number of clients."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nanofed.federated.wire.codec import Weights

PseudoGradient = dict[str, npt.NDArray[np.float64]]


class MeanAccumulator:
    """The weighted mean of (global - local) over the clients of a round, folded in one at a time.

    In fp64: in fp32, w - (w - l) differs from l in 13 % of the elements, and one client with FedAvg must give its own
    weights back to the bit.

    Args:
        weights: the global weights that the clients started from.
    """

    def __init__(self, weights: Weights) -> None:
        self._global = weights
        self._sum: PseudoGradient = {name: np.zeros(array.shape, np.float64) for name, array in weights.items()}
        self._total = 0.0

    def fold(self, local: Weights, weight: float) -> float:
        """Add one client's weights and return the L2 norm of its update.

        Args:
            local: its weights, of the global weights' names and shapes.
            weight: its share in the mean, positive; shares need not sum to 1.
        """
        squares = 0.0
        for name, total in self._sum.items():
            difference = np.subtract(self._global[name], local[name], dtype=np.float64)
            flat = difference.reshape(-1)
            squares += float(flat @ flat)
            difference *= weight
            total += difference
        self._total += weight
        return float(np.sqrt(squares))

    def mean(self) -> PseudoGradient:
        """Return the mean pseudo-gradient; the accumulator is used up.

        Raises:
            ValueError: nothing was folded in.
        """
        if self._total <= 0:
            raise ValueError("there is no client to take the mean of")
        for total in self._sum.values():
            total /= self._total
        return self._sum
