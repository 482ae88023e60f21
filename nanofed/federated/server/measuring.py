"""Measuring the global weights: at once, or beside the next round where that does not wait for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanofed.federated.server.board import Board
from nanofed.federated.server.evaluation import Evaluator
from nanofed.federated.server.events import SERVER
from nanofed.federated.server.state import State
from nanofed.federated.wire.evaluation import Evaluate
from nanofed.federated.wire.messages import Instructions
from nanofed.training.run_options import RunOptions
from nanofed.training.summary import Point

logger = logging.getLogger(__name__)


@dataclass
class Measurement:
    """What the weights after a round came to.

    Attributes:
        round: after which they were taken.
        step: optimizer steps of the run by then.
        tokens: merged by then.
        train_seconds: of training by then.
        prompts: to be continued.
        bpb: bits per byte; None before it is known, or where it could not be measured.
        samples: prompt -> text.
        seconds: that it took.
        error: why there is no figure.
    """

    round: int
    step: int
    tokens: int
    train_seconds: float
    prompts: tuple[str, ...] = ()
    bpb: float | None = None
    samples: dict[str, str] | None = None
    seconds: float = 0.0
    error: Exception | None = None


class Measuring:
    """Has rounds measured here, by the server, and writes down what comes of it, under the round that it is of.

    Beside the rounds one snapshot at a time is measured, in a thread, and not one more is queued: a round whose turn comes
    while another is being measured goes without a figure, and says so.

    Args:
        evaluator: whose model is the snapshot.
        board: where figures go.
        options: of the run: what is sampled, and when.
        beside: measure while the next round runs; else at once, so that a run takes the same course each time.
    """

    def __init__(self, evaluator: Evaluator, board: Board, options: RunOptions, *, beside: bool) -> None:
        self._evaluator = evaluator
        self._board = board
        self._options = options
        self._beside = beside
        self._thread: threading.Thread | None = None
        self._current: Measurement | None = None
        self.round = -1  # the last one measured, or being measured

    def begin(self, state: State) -> None:
        """Measure the first weights of a run, and those of a resumed round that the server did not live to see measured."""
        number = state.clock.round
        if any(point.step == number for point in self._board.summary.curve):
            self.round = number
        elif number % self._options.eval_every == 0:
            self.start(state)

    def end(self, state: State) -> None:
        """Measure the last weights of a run, if they are not yet: its last round was an empty one."""
        if self.round != state.clock.round:
            self.start(state, last=True)

    def ask(self, instructions: Mapping[str, Instructions]) -> Mapping[str, Evaluate]:
        """Return what the clients of a round are to measure: nothing, it is done here."""
        return {}

    def hear(self, client: str, metrics: Mapping[str, Any], elapsed: float, state: State) -> float:
        """Return how many seconds a client has spent on that: none."""
        return 0.0

    def heard(self, state: State, *, merged: bool) -> None:
        """Hear that all clients of a round have been heard."""

    def start(self, state: State, *, last: bool = False) -> None:
        """Measure the weights as they are; the last ones of a run at once.

        Raises:
            NanofedError: at once, and they cannot be measured.
        """
        clock, options = state.clock, self._options
        due = options.sample_every and clock.round % options.sample_every == 0
        prompts = tuple(options.sample_prompts) if due else ()
        wanted = Measurement(clock.round, clock.step, clock.tokens, self._board.summary.seconds, prompts)
        if last or not self._beside:
            self.take(state, wait=True)
            self._evaluator.load(state.weights)
            measure(self._evaluator, wanted)
            if wanted.error is not None:
                raise wanted.error
            self._write(wanted, state)
        elif self._current is not None:
            logger.info("round %3d  not measured: round %d still is", wanted.round, self._current.round)
        else:
            try:
                self._evaluator.load(state.weights)
            except Exception as error:  # no room for them on the device
                self._evaluator.release()
                wanted.error = error
                self._write(wanted, state)
                return
            self._current, self.round = wanted, wanted.round
            self._thread = threading.Thread(
                target=measure, args=(self._evaluator, wanted), name="evaluation", daemon=True
            )
            self._thread.start()

    def take(self, state: State, *, wait: bool = False) -> None:
        """Write down a measurement that is done; with `wait`, also one that is under way."""
        if self._thread is None or self._current is None or (self._thread.is_alive() and not wait):
            return
        self._thread.join()
        done, self._thread, self._current = self._current, None, None
        self._write(done, state)

    def _write(self, done: Measurement, state: State) -> None:
        if done.bpb is None:
            logger.warning("round %d: bits per byte could not be measured: %s", done.round, done.error)
            state.events.add("evaluation", SERVER, repr(done.error), done.round)
            return
        self.round = max(self.round, done.round)
        point = Point(done.round, done.tokens, round(done.train_seconds, 3), done.bpb)
        self._board.validation(point, step=done.step, seconds=done.seconds)
        for prompt, sample in (done.samples or {}).items():
            self._board.text(prompt, sample, done.step)

    def stop(self) -> None:
        """End a measurement that is under way, at its next batch."""
        self._evaluator.stopped.set()
        if self._thread is not None:
            self._thread.join()


def measure(evaluator: Evaluator, wanted: Measurement) -> None:
    """Measure the loaded weights, and let them go; what goes wrong stands in the measurement."""
    started = time.monotonic()
    try:
        wanted.bpb = evaluator.bits_per_byte()
        wanted.samples = {prompt: evaluator.sample(prompt) for prompt in wanted.prompts}
    except Exception as error:  # of the model, the device or the data; whoever takes it decides
        wanted.error = error
    finally:
        evaluator.release()
    wanted.seconds = time.monotonic() - started
