from __future__ import annotations

import itertools
import logging
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanofed.errors import ConfigError, DataError, NanofedError
from nanofed.federated.runtimes.in_process import InProcessGrid
from nanofed.federated.server.policy import ONE_MACHINE, SITES
from nanofed.federated.site.client import client_app
from nanofed.federated.wire.codec import Arrays, hash_arrays
from nanofed.federated.wire.messages import Instructions, Report
from nanofed.training.checkpoint.folder import checkpoints
from nanofed.training.checkpoint.format import find_checkpoint, read_manifest, read_weights
from nanofed.training.loop import Stopwatch
from tests.federated.tiny import Fit, Site, federation, prepare, same_bits, train
from tests.support import BATCH

FEDAVG = {"outer_lr": 1, "outer_momentum": 0}
Hook = Callable[[Fit, Sequence[Any], Instructions], tuple[Arrays, Report]]


def failing(when: Callable[[Instructions], bool], *, after_training: bool = False) -> Hook:
    def hook(fit: Fit, arrays: Sequence[Any], instructions: Instructions) -> tuple[Arrays, Report]:
        answer = fit(arrays, instructions) if after_training or not when(instructions) else None
        if answer is None or when(instructions):
            raise OSError("the disk is gone")
        return answer

    return hook


@pytest.mark.slow
def test_two_runs_of_one_seed_end_in_the_same_bits(tiny_corpus: Path, tmp_path: Path) -> None:
    options = {"clients": 3, "rounds": 5, "availability": 0.7, "weighting": "tokens"}
    one, _ = train(federation(tiny_corpus, tmp_path, "one", **options))
    two, _ = train(federation(tiny_corpus, tmp_path, "two", **options))
    other, _ = train(federation(tiny_corpus, tmp_path, "other", seed_everything=7, **options))
    assert same_bits(one, two) and not same_bits(one, other)
    bpb = [point.bpb for point in one.metrics.summary.curve]
    assert bpb[-1] < bpb[0]


def test_a_client_that_always_fails_is_named_and_the_others_go_on(tiny_corpus: Path, tmp_path: Path) -> None:
    broken = failing(lambda asked: asked.client == "client-1")
    loop, site = train(federation(tiny_corpus, tmp_path, "run", rounds=3), hook=broken)
    assert [report.client for _, report in site.answered] == ["client-0"] * 3
    assert loop.metrics.summary.tokens == 3 * BATCH, "only what was merged counts"
    assert "OSError: the disk is gone" in loop.clients.refused["client-1"] and "client-0" not in loop.clients.refused
    assert loop.state.ledger.clients() == ("client-0",), "its rows came back"


def test_a_client_that_sends_nan_is_refused_and_may_come_back(tiny_corpus: Path, tmp_path: Path) -> None:
    def hook(fit: Fit, arrays: Sequence[Any], instructions: Instructions) -> tuple[Arrays, Report]:
        local, report = fit(arrays, instructions)
        if (instructions.client, instructions.round) == ("client-1", 2):
            local[0] = np.full_like(local[0], np.nan)
            report = replace(report, payload_hash=hash_arrays(local))
        return local, report

    loop, site = train(federation(tiny_corpus, tmp_path, "run", rounds=3), hook=hook)
    assert all(np.isfinite(array).all() for array in loop.state.weights.values())
    assert loop.state.events.total() == 1
    assert loop.metrics.summary.tokens == 5 * BATCH
    assert "client-1" not in loop.clients.refused, "it did well in the third round"
    first, second, third = [asked for asked in site.asked if asked.client == "client-1"]
    assert first.data is None and second.data is not None and third.data == second.data
    kept = {(part.epoch, part.shard, row) for part in second.lease for row in range(part.start, part.stop)}
    again = {(part.epoch, part.shard, row) for part in third.lease for row in range(part.start, part.stop)}
    assert kept & again, "it goes on where it stood"


@pytest.mark.slow
@pytest.mark.parametrize(("after_training", "down_codec"), [(False, "fp32"), (True, "fp32"), (True, "int4")])
def test_a_round_that_fails_leaves_no_trace(
    tiny_corpus: Path, tmp_path: Path, after_training: bool, down_codec: str
) -> None:
    """Also not in the momentum that the clients keep, nor in the rows: the next try trains what this one would have."""
    tries: dict[tuple[str, int], int] = defaultdict(int)

    def when(asked: Instructions) -> bool:
        return asked.round == 1 and tries[asked.client, asked.round] <= 2

    inner = failing(when, after_training=after_training)

    def hook(fit: Fit, arrays: Sequence[Any], instructions: Instructions) -> tuple[Arrays, Report]:
        tries[instructions.client, instructions.round] += 1
        return inner(fit, arrays, instructions)

    options = {"rounds": 3, "round_steps": 2, "down_codec": down_codec}
    clean, _ = train(federation(tiny_corpus, tmp_path, "clean", **options))
    tried, site = train(federation(tiny_corpus, tmp_path, "tried", **options), hook=hook)
    assert len(site.asked) == 2 * (3 + 2) and same_bits(clean, tried)


