from __future__ import annotations

import itertools

import numpy as np
import pytest

from nanofed.federated.server.merge import MeanAccumulator
from nanofed.federated.server.outer import OuterNesterov
from nanofed.federated.wire.codec import Array

FEDAVG = OuterNesterov(lr=1.0, momentum=0.0)


def random_weights(seed: int, size: int = 20_000) -> dict[str, Array]:
    """Mixed magnitudes over 18 decades, zeros of both signs and denormals among them."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=size) * 10.0 ** generator.uniform(-9, 9, size)
    values[:50], values[50:100], values[100:150] = 0.0, -0.0, generator.uniform(-1e-40, 1e-40, 50)
    generator.shuffle(values)
    return {"a": values[: size // 2].reshape(100, -1).astype(np.float32), "b": values[size // 2 :].astype(np.float32)}


def trained(weights: dict[str, Array], seed: int) -> dict[str, Array]:
    """Every weight moved by up to its own size: what a round does."""
    generator = np.random.default_rng(seed)
    return {n: (w * generator.uniform(0.01, 2, w.shape)).astype(np.float32) for n, w in weights.items()}


@pytest.mark.parametrize("weight", [1.0, 24_576.0, 1e-3, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_one_client_with_fedavg_gets_its_own_weights_back_to_the_bit(seed: int, weight: float) -> None:
    old = random_weights(seed)
    local = trained(old, seed + 100)
    accumulator = MeanAccumulator(old)
    accumulator.fold(local, weight)
    new = FEDAVG.step(old, accumulator.mean())
    for name, array in local.items():
        assert new[name].dtype == np.float32
        assert (new[name] == array).all()


def test_where_the_mean_of_one_client_is_not_exact() -> None:
    """A weight that shrinks more than 2^28 fold in a round comes back to within 2^-52 of its old size, not to the bit."""
    old = {"w": np.array([1.0, -1.0, 1e3], np.float32)}
    local = {"w": np.array([1e-12, 1e-30, 1e-7], np.float32)}
    accumulator = MeanAccumulator(old)
    accumulator.fold(local, 3.0)
    new = FEDAVG.step(old, accumulator.mean())["w"]
    assert (new != local["w"]).any()
    assert (np.abs(new.astype(np.float64) - local["w"]) <= 2.0**-52 * np.abs(old["w"])).all()


def test_fp32_would_not_do() -> None:
    old = random_weights(0)["b"]
    local = trained({"b": old}, 1)["b"]
    assert (old - (old - local) != local).mean() > 0.01


def test_the_weighted_mean_is_numpys() -> None:
    old = random_weights(1)
    clients = [trained(old, seed) for seed in range(5)]
    shares = [3.0, 1.0, 0.5, 7.0, 2.0]
    accumulator = MeanAccumulator(old)
    norms = [accumulator.fold(local, share) for local, share in zip(clients, shares, strict=True)]
    mean = accumulator.mean()
    for name in old:
        stacked = np.stack([old[name].astype(np.float64) - local[name] for local in clients])
        np.testing.assert_allclose(mean[name], np.average(stacked, axis=0, weights=shares), rtol=1e-9, atol=1e-30)
    for local, norm in zip(clients, norms, strict=True):
        flat = np.concatenate([(old[n].astype(np.float64) - local[n]).ravel() for n in old])
        assert norm == pytest.approx(np.linalg.norm(flat), rel=1e-12)


def test_the_order_of_arrival_does_not_matter() -> None:
    old = random_weights(2, 2_000)
    clients = [(trained(old, seed), float(seed + 1)) for seed in range(4)]
    results = []
    for order in itertools.permutations(clients):
        accumulator = MeanAccumulator(old)
        for local, share in order:
            accumulator.fold(local, share)
        results.append(FEDAVG.step(old, accumulator.mean()))
    for name in old:
        stacked = np.stack([result[name] for result in results])
        spread = stacked.max(axis=0).astype(np.float64) - stacked.min(axis=0)
        assert (spread <= 1e-6 * np.abs(old[name])).all()


def test_fedavg_is_the_mean_of_the_weights_and_leaves_the_old_ones() -> None:
    old = random_weights(3)
    before = {name: array.copy() for name, array in old.items()}
    clients = [trained(old, seed) for seed in range(3)]
    accumulator = MeanAccumulator(old)
    for local in clients:
        accumulator.fold(local, 1.0)
    new = FEDAVG.step(old, accumulator.mean())
    for name in old:
        mean = np.mean([local[name].astype(np.float64) for local in clients], axis=0)
        np.testing.assert_allclose(new[name], mean, rtol=1e-6, atol=1e-44)  # denormals are that coarse
        assert (old[name] == before[name]).all()


def test_nobody_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no client"):
        MeanAccumulator(random_weights(0, 200)).mean()
