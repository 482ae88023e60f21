from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nanofed.federated.wire.codec import CODECS, Array, WireError, hash_weights, payload_bytes

CODEC = CODECS["fp32"]


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


def wrong(name: str, index: int, array: Any) -> Any:
    return pytest.param(index, array, id=name)


@pytest.mark.parametrize(
    ("index", "array"),
    [
        wrong("transposed", 0, np.zeros((4, 6), np.float32)),
        wrong("flat", 0, np.zeros(24, np.float32)),
        wrong("broadcastable scalar", 0, np.float32(1).reshape(())),
        wrong("broadcastable one", 0, np.zeros((1, 1), np.float32)),
        wrong("broadcastable row", 0, np.zeros(4, np.float32)),
        wrong("one more axis", 1, np.zeros((1, 4), np.float32)),
        wrong("empty", 1, np.zeros((0,), np.float32)),
        wrong("fp64", 1, np.zeros(4, np.float64)),
        wrong("fp16", 1, np.zeros(4, np.float16)),
        wrong("int32", 1, np.zeros(4, np.int32)),
        wrong("other byte order", 1, np.zeros(4, ">f4")),
        wrong("complex", 1, np.zeros(4, np.complex64)),
        wrong("text", 1, np.array(["a", "b", "c", "d"])),
        wrong("structured", 1, np.zeros(4, [("x", "<f4")])),
    ],
)
def test_what_does_not_fit_is_refused_by_name(index: int, array: Any) -> None:
    arrays = CODEC.encode(weights())
    arrays[index] = array
    with pytest.raises(WireError, match="^" + list(weights())[index]):
        CODEC.decode(arrays, weights())


@pytest.mark.parametrize("number", [0, 2, 4])
def test_another_number_of_arrays_is_refused(number: int) -> None:
    arrays = [*CODEC.encode(weights()), np.zeros(1, np.float32)][:number]
    with pytest.raises(WireError, match=f"{number} arrays arrived, 3 are expected"):
        CODEC.decode(arrays, weights())


def test_the_hash_sees_everything() -> None:
    original = hash_weights(weights())
    assert hash_weights(weights()) == original
    assert hash_weights({name: np.asfortranarray(array) for name, array in weights().items()}) == original
    seen = {original}

    def differs(changed: dict[str, Array]) -> None:
        digest = hash_weights(changed)
        assert digest not in seen
        seen.add(digest)

    for name in weights():
        for position in range(weights()[name].size):
            changed = weights()
            flat = changed[name].reshape(-1)
            flat[position] = np.nextafter(flat[position], np.float32(np.inf))
            differs(changed)
    signed = weights()
    signed["head"][0] = 0.0
    differs(signed)
    signed["head"][0] = -0.0
    differs(signed)
    differs({("renamed" if name == "one" else name): array for name, array in weights().items()})
    differs(dict(reversed(weights().items())))
    differs({**weights(), "wte": weights()["wte"].reshape(4, 6)})
    differs({name: array for name, array in weights().items() if name != "one"})
    differs({**weights(), "more": np.zeros(0, np.float32)})
