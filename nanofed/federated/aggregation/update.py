"""The clients' updates, read block by block from their replies: no client's weights are ever decoded as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanofed.federated.wire.blocks import BLOCK, norms_of_blocks
from nanofed.federated.wire.codec import Arrays, Codec, Weights

Read = Callable[[Sequence[Tensor], int, slice, Tensor], None]  # arrays of a weight, its index, elements, out

SAMPLE = 1 << 16  # coordinates by which directions are compared: cosines to about 0.004


class SentWeights:
    """The weights that a round was sent, and against which its replies are read.

    An update is the local weights minus the weights *as the clients received them*, so what the down-link rounds off is no
    update of theirs.

    Args:
        weights: the global weights; their names and shapes are those of every reply.
        payload: the encoded weights as all clients hold them in this round.
        down: the codec of the payload.
        up: the codec of the replies.
        changes: what is sent in the payload's place to those who hold earlier weights.
        changed_from: client -> the hash of the weights that it holds, for the clients that are sent the changes.
    """

    def __init__(
        self,
        weights: Weights,
        payload: Arrays,
        down: Codec,
        up: Codec,
        changes: Arrays | None = None,
        changed_from: Mapping[str, str] | None = None,
    ) -> None:
        self.weights = weights
        self.payload = payload
        self.changed_from = changed_from or {}
        self._changes = changes
        self.up = up
        self.shapes = {name: array.shape for name, array in weights.items()}
        self.sizes = [array.size for array in weights.values()]
        # One client with FedAvg gives its own weights back to the bit: in fp32, w - (w - l) differs from l in 13 % of the
        # elements. What a lossy codec has rounded needs no more than fp32.
        self.dtype = torch.float64 if up.lossless else torch.float32
        self._down = down
        self._received = down.tensors(payload, weights)
        step = max(1, sum(self.sizes) // SAMPLE) | 1  # odd: not the same column of every row
        self._sampled = [slice(0, size, step) for size in self.sizes]

    def payload_for(self, client: str) -> Arrays:
        """Return the arrays that a client is sent: what changed where it holds earlier weights, else the weights."""
        return self._changes if self._changes is not None and client in self.changed_from else self.payload

    def open(self, arrays: Sequence[npt.NDArray[np.generic]]) -> list[list[Tensor]]:
        """Return the arrays of a reply, grouped by weight, as tensors on the same memory.

        Raises:
            WireError: The arrays do not fit.
        """
        return self.up.tensors(arrays, self.weights)

    def read(self, index: int, part: slice, out: Tensor) -> None:
        """Write some elements of the weight number `index`, as the clients received it, into `out`."""
        self._down.read(self._received[index], part, out)

    def reader(self, dtype: torch.dtype, elements: int = BLOCK) -> Read:
        """Return a function that writes some elements of one weight's update into a tensor.

        The function holds a buffer, so every thread needs its own.

        Args:
            dtype: The dtype of the tensor that is written to.
            elements: The largest number of elements in one call.
        """
        if not self.up.lossless:
            return lambda arrays, index, part, out: self.up.read(arrays, part, out)
        buffer = torch.empty(elements, dtype=dtype)

        def read(arrays: Sequence[Tensor], index: int, part: slice, out: Tensor) -> None:
            base = buffer[: out.numel()]
            self.read(index, part, base)
            self.up.read(arrays, part, out)
            out.sub_(base)

        return read

    def sample(self, opened: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return an update, in fp64, at some 65,536 coordinates that are spread evenly over the model."""
        out = [torch.empty(len(range(part.start, part.stop, part.step)), dtype=torch.float64) for part in self._sampled]
        read = self.reader(torch.float64, max(map(len, out), default=0))
        for index, (arrays, part) in enumerate(zip(opened, self._sampled, strict=True)):
            read(arrays, index, part, out[index])
        return torch.cat(out)

    def sample_of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return one-dimensional tensors, one a weight, at the coordinates of `sample`, fp64."""
        return torch.cat([tensor[part].double() for tensor, part in zip(tensors, self._sampled, strict=True)])

    def update_norms(self, arrays: Sequence[npt.NDArray[np.generic]]) -> list[float]:
        """Return the L2 norm of a reply's update of every weight, in fp64; it is not finite where an element is not.

        Raises:
            WireError: the arrays do not fit.
        """
        opened = self.open(arrays)

        def reader() -> Callable[[int, slice, Tensor], None]:
            read = self.reader(torch.float64)
            return lambda index, part, out: read(opened[index], index, part, out)

        return norms_of_blocks(self.sizes, reader)
