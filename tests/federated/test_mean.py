from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanofed.federated.aggregation import Method, make_aggregator
from nanofed.federated.aggregation.aggregator import Aggregator, PseudoGradient
from nanofed.federated.aggregation.outer import OuterNesterov
from nanofed.federated.wire import blocks
from nanofed.federated.wire.codec import CODECS, Array, Weights, WireError
from tests.federated.arrays import hash_weights, odd_weights, random_weights, sent_weights, trained, update_norm, vector

FP32, BF16 = CODECS["fp32"], CODECS["bf16"]
LINKS = list(itertools.product(CODECS, CODECS))  # down, up
METHODS: tuple[Method, ...] = ("mean", "median", "trimmed_mean")
NOWHERE = Path("never used by the mean")


def aggregator(
    old: Weights, down: str = "fp32", up: str = "fp32", method: Method = "mean", spool: Path = NOWHERE
) -> Aggregator:
    return make_aggregator(method, sent_weights(old, down, up), spool)


def base_of(old: Weights, down: str) -> dict[str, Array]:
    return CODECS[down].decode(CODECS[down].encode(old), old)


def received(local: Weights, base: Weights, up: str) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """What arrives of base - local: NumPy's fp64, from a decoded reply."""
    arrived = CODECS[up].decode(CODECS[up].pack(local, base), base)
    if CODECS[up].lossless:
        return {name: base[name].astype(np.float64) - arrived[name] for name in base}
    return {name: -arrived[name].astype(np.float64) for name in base}


def plain(method: Method, gradients: Sequence[Mapping[str, Any]], shares: Sequence[float]) -> dict[str, Any]:
    """The merge as NumPy has it, in fp64."""
    stacked = {name: np.stack([g[name] for g in gradients]) for name in gradients[0]}
    if method == "mean":
        return {name: np.average(values, axis=0, weights=shares) for name, values in stacked.items()}
    if method == "median":
        return {name: np.median(values, axis=0) for name, values in stacked.items()}
    cut = len(gradients) // 5
    return {n: np.sort(v, axis=0)[cut : len(gradients) - cut].mean(axis=0) for n, v in stacked.items()}


def stepped(old: Weights, gradient: PseudoGradient) -> dict[str, Array]:
    """One step of FedAvg."""
    new = {name: np.array(array, order="C") for name, array in old.items()}
    OuterNesterov(lr=1.0, momentum=0.0).step(new, gradient)
    return new


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weight", [1.0, 24_576.0, 1e-3, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_one_client_with_fedavg_gets_its_own_weights_back_to_the_bit(
    seed: int, weight: float, method: Method, tmp_path: Path
) -> None:
    old = random_weights(seed)
    local = trained(old, seed + 100)
    one = aggregator(old, method=method, spool=tmp_path)
    one.fold("a", FP32.pack(local, old), weight)
    new = stepped(old, one.result())
    for name, array in local.items():
        assert new[name].dtype == np.float32
        assert (new[name] == array).all()


def test_where_the_mean_of_one_client_is_not_exact() -> None:
    """A weight that shrinks more than 2^28 fold in a round comes back to within 2^-52 of its old size, not to the bit."""
    old = {"w": np.array([1.0, -1.0, 1e3], np.float32)}
    local = {"w": np.array([1e-12, 1e-30, 1e-7], np.float32)}
    one = aggregator(old)
    one.fold("a", FP32.pack(local, old), 3.0)
    new = stepped(old, one.result())["w"]
    assert (new != local["w"]).any()
    assert (np.abs(new.astype(np.float64) - local["w"]) <= 2.0**-52 * np.abs(old["w"])).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("down", "up"), LINKS)
