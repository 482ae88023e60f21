"""The server evaluates beside the next round: a figure is of the round that was measured, and a failure ends nothing."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nanofed.federated.server.evaluation import ServerEvaluator, ServerModel
from nanofed.federated.server.events import SERVER, Events
from nanofed.federated.server.state import RoundClock
from nanofed.training.run_options import RunOptions
from nanofed.training.summary import Summary


class SlowModel(ServerModel):
    """Measures when it is let."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.go = threading.Event()
        self.loaded: list[Any] = []
        self.fails = False
        self.released = 0

    def load(self, weights: Any) -> None:
        self.loaded.append(weights)

    def bits_per_byte(self) -> float:
        while not self.go.wait(0.01):
            if self.stopped.is_set():
                raise RuntimeError("stopped")
        if self.fails:
            raise OSError("the shard is gone")
        return float(self.loaded[-1])

    def release(self) -> None:
        self.released += 1


Setup = tuple[ServerEvaluator, SlowModel, list[Any], Any]


@pytest.fixture
def setup() -> Setup:
    written: list[Any] = []
    metrics = SimpleNamespace(
        summary=Summary("run", "federated", seconds=5.0),
        validation=lambda point, step, seconds: written.append((point.step, point.tokens, point.bpb, step)),
    )
    model = SlowModel()
    evaluator = ServerEvaluator(model, cast(Any, metrics), RunOptions(), beside=True)
    return evaluator, model, written, SimpleNamespace(clock=RoundClock(3, 30, 9), weights=1.5, events=Events())


def test_a_figure_is_of_the_round_that_was_measured(setup: Setup) -> None:
    evaluator, model, written, state = setup
    evaluator.start(state)
    state.clock, state.weights = RoundClock(4, 40, 12), 9.9  # the next round goes on
    evaluator.collect(state)
    assert written == [] and evaluator.round == 3
    evaluator.start(state)
    assert model.loaded == [1.5], "one at a time"
    model.go.set()
    evaluator.collect(state, wait=True)
    assert written == [(3, 30, 1.5, 9)]
    evaluator.start(state, last=True)
    assert written[1:] == [(4, 40, 9.9, 12)] and evaluator.round == 4
    assert model.released == 2


def test_a_figure_that_is_ready_holds_up_no_other(setup: Setup) -> None:
    evaluator, model, written, state = setup
    model.go.set()
    for number in range(3, 7):
        state.clock = RoundClock(number, 10 * number, 3 * number)
        evaluator.start(state)
        evaluator._pool.submit(lambda: None).result()  # behind it: it has been measured
    evaluator.collect(state)
    assert [step for step, *_ in written] == [3, 4, 5, 6]


def test_a_failure_is_counted_and_the_run_goes_on(setup: Setup) -> None:
    evaluator, model, written, state = setup
    model.fails = True
    model.go.set()
    evaluator.start(state)
    evaluator.collect(state, wait=True)
    count = state.events.last("evaluation", SERVER)
    assert written == [] and count.round == 3 and "the shard is gone" in count.reason
    assert model.released == 1
    with pytest.raises(OSError, match="the shard is gone"):
        evaluator.start(state, last=True)


def test_where_there_is_no_room_for_the_weights_the_run_goes_on(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator, model, written, state = setup

    def load(weights: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(model, "load", load)
    evaluator.start(state)
    count = state.events.last("evaluation", SERVER)
    assert written == [] and count.round == 3 and "no room" in count.reason
    assert model.released == 1
    monkeypatch.undo()
    model.go.set()
    evaluator.start(state)
    evaluator.collect(state, wait=True)
    assert written == [(3, 30, 1.5, 9)]


def test_the_end_does_not_wait_for_it(setup: Setup) -> None:
    evaluator, _, written, state = setup
    evaluator.start(state)
    started = time.monotonic()
    evaluator.stop()
    assert time.monotonic() - started < 5 and written == []
