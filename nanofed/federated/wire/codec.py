"""How weights travel: one interface, exact names and shapes on both sides, exact sizes."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanofed.federated.wire.blocks import BLOCK, flat, norms_of_blocks, over_blocks

Array = npt.NDArray[np.float32]
Weights = Mapping[str, Array]  # name -> fp32 array; the order is the model's own on both sides
Arrays = list[npt.NDArray[np.generic]]
Layout = tuple[tuple[np.dtype[Any], tuple[int, ...]], ...]  # dtype and shape of each array that one weight travels as
Part = Callable[[slice, Tensor], Tensor]  # some elements of a weight, and a buffer for them -> these elements


class WireError(ValueError):
    """What arrived is not what the schema says."""


class Codec(ABC):
    """Turns weights into the arrays of a message and back.

    Down goes `encode(weights)`, of which the client makes its base, `decode(arrays, like)`. Up comes `pack(local, base)`:
    the local weights as they are where the codec is lossless, and what they moved, local - base, where it is not: rounded,
    an update keeps its leading digits, while of the weights the update would be the last ones.

    A codec says how one weight travels (`layout`, `_write`, `read`): as one array or several, such as integers and scales.

    Attributes:
        name: The codec's name in configs and instructions.
        lossless: What arrives is what was sent, to the bit.
        feedback: A client keeps what was rounded off and sends it with the next update (`pack_with_feedback`).
    """

    name: str
    lossless: bool
    feedback = False

    @property
    def whole(self) -> Codec:
        """The codec of weights that go down whole: this one, or bf16 where this one sends what changed (`wire/changes.py`)."""
        return self

    @abstractmethod
    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Return dtype and shape of each array that a weight of `shape` travels as."""

    @abstractmethod
    def read(self, arrays: Sequence[Tensor], part: slice, out: Tensor) -> None:
        """Write the values of some elements of one weight into `out`, fp32 or fp64.

        Args:
            arrays: The arrays of the weight, one-dimensional (`blocks.flat`).
            part: The elements, in the order of memory; the slice may have a step.
            out: A one-dimensional tensor of as many elements.
        """

    @abstractmethod
    def _write(self, values: Array, base: Part | None, out: Sequence[Tensor]) -> None:
        """Write one weight, or where there is a base, what it moved, into its arrays, one-dimensional."""

    def encode(self, weights: Weights, buffer: Any = None) -> Arrays:
        """Return the arrays to send, in the weights' order; where a buffer of `nbytes(weights)` bytes is given, they fill it."""
        return self._packed(weights, None, buffer)

    def pack(self, local: Weights, base: Mapping[str, Array | Part], buffer: Any = None) -> Arrays:
        """Return what a client sends up, or a server down to those who hold the base.

        Args:
            local: The weights after training.
            base: The weights as they were received, `decode` or `parts` of what came down; of the same names and shapes.
            buffer: As in `encode`.
        """
        return self.encode(local, buffer) if self.lossless else self._packed(local, base, buffer)

    def over(self, buffer: Any, like: Weights) -> Arrays:
        """Return the arrays of a message whose bytes stand one after the other in a buffer, on the same memory.

        Args:
            buffer: A buffer of `nbytes(like)` bytes.
            like: Weights of the same names and shapes.
        """
        return arrays_over(buffer, tuple((dtype, shape) for _, dtype, shape in self._layouts(like)))

    def _packed(self, weights: Weights, base: Mapping[str, Array | Part] | None, buffer: Any = None) -> Arrays:
        arrays: Arrays
        if buffer is None:
            arrays = [np.empty(shape, dtype) for _, dtype, shape in self._layouts(weights)]
        else:
            arrays = self.over(buffer, weights)
        for (name, values), out in zip(weights.items(), self.tensors(arrays, weights), strict=True):
            self._write(values, None if base is None else _part(base[name]), out)
        return arrays

    def _layouts(self, like: Weights) -> Iterator[tuple[str, np.dtype[Any], tuple[int, ...]]]:
        """Yield what each array of a message is part of, its dtype and its shape."""
        for name, expected in like.items():
            for dtype, shape in self.layout(expected.shape):
                yield name, dtype, shape

    def decode(self, arrays: Sequence[npt.NDArray[np.generic]], like: Weights) -> dict[str, Array]:
        """Return weights with the names and shapes of `like`; they may be the arrays themselves.

        Raises:
            WireError: The arrays do not fit, see `check`.
        """
        out = {name: np.empty(expected.shape, np.float32) for name, expected in like.items()}
        self.write_to({name: flat(array) for name, array in out.items()}, arrays, like)
        return out

    def parts(self, arrays: Sequence[npt.NDArray[np.generic]], like: Weights) -> dict[str, Part]:
        """Return, for each weight, a function that reads parts of what `decode` returns: nothing is made of the rest.

        Raises:
            WireError: The arrays do not fit, see `check`.
        """

        def reader(tensors: Sequence[Tensor]) -> Part:
            def read(part: slice, buffer: Tensor) -> Tensor:
                self.read(tensors, part, buffer)
                return buffer

            return read

        return {name: reader(tensors) for name, tensors in zip(like, self.tensors(arrays, like), strict=True)}

    def write_to(self, out: Mapping[str, Tensor], arrays: Sequence[npt.NDArray[np.generic]], like: Weights) -> None:
        """Write what `decode` returns into fp32 tensors in this machine's memory, block by block.

        Args:
            out: Contiguous tensors with the names and shapes of `like`; they may be parameters.
            arrays: The arrays as they arrived.
            like: Weights of the same names and shapes.

        Raises:
            WireError: The arrays do not fit, see `check`. Nothing is written then.
        """
        parts = dict(zip(like, self.tensors(arrays, like), strict=True))
        names = list(like)
        targets = [out[name].detach().view(-1) for name in names]

        def write(index: int, part: slice) -> None:
            self.read(parts[names[index]], part, targets[index][part])

        over_blocks([target.numel() for target in targets], lambda: write)

    def check(self, arrays: Sequence[npt.NDArray[np.generic]], like: Weights) -> None:
        """Check that arrays can be read as weights with the shapes of `like`.

        Raises:
            WireError: There is another number of arrays, or another shape or dtype; the error names the first that does not fit.
        """
        layouts = list(self._layouts(like))
        if len(arrays) != len(layouts):
            raise WireError(f"{len(arrays)} arrays arrived, {len(layouts)} are expected")
        for (name, dtype, shape), array in zip(layouts, arrays, strict=True):
            if array.dtype != dtype:
                raise WireError(f"{name} is {array.dtype}, not {dtype}")
            if array.shape != shape:
                raise WireError(f"{name} has shape {array.shape}, not {shape}")

    def tensors(self, arrays: Sequence[npt.NDArray[np.generic]], like: Weights) -> list[list[Tensor]]:
        """Check arrays and return those of each weight, one-dimensional, ready for `read`, on the same memory."""
        self.check(arrays, like)
        rest = iter(arrays)
        return [[flat(next(rest)) for _ in self.layout(expected.shape)] for expected in like.values()]

    def nbytes(self, like: Weights) -> int:
        """Return the exact size of weights on the wire in bytes, without the messages' own framing."""
        return bytes_of(tuple((dtype, shape) for _, dtype, shape in self._layouts(like)))