def test_it_is_numpys_for_any_shape_codec_and_number_of_clients(
    down: str, up: str, method: Method, tmp_path: Path
) -> None:
    for clients in (1, 2, 3, 5, 8):
        old = odd_weights(clients)
        base = base_of(old, down)
        locals_ = [trained(base, seed) for seed in range(clients)]
        shares = list(np.random.default_rng(clients).uniform(0.5, 7, clients))
        round_ = aggregator(old, down, up, method, tmp_path)
        for client, (local, share) in enumerate(zip(locals_, shares, strict=True)):
            round_.fold(f"client-{client}", CODECS[up].pack(local, base), share)
        result = round_.result()
        expected = plain(method, [received(local, base, up) for local in locals_], shares)
        assert list(result) == list(old)
        wide = CODECS[up].lossless
        for name, array in result.items():
            assert array.dtype == (np.float64 if wide else np.float32)
            assert array.shape == old[name].shape
            rtol, atol = (1e-12, 1e-14) if wide else (1e-5, 1e-6)
            np.testing.assert_allclose(array, expected[name], rtol=rtol, atol=atol, err_msg=name)
        merged = vector(expected)
        for client, local in enumerate(locals_):  # every third coordinate is looked at
            g = vector(received(local, base, up))
            cosine = g @ merged / (np.linalg.norm(g) * np.linalg.norm(merged))
            assert round_.cosines()[f"client-{client}"] == pytest.approx(cosine, abs=0.02)
        round_.close()
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("up", CODECS)
def test_neither_blocks_nor_threads_change_a_bit(
    up: str, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {"w": random_weights(0, 100_200)["b"], **odd_weights(0)}
    clients = [trained(old, seed) for seed in range(4)]
    digests, norms = set(), set()
    for threads, block in ((1, blocks.BLOCK), (2, blocks.BLOCK), (4, 4096), (3, 64), (1, 1 << 14)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for module in ("wire.blocks", "wire.codec", "aggregation.update", "aggregation.mean", "aggregation.robust"):
            monkeypatch.setattr(f"nanofed.federated.{module}.BLOCK", block)
        round_ = aggregator(old, up=up, method=method, spool=tmp_path)
        for client, local in enumerate(clients):
            packed = CODECS[up].pack(local, old)
            round_.fold(str(client), packed, 1.7 + client, scale=1 / (1 + client))
            if block == blocks.BLOCK:
                norms.add(update_norm(packed, sent_weights(old, up=up)))
        digests.add(hash_weights(round_.result()))
    assert len(digests) == 1
    assert len(norms) >= len(clients)


@pytest.mark.parametrize("up", CODECS)
def test_the_order_of_arrival_does_not_matter(up: str) -> None:
    old = random_weights(2, 2_000)
    clients = [(CODECS[up].pack(trained(old, seed), old), (seed + 1) / 3) for seed in range(4)]
    seen = [vector(received(trained(old, seed), old, up)) for seed in range(4)]
    largest = np.maximum.reduce([np.abs(vector(old)) * 2 if CODECS[up].lossless else np.abs(g) for g in seen])
    results = []
    for order in itertools.permutations(range(4)):
        round_ = aggregator(old, up=up)
        for client in order:
            round_.fold(str(client), *clients[client])
        results.append(vector(round_.result()))
    spread = np.max(results, axis=0) - np.min(results, axis=0)
    rounding = 2.0**-50 if CODECS[up].lossless else 2.0**-21
    assert (spread <= rounding * largest + 1e-44).all()
    assert spread.any(), "the bound above would prove nothing"


def test_fedavg_is_the_mean_of_the_weights_and_a_merge_leaves_the_old_ones() -> None:
    old = random_weights(3)
    before = hash_weights(old)
    clients = [trained(old, seed) for seed in range(3)]
    round_ = aggregator(old)
    for client, local in enumerate(clients):
        round_.fold(str(client), FP32.pack(local, old), 1.0)
    gradient = round_.result()
    assert hash_weights(old) == before
    for name, new in stepped(old, gradient).items():
        mean = np.mean([local[name].astype(np.float64) for local in clients], axis=0)
        np.testing.assert_allclose(new, mean, rtol=1e-6, atol=1e-44)  # denormals are that coarse


def test_what_the_down_link_rounds_off_is_no_update() -> None:
    """A client that moves nothing leaves the global weights as they are, although it never saw their last digits."""
    old = random_weights(4)
    base = base_of(old, "bf16")
    assert any((base[name] != old[name]).any() for name in old)
    for up in CODECS:
        round_ = aggregator(old, "bf16", up)
        packed = CODECS[up].pack(base, base)
        round_.fold("a", packed, 1.0)
        assert hash_weights(stepped(old, round_.result())) == hash_weights(old)
        assert update_norm(packed, sent_weights(old, "bf16", up)) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("up", CODECS)
def test_a_clipped_update_counts_for_its_part(up: str, method: Method, tmp_path: Path) -> None:
    old = random_weights(5)
    local = trained(old, 6)
    round_ = aggregator(old, up=up, method=method, spool=tmp_path)
    round_.fold("a", CODECS[up].pack(local, old), 5.0, scale=0.125)
    expected = 0.125 * vector(received(local, old, up))
    np.testing.assert_allclose(vector(round_.result()), expected, rtol=1e-6, atol=1e-44)


@pytest.mark.parametrize(("down", "up"), LINKS)
def test_the_norm_is_numpys(down: str, up: str) -> None:
    for seed in range(3):
        old = odd_weights(seed)
        base = base_of(old, down)
        local = trained(base, seed)
        norm = update_norm(CODECS[up].pack(local, base), sent_weights(old, down, up))
        assert norm == pytest.approx(float(np.linalg.norm(vector(received(local, base, up)))), rel=1e-12)
    nothing: dict[str, Array] = {"w": np.zeros((0, 3), np.float32)}
    assert update_norm(CODECS[up].encode(nothing), sent_weights(nothing, down, up)) == 0


@pytest.mark.parametrize("up", CODECS)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_the_norm_shows_one_value_that_is_not_finite_anywhere(up: str, value: float) -> None:
    old = odd_weights(1)
    sent = sent_weights(old, up=up)
    packed = CODECS[up].pack(old, old)
    assert update_norm(packed, sent) == 0
    bad = np.array([value], np.float32)
    patterns = {np.dtype(np.float32): bad[0], np.dtype(np.uint16): BF16.encode({"": bad})[0][0]}
    for index, shape in enumerate(array.shape for array in old.values()):
        size = math.prod(shape)
        for place in {p % size for p in (0, 1, 16, 1021, blocks.BLOCK - 1, blocks.BLOCK, -2, -1)} if size else ():
            arrays = [np.array(array) for array in packed]
            target = (
                CODECS[up].tensors(arrays, old)[index][-1].numpy()
            )  # the weight itself, or the scales of its groups
            target[place % size * len(target) // size] = patterns[target.dtype]
            assert not math.isfinite(update_norm(arrays, sent)), (shape, place)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("up", CODECS)
def test_what_does_not_fit_is_refused_and_nothing_of_it_is_folded_in(up: str, method: Method, tmp_path: Path) -> None:
    old = random_weights(7, 2_000)
    good = CODECS[up].pack(trained(old, 1), old)
    round_ = aggregator(old, up=up, method=method, spool=tmp_path)
    round_.fold("good", good, 1.0)
    spoils: list[Callable[[Any], Any]] = [
        lambda array: array[:1],
        lambda array: array.astype(np.float64),
        lambda array: array.T if array.ndim > 1 else array[None],
    ]
    for spoil in spoils:
        for index in range(len(good)):
            arrays = [spoil(array) if n == index else array for n, array in enumerate(good)]
            with pytest.raises(WireError, match="^" + "ab"[index]):
                round_.fold("bad", arrays, 1.0)
            with pytest.raises(WireError, match="^" + "ab"[index]):
                update_norm(arrays, sent_weights(old, up=up))
    with pytest.raises(WireError, match=f"{len(good) - 1} arrays arrived, {len(good)} are expected"):
        round_.fold("bad", good[:-1], 1.0)
    alone = aggregator(old, up=up)
    alone.fold("good", good, 1.0)
    result, expected = round_.result(), alone.result()
    assert all((result[name] == expected[name]).all() for name in old)
    assert list(round_.cosines()) == ["good"]


def test_cosines_of_a_model_that_is_sampled_are_near_the_true_ones() -> None:
    size = 1_500_000
    generator = np.random.default_rng(0)
    old = {"w": np.zeros((1000, size // 1000), np.float32), "v": np.zeros(500, np.float32)}
    common = generator.normal(size=size)
    updates = [common + noise * generator.normal(size=size) for noise in (0.2, 1, 5)]
    locals_ = [{"w": update.astype(np.float32).reshape(1000, -1)} for update in updates]
    round_ = aggregator(old)
    for client, local in enumerate(locals_):
        round_.fold(str(client), FP32.encode({**local, "v": np.ones(500, np.float32)}), 1.0)
    merged = round_.result()["w"].reshape(-1)
    for client, local in enumerate(locals_):
        g = -local["w"].reshape(-1).astype(np.float64)
        true = g @ merged / np.linalg.norm(g) / np.linalg.norm(merged)
        assert round_.cosines()[str(client)] == pytest.approx(true, abs=0.02)
