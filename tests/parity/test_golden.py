"""A tiny federation ends in the state it has always ended in, to the bit: a change of how the code is cut must not show here.

Weights and updates are drawn by NumPy and added exactly, so that the hashes hold on every machine: what is left is the server's
arithmetic, the leases of rows, and the clock. A change that is meant to move them replaces the hashes, and says why.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanofed.federated.server.rounds import RoundLoop
from nanofed.federated.wire.codec import Arrays, hash_arrays
from nanofed.federated.wire.messages import Instructions, Report
from tests.federated.conftest import one_thread, tiny_corpus
from tests.federated.tiny import Fit, federation, prepare

__all__ = ["one_thread", "tiny_corpus"]  # the fixtures

HASHES = {
    "mean": "6df177c82ce58153400aeabc9b45be68cb14df4ef068c8b9cf00348a37e4dfb5",
    "fedavg": "a9e0db4662620b514abd523adfa9358fbd81c7233dd4d825da39c930aeefaf4c",
    "median": "47bf89b8bec2f8dd6212646fc9dbb2892c93e6cb42fb9e78dcf56d0e199759cb",
    "trimmed_mean": "1a5cf184bc95919fabbb2f154e217bbd7500740407d3c3b3f9674e23d32a362e",
}


def drawn(seed: str, shape: tuple[int, ...], length: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Multiples of 2^-20: sums of a few of them are exact."""
    steps = np.random.default_rng(zlib.crc32(seed.encode())).integers(-1024, 1024, shape)
    return (steps * (length * 2.0**-20)).astype(np.float32)


def moved(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
    """Train, for a report that is real, and send weights that are the same everywhere."""
    _, report = fit(arrays, asked)
    seed = f"{asked.client} {asked.round}"
    local = [array + drawn(f"{seed} {index}", array.shape, 1.0) for index, array in enumerate(arrays)]
    return local, replace(report, payload_hash=hash_arrays(local))


def state_hash(loop: RoundLoop) -> str:
    """SHA-256 over weights, outer momentum, ledger and clock."""
    state = loop.state
    found = hashlib.sha256()
    for name, array in [*state.weights.items(), *state.outer.state_dict().items()]:
        found.update(name.encode() + np.asarray(array).tobytes())
    found.update(json.dumps([state.ledger.state_dict(), vars(state.clock)], sort_keys=True).encode())
    return found.hexdigest()


@pytest.mark.parametrize("method", HASHES)
def test_the_state_after_three_rounds(method: str, tiny_corpus: Path, tmp_path: Path) -> None:
    outer = (1.0, 0.0) if method == "fedavg" else (0.5, 0.5)  # powers of two: a fused product rounds as any other
    merge = "mean" if method == "fedavg" else method
    options = {"merge": merge, "max_norm_ratio": "null", "outer_lr": outer[0], "outer_momentum": outer[1]}
    options["outer_warmdown"] = 0
    config = federation(tiny_corpus, tmp_path, method, clients=5, rounds=3, **options)
    loop, _ = prepare(config, hook=moved)
    for name, array in loop.state.weights.items():
        loop.state.weights[name] = drawn(name, array.shape, 64.0)
    try:
        loop.train()
    finally:
        loop.metrics.close()
    assert loop.state.clock.round == 3
    assert state_hash(loop) == HASHES[method]
