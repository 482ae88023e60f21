"""Clients that stay away, quorums that are not met, disks that are full: what the server's rounds do then."""

from __future__ import annotations

import logging
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nanofed.errors import NanofedError
from nanofed.federated.deploy.server import _open
from nanofed.federated.federation import Federation
from nanofed.federated.runtimes.in_process import InProcessGrid
from nanofed.federated.server.events import SERVER
from nanofed.federated.server.policy import SITES
from nanofed.federated.server.rounds import RoundLoop
from nanofed.federated.server.state import State
from nanofed.federated.site.client import client_app
from nanofed.federated.wire.codec import Arrays
from nanofed.federated.wire.messages import Instructions, Report
from nanofed.training.checkpoint.atomic import SaveError
from nanofed.training.checkpoint.folder import checkpoints
from nanofed.training.checkpoint.format import find_checkpoint, read_manifest
from nanofed.training.summary import Summary
from tests.faults.children import call, mount_disk
from tests.faults.hostile import play
from tests.federated.conftest import one_thread, tiny_corpus
from tests.federated.tiny import Fit, Site, federation, make_corpus
from tests.support import BATCH

logger = logging.getLogger(__name__)

__all__ = ["one_thread", "tiny_corpus"]  # the fixtures


@pytest.mark.parametrize("absent", [0.3, 0.5])
def test_clients_that_stay_away(
    absent: float,
    tiny_corpus: Path,
    tmp_path: Path,
    count: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """Ten clients with a quorum of 2: every round with a quorum commits, the others change nothing."""
    rounds = count(8, 200)
    options = {"clients": 10, "rounds": rounds, "quorum": 2, "save_every": 0, "model.recipe.num_steps": 100_000}
    loop, site, left = play(federation(tiny_corpus, tmp_path, "away", availability=1 - absent, **options))
    by_round = defaultdict(list)
    for asked in site.asked:
        by_round[asked.round].append(asked)
    assert all(len(asked) >= 2 for asked in by_round.values())
    assert left.events.get(SERVER, {}).get("quorum", 0) == rounds - len(by_round)
    tokens, bases = 0, []
    for _, asked_now in sorted(by_round.items()):
        (base,) = {asked.base_hash for asked in asked_now}
        assert {(asked.clock_tokens, asked.participants) for asked in asked_now} == {(tokens, len(asked_now))}
        tokens += BATCH * len(asked_now)
        bases.append(base)
    assert len(set(bases)) == len(bases) and loop.metrics.summary.tokens == tokens
    share = statistics.fmean(len(asked) for asked in by_round.values()) / 10
    assert share == pytest.approx(1 - absent, abs=0.2 if rounds < 100 else 0.05)
    if rounds < 100:
        return
    whole, _, _ = play(federation(tiny_corpus, tmp_path, "whole", **options))
    bpb, all_there = loop.metrics.summary.bpb_end or 0.0, whole.metrics.summary.bpb_end or 0.0
    cost = f"{absent:.0%} of 10 clients absent, {rounds} rounds: {bpb:.4f} bits per byte, with all {all_there:.4f}"
    record_property("cost", cost)


def test_a_round_below_its_quorum_changes_nothing(tiny_corpus: Path, tmp_path: Path) -> None:
    """Too few are there, or enough are there and too few of them answer well: weights, momentum, ledger and clock stay."""
    options = {"clients": 3, "rounds": 12, "quorum": 2, "availability": 0.6, "seed_everything": 5}
    config = federation(tiny_corpus, tmp_path, "run", **options)
    states: list[tuple[int, dict[str, Any]]] = []
    loops: list[RoundLoop] = []

    def hook(fit: Fit, arrays: Sequence[Any], asked: Instructions) -> tuple[Arrays, Report]:
        if asked.round % 3 == 0 and asked.client != "client-0" and tries[asked.round] < 2:
            tries[asked.round] += 1
            raise OSError("the disk is gone")
        return fit(arrays, asked)

    tries: dict[int, int] = defaultdict(int)
    real = RoundLoop._round

    def watched(self: RoundLoop, number: int, attempt: int) -> bool | None:
        before = _snapshot(self)
        outcome = real(self, number, attempt)
        after = _snapshot(self)
        changed = {key for key in before if before[key] != after[key]}
        states.append((number, {"outcome": outcome, "changed": changed}))
        loops.append(self)
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoundLoop, "_round", watched)
        _, _, left = play(config, hook=hook)
    merged = [seen for _, seen in states if seen["outcome"]]
    failed = [seen for _, seen in states if seen["outcome"] is False]
    empty = [seen for _, seen in states if seen["outcome"] is None]
    assert merged and failed and empty
    assert all(seen["changed"] == {"weights", "outer", "rows", "tokens", "round"} for seen in merged)
    assert all(seen["changed"] == set() for seen in failed)
    assert all(seen["changed"] == {"round"} for seen in empty)
    assert left.events[SERVER]["quorum"] == len(empty)


def _snapshot(loop: RoundLoop) -> dict[str, Any]:
    state = loop.state
    return {
        "weights": [array.tobytes() for array in state.weights.values()],
        "outer": {name: tensor.numpy().tobytes() for name, tensor in state.outer.state_dict().items()},
        "rows": state.ledger.merged_rows(),
        "tokens": (state.clock.tokens, state.clock.step),
        "round": state.clock.round,
    }


def _loop(config: Federation) -> RoundLoop:
    site = Site(config.trainer())
    names = [f"client-{n}" for n in range(config.federation.clients)]
    return config.loop(InProcessGrid(client_app(lambda context: site), names))


