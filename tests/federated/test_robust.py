from __future__ import annotations

import itertools
import logging
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from nanofed.errors import NanofedError
from nanofed.federated.aggregation import Method, make_aggregator
from nanofed.federated.aggregation.outer import OuterNesterov
from nanofed.federated.aggregation.robust import Median, Sorted, TrimmedMean, comparators
from nanofed.federated.wire.codec import CODECS, Array, Weights, payload_bytes
from tests.benchmarks import machine
from tests.faults.children import call, mount_disk
from tests.federated.arrays import hash_weights, odd_weights, random_weights, sent_weights, trained, update_norm, vector

ROBUST: tuple[Method, ...] = ("median", "trimmed_mean")
FP32 = CODECS["fp32"]
CPU = torch.device("cpu")
LINKS = list(itertools.product(CODECS, CODECS))  # down, up


@pytest.mark.parametrize("n", range(11))
def test_the_network_sorts_everything(n: int) -> None:
    """A network that sorts all zeros and ones sorts all values (Knuth, vol. 3, theorem Z)."""
    values = np.array(list(itertools.product((0, 1), repeat=n)), np.int8).T.copy()
    for i, j in comparators(n):
        assert 0 <= i < j < n
        values[[i, j]] = np.minimum(values[i], values[j]), np.maximum(values[i], values[j])
    assert (np.diff(values, axis=0) >= 0).all()


@pytest.mark.parametrize("n", [16, 37, 64, 100])
def test_the_network_sorts_many(n: int) -> None:
    values = np.random.default_rng(n).permuted(np.tile(np.arange(n), (2000, 1)), axis=1).T.copy()
    pairs = list(comparators(n))
    for i, j in pairs:
        values[[i, j]] = np.minimum(values[i], values[j]), np.maximum(values[i], values[j])
    assert (values == np.arange(n)[:, None]).all()
    assert len(pairs) < n * np.log2(n) ** 2 / 4 + n


@pytest.mark.parametrize("method", ROBUST)
@pytest.mark.parametrize("up", CODECS)
def test_the_order_of_arrival_and_the_shares_do_not_change_a_bit(up: str, method: Method, tmp_path: Path) -> None:
    old = random_weights(1)
    packed = [CODECS[up].pack(trained(old, seed), old) for seed in range(5)]
    digests = set()
    for order in itertools.islice(itertools.permutations(range(5)), 0, None, 17):
        aggregator = make_aggregator(method, sent_weights(old, up=up), tmp_path)
        for client in order:
            aggregator.fold(str(client), packed[client], weight=1.0 + order.index(client) * 1e3)
        digests.add(hash_weights(aggregator.result()))
    assert len(digests) == 1


def hostile_round(method: Method, up: str, down: str, folder: Path, seed: int) -> tuple[Array, Array, Array]:
    """Four honest clients that agree for the greater part, and one that sends ten times the opposite."""
    generator = np.random.default_rng(seed)
    old = odd_weights(seed)
    base = CODECS[down].decode(CODECS[down].encode(old), old)
    common = {name: generator.normal(size=w.shape) * 1e-2 for name, w in old.items()}

    def local(factor: float, noise: float) -> dict[str, Array]:
        return {
            n: (w + factor * (common[n] + noise * generator.normal(size=w.shape) * 1e-2)).astype(np.float32)
            for n, w in base.items()
        }

    clients = [local(1, 0.3) for _ in range(4)]
    clients.insert(int(generator.integers(5)), local(-10, 0.3))
    aggregator = make_aggregator(method, sent_weights(old, down, up), folder)
    for number, client in enumerate(clients):
        aggregator.fold(str(number), CODECS[up].pack(client, base), 1.0)
    updates = np.stack([vector(base) - vector(client) for client in clients])
    honest = updates[np.argsort(np.linalg.norm(updates, axis=1))[:4]]
    merged = vector(aggregator.result())
    cosines = np.array(list(aggregator.cosines().values()))
    assert cosines.argmin() == np.linalg.norm(updates, axis=1).argmax(), "the hostile one is seen"
    return merged.astype(np.float32), honest.astype(np.float32), -vector(common).astype(np.float32)


@pytest.mark.parametrize("method", ROBUST)
@pytest.mark.parametrize(("down", "up"), LINKS)
def test_one_hostile_client_of_five_cannot_steer(down: str, up: str, method: Method, tmp_path: Path) -> None:
    merged, honest, common = hostile_round(method, up, down, tmp_path, 0)
    largest = np.abs(honest).max(axis=0)
    steps = {"fp32": 0.0, "bf16": 2.0**-8 * largest, "int8": largest.max() / 254, "int4": largest.max() / 13}
    rounding = 1.01 * steps[up]
    low, high = honest.min(axis=0) - rounding - 1e-9, honest.max(axis=0) + rounding + 1e-9
    assert ((low <= merged) & (merged <= high)).all(), "no coordinate leaves what the honest ones span"
    assert np.linalg.norm(merged - common) < 0.35 * np.linalg.norm(common)


