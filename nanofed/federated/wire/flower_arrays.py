"""Arrays as Flower's messages hold them, the bytes of a .npy file, with one copy to get in and none to get out.

Flower's own ways there copy several times, through files in memory.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from flwr.app import Array

KIND = "numpy.ndarray"  # what Flower calls them


def to_flower(array: npt.NDArray[np.generic]) -> Array:
    """Return Flower's array with the same content."""
    array = np.asarray(array, order="C")
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
    data = b"".join((head.getvalue(), array.reshape(-1).view(np.uint8).data))
    return Array(dtype=str(array.dtype), shape=tuple(array.shape), stype=KIND, data=data)


def from_flower(array: Array) -> npt.NDArray[np.generic]:
    """Return the content of Flower's array, read-only, on the same memory where that is aligned.

    Raises:
        ValueError: it is no array of numbers, or has fewer or more bytes than it says.
    """
    if array.stype != KIND:
        raise ValueError(f"it is {array.stype!r:.40}, not {KIND!r}")
    head = io.BytesIO(array.data)  # reads, and so copies, no more than the header
    version = np.lib.format.read_magic(head)
    if version != (1, 0):
        raise ValueError(f"its format has version {version}")
    shape, in_columns, dtype = np.lib.format.read_array_header_1_0(head)
    start = head.tell()
    content = np.frombuffer(array.data, dtype, offset=start) if start < len(array.data) else np.empty(0, dtype)
    return np.require(content.reshape(shape, order="F" if in_columns else "C"), requirements="A")
