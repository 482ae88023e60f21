from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from nanofed.federated.wire import blocks
from nanofed.federated.wire.codec import (
    CODECS,
    Array,
    Codec,
    IntCodec,
    WireError,
    hash_arrays,
    pack_with_feedback,
    payload_bytes,
)
from tests.federated.arrays import odd_weights, random_weights, trained

CODEC = CODECS["fp32"]
BF16 = CODECS["bf16"]
Bits = npt.NDArray[np.uint32]


def rounded(bits: Bits) -> npt.NDArray[np.uint16]:
    """The upper halves of fp32 bit patterns, rounded to nearest with ties to even, in integers alone."""
    return ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def not_a_number(pattern: npt.NDArray[np.uint16]) -> npt.NDArray[np.bool_]:
    return (pattern & 0x7FFF) > 0x7F80


def encoded(bits: Bits) -> npt.NDArray[np.uint16]:
    (array,) = BF16.encode({"w": bits.view(np.float32)})
    assert array.dtype == np.uint16
    assert array.shape == bits.shape
    return array.astype(np.uint16, copy=False)


def expected_bytes(codec: str, shape: tuple[int, ...]) -> int:
    size = math.prod(shape)
    if codec in ("fp32", "bf16"):
        return size * (4 if codec == "fp32" else 2)
    if len(shape) < 2 or size < 4096:
        return 4 * size
    return size + 4 * size // shape[-1] if codec == "int8" else -(-size // 2) + 2 * -(-size // 128)


def half_steps(codec: IntCodec, values: Array) -> Array:
    """Half a step of each element's group: what rounding to nearest may cost; of int4 also what the scale's own rounding does."""
    if expected_bytes(codec.name, values.shape) == 4 * values.size:
        return np.zeros_like(values)
    group = values.shape[-1] if codec.name == "int8" else 128
    flat = np.abs(values).reshape(-1)
    padded = np.pad(flat, (0, -flat.size % group)).reshape(-1, group)
    steps = np.repeat(padded.max(axis=1) / codec.TOP, group)[: flat.size]
    return (
        (steps * (0.5 + (1e-5 if codec.name == "int8" else codec.TOP * 2.0**-8)))
        .reshape(values.shape)
        .astype(np.float32)
    )


def weights() -> dict[str, Array]:
    generator = np.random.default_rng(0)
    return {
        "wte": generator.normal(size=(6, 4)).astype(np.float32),
        "head": generator.normal(size=(4,)).astype(np.float32),
        "one": np.array([3.5], np.float32),
    }


def test_fp32_is_lossless_and_of_exact_size() -> None:
    original = weights()
    original["wte"][0] = [np.nan, -0.0, 1e-45, np.inf]
    arrays = CODEC.encode(original)
    assert payload_bytes(arrays) == 4 * (24 + 4 + 1)
    back = CODEC.decode(arrays, original)
    assert list(back) == list(original)
    for name, array in original.items():
        assert back[name].tobytes() == array.tobytes()
    transposed = {"wte": np.asfortranarray(original["wte"])}
    assert CODEC.decode(CODEC.encode(transposed), transposed)["wte"].tobytes() == original["wte"].tobytes()


SHAPES = [(4, 6), (24,), (), (1, 1), (4,), (6, 1), (0, 4), (1, 6, 4)]
DTYPES: list[Any] = [np.int16, np.int32, np.float16, np.float64, ">f4", ">u2", np.complex64, "U1", [("x", "<f4")]]


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_another_shape_or_dtype_is_refused_by_every_codec_before_anything_is_read(codec: Codec, index: int) -> None:
    arrays = codec.encode(weights())
    codec.check(arrays, weights())
    right = arrays[index]
    spoils = [np.zeros(shape, right.dtype) for shape in SHAPES if shape != right.shape]
    spoils += [np.zeros(right.shape, dtype) for dtype in DTYPES]
    for spoilt in spoils:
        spoilt_arrays = [spoilt if n == index else array for n, array in enumerate(arrays)]
        for read in (codec.check, codec.decode, codec.parts):
            with pytest.raises(WireError, match=rf"^{list(weights())[index]} (has shape|is )"):
                read(spoilt_arrays, weights())


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("threads", [1, 3])
def test_any_names_and_shapes_travel_in_exactly_so_many_bytes(
    codec: Codec, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for seed in range(4):
        original = odd_weights(seed)
        arrays = codec.encode(original)
        size = sum(expected_bytes(codec.name, array.shape) for array in original.values())
        assert codec.nbytes(original) == payload_bytes(arrays) == size
        base = codec.decode(arrays, original)
        assert list(base) == list(original)
        assert all(base[name].shape == array.shape for name, array in original.items())
        local = trained(base, seed)
        packed = codec.pack(local, base)
        assert hash_arrays(codec.pack(local, codec.parts(arrays, original))) == hash_arrays(packed)
        codec.check(packed, original)
        assert payload_bytes(packed) == size
        for name, array in codec.decode(packed, original).items():
            if codec.lossless:
                assert array.tobytes() == local[name].tobytes()
                continue
            update = np.asarray(local[name] - base[name], order="C")
            if isinstance(codec, IntCodec):
                assert (np.abs(array - update) <= half_steps(codec, update)).all(), name
            else:
                assert (array.view(np.uint32) == rounded(update.view(np.uint32)).astype(np.uint32) << 16).all(), name


def test_every_bf16_number_arrives_as_it_is() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint32)
    (wide,) = BF16.decode([patterns.astype(np.uint16)], {"w": np.zeros(1 << 16, np.float32)}).values()
    assert (wide.view(np.uint32) == patterns << 16).all(), "widening is exact, of NaNs too"
    back = encoded((patterns << 16).astype(np.uint32))
    nan = not_a_number(patterns.astype(np.uint16))
    assert (back[~nan] == patterns[~nan]).all()
    assert not_a_number(back[nan]).all()


