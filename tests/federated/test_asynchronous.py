"""Clients of several speeds whose updates are merged when they come, in process and on a virtual clock."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from nanofed.errors import ConfigError, NanofedError
from nanofed.federated.aggregation.outer import damping
from nanofed.federated.wire.codec import Arrays, hash_arrays
from nanofed.federated.wire.messages import Instructions, Report
from nanofed.training.summary import AT_HORIZON
from tests.federated.tiny import Fit, Site, federation, prepare, same_bits, train
from tests.support import BATCH

SPEEDS: dict[str, Any] = {"asynchronous": True, "clients": 4, "client_speeds": [7, 5, 3, 1]}


def merged_order(site: Site) -> str:
    return "".join(asked.client[-1] for asked in site.asked)


def test_whoever_is_ready_is_merged_and_goes_on_from_the_newest_weights(tiny_corpus: Path, tmp_path: Path) -> None:
    """Client i is ready at each multiple of 1 / 7, 1 / 5, 1 / 3 and 1, whatever the others do."""
    loop, site = train(federation(tiny_corpus, tmp_path, "run", rounds=16, **SPEEDS))
    assert merged_order(site)[:12] == "010210012010"
    assert [merged_order(site).count(client) for client in "0123"] == [7, 5, 3, 1]
    sent: dict[str, int] = defaultdict(lambda: 1)
    for merge, asked in enumerate(site.asked, start=1):
        assert asked.round == sent[asked.client], "it was sent the weights after its own last merge"
        assert (asked.clock_tokens, asked.participants) == ((asked.round - 1) * BATCH, 4)
        sent[asked.client] = merge + 1
    assert (loop.state.clock.tokens, loop.state.clock.step) == (16 * BATCH, 4)
    assert loop.metrics.summary.curve[-1].step == 16


def test_each_update_is_read_against_the_weights_that_its_client_was_sent(tiny_corpus: Path, tmp_path: Path) -> None:
    """With plain averaging the end is the start, and of every update a fourth, damped by its age."""
    moves: list[tuple[int, list[np.ndarray[Any, Any]]]] = []

    def moved(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
        _, report = fit(arrays, asked)
        random = np.random.default_rng(zlib.crc32(f"{asked.client} {asked.round}".encode()))
        moves.append((asked.round, [random.normal(size=array.shape).astype(np.float32) for array in arrays]))
        local = [array + move for array, move in zip(arrays, moves[-1][1], strict=True)]
        return local, replace(report, payload_hash=hash_arrays(local))

    config = federation(tiny_corpus, tmp_path, "run", rounds=16, outer="fedavg", max_norm_ratio="null", **SPEEDS)
    loop, _ = prepare(config, hook=moved)
    expected = [array.astype(np.float64) for array in loop.state.weights.values()]
    loop.train()
    loop.metrics.close()
    ages = [merge - sent for merge, (sent, _) in enumerate(moves, start=1)]
    assert max(ages) >= 12, "the slowest is late"
    for age, (_, move) in zip(ages, moves, strict=True):
        for total, change in zip(expected, move, strict=True):
            total += damping(age, 4) / 4 * change.astype(np.float64)
    for total, array in zip(expected, loop.state.weights.values(), strict=True):
        np.testing.assert_allclose(array, total, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("codecs", [{}, {"down_codec": "bf16", "up_codec": "int4"}])
def test_two_runs_of_one_seed_end_in_the_same_bits(tiny_corpus: Path, tmp_path: Path, codecs: dict[str, str]) -> None:
    options = {"rounds": 12, "sharding": "full", **SPEEDS, **codecs}
    one, _ = train(federation(tiny_corpus, tmp_path, "one", **options))
    two, _ = train(federation(tiny_corpus, tmp_path, "two", **options))
    assert same_bits(one, two)
    bpb = [point.bpb for point in one.metrics.summary.curve]
    assert bpb[-1] < bpb[0]


def test_it_ends_at_the_horizon_though_others_still_train(tiny_corpus: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rounds": "null", "round_steps": 4, "model.recipe.num_steps": 40, **SPEEDS}
    loop, site = train(federation(tiny_corpus, tmp_path, "run", **options))
    assert 40 * BATCH <= loop.state.clock.tokens < 44 * BATCH
    assert site.asked[0].max_steps == 4 and site.asked[-1].max_steps < 4, "the last ones train less"
    assert loop.metrics.summary.ended == AT_HORIZON


def test_a_client_that_fails_is_asked_again_and_holds_up_nobody(tiny_corpus: Path, tmp_path: Path) -> None:
    def broken(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
        local, report = fit(arrays, asked)
        if asked.client == "client-1":
            local[0] = np.full_like(local[0], np.nan)
            report = replace(report, payload_hash=hash_arrays(local))
        return local, report

    loop, site = train(federation(tiny_corpus, tmp_path, "run", rounds=8, **SPEEDS), hook=broken)
    assert merged_order(site).count("1") >= 3
    assert loop.state.events.total("not_finite", client="client-1") == merged_order(site).count("1")
    assert loop.state.clock.tokens == 8 * BATCH and "client-1" not in loop.state.speeds.rounds
    assert "client-1" not in loop.state.ledger.clients() or not loop.state.ledger.data("client-1")
    assert all(np.isfinite(array).all() for array in loop.state.weights.values())


def test_where_all_fail_the_run_ends_with_the_reason(tiny_corpus: Path, tmp_path: Path) -> None:
    def broken(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
        raise OSError("the disk is gone")

    with pytest.raises(NanofedError, match=r"2 rounds in a row .*the disk is gone"):
        train(federation(tiny_corpus, tmp_path, "run", rounds=8, max_failed_rounds=2, **SPEEDS), hook=broken)


def test_a_site_that_was_started_again_is_sent_another_message(tiny_corpus: Path, tmp_path: Path) -> None:
    """It is another node then, and nobody answers what the old one was sent."""
    loop, site = prepare(federation(tiny_corpus, tmp_path, "run", rounds=6, **SPEEDS))
    grid = cast(Any, loop._messenger._grid)

    def restarted(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
        if len(site.asked) == 2:
            grid._contexts[9], grid._speeds[9] = grid._contexts.pop(4), 20.0
            for lost in [name for name, message in grid._inbox.items() if message.metadata.dst_node_id == 4]:
                del grid._inbox[lost], grid._ready[lost]
        return fit(arrays, asked)

    site.hook = restarted
    loop.train()
    loop.metrics.close()
    assert loop.state.events.total("silent", client="client-3") == 1
    slowest = [asked.round for asked in site.asked if asked.client == "client-3"]
    assert slowest[0] == 3, "it was sent the weights after the second merge"


@pytest.mark.slow
def test_a_resumed_run_reads_on_and_merges_no_row_twice(tiny_corpus: Path, tmp_path: Path) -> None:
    train(federation(tiny_corpus, tmp_path, "run", rounds=6, **SPEEDS))
    loop, site = train(federation(tiny_corpus, tmp_path, "run", rounds=14, ckpt_path="last", **SPEEDS))
    assert site.asked[0].round == 7 and loop.state.clock.tokens == 14 * BATCH == sum(loop.state.speeds.tokens.values())
    fast = next(asked for asked in site.asked if asked.client == "client-0")
    assert fast.data is not None, "it goes on where it was merged"
    ledger = loop.state.ledger
    parts = [part for name in ledger.clients() for part in ledger.held(name)]
    held = [(part.epoch, part.shard, row) for part in parts for row in range(part.start, part.stop)]
    assert len(held) == len(set(held))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("merge", "median"),
        ("weighting", "tokens"),
        ("outer", "adam"),
        ("overlap", True),
        ("availability", 0.5),
        ("evaluation", "sites"),
        ("down_codec", "int8"),
    ],
)
def test_what_does_not_go_with_it_is_refused_at_the_start(
    tiny_corpus: Path, tmp_path: Path, option: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=rf"federation\.asynchronous=true .*federation\.{option}={value}"):
        _ = federation(tiny_corpus, tmp_path, "run", asynchronous=True, **{option: value}).federation
