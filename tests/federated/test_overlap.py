"""Steps that a site takes between two rounds: the first ones of the next round, or none of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning import Fabric

from nanofed.data.rows import RowRange
from nanofed.errors import ConfigError
from nanofed.federated.config import Arguments
from nanofed.federated.site.ranks import Turn
from nanofed.federated.site.trainer import FabricTrainer, _goes_on
from nanofed.training.loop import Stopwatch
from tests.federated.sites import Rounds, Trainer, initial_weights, same, tiny_args
from tests.federated.tiny import federation, prepare
from tests.support import BATCH


class Looks(Stopwatch):
    """Shows 0 so many times."""

    def __init__(self, times: int) -> None:
        self._times = times

    def elapsed(self) -> float:
        self._times -= 1
        return 0.0 if self._times >= 0 else 1.0


@pytest.fixture(scope="module")
def args(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_args(tiny_corpus, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def rounds(args: list[str], tiny_corpus: Path) -> Rounds:
    return Rounds(tiny_corpus, initial_weights(args))


def trainer(args: list[str], folder: Path) -> FabricTrainer:
    module, data = Arguments.from_args(args).build()
    return FabricTrainer(module, data, Fabric(accelerator="cpu", devices=1), folder)


def furthest(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


def test_where_nobody_else_trains_it_is_as_if_there_were_no_rounds(
    args: list[str], rounds: Rounds, tmp_path: Path
) -> None:
    """The weights that come are those that were sent: steps, rates, rows and momentum go on, rounding aside."""
    whole = rounds.copy()
    whole.merge(trainer(args, tmp_path / "whole").fit(whole.weights, whole.instructions(max_steps=9)))
    site = trainer(args, tmp_path / "site")
    for ahead in (0, 2, 1):
        answer = site.fit(rounds.weights, rounds.instructions(max_steps=3, overlap=True))
        rounds.merge(answer)
        assert (rounds.reports[-1].steps, rounds.reports[-1].ahead, rounds.reports[-1].tokens) == (3, ahead, 3 * BATCH)
        assert site.ahead_steps() == 2
        site.train_ahead(Looks({0: 2, 2: 1, 1: 1}[ahead]), Turn())
    assert rounds.data == whole.data
    assert furthest(rounds.weights, whole.weights) < 1e-6 < furthest(rounds.weights, initial_weights(args))


def test_what_others_have_changed_is_added_to_a_clients_own_steps(
    args: list[str], rounds: Rounds, tmp_path: Path
) -> None:
    site = trainer(args, tmp_path)
    rounds.merge(site.fit(rounds.weights, rounds.instructions(overlap=True)))
    before = [weight.copy() for weight in rounds.weights]
    site.train_ahead(Looks(1), Turn())
    assert site._ahead is not None
    own = [tensor.numpy().copy() for tensor in site._ahead.change.values()]
    rounds.weights = [np.add(weight, np.float32(0.25), dtype=np.float32) for weight in before]
    taken = site._take_ahead(rounds.instructions())
    site._ahead = taken
    local, report = site.fit(rounds.weights, rounds.instructions())
    assert report.ahead == 1 and report.steps == 2
    moved = [np.subtract(weight, base, dtype=np.float32) for weight, base in zip(local, rounds.weights, strict=True)]
    assert any(np.abs(step).max() > 0 for step in own)
    for step, both in zip(own, moved, strict=True):  # one step of its own and one more, of about that length
        assert np.linalg.norm(both) < 4 * np.linalg.norm(step) + 1e-6
        assert np.vdot(step, both) >= 0


@pytest.mark.parametrize(
    "change",
    ["refused", "lease", "batch", "short", "run"],
)
def test_steps_that_the_next_round_does_not_go_on_from_are_thrown_away(
    args: list[str], rounds: Rounds, tmp_path: Path, change: str
) -> None:
    """As if they had never been taken: weights, optimizer state and rows are those of a site that has waited."""
    waited, ahead = trainer(args, tmp_path / "waited"), trainer(args, tmp_path / "ahead")
    first = rounds.instructions(overlap=True)
    answers = [site.fit(rounds.weights, first) for site in (waited, ahead)]
    ahead.train_ahead(Looks(1), Turn())
    assert ahead._ahead is not None
    again = rounds.copy()
    rounds.merge(answers[0])
    asked = rounds.instructions()
    if change == "refused":  # the server did not take the round: it asks for it anew
        rounds, asked = again, again.instructions(nonce="d" * 32)
    elif change == "lease":
        asked = replace(asked, lease=asked.lease[:2])
    elif change == "batch":
        asked = replace(asked, batch_tokens=BATCH // 2)
    elif change == "short":
        asked = replace(asked, max_steps=1)
    else:
        asked = replace(asked, run="f" * 32)
    one, two = (site.fit(rounds.weights, asked) for site in (waited, ahead))
    assert same(one[0], two[0]) and one[1].data == two[1].data and two[1].ahead == 0


def test_an_evaluation_in_between_changes_nothing(args: list[str], rounds: Rounds, tmp_path: Path) -> None:
    sites = [trainer(args, tmp_path / name) for name in ("one", "two")]
    first = rounds.instructions(overlap=True)
    answers = [site.fit(rounds.weights, first) for site in sites]
    for site in sites:
        site.train_ahead(Looks(1), Turn())
    rounds.merge(answers[0])
    sites[1].evaluate(rounds.weights, rounds.evaluate())
    one, two = (site.fit(rounds.weights, rounds.instructions()) for site in sites)
    assert same(one[0], two[0]) and one[1].ahead == two[1].ahead == 1


def test_weights_that_were_evaluated_are_not_trained_on(args: list[str], rounds: Rounds, tmp_path: Path) -> None:
    site = trainer(args, tmp_path)
    rounds.merge(site.fit(rounds.weights, rounds.instructions(overlap=True)))
    assert site.ahead_steps() == 1
    site.evaluate(rounds.weights, rounds.evaluate())
    assert site.ahead_steps() == 0


def test_nothing_is_trained_beyond_the_horizon(args: list[str], rounds: Rounds, tmp_path: Path) -> None:
    site = trainer(args, tmp_path)
    site.fit(rounds.weights, rounds.instructions(overlap=True, horizon_tokens=2 * BATCH))
    assert site.ahead_steps() == 0


@pytest.mark.parametrize(
    ("before", "after", "holds"),
    [
        ([("a", 0, 8)], [("a", 0, 8)], True),
        ([("a", 0, 8), ("b", 0, 4)], [("b", 0, 9), ("c", 0, 1)], True),
        ([("a", 0, 8), ("b", 0, 4)], [("a", 0, 8), ("b", 0, 4), ("c", 0, 1)], True),
        ([("a", 0, 8), ("b", 0, 4)], [("a", 0, 9), ("b", 0, 4)], False),
        ([("a", 0, 8), ("b", 0, 4)], [("a", 0, 8)], False),
        ([("a", 0, 8), ("b", 0, 4)], [("b", 0, 3)], False),
        ([("a", 0, 8)], [("b", 0, 8)], False),
        ([("a", 0, 8)], [], False),
    ],
)
def test_leases_that_go_on(before: list[Any], after: list[Any], holds: bool) -> None:
    assert _goes_on([RowRange(*part) for part in before], [RowRange(*part) for part in after]) is holds


def test_clients_of_one_machine_have_nothing_to_wait_for(tiny_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"federation\.overlap: clients of one machine take turns"):
        prepare(federation(tiny_corpus, tmp_path, "run", overlap=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_worker_trains_on_until_it_is_asked(args: list[str], rounds: Rounds, tmp_path: Path, ranks: int) -> None:
    with Trainer(args, tmp_path, ranks=ranks) as site:
        steps = 70
        for _ in range(2):
            site.train(rounds, max_steps=steps, overlap=True)
        time.sleep(0.2)
        site.train(rounds, max_steps=steps, overlap=True)
        assert [report.steps for report in rounds.reports] == [steps] * 3
        assert 1 <= rounds.reports[-1].ahead < steps
        all_of_them = 2 * steps - 2  # said when the last one begins
        site.wait_until(
            lambda now: now["state"] == "idle" and now["steps"] == all_of_them, "end of what may be trained"
        )
        site.train(rounds, max_steps=steps)
        assert rounds.reports[-1].ahead == steps - 1
    losses = [report.loss_last for report in rounds.reports]
    assert losses[-1] < losses[0]
