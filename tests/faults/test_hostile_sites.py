"""Sites that keep hurting: the others are merged in every round, and the model learns as it does without the hostile one.

Every federation here has one hostile site, the last one. Small counts are in CI; `--campaign` plays 200 rounds.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanofed.data.packing import StreamState
from nanofed.data.rows import Row
from nanofed.data.streams import DataState
from nanofed.federated.aggregation.norm_guard import UnusualNorm
from nanofed.federated.server.ledger import LocalLedger
from nanofed.federated.server.rounds import RoundLoop
from nanofed.federated.server.scheduling import MAX_MARGIN, SPARE_ROWS, steps_taken
from nanofed.federated.wire.codec import Arrays, hash_arrays
from nanofed.federated.wire.messages import Hello, Instructions, Report, SiteShard
from tests.federated.conftest import one_thread, tiny_corpus
from tests.federated.tiny import Fit, federation, make_corpus, prepare, train

__all__ = ["one_thread", "tiny_corpus"]  # the fixtures

Update = list[Any]  # what each weight moves by
Attack = Callable[[Update, Update, RoundLoop, Instructions, Report], Update]  # update, base -> update


def free_rider(update: Update, base: Update, *_: Any) -> Update:
    return [0 * moved for moved in update]


def near_zero(update: Update, base: Update, *_: Any) -> Update:
    return [np.float32(1e-2) * moved for moved in update]


def noise(update: Update, base: Update, *_: Any) -> Update:
    """9.9 times as long as the weights themselves, from the first round on."""
    generator = np.random.default_rng(0)
    drawn = [generator.standard_normal(moved.shape).astype(np.float32) for moved in update]
    return [np.float32(9.9 * _length(base) / _length(drawn)) * moved for moved in drawn]


def ramp(update: Update, base: Update, loop: RoundLoop, asked: Instructions, report: Report) -> Update:
    """Its honest update, made as long as will be merged whole: 0.999 of the limit."""
    guard, steps = loop.state.norms, steps_taken(loop._module.recipe.schedule, asked, report.steps)
    lengths = [_length([moved]) for moved in update]

    def passes(factor: float) -> bool:
        try:
            length = guard.measure([factor * value for value in lengths], steps)
            return guard.scale(length, {asked.client: length}, loop.state.weights_norm) == 1.0
        except UnusualNorm:
            return False

    low, high = 1.0, 1e4
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if passes(middle) else (low, middle)
    return [np.float32(low) * moved for moved in update]


def _length(arrays: Update) -> float:
    return math.sqrt(math.fsum(float((array.astype(np.float64) ** 2).sum()) for array in arrays))


def play(
    corpus: Path, folder: Path, clients: int, attack: Attack | None, *, absent: bool = False, **options: Any
) -> RoundLoop:
    """Run a federation whose last site is hostile, or fails in every round."""
    config = federation(corpus, folder, "run", clients=clients, save_every=0, eval_every=10**6, **options)
    hostile = f"client-{clients - 1}"

    def hook(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
        if asked.client == hostile and absent:
            raise OSError("it is not there")
        base = [array.copy() for array in arrays]
        local, report = fit(arrays, asked)
        if asked.client == hostile and attack is not None:
            update = [np.asarray(a, np.float32) - b for a, b in zip(local, base, strict=True)]
            sent = [b + u for b, u in zip(base, attack(update, base, loop, asked, report), strict=True)]
            return sent, replace(report, payload_hash=hash_arrays(sent))
        return local, report

    loop, _ = prepare(config, hook=hook, answered=deque(maxlen=0))
    try:
        loop.train()
    finally:
        loop.metrics.close()
    return loop


def refusals(loop: RoundLoop) -> dict[str, dict[str, int]]:
    return {
        client: {str(kind): count.count for kind, count in kinds.items()}
        for client, kinds in loop.state.events.by_client().items()
    }


@pytest.mark.parametrize("clients", [2, 5])
@pytest.mark.parametrize(
    ("attack", "kind"), [(free_rider, "small_norm"), (near_zero, "small_norm"), (noise, "large_norm")]
)
def test_who_brings_nothing_is_refused_by_name_and_the_others_train_as_without_it(
    attack: Attack, kind: str, clients: int, tiny_corpus: Path, tmp_path: Path, count: Callable[[int, int], int]
) -> None:
    rounds = count(6, 200)
    options: dict[str, Any] = {"rounds": rounds, "round_steps": count(1, 4)}
    options["model.recipe.num_steps"] = rounds * options["round_steps"] * clients
    loop = play(tiny_corpus, tmp_path / "hostile", clients, attack, **options)
    absent = play(tiny_corpus, tmp_path / "absent", clients, None, absent=True, **options)
    assert refusals(loop) == {f"client-{clients - 1}": {kind: rounds}}, "and no honest site's update was clipped"
    assert loop.state.speeds.rounds == {f"client-{n}": rounds for n in range(clients - 1)}
    ours, theirs = loop.metrics.summary.bpb_end, absent.metrics.summary.bpb_end
    assert ours is not None and theirs is not None and ours <= theirs * 1.02


@pytest.mark.parametrize("clients", [2, 5])
def test_a_site_that_sends_all_that_is_allowed_drives_no_limit(
    clients: int, tmp_path: Path, count: Callable[[int, int], int]
) -> None:
    rounds = count(8, 200)
    options: dict[str, Any] = {"rounds": rounds, "round_steps": count(1, 4)}
    options["model.recipe.num_steps"] = rounds * options["round_steps"] * clients
    # In a campaign no text is read twice: a model that learns its text by heart is the worse for every further site.
    corpus = make_corpus(tmp_path / "corpus", documents=count(160, 80_000))
    loop = play(corpus, tmp_path / "hostile", clients, ramp, **options)
    absent = play(corpus, tmp_path / "absent", clients, None, absent=True, **options)
    assert all(client == f"client-{clients - 1}" for client in refusals(loop))
    assert all(loop.state.speeds.rounds[f"client-{n}"] == rounds for n in range(clients - 1))
    usual = loop.state.norms.state_dict()["usual"]
    assert usual == {"matrices": usual["matrices"]} and usual["matrices"] < 1.0
    ours, theirs = loop.metrics.summary.bpb_end, absent.metrics.summary.bpb_end
    # Few rounds are noisy.
    assert ours is not None and theirs is not None and ours <= theirs * count(5, 2) / 100 + theirs


# --- claims


def to_the_end_of_its_lease(asked: Instructions) -> DataState:
    last = asked.lease[-1]
    return DataState(0, {n: StreamState(Row(last.epoch, last.shard, last.stop)) for n in range(8)})


def test_a_site_that_claims_all_of_its_lease_ends_no_horizon_early(
    tiny_corpus: Path, tmp_path: Path, count: Callable[[int, int], int]
) -> None:
    """It says that it has read its lease to the end, on eight devices and in no time; what a round leases stays an epoch.

    What an honest client holds may be more after many epochs: its streams read unevenly, and rows stay its own until the slowest
    has read them.
    """
    rounds = count(6, 200)
    held: dict[str, set[tuple[int, str, int]]] = {"client-0": set(), "client-1": set()}
    leased: dict[str, list[int]] = {client: [] for client in held}

    def greet(hello: Hello) -> Hello:
        return replace(hello, devices=8, tokens_per_second=1e12) if hello.name == "client-1" else hello

    def hook(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
        rows = {(part.epoch, part.shard, row) for part in asked.lease for row in range(part.start, part.stop)}
        leased[asked.client].append(len(rows - held[asked.client]))
        held[asked.client] = rows
        local, report = fit(arrays, asked)
        if asked.client != "client-1":
            return local, report
        steps = max(report.steps, min(asked.max_steps, len(rows) * 30 // asked.batch_tokens))
        end = to_the_end_of_its_lease(asked)
        return local, replace(report, steps=steps, tokens=steps * asked.batch_tokens, seconds=steps * 1e-6, data=end)

    options: dict[str, Any] = {"clients": 2, "rounds": rounds, "round_steps": "null", "round_seconds": 0.05}
    options["model.recipe.num_steps"] = 10**6  # all the rounds: what is claimed meanwhile is to be seen
    config = federation(tiny_corpus, tmp_path, "run", save_every=0, eval_every=10**6, **options)
    loop, _ = train(config, hook=hook, greet=greet)
    assert loop.state.clock.round == rounds and loop.state.speeds.rounds["client-0"] == rounds
    honest = loop.state.speeds.tokens["client-0"]
    assert loop.state.clock.tokens <= (1 + 8 * 8) * honest
    epoch = 160 + SPARE_ROWS["best_fit"] * MAX_MARGIN
    assert all(0 < max(rows) <= epoch for rows in leased.values()), "all of the text once, and rows read ahead"


# --- text that only a site has


def shards(number: int, rows: int, text_bytes: int) -> tuple[SiteShard, ...]:
    return tuple(SiteShard(f"s{n:05d}", rows, text_bytes, "f" * 64) for n in range(number))


@pytest.mark.parametrize(
    "told", [shards(1, 8, 8), shards(4096, 8, 8), (SiteShard("a", 8, 9, "f"), *shards(4095, 1, 1))], ids=len
)
def test_a_lease_of_next_to_no_text_is_short_and_quick(told: tuple[SiteShard, ...]) -> None:
    ledger = LocalLedger(8)
    ledger.admit("site", told)
    started = time.process_time()
    for _ in range(3):
        lease = ledger.of("site").lease("site", 20 * 524_288, spare_rows=160)
    assert 0 < len(lease) <= 1024 and time.process_time() - started < 10


# --- honest sites that differ


@pytest.mark.parametrize("merge", ["mean", "trimmed_mean"])
def test_honest_sites_of_unlike_speed_and_habit_are_merged_whole(
    merge: str, tiny_corpus: Path, tmp_path: Path, count: Callable[[int, int], int]
) -> None:
    """Seven steps, one step, a late joiner and one who misses most rounds, from the first step of a run to the rate's end."""
    rounds = count(8, 60)
    away = {"client-2": range(1, 4), "client-3": range(3, rounds - 1)}

    def hook(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
        if asked.round in away.get(asked.client, ()):
            raise OSError("it is not there")
        return fit(arrays, replace(asked, max_steps=1) if asked.client == "client-1" else asked)

    options: dict[str, Any] = {"clients": 4, "rounds": rounds, "round_steps": 7, "merge": merge, "save_every": 0}
    options |= {"on_large_norm": "reject", "eval_every": 10**6, "model.recipe.num_steps": 3 * 7 * rounds}
    config = federation(tiny_corpus, tmp_path, "run", **options)
    loop, _ = train(config, hook=hook, answered=deque(maxlen=0))
    assert refusals(loop) == {client: {"failed": len(missed)} for client, missed in away.items()}
    assert loop.state.speeds.rounds == {
        f"client-{n}": loop.state.clock.round - len(away.get(f"client-{n}", ())) for n in range(4)
    }
