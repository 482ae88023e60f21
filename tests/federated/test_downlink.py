"""Weights that go down as what changed: both sides hold the same bits, whoever comes late, starts again or is sent nonsense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanofed.federated.config import FederationConfig
from nanofed.federated.server.downlink import Downlink
from nanofed.federated.server.rounds import RoundLoop
from nanofed.federated.server.state import HELD
from nanofed.federated.site.trainer import FabricTrainer
from nanofed.federated.wire.changes import changed
from nanofed.federated.wire.codec import CODECS, Array, Arrays, WireError, hash_arrays, payload_bytes
from nanofed.federated.wire.messages import Instructions, Report, StoredWeights
from nanofed.federated.wire.weight_store import WeightStore
from nanofed.federated.wire.weights_calls import DOWN
from nanofed.training.checkpoint.format import find_checkpoint, read_state
from tests.federated.arrays import odd_weights, trained
from tests.federated.tiny import Fit, federation, prepare, same_bits, train

BF16 = CODECS["bf16"]
SMALL = ["int8", "int4"]
Asked = Sequence[tuple[int, str, bool, int]]


def to_bf16(values: Array) -> Array:
    """Round to bf16, with ties to even, in integers alone."""
    bits = values.view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("codec", SMALL)
@pytest.mark.parametrize("threads", [1, 3])
def test_changes_are_added_as_numpy_adds_them(codec: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    down = CODECS[codec]
    for seed in range(3):
        old = odd_weights(seed)
        held = BF16.encode(old)
        changes = down.pack(trained(old, seed), BF16.parts(held, old))
        added = changed(held, changes, down, old)
        before, moves, after = (c.decode(a, old) for c, a in ((BF16, held), (down, changes), (BF16, added)))
        for name in old:
            expected = np.asarray(before[name] + moves[name], order="C")
            assert after[name].tobytes() == to_bf16(expected.reshape(-1)).tobytes(), name
        assert hash_arrays(held) == hash_arrays(BF16.encode(old)), "the old ones stay"
        assert hash_arrays(changed(held, changes, down, old, out=held)) == hash_arrays(added)
        assert hash_arrays(held) == hash_arrays(added)
        with pytest.raises(WireError, match="arrays arrived"):
            changed(held, changes[:-1], down, old, out=held)
        assert hash_arrays(held) == hash_arrays(added), "nothing is written where the arrays do not fit"


@pytest.mark.parametrize(("codec", "worst"), [("int8", 1.0), ("int4", 12.0)])
def test_errors_do_not_add_up(codec: str, worst: float) -> None:
    """After many rounds the held weights are as far from the global ones as after the first, and where those stay, nearer."""
    down, random = CODECS[codec], np.random.default_rng(0)
    weights: dict[str, Array] = {"w": random.normal(size=(64, 256)).astype(np.float32), "v": np.ones(7, np.float32)}
    held, far = BF16.encode(weights), []

    def advance() -> float:
        nonlocal held
        held = changed(held, down.pack(weights, BF16.parts(held, weights)), down, weights)
        return float(np.abs(BF16.decode(held, weights)["w"] - weights["w"]).max())

    step = 0.01
    for _ in range(60):
        for array in weights.values():
            array += step * random.normal(size=array.shape).astype(np.float32)
        far.append(advance())
    rounding = 2.0**-8 * float(np.abs(weights["w"]).max())  # of bf16, half a unit of the last place
    assert max(far[30:]) < 1.5 * max(far[:30]) < 1.5 * (rounding + worst * step)
    rest = [advance() for _ in range(8)][-1]
    assert rest <= rounding and (BF16.decode(held, weights)["v"] == to_bf16(weights["v"])).all()


# --- a server's side


class Server:
    """A Downlink over a real store, with weights that move after each round."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = WeightStore(folder)
        self.state = cast(Any, SimpleNamespace(weights=odd_weights(0), held=None, clock=SimpleNamespace(tokens=0)))
        self.downlink = Downlink(FederationConfig(down_codec="int8", up_codec="int8"), self.store)

    def commit(self) -> None:
        self.state.weights = trained(self.state.weights, self.state.clock.tokens)
        self.state.clock.tokens += 1

    def round(self, *clients: str) -> dict[str, Arrays]:
        """Send a round and return what each client can fetch; all of them answer."""
        sent = self.downlink.encode(self.state, clients)
        offered = self.store.offer({client: sent.payload_for(client) for client in clients}, 0, 30.0)
        found = {}
        for client in clients:
            stored = StoredWeights.found_in(offered.note(client))
            assert stored is not None
            found[client] = sent.payload_for(client)
            content = b"".join(array.tobytes() for array in found[client])
            assert (self.folder / DOWN / stored.ticket).read_bytes() == content
        self.files = len(list((self.folder / DOWN).iterdir()))
        offered.close()
        assert not list((self.folder / DOWN).iterdir())
        self.downlink.holders.update(clients)
        self.changed_from = dict(sent.changed_from)
        return found