@pytest.mark.parametrize("length", [1 << 20, 1 << 16, 1027])
def test_bf16_rounds_to_nearest_with_ties_to_even(length: int) -> None:
    """All exponents, ties and their neighbours, subnormals, what overflows, NaNs of every kind."""
    generator = np.random.default_rng(length)
    kinds = [
        generator.integers(0, 1 << 32, length, dtype=np.uint32),
        (generator.integers(0, 1 << 16, length, dtype=np.uint32) << 16)
        + 0x8000
        + generator.integers(-1, 2, length).astype(np.uint32),
        generator.integers(0, 1 << 23, length, dtype=np.uint32)
        | (generator.integers(0, 2, length, dtype=np.uint32) << 31),
        0x7F7F0000 + generator.integers(0, 1 << 16, length, dtype=np.uint32),
        0x7F800000 | generator.integers(0, 1 << 23, length, dtype=np.uint32),
    ]
    for kind in kinds:
        bits = kind.astype(np.uint32)
        ours = encoded(bits)
        nan = np.isnan(bits.view(np.float32))
        assert (ours[~nan] == rounded(bits)[~nan]).all()
        assert not_a_number(ours[nan]).all()
        torchs = torch.from_numpy(bits.view(np.float32)).bfloat16().view(torch.uint16).numpy()
        assert (ours[~nan] == torchs[~nan]).all()
    edges = np.array([3.4e38, -3.4e38, np.inf, -np.inf, 1e-45, -0.0], np.float32)
    assert encoded(edges.view(np.uint32)).tolist() == [0x7F80, 0xFF80, 0x7F80, 0xFF80, 0, 0x8000]


def test_bf16_sends_up_what_was_moved_and_not_where_to() -> None:
    """An update of a thousandth of a weight keeps 8 bits of its own; of the weight itself not one of them would be left."""
    base = random_weights(0)
    local = {name: (array * np.float32(1.001)).astype(np.float32) for name, array in base.items()}
    update = BF16.decode(BF16.pack(local, base), base)
    for name in base:
        moved = local[name] - base[name]
        assert (np.abs(update[name] - moved) <= 2.0**-8 * np.abs(moved) + 1e-40).all()
        absolute = BF16.decode(BF16.encode({name: local[name]}), {name: base[name]})[name]
        assert np.abs(absolute - base[name] - moved).sum() > np.abs(moved).sum()


def test_what_is_not_finite_stays_so_on_its_way_up() -> None:
    base = {"w": np.zeros(6, np.float32)}
    local = {"w": np.array([np.nan, np.inf, -np.inf, 3.4e38, 1.0, -0.0], np.float32)}
    (up,) = BF16.decode(BF16.pack(local, base), base).values()
    assert np.isnan(up[0])
    assert (up[1:] == [np.inf, -np.inf, np.inf, 1.0, 0.0]).all()


def test_read_only_and_strided_arrays_are_read_and_left_alone() -> None:
    size = blocks.BLOCK + 3
    frozen = np.arange(2 * size, dtype=np.float32)[::2]
    frozen.flags.writeable = False
    for codec in CODECS.values():
        before = frozen.tobytes()
        arrays = codec.encode({"w": frozen})
        for array in arrays:
            array.flags.writeable = False
        (decoded,) = codec.decode(arrays, {"w": frozen}).values()
        assert (decoded == codec.decode(codec.encode({"w": frozen.copy()}), {"w": frozen})["w"]).all()
        assert frozen.tobytes() == before


def test_the_hash_of_a_payload_sees_everything_whatever_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, other in ((np.float32, np.int32), (np.uint16, np.int16)):
        arrays: list[npt.NDArray[Any]] = [(100 * np.abs(array)).astype(kind) for array in weights().values()]
        original = hash_arrays(arrays)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        assert hash_arrays([np.asfortranarray(array) for array in arrays]) == original
        monkeypatch.undo()
        seen = {original, hash_arrays(arrays[:-1]), hash_arrays(arrays[::-1]), hash_arrays([*arrays, np.zeros(0)])}
        seen.add(hash_arrays([arrays[0].reshape(-1), *arrays[1:]]))
        seen.add(hash_arrays([arrays[0].view(other), *arrays[1:]]))
        for index, array in enumerate(arrays):
            for byte in range(array.nbytes):
                damaged = array.copy()
                damaged.reshape(-1).view(np.uint8)[byte] ^= 1
                seen.add(hash_arrays([*arrays[:index], damaged, *arrays[index + 1 :]]))
        assert len(seen) == 6 + payload_bytes(arrays)