def _part(weight: Array | Part) -> Part:
    if callable(weight):
        return weight
    values = flat(weight)
    return lambda part, _: values[part]


class Fp32Codec(Codec):
    """Lossless: every weight as it is, fp32, by itself: none is copied."""

    name = "fp32"
    lossless = True

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Return that a weight travels as itself."""
        return ((np.dtype(np.float32), shape),)

    def read(self, arrays: Sequence[Tensor], part: slice, out: Tensor) -> None:
        """Copy elements into `out`."""
        out.copy_(arrays[0][part])

    def _write(self, values: Array, base: Part | None, out: Sequence[Tensor]) -> None:
        out[0].copy_(flat(values))

    def encode(self, weights: Weights, buffer: Any = None) -> Arrays:
        """Return the weights themselves, where they are contiguous and no buffer is given for them."""
        if buffer is not None:
            return super().encode(weights, buffer)
        return [np.asarray(values, dtype=np.float32, order="C") for values in weights.values()]

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

    def _write(self, values: Array, base: Part | None, out: Sequence[Tensor]) -> None:
        source, target = flat(values), out[0].view(torch.bfloat16)

        def worker() -> Callable[[int, slice], None]:
            buffers = torch.empty(2, min(BLOCK, source.numel()))

            def write(_: int, part: slice) -> None:
                block = source[part]
                if base is not None:
                    before, moved = buffers[:, : block.numel()]
                    block = torch.sub(block, base(part, before), out=moved)
                target[part].copy_(block)

            return write

        over_blocks([source.numel()], worker)


class IntCodec(Codec):
    """Small integers, and a scale for each group of elements.

    The scale makes the largest element of a group the largest integer; the others are rounded to the nearest. Vectors, and
    matrices of fewer than `EXACT` elements, travel as they are. A group with an element that is not finite is not finite when it
    is read.
    """

    lossless = False
    EXACT = 4096
    TOP: int  # the largest integer

    @property
    def whole(self) -> Codec:
        """The codec of weights that go down whole: of a weight itself, integers would keep too little."""
        return CODECS["bf16"]

    @abstractmethod
    def _arrays(self, shape: tuple[int, ...]) -> Layout:
        """Return dtype and shape of the integers and of the scales of a weight."""

    @abstractmethod
    def _group(self, integers: Tensor, scales: Tensor) -> int:
        """Return how many elements share a scale."""

    @abstractmethod
    def _put(self, values: Tensor, out: Tensor, start: int) -> None:
        """Write whole numbers as the integers from the element `start` on, which begins a group."""

    @abstractmethod
    def _get(self, integers: Tensor, part: slice, out: Tensor) -> None:
        """Write some of the integers into `out`."""

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Return that a weight travels as integers and scales, or, where it is small, as itself."""
        if len(shape) < 2 or math.prod(shape) < self.EXACT:
            return ((np.dtype(np.float32), shape),)
        return self._arrays(shape)

    def read(self, arrays: Sequence[Tensor], part: slice, out: Tensor) -> None:
        """Write the products of integers and scales, rounded to fp32, into `out`."""
        if len(arrays) == 1:
            out.copy_(arrays[0][part])
            return
        if out.dtype != torch.float32:  # all who read them see the same numbers
            narrow = torch.empty(out.shape)
            self.read(arrays, part, narrow)
            out.copy_(narrow)
            return
        integers, scales = arrays[0], _widened(arrays[1])
        group = self._group(*arrays)
        self._get(integers, part, out)
        if part.step not in (None, 1):
            out.mul_(scales[torch.arange(part.start, part.stop, part.step).div_(group, rounding_mode="floor")])
            return
        # The group that the part begins in, whole groups, and the one that it ends in.
        first = min(part.stop, -(-part.start // group) * group)
        last = max(first, part.stop // group * group)
        if first > part.start:
            out[: first - part.start].mul_(scales[part.start // group])
        if last > first:
            out[first - part.start : last - part.start].view(-1, group).mul_(
                scales[first // group : last // group, None]
            )
        if part.stop > last:
            out[last - part.start :].mul_(scales[last // group])

    def _write(self, values: Array, base: Part | None, out: Sequence[Tensor]) -> None:
        source = flat(values)
        exact = len(out) == 1
        group = 1 if exact else self._group(*out)
        # Larger blocks than elsewhere: of a dozen short operations on each, the calls would cost as much as the work.
        block = max(1, 4 * BLOCK // group) * group

        def worker() -> Callable[[int, slice], None]:
            buffers = torch.empty(2, min(block, -(-source.numel() // group) * group))

            def write(_: int, part: slice) -> None:
                size = part.stop - part.start
                padded = -(-size // group) * group
                spare, moved = buffers[:, :padded]
                moved[size:] = 0.0
                if base is None:
                    moved[:size].copy_(source[part])
                else:
                    torch.sub(source[part], base(part, spare[:size]), out=moved[:size])
                if exact:
                    out[0][part] = moved
                    return
                groups = moved.view(-1, group)
                scales = out[1][part.start // group : part.start // group + len(groups)]
                sizes = torch.abs(groups, out=spare.view(-1, group))
                _narrow(sizes.amax(1).div_(self.TOP), scales)
                wide = _widened(scales)
                factors = torch.where(wide > 0, wide, 1.0).reciprocal_()
                groups.mul_(factors[:, None]).round_().clamp_(-self.TOP, self.TOP)
                self._put(moved[:size], out[0], part.start)

            return write

        over_blocks([source.numel()], worker, block=block)


class Int8Codec(IntCodec):
    """A byte for each element, and a scale in fp32 for each row."""

    name = "int8"
    TOP = 127

    def _arrays(self, shape: tuple[int, ...]) -> Layout:
        return (np.dtype(np.int8), shape), (np.dtype(np.float32), shape[:-1])

    def _group(self, integers: Tensor, scales: Tensor) -> int:
        return integers.numel() // scales.numel()

    def _put(self, values: Tensor, out: Tensor, start: int) -> None:
        out[start : start + values.numel()].copy_(values)

    def _get(self, integers: Tensor, part: slice, out: Tensor) -> None:
        out.copy_(integers[part])


class Int4Codec(IntCodec):
    """Half a byte for each element, and a scale in bf16 for each 128 of them: DiLoCo's updates bear it (arXiv:2501.18512).

    With error feedback (`pack_with_feedback`) what one round rounds off is made up for in the next.
    """

    name = "int4"
    TOP = 7
    feedback = True
    GROUP = 128

    def _arrays(self, shape: tuple[int, ...]) -> Layout:
        size = math.prod(shape)
        return (np.dtype(np.uint8), (-(-size // 2),)), (np.dtype(np.uint16), (-(-size // self.GROUP),))

    def _group(self, integers: Tensor, scales: Tensor) -> int:
        return self.GROUP

    def _put(self, values: Tensor, out: Tensor, start: int) -> None:
        count = values.numel()
        halves = torch.zeros(count + count % 2, dtype=torch.int8)
        halves[:count].copy_(values).add_(self.TOP + 1)
        pairs = halves.view(torch.int16)  # a pair's first half in the lower byte, on every machine that PyTorch runs on
        out[start // 2 : start // 2 + pairs.numel()].copy_((pairs >> 4 | pairs) & 255)

    def _get(self, integers: Tensor, part: slice, out: Tensor) -> None:
        if part.step in (None, 1):
            pairs = integers[part.start // 2 : (part.stop + 1) // 2]
            wide = pairs.to(torch.int16)
            halves = (wide | wide << 4).bitwise_and_(0x0F0F).view(torch.uint8)[part.start % 2 :][: out.numel()]
        else:
            at = torch.arange(part.start, part.stop, part.step)
            halves = integers[at // 2] >> (at % 2 * 4).to(torch.uint8) & 15
        out.copy_(halves).sub_(self.TOP + 1)


def _widened(scales: Tensor) -> Tensor:
    """Return scales as fp32; those of two bytes are bf16."""
    return scales if scales.dtype == torch.float32 else scales.view(torch.bfloat16).float()


def _narrow(scales: Tensor, out: Tensor) -> None:
    """Write fp32 scales as they travel."""
    (out if out.dtype == torch.float32 else out.view(torch.bfloat16)).copy_(scales)


def pack_with_feedback(
    codec: Codec, local: Weights, base: Mapping[str, Part], residual: Mapping[str, Tensor]
) -> Arrays:
    """Return what a client sends up, with what the codec has rounded off in earlier rounds added to it.

    Error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847): over rounds the sum of what is sent is the sum
    of what was moved, but for the residual of the last one. Of a residual that is longer than half of what a weight was moved,
    after a short round say, only so much is added, for an update must be no longer than its steps can have made it.

    Args:
        codec: A lossy codec.
        local: The weights after training.
        base: The weights as they were received, `parts` of what came down.
        residual: What is still to be sent of each weight, fp32 and one-dimensional, zeros at first; it is brought forward.
    """
    names, weights = list(local), [flat(array) for array in local.values()]
    sizes = [weight.numel() for weight in weights]

    def reader() -> Callable[[int, slice, Tensor], object]:
        buffer = torch.empty(BLOCK)

        def moved(index: int, part: slice, out: Tensor) -> None:
            before = base[names[index]](part, buffer[: out.numel()])
            out.copy_(weights[index][part]).sub_(before)

        return moved

    rest = norms_of_blocks(sizes, lambda: lambda index, part, out: out.copy_(residual[names[index]][part]))
    shares = {
        name: min(1.0, 0.5 * moved / left) if left else 1.0
        for name, moved, left in zip(names, norms_of_blocks(sizes, reader), rest, strict=True)
    }

    def minus(name: str, before: Part) -> Part:
        def read(part: slice, buffer: Tensor) -> Tensor:
            return torch.sub(before(part, buffer), residual[name][part], alpha=shares[name], out=buffer)

        return read

    arrays = codec.pack(local, {name: minus(name, before) for name, before in base.items()})
    sent = codec.parts(arrays, local)

    def worker() -> Callable[[int, slice], None]:
        buffers = torch.empty(2, BLOCK)

        def keep(index: int, part: slice) -> None:
            name = names[index]
            before, rounded = buffers[:, : part.stop - part.start]
            residual[name][part].add_(weights[index][part]).sub_(base[name](part, before)).sub_(
                sent[name](part, rounded)
            )

        return keep

    over_blocks(sizes, worker)
    return arrays


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Fp32Codec(), Bf16Codec(), Int8Codec(), Int4Codec())}


def layout_of(arrays: Iterable[npt.NDArray[np.generic]]) -> list[tuple[str, list[int]]]:
    """Return dtype and shape of each array, as JSON can say them."""
    return [(array.dtype.str, list(array.shape)) for array in arrays]


def bytes_of(layout: Layout) -> int:
    """Return how many bytes the arrays of a layout have together."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout)


def arrays_over(buffer: Any, layout: Layout) -> Arrays:
    """Return arrays whose bytes stand one after the other in a buffer, on the same memory."""
    rest: Any = np.frombuffer(buffer, np.uint8)
    arrays: Arrays = []
    for dtype, shape in layout:
        size = dtype.itemsize * math.prod(shape)
        arrays.append(rest[:size].view(dtype).reshape(shape))
        rest = rest[size:]
    return arrays


def hash_arrays(arrays: Sequence[npt.NDArray[np.generic]]) -> str:
    """Return the SHA-256 over dtypes, shapes and bytes of arrays as they travel: what arrives is what was sent.

    It is that of each array's dtype and shape with the SHA-256 of its bytes: they are hashed by several threads.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digests = list(pool.map(lambda array: hashlib.sha256(np.ascontiguousarray(array).data).hexdigest(), arrays))
    return hashlib.sha256(json.dumps(list(zip(layout_of(arrays), digests, strict=True))).encode()).hexdigest()


def payload_bytes(arrays: Sequence[npt.NDArray[np.generic]]) -> int:
    """Return the bytes of the arrays on the wire, without the messages' own framing."""
    return sum(array.nbytes for array in arrays)
