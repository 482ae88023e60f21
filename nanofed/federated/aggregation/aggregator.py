"""The interface of every aggregation: replies are folded in one at a time, and one pseudo-gradient comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanofed.federated.aggregation.spool import Spool
from nanofed.federated.aggregation.update import SentWeights

PseudoGradient = Mapping[str, npt.NDArray[np.floating[Any]]]


class Aggregator(ABC):
    """Takes the replies of a round one at a time and returns the pseudo-gradient of them all.

    The pseudo-gradient is global minus local weights. It is fp64 where clients send their weights as they are, and fp32 where a
    codec has rounded their updates. An aggregator checks names, shapes and dtypes of a reply and nothing else: replies are
    validated before. `close`, or a `with` block, frees its memory and removes its files.

    A reply can wait on disk until the others of its round have said whether it is merged: `hold`, then `release` or `drop`.

    Args:
        sent: the weights that the round was sent.
        spool: the folder for replies that wait on disk; files that an earlier round left there are removed.

    Raises:
        NanofedError: the folder cannot be used.
    """

    def __init__(self, sent: SentWeights, spool: Path) -> None:
        self._sent = sent
        self._spool = Spool(sent, spool)
        self._held: dict[str, float] = {}  # client -> its share
        self._samples: dict[str, Tensor] = {}
        self._mean: Tensor  # the merged update at the samples' coordinates, after `result`

    def fold(self, client: str, arrays: Sequence[npt.NDArray[np.generic]], weight: float, scale: float = 1.0) -> None:
        """Fold a client's reply into the result; its arrays are not needed afterwards.

        Args:
            client: name of the client.
            arrays: the client's reply, in the up-link's codec.
            weight: the client's share in the mean, positive; shares need not sum to 1.
            scale: factor of the client's update, in (0, 1]; below 1 the update is clipped.

        Raises:
            WireError: the arrays do not fit; nothing was folded in.
            NanofedError: the disk on which replies are kept is full; the round cannot be merged.
        """
        opened = self._sent.open(arrays)
        self._fold(client, opened, weight, scale)
        self._samples[client] = self._sent.sample(opened)

    def hold(self, client: str, arrays: Sequence[npt.NDArray[np.generic]], weight: float) -> None:
        """Keep a client's reply on disk; its arrays are not needed afterwards.

        Raises:
            NanofedError: the disk is full; the round cannot be merged.
        """
        self._spool.write(client, self._sent.open(arrays))
        self._held[client] = weight

    def release(self, client: str, scale: float) -> None:
        """Fold in the reply of a client that was held.

        Args:
            client: name of the client.
            scale: factor of the client's update, in (0, 1]; below 1 the update is clipped.

        Raises:
            NanofedError: the reply cannot be read any more; the round cannot be merged.
        """
        arrays = [self._spool.read(client, index) for index in range(len(self._sent.sizes))]
        self._fold(client, arrays, self._held.pop(client), scale)
        self._samples[client] = self._sent.sample(arrays)
        self._spool.remove(client)

    def drop(self, client: str) -> None:
        """Leave out a client that was held."""
        del self._held[client]
        self._spool.remove(client)

    def result(self) -> PseudoGradient:
        """Return the pseudo-gradient, by parameter. It can be asked for once, when somebody was folded in."""
        merged = self._result()
        self._mean = self._sent.sample_of(merged).neg_()
        shaped = zip(self._sent.shapes.items(), merged, strict=True)
        return {name: tensor.numpy().reshape(shape) for (name, shape), tensor in shaped}

    def cosines(self) -> dict[str, float]:
        """Return the cosine of each client's update with the merged one, 0 where one of them is zero.

        It can be asked for after `result`. It is estimated from some 65,536 coordinates that are spread evenly over the
        model, for the updates themselves are gone by then.
        """
        return {
            client: float(torch.cosine_similarity(sample, self._mean, dim=0, eps=1e-30))
            for client, sample in self._samples.items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the replies that wait on disk. A result stays valid, and closing again does nothing."""
        self._spool.close()

    @abstractmethod
    def _fold(self, client: str, opened: Sequence[Sequence[Tensor]], weight: float, scale: float) -> None:
        """Fold in a reply whose arrays fit."""

    @abstractmethod
    def _result(self) -> list[Tensor]:
        """Return the pseudo-gradient of each weight, as a one-dimensional tensor."""
