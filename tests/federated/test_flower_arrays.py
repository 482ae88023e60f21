from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array

from nanofed.federated.wire.weight_transport import from_flower, to_flower
from tests.federated.arrays import odd_weights


def test_arrays_are_flowers_to_the_byte_and_come_back_on_the_same_memory() -> None:
    for kind in (np.float32, np.uint16, np.uint8, np.float64):
        for array in odd_weights(5).values():
            array = np.asarray(array).astype(kind)
            ours = to_flower(array)
            theirs = Array(np.ascontiguousarray(array).reshape(array.shape))
            assert (ours.dtype, ours.shape, ours.stype) == (theirs.dtype, theirs.shape, theirs.stype)
            assert ours.data == theirs.data and ours.object_id == theirs.object_id
            back = from_flower(theirs)
            assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
            assert not (back.size and back.flags.writeable)
            assert not back.size or np.shares_memory(back, np.frombuffer(theirs.data, np.uint8))
    columns = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    assert (from_flower(Array(columns)) == columns).all()


def test_an_array_behind_a_head_of_odd_length_is_aligned() -> None:
    raw = data()
    size = int.from_bytes(raw[8:10], "little")
    odd = raw[:8] + (size + 1).to_bytes(2, "little") + raw[10 : 9 + size] + b" \n" + raw[10 + size :]
    back = from_flower(Array("float32", (2, 3), "numpy.ndarray", odd))
    assert back.flags.aligned
    assert (back == 0).all() and back.shape == (2, 3)


def data(dtype: Any = np.float32, shape: tuple[int, ...] = (2, 3)) -> bytes:
    return to_flower(np.zeros(shape, dtype)).data


@pytest.mark.parametrize(
    "bad",
    [
        Array("float32", (2, 3), "pickle", data()),
        Array("float32", (2, 3), "numpy.ndarray", b""),
        Array("float32", (2, 3), "numpy.ndarray", data()[:-1]),
        Array("float32", (2, 3), "numpy.ndarray", data()[:-4]),
        Array("float32", (2, 3), "numpy.ndarray", data() + b"more"),
        Array("float32", (2, 3), "numpy.ndarray", data()[:20]),
        Array("float32", (2, 3), "numpy.ndarray", data().replace(b"NUMPY\x01", b"NUMPY\x02")),
        Array("float32", (2, 3), "numpy.ndarray", data().replace(b"<f4", b"|O8")),
        Array("float32", (2, 3), "numpy.ndarray", data().replace(b"<f4", b"|V0")),
        Array("float32", (2, 3), "numpy.ndarray", data().replace(b"(2, 3)", b"(9, 9)")),
    ],
)
def test_what_is_no_array_is_refused(bad: Array) -> None:
    with pytest.raises(ValueError, match=r"."):
        from_flower(bad)