def test_the_mean_is_steered_by_it(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the hostile one is seen"):  # it has become the direction of the mean
        hostile_round("mean", "fp32", "fp32", tmp_path, 0)


@pytest.mark.parametrize("trim", [0.0, 0.1, 0.2, 0.29, 0.3, 0.49])
def test_so_many_are_cut_on_each_side(trim: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = {"w": np.zeros(1, np.float32)}
    for clients in (1, 2, 3, 4, 5, 7, 10, 100):
        values = np.random.default_rng(clients).permutation(clients).astype(np.float32) ** 2
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            aggregator = make_aggregator("trimmed_mean", sent_weights(old), tmp_path, trim=trim)
            for client, value in enumerate(values):
                aggregator.fold(str(client), [np.full(1, value)], 1.0)
            result = -float(aggregator.result()["w"][0])
        cut = clients * round(100 * trim) // 100
        assert result == pytest.approx(np.sort(values)[cut : clients - cut].mean(), rel=1e-15)
        assert bool(caplog.records) == (cut == 0), "that nothing is cut off is said"


@pytest.mark.parametrize("method", ROBUST)
def test_who_is_dropped_leaves_no_trace_and_saves_no_other_from_being_cut(
    method: Method, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = random_weights(4)
    results = []
    for dropped in (2, 3):
        with make_aggregator(method, sent_weights(old), tmp_path, trim=0.3) as aggregator:
            assert isinstance(aggregator, Sorted)
            for client in range(7):
                aggregator.fold(str(client), FP32.encode(trained(old, client + 10 * (client == dropped))), 1.0, 0.5)
            aggregator.drop(str(dropped))
            aggregator.fold(str(dropped), FP32.encode(trained(old, dropped)), 1.0, 0.5)
            assert len(list(tmp_path.iterdir())) == 7
            results.append(vector(aggregator.result()))
            assert len(aggregator.cosines()) == 7 and not list(tmp_path.iterdir())
    # Of 7, 2 are cut on each side; of 8, one of whom was dropped, as well.
    np.testing.assert_array_equal(results[0], results[1])
    updates = np.sort([vector(old) - vector(trained(old, seed)) for seed in range(7)], axis=0) / 2
    expected = updates[3] if method == "median" else updates[2:-2].mean(0)
    np.testing.assert_allclose(results[0], expected, rtol=1e-12, atol=1e-18)
    assert not caplog.records


@pytest.mark.parametrize("method", ROBUST)
def test_one_that_is_not_finite_is_seen_by_the_outer_step(method: Method, tmp_path: Path) -> None:
    """Validation refuses it before; were it to slip through, no weight would move."""
    old = odd_weights(2)
    aggregator = make_aggregator(method, sent_weights(old), tmp_path)
    for client in range(5):
        local = {name: np.array(w, order="C") for name, w in trained(old, client).items()}
        if client == 2:
            next(w for w in local.values() if w.size > 9).reshape(-1)[-1] = np.nan
        aggregator.fold(str(client), FP32.encode(local), 1.0)
    new = {name: np.array(array, order="C") for name, array in old.items()}
    with pytest.raises(ValueError, match="not finite"):
        OuterNesterov().step(new, aggregator.result())
    assert hash_weights(new) == hash_weights(old)


def test_what_a_killed_server_left_behind_is_removed_and_nothing_else(tmp_path: Path) -> None:
    old = random_weights(3)
    for kind in (Median, TrimmedMean):
        (tmp_path / "00007.update").write_bytes(b"left")
        (tmp_path / "notes.txt").write_text("kept")
        with kind(sent_weights(old), tmp_path) as aggregator:
            aggregator.fold("a", FP32.encode(old), 1.0)
            (file,) = tmp_path.glob("*.update")
            assert 0 <= file.stat().st_size - payload_bytes(FP32.encode(old)) < 64 * len(old)
        assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
        with pytest.raises(ZeroDivisionError), kind(sent_weights(old), tmp_path) as aggregator:
            aggregator.fold("a", FP32.encode(old), 1.0)
            raise ZeroDivisionError
        assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_reply_that_was_cut_short_on_disk_is_no_merge(tmp_path: Path) -> None:
    old = random_weights(3)
    for size in (0, 4096, 40_000):
        aggregator = make_aggregator("median", sent_weights(old), tmp_path)
        for client in range(3):
            aggregator.fold(str(client), FP32.encode(old), 1.0)
        with sorted(tmp_path.iterdir())[1].open("r+b") as file:
            file.truncate(size)
        with pytest.raises(NanofedError, match=f"cannot be kept in {tmp_path}"):
            aggregator.result()
        assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    old = random_weights(3)
    (tmp_path / "file").touch()
    with pytest.raises(NanofedError, match=rf"cannot be kept in {tmp_path}/file/spool \(Not a directory\)"):
        make_aggregator("median", sent_weights(old), tmp_path / "file" / "spool")


def _on_a_small_disk(folder: Path, method: Method, change: str) -> None:
    old = random_weights(4, 200_000)  # 800 kB
    mount_disk(folder, "2m")
    spool = folder / "spool"
    aggregator = make_aggregator(method, sent_weights(old), spool)
    aggregator.fold("a", FP32.encode(old), 1.0)
    if change:
        mount_disk(folder, "2m", change)
        reason = "Read-only file system"
    else:
        aggregator.fold("b", FP32.encode(old), 1.0)
        reason = "No space left on device"
    with pytest.raises(NanofedError) as failure:
        aggregator.fold("c", FP32.encode(old), 1.0)
    assert str(spool) in str(failure.value)
    assert reason in str(failure.value)
    assert [file.name for file in spool.iterdir()] == (["00000.update"] if change else []), "the disk is given back"
    if not change:
        again = make_aggregator(method, sent_weights(old), spool)
        again.fold("a", FP32.encode(old), 1.0)
        assert not vector(again.result()).any()


@pytest.mark.slow
@pytest.mark.parametrize("method", ROBUST)
@pytest.mark.parametrize("change", ["", "ro"], ids=["full", "read-only"])
def test_a_full_or_read_only_disk_is_named_and_the_round_is_not_merged(
    method: Method, change: str, tmp_path: Path
) -> None:
    call(_on_a_small_disk, tmp_path, method, change)


LAYERS, LAYER = 16, 1 << 20  # a model of 16.8 M parameters, 67 MB in fp32


def _added_megabytes(folder: Path, method: Method, down: str, up: str, clients: int) -> float:
    """Return the peak of resident memory beyond the weights and payloads that are there, over folds, norms and merge."""
    torch.set_num_threads(2)
    added = 0.0
    for layer in (1 << 16, LAYER):  # once small: the code itself is read from disk, too
        old: Weights = {f"layer{n}": np.full((1024, layer // 1024), n, np.float32) for n in range(LAYERS)}
        sent = sent_weights(old, down, up)
        packed = [np.add(array, 1, dtype=array.dtype) for array in CODECS[up].encode(old)]
        machine.reset_peak_memory(CPU)
        before = machine.resident_memory_mb()
        with make_aggregator(method, sent, folder) as aggregator:
            for client in range(clients):
                assert update_norm(packed, sent) > 0
                aggregator.fold(str(client), packed, 1.0)
            assert list(aggregator.result()) == list(old)
        added = machine.peak_memory_mb(CPU) - before
    return added


@pytest.mark.slow
@pytest.mark.parametrize(("down", "up"), LINKS)
def test_a_merge_takes_one_accumulator(down: str, up: str, tmp_path: Path) -> None:
    accumulator = LAYERS * LAYER * (8 if CODECS[up].lossless else 4) / 1e6
    added = call(_added_megabytes, tmp_path, "mean", down, up, 3)
    assert 0.8 * accumulator < added < accumulator + 12  # buffers of two threads, samples of three clients


@pytest.mark.slow
@pytest.mark.parametrize("clients", [3, 12])
def test_the_memory_of_a_robust_merge_is_of_one_layer_a_client(clients: int, tmp_path: Path) -> None:
    """What is mapped from files, and can be taken back at any time, counts as resident here."""
    accumulator, layer = LAYERS * LAYER * 4 / 1e6, LAYER * 2 / 1e6
    added = call(_added_megabytes, tmp_path, "median", "bf16", "bf16", clients)
    assert 0.8 * accumulator < added < accumulator + clients * (layer + 1) + 12


def test_files_are_private(tmp_path: Path) -> None:
    old = random_weights(5, 2_000)
    with make_aggregator("median", sent_weights(old), tmp_path / "spool") as aggregator:
        aggregator.fold("../../etc/a", FP32.encode(old), 1.0)  # a name is never a path
        (file,) = (tmp_path / "spool").iterdir()
        assert stat.S_ISREG(file.stat().st_mode)
    assert [entry.name for entry in tmp_path.iterdir()] == ["spool"]
