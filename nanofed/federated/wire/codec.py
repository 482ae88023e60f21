"""How weights travel: one interface, exact names and shapes on both sides, exact sizes."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanofed.federated.wire.blocks import BLOCK, flat, in_threads, over_blocks

Array = npt.NDArray[np.float32]
Weights = Mapping[str, Array]  # name -> fp32 array; the order is the model's own on both sides
Arrays = list[npt.NDArray[np.generic]]
Layout = tuple[tuple[np.dtype[Any], tuple[int, ...]], ...]  # dtype and shape of each array that one weight travels as


class WireError(ValueError):
    """What arrived is not what the schema says."""


class Codec(ABC):
    """Turns weights into the arrays of a message and back.

    Down goes `encode(weights)`, of which the client makes its base, `decode(arrays, like)`. Up comes `pack(local, base)`:
    the local weights as they are where the codec is lossless, and what they moved, local - base, where it is not: rounded,
    an update keeps its leading digits, while of the weights the update would be the last ones.

    A codec says how one weight travels (`layout`, `_write`, `read`): as one array or several, such as integers and scales.

    Attributes:
        name: as in configs and instructions.
        lossless: what arrives is what was sent, to the bit.
    """

    name: str
    lossless: bool

    @abstractmethod
    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Return dtype and shape of each array that a weight of `shape` travels as."""

    @abstractmethod
    def read(self, arrays: Sequence[Tensor], part: slice, out: Tensor) -> None:
        """Write the values of some elements of one weight into `out`, fp32 or fp64.

        Args:
            arrays: those of the weight, one-dimensional (`blocks.flat`).
            part: which elements, in the order of memory; it may have a step.
            out: as many elements.
        """

    @abstractmethod
    def _write(self, values: Array, base: Array | None) -> Arrays:
        """Return the arrays of one weight, or where there is a base, of what it moved."""

    def encode(self, weights: Weights) -> Arrays:
        """Return the arrays to send, in the weights' order."""
        return [array for values in weights.values() for array in self._write(values, None)]

    def pack(self, local: Weights, base: Weights) -> Arrays:
        """Return what a client sends up.

        Args:
            local: the weights after training.
            base: the weights as they were received, `decode` of what came down; of the same names and shapes.
        """
        if self.lossless:
            return self.encode(local)
        return [array for name, values in local.items() for array in self._write(values, base[name])]

    def decode(self, arrays: Sequence[npt.NDArray[np.generic]], like: Weights) -> dict[str, Array]:
        """Return weights with the names and shapes of `like`; they may be the arrays themselves.

        Raises:
            WireError: the arrays do not fit; see `check`.
        """
        parts = self.tensors(arrays, like)
        out = {name: np.empty(expected.shape, np.float32) for name, expected in like.items()}
        targets = [flat(array) for array in out.values()]
        over_blocks(
            [target.numel() for target in targets],
            lambda: lambda index, part: self.read(parts[index], part, targets[index][part]),
        )
        return out

    def check(self, arrays: Sequence[npt.NDArray[np.generic]], like: Weights) -> None:
        """Check that arrays can be read as weights with the shapes of `like`.

        Raises:
            WireError: another number of arrays, or another shape or dtype; it names the first that does not fit.
        """
        fields = [(name, *field) for name, expected in like.items() for field in self.layout(expected.shape)]
        if len(arrays) != len(fields):
            raise WireError(f"{len(arrays)} arrays arrived, {len(fields)} are expected")
        for (name, dtype, shape), array in zip(fields, arrays, strict=True):
            if array.dtype != dtype:
                raise WireError(f"{name} is {array.dtype}, not {dtype}")
            if array.shape != shape:
                raise WireError(f"{name} has shape {array.shape}, not {shape}")

    def tensors(self, arrays: Sequence[npt.NDArray[np.generic]], like: Weights) -> list[list[Tensor]]:
        """Check arrays and return those of each weight, ready for `read`, on the same memory."""
        self.check(arrays, like)
        rest = iter(arrays)
        return [[flat(next(rest)) for _ in self.layout(expected.shape)] for expected in like.values()]

    def nbytes(self, like: Weights) -> int:
        """Return the exact size of weights on the wire in bytes, without the messages' own framing."""
        layouts = (field for expected in like.values() for field in self.layout(expected.shape))
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layouts)


