"""Large arrays in blocks that stay in the cache, spread over threads: work at the speed of memory, with no large temporary."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Elements. Two fp64 buffers of it fit into a core's cache, and PyTorch does not spread an operation of 32,768 elements over
# threads of its own. A multiple of every vector width, so that where blocks end changes no rounding.
BLOCK = 1 << 15

T = TypeVar("T")


def flat(array: npt.NDArray[np.generic]) -> Tensor:
    """Return the array's elements as a one-dimensional tensor on the same memory; a non-contiguous array is copied.

    The tensor of a read-only array is for reading.
    """
    elements = np.ascontiguousarray(array).reshape(-1)
    if elements.flags.writeable:
        return torch.from_numpy(elements)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it could be written to
        return torch.from_numpy(elements)


def over_blocks(
    sizes: Sequence[int], worker: Callable[[], Callable[[int, slice], T]], *, block: int | None = None
) -> list[T]:
    """Work on every block of several arrays, and return the results in the order of the blocks.

    Args:
        sizes: The sizes of the arrays, in elements.
        worker: It is called once on every thread, and returns a function of an array's index and the elements of a block.
        block: The elements of a block at most; `BLOCK` by default.
    """
    step = block or BLOCK
    blocks = [
        (index, slice(start, min(start + step, size)))
        for index, size in enumerate(sizes)
        for start in range(0, size, step)
    ]

    threads = min(torch.get_num_threads(), len(blocks))
    if threads <= 1:
        do = worker()
        return [do(*job) for job in blocks]
    queue = iter(enumerate(blocks))  # one for all threads: the interpreter hands out its items one at a time
    results: dict[int, T] = {}

    def run() -> None:
        do = worker()
        for number, job in queue:
            results[number] = do(*job)

    with ThreadPoolExecutor(threads) as pool:
        for running in [pool.submit(run) for _ in range(threads)]:
            running.result()
    return [results[number] for number in range(len(blocks))]


def norms_of_blocks(sizes: Sequence[int], reader: Callable[[], Callable[[int, slice, Tensor], object]]) -> list[float]:
    """Return the L2 norm, in fp64, of each of several arrays that are read block by block; not finite where an element is not.

    Args:
        sizes: The sizes of the arrays, in elements.
        reader: It is called once on every thread, and returns what writes some elements of the n-th array into a fp64 tensor.
    """

    def worker() -> Callable[[int, slice], tuple[int, float]]:
        read, buffer = reader(), torch.empty(BLOCK, dtype=torch.float64)

        def squares(index: int, part: slice) -> tuple[int, float]:
            values = buffer[: part.stop - part.start]
            read(index, part, values)
            return index, float(torch.dot(values, values))

        return squares

    found: list[list[float]] = [[] for _ in sizes]
    for index, square in over_blocks(sizes, worker):
        found[index].append(square)
    return [math.sqrt(math.fsum(squares)) for squares in found]


def l2_norm(arrays: Sequence[npt.NDArray[np.generic]]) -> float:
    """Return the L2 norm of all elements together, in fp64."""
    tensors = [flat(array) for array in arrays]
    sizes = [tensor.numel() for tensor in tensors]
    norms = norms_of_blocks(sizes, lambda: lambda index, part, out: out.copy_(tensors[index][part]))
    return math.sqrt(math.fsum(norm**2 for norm in norms))