def test_a_failure_in_mid_training_does_not_poison_what_the_client_keeps(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The momentum is changed in place by a round; if that ends in an error, the one before is taken from disk."""
    from nanofed.training.module import GPTModule

    original, state = GPTModule.training_step, {"left": -1}

    def step(self: GPTModule, batch: Any, batch_idx: int = 0) -> Any:
        state["left"] -= 1
        if state["left"] == 0:
            raise OSError("a row group cannot be read")  # in mid-accumulation: gradients are left behind
        return original(self, batch, batch_idx)

    monkeypatch.setattr(GPTModule, "training_step", step)
    trouble = [True]

    def hook(fit: Fit, arrays: Sequence[Any], instructions: Instructions) -> tuple[Arrays, Report]:
        if instructions.round == 2 and trouble:
            trouble.clear()
            state["left"] = 4  # after one whole step of two micro-batches, and half of the next
        return fit(arrays, instructions)

    config = federation(tiny_corpus, tmp_path, "run", clients=1, rounds=2, round_steps=3)
    _, site = train(config, hook=hook)
    assert len(site.asked) == 3 and len(site.answered) == 2
    last = site.asked[-1]

    # A fresh trainer that has the files of round 1 only does the same round: bit for bit.
    (folder,) = (config.folder / "clients" / "client-0").iterdir()
    (folder / "round_00000002.pt").unlink()
    fresh = config.trainer()
    weights = read_weights(config.folder / "checkpoints" / "round_00000001")
    arrays = [weights[name].numpy() for name in fresh._parameters]
    local, report = fresh.fit(arrays, last)
    assert report.loss_first == site.answered[-1][1].loss_first
    for ours, theirs in zip(local, site.answered[-1][0], strict=True):
        assert (ours == theirs).all()


def test_a_duplicate_name_takes_no_part(tiny_corpus: Path, tmp_path: Path) -> None:
    _, site = train(federation(tiny_corpus, tmp_path, "run"), names=["client-0", "client-0", "client-1"])
    assert sorted((asked.round, asked.client) for asked in site.asked) == [
        *[(1, "client-0"), (1, "client-1"), (2, "client-0"), (2, "client-1")]
    ]


def test_a_run_that_nobody_may_join_ends_with_the_reason(tiny_corpus: Path, tmp_path: Path) -> None:
    config = federation(tiny_corpus, tmp_path, "run", grace_seconds=0.05, round_seconds=0.05)
    with pytest.raises(NanofedError, match=r"client-0: code x there"):
        train(config, greet=lambda hello: replace(hello, code="x"))


def test_empty_rounds_change_nothing(tiny_corpus: Path, tmp_path: Path) -> None:
    config = federation(tiny_corpus, tmp_path, "run", rounds=20, availability=0.5, seed_everything=3)
    loop, site = train(config)
    by_round = defaultdict(list)
    for asked in site.asked:
        by_round[asked.round].append(asked)
    empty = set(range(1, 21)) - set(by_round)
    assert 1 <= len(empty) <= 12 and any(len(asked) == 1 for asked in by_round.values())
    assert any(number in empty for number in range(2, 19) if number + 1 in by_round)
    held, tokens, steps = None, 0, 0
    for number in sorted(by_round):
        for asked in by_round[number]:
            assert held is None or asked.base_hash == held, f"the model changed before round {number}"
            assert (asked.clock_tokens, asked.clock_step) == (tokens, steps)
            assert asked.participants == len(by_round[number])
        saved = read_weights(config.folder / "checkpoints" / f"round_{number:08d}")
        held = hash_arrays([saved[name].numpy() for name in loop.state.weights])
        tokens, steps = tokens + BATCH * len(by_round[number]), steps + 1
    assert loop.metrics.summary.tokens == tokens == BATCH * len(site.asked)
    assert loop.metrics.summary.curve[-1].step == 20, "the end is evaluated, were it an empty round"
    assert hash_arrays(list(loop.state.weights.values())) == held


def test_when_all_fail_the_run_ends_and_the_last_checkpoint_stays(tiny_corpus: Path, tmp_path: Path) -> None:
    config = federation(tiny_corpus, tmp_path, "run", rounds=9, max_failed_rounds=3)
    loop, site = prepare(config, hook=failing(lambda asked: asked.round > 2))
    with pytest.raises(NanofedError, match=r"3 rounds in a row .*client-0: .*the disk is gone"):
        loop.train()
    loop.metrics.close()
    assert len(site.asked) == 2 * (2 + 3)
    last = find_checkpoint(config.folder)
    assert last.name == "round_00000002" and read_manifest(last).tokens == 4 * BATCH
    for name, tensor in read_weights(last).items():
        assert (loop.state.weights[name] == tensor.numpy()).all()


def test_failures_end_a_run_also_where_rounds_are_empty_in_between(tiny_corpus: Path, tmp_path: Path) -> None:
    config = federation(tiny_corpus, tmp_path, "run", rounds=100, availability=0.4, max_failed_rounds=4)
    with pytest.raises(NanofedError, match="4 rounds in a row"):
        train(config, hook=failing(lambda asked: True))


def test_another_client_gets_its_chance_after_one_failed(tiny_corpus: Path, tmp_path: Path) -> None:
    broken = failing(lambda asked: asked.client == "client-1")
    config = federation(tiny_corpus, tmp_path, "run", rounds=8, availability=0.5, max_failed_rounds=6)
    loop, site = train(config, hook=broken)
    alone = {asked.round for asked in site.asked if asked.client == "client-1" and asked.participants == 1}
    assert alone, "client-1 was alone in some round: it failed, and the draw was made anew"
    assert loop.metrics.summary.tokens == BATCH * sum(report.client == "client-0" for _, report in site.answered) > 0


def test_a_global_batch_is_split_over_the_clients(
    tiny_corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = federation(tiny_corpus, tmp_path, "run", global_batch_tokens=2 * BATCH, round_steps=2)
    loop, site = train(config)
    assert {asked.batch_tokens for asked in site.asked} == {BATCH}
    assert loop.metrics.summary.tokens == 2 * 2 * 2 * BATCH
    assert caplog.text.count("clients take turns on this machine") == 1
    half = federation(tiny_corpus, tmp_path, "half", global_batch_tokens=BATCH, round_steps=2)
    loop, site = train(half)
    assert {asked.batch_tokens for asked in site.asked} == {BATCH // 2} and loop.metrics.summary.tokens == 4 * BATCH


@pytest.mark.parametrize(("steps", "round_steps", "last"), [(10, 3, 2), (8, 2, 2), (2, 5, 1)])
def test_the_horizon_is_met_exactly(tiny_corpus: Path, tmp_path: Path, steps: int, round_steps: int, last: int) -> None:
    options: dict[str, Any] = {"rounds": 99, "round_steps": round_steps, "model.recipe.num_steps": steps}
    loop, site = train(federation(tiny_corpus, tmp_path, "run", **options))
    assert loop.metrics.summary.tokens == steps * BATCH == site.asked[0].horizon_tokens
    assert site.asked[-1].max_steps == last
    assert loop.metrics.summary.curve[-1].tokens == steps * BATCH


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packing", "more"),
    [
        ("contiguous", {"up_codec": "int4", "down_codec": "int8", "outer": "adam"}),
        ("best_fit", {"outer": "nesterov"}),
    ],
)
def test_a_killed_server_resumes_to_the_same_bits(
    tiny_corpus: Path, tmp_path: Path, packing: str, more: dict[str, str]
) -> None:
    """Server and clients lose all they had in memory, in mid-round: one client has trained it, the other has not."""
    options = {"rounds": 4, "round_steps": 2, "data.packing": packing, "keep_checkpoints": 2, **more}
    whole, _ = train(federation(tiny_corpus, tmp_path, "whole", **options))

    def power_cut(fit: Fit, arrays: Sequence[Any], instructions: Instructions) -> tuple[Arrays, Report]:
        if (instructions.round, instructions.client) == (3, "client-1"):
            raise KeyboardInterrupt
        return fit(arrays, instructions)

    with pytest.raises(KeyboardInterrupt):
        train(federation(tiny_corpus, tmp_path, "cut", **options), hook=power_cut)
    folder = tmp_path / "cut"
    assert [path.name for path in checkpoints(folder)] == ["round_00000001", "round_00000002"]
    resumed, site = train(federation(tiny_corpus, tmp_path, "cut", ckpt_path="last", **options))
    assert [asked.round for asked in site.asked] == [3, 3, 4, 4]
    assert same_bits(whole, resumed)
    assert resumed.state.ledger.state_dict() == whole.state.ledger.state_dict()
    assert [p.tokens for p in resumed.metrics.summary.curve] == [p.tokens for p in whole.metrics.summary.curve]
    assert resumed.metrics.summary.curve[-1].bpb == whole.metrics.summary.curve[-1].bpb


@pytest.mark.slow
def test_a_server_that_dies_before_it_has_saved_a_round_trains_it_again(tiny_corpus: Path, tmp_path: Path) -> None:
    """Its clients have trained that round and, all but one of them, the next: they go back to before both."""
    options = {"rounds": 5, "round_steps": 2, "up_codec": "int4"}
    whole, _ = train(federation(tiny_corpus, tmp_path, "whole", **options))
    config = federation(tiny_corpus, tmp_path, "cut", **options)

    def power_cut(fit: Fit, arrays: Sequence[Any], instructions: Instructions) -> tuple[Arrays, Report]:
        if instructions.round == 3:
            loop._save = lambda *, last=False: None  # type: ignore[method-assign]  # the process is killed before it can
        if (instructions.round, instructions.client) == (4, "client-1"):
            raise KeyboardInterrupt
        return fit(arrays, instructions)

    loop, _ = prepare(config, hook=power_cut)
    with pytest.raises(KeyboardInterrupt):
        loop.train()
    loop.metrics.close()
    assert checkpoints(config.folder)[-1].name == "round_00000002"
    resumed, site = train(federation(tiny_corpus, tmp_path, "cut", ckpt_path="last", **options))
    assert [asked.round for asked in site.asked] == [3, 3, 4, 4, 5, 5]
    assert same_bits(whole, resumed)


def test_a_stop_between_two_rounds_saves_the_last_one(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = federation(tiny_corpus, tmp_path, "run", rounds=9)
    loop, _ = prepare(config)
    wait = loop.clients.wait

    def stopped(number: int, meanwhile: Callable[[str], None]) -> dict[str, int]:
        if number == 3:
            raise SystemExit(143)
        return wait(number, meanwhile)

    monkeypatch.setattr(loop.clients, "wait", stopped)
    with pytest.raises(SystemExit):
        loop.train()
    loop.metrics.close()
    assert find_checkpoint(config.folder).name == "round_00000002"


def test_a_checkpoint_is_written_once(tiny_corpus: Path, tmp_path: Path) -> None:
    """A signal may come between its end and the note of it."""
    config = federation(tiny_corpus, tmp_path, "run", rounds=2)
    loop, _ = train(config)
    loop._save_later()
    assert loop._due is not None
    for _ in range(2):
        loop._due[1]()
    assert len(list((config.folder / "checkpoints" / "superseded").iterdir())) == 1, "of the end of the run"


def test_the_first_rounds_can_be_shorter(tiny_corpus: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rounds": 99, "clients": 1, "model.recipe.num_steps": 12}
    config = federation(tiny_corpus, tmp_path, "run", round_steps="[[0.25, 1], [1.0, 4]]", **options)
    _, site = train(config)
    assert [asked.max_steps for asked in site.asked] == [1, 1, 1, 4, 4, 1]
    one = federation(
        tiny_corpus, tmp_path, "one", round_seconds="[[0.5, 0.001], [1.0, 600]]", round_steps="null", **options
    )
    _, site = train(one)
    assert [asked.seconds for asked in site.asked] == [0.001] * 6 + [600]
    assert [asked.max_steps for asked in site.asked][-1] == 6


@pytest.mark.parametrize("lengths", ["[[0.5, 2]]", "[[1.0, 2], [0.5, 3]]", "[[0.5, 2], [1.0, 0]]", "[[0, 1], [1, 2]]"])
def test_lengths_of_rounds_that_make_no_sense(tiny_corpus: Path, tmp_path: Path, lengths: str) -> None:
    with pytest.raises(ConfigError, match=r"federation\.round_steps"):
        _ = federation(tiny_corpus, tmp_path, "run", round_steps=lengths).federation


def test_a_damaged_checkpoint_is_skipped(tiny_corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = federation(tiny_corpus, tmp_path, "run", rounds=2)
    train(config)
    weights = find_checkpoint(config.folder) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    _, site = train(federation(tiny_corpus, tmp_path, "run", rounds=3, ckpt_path="last"))
    assert [asked.round for asked in site.asked] == [2, 2, 3, 3]
    assert "round_00000002/model.safetensors is not what was saved" in caplog.text
    assert [path.name for path in checkpoints(config.folder)][-2:] == ["round_00000002", "round_00000003"]
    for path in checkpoints(config.folder):
        read_manifest(path)


@pytest.mark.parametrize("weighting", ["uniform", "tokens"])
def test_rounds_of_seconds_on_clients_of_two_speeds(
    tiny_corpus: Path, tmp_path: Path, weighting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the speed is half the steps; the mean weighs clients alike, or by the tokens they trained."""
    ticks = itertools.count()  # every look at the clock is a second later
    monkeypatch.setattr(
        "nanofed.federated.site.trainer.Stopwatch", lambda speed: Stopwatch(speed, lambda: float(next(ticks)))
    )
    options = {"rounds": 1, "round_seconds": 24, "round_steps": "null", "client_speeds": [1.0, 0.5], **FEDAVG}
    options["model.recipe.batch_tokens"] = BATCH // 2
    loop, site = train(federation(tiny_corpus, tmp_path, "run", weighting=weighting, **options))
    (fast, one), (slow, two) = site.answered
    assert one.steps > two.steps >= 1 and one.steps == pytest.approx(2 * two.steps, abs=4)
    assert one.tokens == one.steps * BATCH // 2 and two.tokens == two.steps * BATCH // 2
    assert 20 <= one.seconds <= 26 and 20 <= two.seconds <= 28
    shares = [float(one.tokens), float(two.tokens)] if weighting == "tokens" else [1.0, 1.0]
    for name, a, b in zip(loop.state.weights, fast, slow, strict=True):
        mean = np.average(np.stack([a, b]).astype(np.float64), axis=0, weights=shares)
        np.testing.assert_allclose(loop.state.weights[name], mean, rtol=1e-6, atol=1e-9)


def test_too_few_rows_for_the_streams_are_refused_at_the_start(tiny_corpus: Path, tmp_path: Path) -> None:
    config = federation(tiny_corpus, tmp_path, "run", **{"data.streams": 64})
    with pytest.raises(DataError, match=r"too few rows for 64 streams|lower data\.device_batch_size or data\.streams"):
        train(config)


def test_rates_follow_the_batches_of_those_who_are_there(
    tiny_corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server says how many take part and how far the run goes: a site needs to know neither."""
    more: dict[str, Any] = {"clients": 2, "rounds": 2, "round_steps": 1, "model.recipe.num_steps": 100_000}
    caplog.set_level("INFO", logger="nanofed.federated.server.rounds")
    train(federation(tiny_corpus, tmp_path, "both", **more))
    train(federation(tiny_corpus, tmp_path, "alone", **more | {"clients": 1}))
    said = [record.getMessage() for record in caplog.records if "learning rates x" in record.getMessage()]
    horizon = f"{100_000 * BATCH:,}"
    assert [f"steps of {2 * BATCH:,} tokens on {horizon}" in said[0], f"steps of {BATCH:,} tokens" in said[1]] == [
        True
    ] * 2
    assert len(said) == 2, "once a run, as long as nothing changes"


def test_sites_hear_once_which_part_of_their_seconds_they_train(
    tiny_corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nanofed")
    said = []

    def slowly(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
        time.sleep(0.3)
        return fit(arrays, asked)

    for name, policy in (("sites", SITES), ("here", ONE_MACHINE)):
        config = federation(tiny_corpus, tmp_path, name, clients=1, rounds=5)
        config.open()
        app = client_app(partial(lambda site, context: site, Site(config.trainer(), hook=slowly)))
        loop = config.loop(InProcessGrid(app, ["client-0"]), policy=policy)
        loop.train()
        loop.metrics.close()
        said.append([record.getMessage() for record in caplog.records if "sites trained" in record.getMessage()])
        caplog.clear()
    (told,), nothing = said
    assert nothing == []
    found = re.fullmatch(
        r"round   3  sites trained for (\d+)% of its (\S+) s; federation.round_seconds=(\d+) would .* 95%", told
    )
    assert found is not None, told
    share, seconds, length = int(found[1]) / 100, float(found[2]), int(found[3])
    assert seconds >= 0.3
    low, high = ((1 - share + n * 0.005) * (seconds + n * 0.05) / 0.05 for n in (-1, 1))  # as they are rounded
    assert math.ceil(low) <= length <= math.ceil(high)