class Fp32Codec(Codec):
    """Lossless: every weight as it is, fp32."""

    name = "fp32"
    lossless = True

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Return that a weight travels as itself."""
        return ((np.dtype(np.float32), shape),)

    def read(self, arrays: Sequence[Tensor], part: slice, out: Tensor) -> None:
        """Copy elements into `out`."""
        out.copy_(arrays[0][part])

    def _write(self, values: Array, base: Array | None) -> Arrays:
        return [np.asarray(values, dtype=np.float32, order="C")]  # itself, without a copy, where it is contiguous

    def decode(self, arrays: Sequence[npt.NDArray[np.generic]], like: Weights) -> dict[str, Array]:
        """Check the arrays and give them their names: no copy."""
        self.check(arrays, like)
        return {name: array.astype(np.float32, copy=False) for name, array in zip(like, arrays, strict=True)}


class Bf16Codec(Codec):
    """The upper half of each fp32 number, rounded to nearest with ties to even: 8 bits of precision, fp32's range.

    It travels as its bit pattern, uint16, since NumPy and so Flower know no bfloat16. What is not finite stays not finite, and
    what is beyond bf16's largest number becomes infinite.
    """

    name = "bf16"
    lossless = False

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Return that a weight travels as bit patterns in its own shape."""
        return ((np.dtype(np.uint16), shape),)

    def read(self, arrays: Sequence[Tensor], part: slice, out: Tensor) -> None:
        """Widen elements into `out`, which is exact."""
        out.copy_(arrays[0].view(torch.bfloat16)[part])

    def _write(self, values: Array, base: Array | None) -> Arrays:
        out = np.empty(values.shape, np.uint16)
        source, target = flat(values), flat(out).view(torch.bfloat16)
        start = None if base is None else flat(base)

        def worker() -> Callable[[int, slice], None]:
            buffer = torch.empty(min(BLOCK, source.numel()))

            def write(_: int, part: slice) -> None:
                block = source[part]
                if start is not None:
                    block = torch.sub(block, start[part], out=buffer[: block.numel()])
                target[part].copy_(block)

            return write

        over_blocks([source.numel()], worker)
        return [out]


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Fp32Codec(), Bf16Codec())}


def hash_weights(weights: Weights) -> str:
    """Return the SHA-256 over names, shapes and bytes: two sides that agree on it hold the same weights."""
    return _hash([[name, list(array.shape)] for name, array in weights.items()], list(weights.values()))


def hash_arrays(arrays: Sequence[npt.NDArray[np.generic]]) -> str:
    """Return the SHA-256 over dtypes, shapes and bytes of arrays as they travel: what arrives is what was sent."""
    return _hash([[array.dtype.str, list(array.shape)] for array in arrays], arrays)


def _hash(headers: Sequence[object], arrays: Sequence[npt.NDArray[np.generic]]) -> str:
    """Return the SHA-256 over each array's header and the SHA-256 of its bytes: arrays are hashed by several threads."""

    def worker() -> Callable[[npt.NDArray[np.generic]], str]:
        return lambda array: hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()

    digests = in_threads(arrays, worker)
    return hashlib.sha256(json.dumps(list(zip(headers, digests, strict=True))).encode()).hexdigest()


def payload_bytes(arrays: Sequence[npt.NDArray[np.generic]]) -> int:
    """Return the bytes of the arrays on the wire, without the messages' own framing."""
    return sum(array.nbytes for array in arrays)
