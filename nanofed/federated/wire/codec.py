"""How weights travel: one interface, exact names and shapes on both sides, exact sizes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Weights = Mapping[str, Array]  # name -> fp32 array; the order is the model's own on both sides


class WireError(ValueError):
    """What arrived is not what the schema says."""


class Codec(Protocol):
    """Turns weights into the arrays of a message and back."""

    name: str

    def encode(self, weights: Weights) -> list[npt.NDArray[np.generic]]:
        """Return the arrays to send, in the weights' order."""

    def decode(self, arrays: Sequence[npt.NDArray[np.generic]], like: Weights) -> dict[str, Array]:
        """Return weights with the names and shapes of `like`, or raise WireError naming the first that does not fit."""


class Fp32Codec:
    """Lossless: every weight as it is, fp32."""

    name = "fp32"

    def encode(self, weights: Weights) -> list[npt.NDArray[np.generic]]:
        """Return the arrays themselves, without a copy."""
        return [np.ascontiguousarray(array, dtype=np.float32) for array in weights.values()]

    def decode(self, arrays: Sequence[npt.NDArray[np.generic]], like: Weights) -> dict[str, Array]:
        """Check number, shape and dtype, and give the arrays their names."""
        if len(arrays) != len(like):
            raise WireError(f"{len(arrays)} arrays arrived, {len(like)} are expected")
        out: dict[str, Array] = {}
        for (name, expected), array in zip(like.items(), arrays, strict=True):
            if array.dtype != np.float32:
                raise WireError(f"{name} is {array.dtype}, not float32")
            if array.shape != expected.shape:
                raise WireError(f"{name} has shape {array.shape}, not {expected.shape}")
            out[name] = array.astype(np.float32, copy=False)
        return out


CODECS: dict[str, Codec] = {"fp32": Fp32Codec()}


def hash_weights(weights: Weights) -> str:
    """Return the SHA-256 over names, shapes and bytes: two sides that agree on it hold the same weights."""
    digest = hashlib.sha256()
    for name, array in weights.items():
        digest.update(json.dumps([name, list(array.shape)]).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def hash_arrays(arrays: Sequence[npt.NDArray[np.generic]]) -> str:
    """Return the SHA-256 over dtypes, shapes and bytes of arrays as they travel: what arrives is what was sent."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(json.dumps([array.dtype.str, list(array.shape)]).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def payload_bytes(arrays: Sequence[npt.NDArray[np.generic]]) -> int:
    """Return the bytes of the arrays on the wire, without the messages' own framing."""
    return sum(array.nbytes for array in arrays)