def test_who_has_answered_is_sent_the_changes_and_the_others_whole_weights(tmp_path: Path) -> None:
    server = Server(tmp_path / "weights")
    like = server.state.weights
    first = server.round("a", "b")
    assert hash_arrays(first["a"]) == hash_arrays(BF16.encode(like)) and server.files == 1 and not server.changed_from
    held, before = BF16.encode(like), server.downlink.base_hash
    server.commit()
    second = server.round("a", "c")
    assert server.files == 2 and server.changed_from == {"a": before}
    mine = changed(held, second["a"], CODECS["int8"], like)
    assert hash_arrays(mine) == hash_arrays(second["c"]) == server.downlink.base_hash != before
    server.commit()
    third = server.round("a", "b", "c")  # `b` did not answer the second round
    assert set(server.changed_from) == {"a", "c"} and third["a"] is third["c"]
    mine = changed(mine, third["a"], CODECS["int8"], like)
    assert hash_arrays(mine) == hash_arrays(third["b"])
    server.commit()
    server.round("a", "b")
    assert server.files == 1, "whole weights are not made where nobody needs them"


def test_a_round_that_is_tried_again_is_sent_the_same_weights(tmp_path: Path) -> None:
    server = Server(tmp_path / "weights")
    server.round("a")
    server.commit()
    server.round("a")
    tried = server.downlink.base_hash
    again = server.round("a")
    assert server.downlink.base_hash == hash_arrays(again["a"]) == tried and not server.changed_from


# --- whole federations