def _serve_on_a_small_disk(corpus: Path, change: str) -> None:
    """Only the checkpoints are on that disk: what is written of figures and clients' states has room."""
    torch.set_num_threads(1)
    make_corpus(corpus)
    options: dict[str, Any] = {"rounds": 4, "save_every": 1, "keep_checkpoints": 2, "eval_every": 1}
    whole, _, _ = play(federation(corpus, corpus, "whole", **options))
    one = sum(p.stat().st_size for p in find_checkpoint(corpus / "whole").rglob("*") if p.is_file())
    config = federation(corpus, corpus, "run", **options)
    disk = config.open() / "checkpoints"
    disk.mkdir()
    size = str((3 << 20) + one * 4)
    mount_disk(disk, size)
    loop, ballast = _loop(config), disk / "ballast"
    real = loop._round

    def losing_the_disk(number: int, attempt: int) -> bool | None:  # in it, the round before is saved
        if number == 3 and change == "full":
            with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 16))
        elif number == 3:
            mount_disk(disk, size, "ro")
        return real(number, attempt)

    loop._round = losing_the_disk  # type: ignore[method-assign]
    with pytest.raises(SaveError):
        loop.train()  # the last checkpoint has to be there
    loop.metrics.close()
    assert loop.state.clock.round == 4, "the run went on"
    lost = loop.state.events.last("disk", SERVER)
    assert lost is not None and lost.count == 2 and lost.round == 3, "and of the last round the error itself tells"
    assert [path.name for path in checkpoints(config.folder)] == ["round_00000001"]
    read_manifest(find_checkpoint(config.folder))
    for name, array in loop.state.weights.items():
        assert array.tobytes() == whole.state.weights[name].tobytes()
    if change == "full":
        ballast.unlink()
    else:
        mount_disk(disk, size, "larger")
    resumed = _loop(federation(corpus, corpus, "run", ckpt_path="last", **options))
    assert resumed.state.clock.round == 1
    resumed.train()
    resumed.metrics.close()
    assert find_checkpoint(config.folder).name == "round_00000004"
    assert read_manifest(find_checkpoint(config.folder)).tokens == whole.state.clock.tokens
    assert [point.step for point in Summary.read(config.folder).curve] == [0, 1, 2, 3, 4]


def test_a_run_that_went_back_stays_there_though_it_dies_before_it_saves(tiny_corpus: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rounds": 3, "save_every": 1}
    whole, _, _ = play(federation(tiny_corpus, tmp_path, "run", **options))
    run = tmp_path / "run"
    first = run / "checkpoints" / "round_00000001"
    loop = _loop(federation(tiny_corpus, tmp_path, "run", ckpt_path=str(first), **options))

    def dying() -> None:
        assert Summary.read(run).ended is None, "it says that it has ended while it goes on"
        raise KeyboardInterrupt

    loop._rounds = dying  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        loop.train()
    loop.metrics.close()
    assert checkpoints(run) == [first]
    again = _loop(federation(tiny_corpus, tmp_path, "run", ckpt_path="last", **options))
    again.train()
    again.metrics.close()
    for name, array in again.state.weights.items():
        assert array.tobytes() == whole.state.weights[name].tobytes()


def test_a_last_round_that_cannot_be_measured_is_not_lost(tiny_corpus: Path, tmp_path: Path) -> None:
    loop = _loop(federation(tiny_corpus, tmp_path, "run", rounds=2, save_every=0))
    start = loop._evaluator.start

    def failing(state: State, *, last: bool = False) -> None:
        if last:
            raise NanofedError("the validation shard is gone")
        start(state, last=last)

    loop._evaluator.start = failing  # type: ignore[method-assign]
    with pytest.raises(NanofedError, match="the validation shard is gone"):
        loop.train()
    loop.metrics.close()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["round_00000002"]


def test_nobody_pauses_for_longer_than_a_minute() -> None:
    assert [SITES.pause(failed) for failed in (0, 1, 3, 6, 1024, 10**6)] == [0, 2, 8, 60, 60, 60]


def test_a_server_goes_back_to_the_checkpoint_that_it_is_given(tiny_corpus: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rounds": 3, "save_every": 1}
    play(federation(tiny_corpus, tmp_path, "run", **options))
    saved = checkpoints(tmp_path / "run")
    started = federation(tiny_corpus, tmp_path, "run", **options)
    _open(started)
    assert started.config.ckpt_path == "last" and checkpoints(tmp_path / "run") == saved
    back = federation(tiny_corpus, tmp_path, "run", ckpt_path=str(saved[0]), **options)
    _open(back)
    assert back.config.ckpt_path == "last" and checkpoints(tmp_path / "run") == saved[:1]
    play(federation(tiny_corpus, tmp_path, "run", ckpt_path="last", **options))
    went_on = checkpoints(tmp_path / "run")
    assert [path.name for path in went_on] == [path.name for path in saved]
    restarted = federation(tiny_corpus, tmp_path, "run", ckpt_path=str(saved[0]), **options)  # with the same arguments
    _open(restarted)
    assert restarted.config.ckpt_path == "last" and checkpoints(tmp_path / "run") == went_on
    other = tmp_path / "other"
    shutil.copytree(saved[0], other)
    begun = federation(tiny_corpus, tmp_path, "run", ckpt_path=str(other), **options)  # where it once began
    _open(begun)
    assert begun.config.ckpt_path == "last" and checkpoints(tmp_path / "run") == went_on


@pytest.mark.parametrize("change", ["full", "ro"])
def test_a_server_on_a_full_or_read_only_disk_goes_on_and_fails_at_its_end(change: str, tmp_path: Path) -> None:
    call(_serve_on_a_small_disk, tmp_path, change)
