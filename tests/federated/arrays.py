"""Weights of all sorts, and what a client makes of them, for the tests of codecs, merges and outer steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nanofed.federated.aggregation.update import SentWeights
from nanofed.federated.wire.blocks import BLOCK
from nanofed.federated.wire.codec import CODECS, Array, Arrays, Weights, hash_arrays


def hash_weights(weights: Weights) -> str:
    """Return names in their order and the hash of the rest: two that agree on it are the same weights, to the bit."""
    return f"{list(weights)} {hash_arrays(list(weights.values()))}"


def sent_weights(weights: Weights, down: str = "fp32", up: str = "fp32") -> SentWeights:
    """Return weights as a round is sent them."""
    return SentWeights(weights, CODECS[down].encode(weights), CODECS[down], CODECS[up])


def update_norm(arrays: Arrays, sent: SentWeights) -> float:
    """Return the L2 norm of a reply's whole update."""
    return math.hypot(*sent.update_norms(arrays))


def random_weights(seed: int, size: int = 20_000) -> dict[str, Array]:
    """Mixed magnitudes over 18 decades, zeros of both signs and denormals among them."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=size) * 10.0 ** generator.uniform(-9, 9, size)
    values[:50], values[50:100], values[100:150] = 0.0, -0.0, generator.uniform(-1e-40, 1e-40, 50)
    generator.shuffle(values)
    return {"a": values[: size // 2].reshape(100, -1).astype(np.float32), "b": values[size // 2 :].astype(np.float32)}


def odd_weights(seed: int) -> dict[str, Array]:
    """Random names and shapes: of no dimension, empty, transposed, with steps, read-only, and around the ends of blocks."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return generator.normal(size=shape).astype(np.float32)

    frozen = normal(3, 5)
    frozen.flags.writeable = False
    arrays = [normal(), normal(0), normal(4, 0, 3), normal(1), normal(*generator.integers(1, 9, 3))]
    arrays += [normal(64, 33).T, normal(40, 14)[::2, ::-2], frozen]
    arrays += [normal(BLOCK - 1), normal(2, BLOCK // 2), normal(BLOCK + 1), normal(3, BLOCK - 5)]
    generator.shuffle(arrays)
    names = [f"layer.{generator.integers(1000)}.{n}" for n in range(len(arrays))]
    return dict(zip(names, arrays, strict=True))


def trained(weights: Weights, seed: int) -> dict[str, Array]:
    """Every weight moved by up to its own size: what a round does."""
    generator = np.random.default_rng(seed)
    return {n: (w * generator.uniform(0.01, 2, w.shape)).astype(np.float32) for n, w in weights.items()}


def vector(arrays: Mapping[str, npt.NDArray[np.floating[Any]]]) -> npt.NDArray[np.float64]:
    """All elements in one fp64 vector, in C order."""
    return np.concatenate([np.asarray(array, np.float64).reshape(-1) for array in arrays.values()])
