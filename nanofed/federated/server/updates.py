"""What clients moved, read block by block from what they sent: no client's weights or update is ever there as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanofed.federated.wire.blocks import BLOCK, norm_of, norms_of_blocks
from nanofed.federated.wire.codec import Codec, Weights

Read = Callable[[Sequence[Tensor], int, slice, Tensor], None]  # arrays of a weight, its index, elements, out

SAMPLE = 1 << 16  # coordinates by which directions are compared: cosines to about 0.004


class Base:
    """What the clients of a round were sent, against which their replies are read.

    The base is the weights *as the clients received them*, so that what the down-link rounds off is no update of theirs.

    Args:
        weights: the global weights: names and shapes.
        payload: what was sent, `down.encode(weights)`.
        down: its codec.
        up: the codec of the replies.
    """

    def __init__(self, weights: Weights, payload: Sequence[npt.NDArray[np.generic]], down: Codec, up: Codec) -> None:
        self.shapes = {name: array.shape for name, array in weights.items()}
        self.sizes = [array.size for array in weights.values()]
        self.up = up
        # One client with FedAvg gives its own weights back to the bit: in fp32, w - (w - l) differs from l in 13 % of the
        # elements. What a lossy codec has rounded needs no more than fp32.
        self.dtype = torch.float64 if up.lossless else torch.float32
        self._weights = weights
        self._down = down
        self._sent = down.tensors(payload, weights)
        step = max(1, sum(self.sizes) // SAMPLE) | 1  # odd: not the same column of every row
        self._sampled = [slice(0, size, step) for size in self.sizes]

    def open(self, arrays: Sequence[npt.NDArray[np.generic]]) -> list[list[Tensor]]:
        """Return a reply's arrays, those of each weight, to be read.

        Raises:
            WireError: they do not fit.
        """
        return self.up.tensors(arrays, self._weights)

    def read(self, index: int, part: slice, out: Tensor) -> None:
        """Write a part of one weight's base into `out`."""
        self._down.read(self._sent[index], part, out)

    def reader(self, dtype: torch.dtype, elements: int = BLOCK) -> Read:
        """Return a function that writes a part of one weight's update, local - base, into `out`.

        It holds a buffer: every thread has its own.

        Args:
            dtype: of `out`.
            elements: of a part at most.
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
        """Return an update at some 65,536 coordinates spread evenly over it, fp64."""
        out = [torch.empty(len(range(part.start, part.stop, part.step)), dtype=torch.float64) for part in self._sampled]
        read = self.reader(torch.float64, max(map(len, out), default=0))
        for index, (arrays, part) in enumerate(zip(opened, self._sampled, strict=True)):
            read(arrays, index, part, out[index])
        return torch.cat(out)

    def sample_of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return one-dimensional tensors, one a weight, at the coordinates of `sample`, fp64."""
        return torch.cat([tensor[part].double() for tensor, part in zip(tensors, self._sampled, strict=True)])


def update_norms(
    arrays: Sequence[npt.NDArray[np.generic]],
    weights: Weights,
    down_payload: Sequence[npt.NDArray[np.generic]],
    down: Codec,
    up: Codec,
) -> list[float]:
    """Return the L2 norm of a client's update, local - base, of every weight, in fp64; not finite where an element is not.

    Args:
        arrays: what the client sent.
        weights: the global weights: names and shapes.
        down_payload: what it was sent.
        down: the codec of that.
        up: the codec of its reply.

    Raises:
        WireError: the arrays do not fit.
    """
    base = Base(weights, down_payload, down, up)
    opened = base.open(arrays)

    def reader() -> Callable[[int, slice, Tensor], None]:
        read = base.reader(torch.float64)
        return lambda index, part, out: read(opened[index], index, part, out)

    return norms_of_blocks(base.sizes, reader)


def update_norm(
    arrays: Sequence[npt.NDArray[np.generic]],
    weights: Weights,
    down_payload: Sequence[npt.NDArray[np.generic]],
    down: Codec,
    up: Codec,
) -> float:
    """Return the L2 norm of a client's whole update; arguments and errors are those of `update_norms`."""
    return norm_of(update_norms(arrays, weights, down_payload, down, up))