def asking(
    log: list[tuple[int, str, bool, int]],
) -> Callable[[Fit, Sequence[Any], Instructions], tuple[Arrays, Report]]:
    """Note of each message its round, client, whether it holds changes, and its bytes."""

    def hook(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
        log.append((asked.round, asked.client, bool(asked.changed_from), payload_bytes(arrays)))
        return fit(arrays, asked)

    return hook


def held_by_both(loop: RoundLoop, trainer: Any) -> bool:
    """Tell whether server and site hold the same weights."""
    return bool(hash_arrays(loop.state.held or []) == trainer._held.hash == hash_arrays(trainer._held.arrays))


@pytest.mark.parametrize("codec", SMALL)
def test_late_clients_are_sent_whole_weights_and_all_bytes_are_counted(
    codec: str, tiny_corpus: Path, tmp_path: Path
) -> None:
    options = {"clients": 3, "rounds": 7, "availability": 0.6, "down_codec": codec, "up_codec": "bf16"}
    log: list[tuple[int, str, bool, int]] = []
    loop, site = train(federation(tiny_corpus, tmp_path, "run", **options), hook=asking(log))
    weights = loop.state.weights
    present = {number: {client for n, client, _, _ in log if n == number} for number, *_ in log}
    rounds = sorted(present)
    before = dict(zip(rounds[1:], rounds, strict=False))
    for number, client, changes, size in log:
        assert changes == (number in before and client in present[before[number]]), (number, client)
        assert size == (CODECS[codec] if changes else BF16).nbytes(weights)
    assert {changes for _, _, changes, _ in log} == {True, False}
    assert held_by_both(loop, site.real) and not loop.state.events.total("failed", "weights")
    up = len(log) * BF16.nbytes(weights)
    assert loop.metrics.summary.bytes == sum(size for *_, size in log) + up
    figures = EventAccumulator(str(tmp_path / "run"))
    figures.Reload()
    by_round = [sum(size for number, _, _, size in log if number == n) for n in rounds]
    assert [event.value for event in figures.Scalars("fed/bytes_down")] == by_round
    own = EventAccumulator(str(tmp_path / "run" / "sites" / "client-0"))
    own.Reload()
    assert [event.value for event in own.Scalars("fed/bytes_down")] == [s for _, c, _, s in log if c == "client-0"]


def test_a_trainer_that_has_lost_its_weights_says_so_and_is_sent_them_whole(tiny_corpus: Path, tmp_path: Path) -> None:
    log: list[tuple[int, str, bool, int]] = []
    noted = asking(log)

    def hook(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
        if (asked.round, asked.client) == (3, "client-0"):
            site.real._held = None  # type: ignore[attr-defined]
        return noted(fit, arrays, asked)

    loop, site = prepare(federation(tiny_corpus, tmp_path, "run", rounds=5, down_codec="int8"))
    site.hook = hook
    loop.train()
    loop.metrics.close()
    # Both clients share the trainer, and so the loss.
    assert [(number, changes) for number, client, changes, _ in log if client == "client-0"] == [
        *[(1, False), (2, True), (3, True), (3, False), (4, True), (5, True)]
    ]
    lost = loop.state.events.last("weights", "client-0")
    assert lost is not None and lost.count == 1 and "have to be sent whole" in lost.reason
    assert len(site.answered) == 10 and held_by_both(loop, site.real)


@pytest.mark.parametrize("spoil", ["bits", "dtype", "size", "none", "whole"])
def test_nothing_is_trained_on_changes_that_are_not_right(spoil: str, tiny_corpus: Path, tmp_path: Path) -> None:
    def spoilt(arrays: Sequence[Any]) -> list[Any]:
        if spoil == "bits":
            array = arrays[0] ^ 64  # of every element: rows that nothing has moved have the scale 0
            return [array, *arrays[1:]]
        if spoil == "dtype":
            return [arrays[0].astype(np.float64), *arrays[1:]]
        if spoil == "size":
            return [arrays[0][..., :-1], *arrays[1:]]
        return [] if spoil == "none" else BF16.encode(loop.state.weights)

    def hook(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
        return fit(spoilt(arrays) if asked.round == 2 and asked.changed_from else arrays, asked)

    loop, site = prepare(federation(tiny_corpus, tmp_path, "run", clients=1, rounds=3, down_codec="int8"))
    site.hook = hook
    loop.train()
    loop.metrics.close()
    assert [(asked.round, bool(asked.changed_from)) for asked in site.asked] == [
        *[(1, False), (2, True), (2, False), (3, True)]
    ]
    failed = loop.state.events.last("failed", "client-0")
    assert failed is not None and failed.count == 1 and "WireError" in failed.reason
    assert held_by_both(loop, site.real)


def test_a_client_that_says_it_holds_nothing_costs_nobody_else(tiny_corpus: Path, tmp_path: Path) -> None:
    """One lies about what it holds, with a hash of its own: it is refused, and the others are sent the changes."""

    def hook(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
        answer, report = fit(arrays, asked)
        return answer, replace(report, base_hash="0" * 64) if asked.client == "client-1" else report

    loop, site = train(federation(tiny_corpus, tmp_path, "run", rounds=3, down_codec="int8"), hook=hook)
    told = {(asked.round, asked.client): bool(asked.changed_from) for asked in site.asked}
    assert [told[n, "client-0"] for n in (1, 2, 3)] == [False, True, True]
    assert not any(told[n, "client-1"] for n in (1, 2, 3)) and loop.state.events.total("stale") == 3


def test_a_server_that_goes_on_sends_whole_weights_first_and_ends_in_the_same_bits(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    options = {"down_codec": "int4", "up_codec": "int8", "save_every": 2, "outer": "nesterov"}
    whole, _ = train(federation(tiny_corpus, tmp_path, "whole", rounds=5, **options))
    train(federation(tiny_corpus, tmp_path, "cut", rounds=2, **options))
    resumed, site = train(federation(tiny_corpus, tmp_path, "cut", rounds=5, ckpt_path="last", **options))
    changes = [bool(asked.changed_from) for asked in site.asked]
    assert changes == [False, False, True, True, True, True]
    assert same_bits(whole, resumed) and hash_arrays(whole.state.held or []) == hash_arrays(resumed.state.held or [])
    saved = read_state(find_checkpoint(tmp_path / "cut"))
    assert hash_arrays([t.view(torch.uint16).numpy() for t in saved[HELD]]) == site.asked[-1].base_hash
    config = federation(tiny_corpus, tmp_path, "cut", rounds=6, ckpt_path="last", down_codec="bf16")
    config.config.force = True  # another codec than the run began with
    other, site = train(config)
    assert other.state.held is None and HELD not in read_state(find_checkpoint(tmp_path / "cut"))
    assert not any(asked.changed_from for asked in site.asked)


class TakingTurns:
    """Two trainers over one folder, as actors of a simulation are: each message reaches the other one."""

    def __init__(self, one: FabricTrainer, other: FabricTrainer) -> None:
        self._both = [one, other]

    def __getattr__(self, name: str) -> Any:
        self._both.reverse()
        return getattr(self._both[0], name)


@pytest.mark.parametrize("shared", [True, False])
def test_trainers_that_share_clients_find_what_these_hold(shared: bool, tiny_corpus: Path, tmp_path: Path) -> None:
    options = {"clients": 1, "rounds": 4, "down_codec": "int8", "up_codec": "int8"}
    alone, _ = train(federation(tiny_corpus, tmp_path, "alone", **options))
    config = federation(tiny_corpus, tmp_path, "shared", **options)
    loop, site = prepare(config)
    site.real = cast(Any, TakingTurns(config.trainer(shared=shared), config.trainer(shared=shared)))
    loop.train()
    loop.metrics.close()
    assert bool(loop.state.events.total("weights")) is not shared
    if shared:
        assert same_bits(alone, loop)


@pytest.mark.parametrize("codec", SMALL)
def test_sites_measure_the_weights_that_they_hold(codec: str, tiny_corpus: Path, tmp_path: Path) -> None:
    """They are taken up once, for the figure and for the training; the last ones come whole, and the run stays the same."""
    options = {"rounds": 3, "eval_every": 1, "down_codec": codec}
    here, _ = train(federation(tiny_corpus, tmp_path, "server", **options))
    log: list[tuple[int, str, bool, int]] = []
    there, site = train(federation(tiny_corpus, tmp_path, "sites", **options, evaluation="sites"), hook=asking(log))
    assert same_bits(here, there) and not there.state.events.total()
    assert [(asked.down_codec, bool(asked.changed_from)) for asked in site.measured] == [
        *[(codec, False)] * 2, *[(codec, True)] * 4, *[("bf16", False)] * 2
    ]  # fmt: skip
    for point, exact in zip(there.metrics.summary.curve, here.metrics.summary.curve, strict=True):
        assert point.bpb == pytest.approx(exact.bpb, rel=0.01)
    whole, up = BF16.nbytes(there.state.weights), CODECS["fp32"].nbytes(there.state.weights)
    assert there.metrics.summary.bytes == sum(size for *_, size in log) + 6 * up + 2 * whole