@pytest.mark.parametrize("number", [0, 2, 4])
def test_another_number_of_arrays_is_refused(number: int) -> None:
    arrays = [*CODEC.encode(weights()), np.zeros(1, np.float32)][:number]
    with pytest.raises(WireError, match=f"{number} arrays arrived, 3 are expected"):
        CODEC.decode(arrays, weights())


INTS = [CODECS["int8"], CODECS["int4"]]


@pytest.mark.parametrize("codec", INTS, ids=lambda codec: codec.name)
def test_integers_are_read_alike_in_any_part(codec: Codec) -> None:
    generator = np.random.default_rng(0)
    old = {"w": generator.normal(size=(131, 77)).astype(np.float32)}
    arrays = codec.encode(old)
    whole = codec.decode(arrays, old)["w"].reshape(-1)
    (tensors,) = codec.tensors(arrays, old)
    for start, stop, step in (
        (0, whole.size, 1),
        (5, whole.size - 3, 1),
        (76, 79, 1),
        (129, 130, 1),
        (0, whole.size, 7),
    ):
        for dtype in (torch.float32, torch.float64):
            out = torch.empty(len(range(start, stop, step)), dtype=dtype)
            codec.read(tensors, slice(start, stop, step), out)
            assert (out.numpy() == whole[start:stop:step]).all()


@pytest.mark.parametrize("codec", INTS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_not_finite(codec: Codec, value: float) -> None:
    old = {"w": np.ones((64, 128), np.float32)}
    old["w"][3, 5] = value
    back = codec.decode(codec.encode(old), old)["w"]
    assert not np.isfinite(back[3]).any()
    np.testing.assert_allclose(np.delete(back, 3, axis=0), 1.0, rtol=0.005)


@pytest.mark.parametrize("codec", INTS, ids=lambda codec: codec.name)
def test_rows_of_zeros_and_the_least_numbers_stay(codec: Codec) -> None:
    old = {"w": np.zeros((64, 128), np.float32)}
    old["w"][1], old["w"][2] = 1e-45, 1e-38
    back = codec.decode(codec.encode(old), old)["w"]
    assert (back[[0, *range(3, 64)]] == 0).all()
    assert np.isfinite(back).all()
    np.testing.assert_allclose(back[2], 1e-38, rtol=0.05)  # such scales are denormal


def test_feedback_loses_nothing_over_rounds() -> None:
    """The sum of what arrives is the sum of what was moved, but for the last residual; without it the error grows."""
    codec, rounds = CODECS["int4"], 40
    generator = np.random.default_rng(0)
    base = {"w": np.zeros((64, 256), np.float32), "norm": np.zeros(64, np.float32)}
    parts = {name: (lambda part, buffer: buffer.zero_()) for name in base}
    residual = {name: torch.zeros(array.size) for name, array in base.items()}
    drift = generator.normal(size=(64, 256)) * np.logspace(
        -3, 0, 256
    )  # most of it is less than half a step of its group
    sent, plain, moved = (np.zeros((64, 256)) for _ in range(3))
    for _ in range(rounds):
        local = {"w": (drift + 0.1 * generator.normal(size=drift.shape)).astype(np.float32), "norm": base["norm"] + 1}
        sent += codec.decode(pack_with_feedback(codec, local, parts, residual), base)["w"]
        plain += codec.decode(codec.pack(local, base), base)["w"]
        moved += local["w"]
    np.testing.assert_allclose(sent + residual["w"].numpy().reshape(64, 256), moved, atol=1e-4)
    assert not residual["norm"].any(), "what travels as it is leaves nothing"
    assert np.linalg.norm(sent - moved) < 0.5 * np.linalg.norm(plain - moved)


def test_a_short_round_sends_no_more_of_a_residual_than_it_has_moved_itself() -> None:
    """What is sent must be no longer than its steps can have made it; the rest waits for the next round."""
    codec = CODECS["int4"]
    generator = np.random.default_rng(0)
    base = {"w": np.zeros((64, 256), np.float32)}
    parts = {"w": lambda part, buffer: buffer.zero_()}
    residual = {"w": torch.zeros(64 * 256)}
    long = {"w": generator.normal(size=(64, 256)).astype(np.float32)}
    pack_with_feedback(codec, long, parts, residual)
    before = residual["w"].clone()
    short = {"w": long["w"] * np.float32(1e-3)}
    sent = codec.decode(pack_with_feedback(codec, short, parts, residual), base)["w"]
    assert np.linalg.norm(sent) < 1.6 * np.linalg.norm(short["w"])
    expected = before + torch.from_numpy(short["w"] - sent).reshape(-1)
    torch.testing.assert_close(residual["w"], expected, rtol=0, atol=1e-6)
