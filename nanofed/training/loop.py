"""The Fabric loop: the same steps as `Trainer.fit`, driven until a number of steps or a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning import Fabric

from nanofed.data.streams import Batch, DataState
from nanofed.training.gc_control import ManualCollection
from nanofed.training.module import GPTModule


class Stopwatch:
    """Measures a budget in seconds of the machine's monotonic clock, divided by `speed`.

    With `speed` 1 it is real time. A client of speed 0.5 is a machine half as fast as this one: its seconds pass twice as
    quickly, so a budget holds half the steps.

    Args:
        speed: this machine's speed against a real one.
        clock: a clock in seconds that never jumps.
        start: when the time began to run on that clock; by default now.
    """

    def __init__(
        self, speed: float = 1.0, clock: Callable[[], float] = time.monotonic, start: float | None = None
    ) -> None:
        self._clock = clock
        self._speed = speed
        self._start = clock() if start is None else start

    def elapsed(self) -> float:
        """Return the seconds since the start on this watch."""
        return (self._clock() - self._start) / self._speed


@dataclass(frozen=True)
class LoopResult:
    """What a stretch of training did."""

    steps: int  # full optimizer steps
    tokens: int  # tokens of those steps, over all ranks
    seconds: float  # time on the stopwatch
    losses: tuple[float, ...]  # mean loss of every step, nats a token
    exhausted: bool  # the data ended before the budget did

    def followed_by(self, other: LoopResult) -> LoopResult:
        """Return what this stretch and the one after it did together, in the time of the other one."""
        return replace(
            other,
            steps=self.steps + other.steps,
            tokens=self.tokens + other.tokens,
            losses=self.losses + other.losses,
        )


@ManualCollection()
def train_steps(
    fabric: Fabric,
    module: Any,
    optimizer: Any,
    batches: Iterable[Batch],
    *,
    accumulation: int,
    step_tokens: int,
    num_steps: int | None = None,
    seconds: float | None = None,
    stopwatch: Stopwatch | None = None,
) -> LoopResult:
    """Train for `num_steps` optimizer steps, or until the next one would end after `seconds`; at least one step.

    A device takes work while the host decides: the time of a step is taken at the end of its backward passes, so a stretch
    may be longer by one update of the optimizer.

    A half accumulation is never flushed as a full step: if the data ends in it, its gradients are dropped and the module's
    `data_state` goes back to the last full step.

    Args:
        fabric: set up and launched.
        module: the GPTModule as `fabric.setup` returned it.
        optimizer: the module's, as `fabric.setup` returned it.
        batches: this rank's micro-batches, on the CPU; with several ranks they end, or fail, on all at the same one.
        accumulation: micro-batches an optimizer step.
        step_tokens: tokens a step over all ranks.
        num_steps: steps to take.
        seconds: budget on `stopwatch`.
        stopwatch: started already; by default real time from now on.
    """
    watch = stopwatch or Stopwatch()
    inner: GPTModule = module.module if hasattr(module, "module") else module
    module.train()
    iterator: Iterator[Batch] = iter(batches)
    losses: list[torch.Tensor] = []
    ends: list[float] = []  # of the steps so far, and the begin of the first
    committed: DataState | None = inner.data_state
    exhausted = False
    backward = _BackwardEnd(fabric.device)
    inner.pop_losses()
    optimizer.zero_grad()  # a stretch that ended in an error may have left gradients
    while num_steps is None or len(losses) < num_steps:
        if seconds is not None and losses:
            backward.wait()  # the host runs ahead of a device: by no more than the update, which keeps it busy meanwhile
        ends.append(watch.elapsed())
        if seconds is not None and losses and ends[-1] + _pace(ends) > seconds:
            break
        for micro in range(accumulation):
            batch = next(iterator, None)
            if batch is None:
                exhausted = True
                break
            # The reducer, where there is one, moves gradients once a step.
            with fabric.no_backward_sync(module, enabled=micro < accumulation - 1):
                loss = module.training_step(batch.to(fabric.device), micro)
                fabric.backward(loss / accumulation)
        if exhausted:
            optimizer.zero_grad()
            inner.data_state = committed
            inner.pop_losses()
            break
        if seconds is not None:
            backward.mark()
        optimizer.step()
        optimizer.zero_grad()
        committed = inner.data_state
        losses.append(torch.stack(inner.pop_losses()).mean())
    values = tuple(torch.stack(losses).tolist()) if losses else ()  # waits for the device: the time below is real
    return LoopResult(len(values), len(values) * step_tokens, watch.elapsed(), values, exhausted)


class _BackwardEnd:
    """Where a device has done all backward passes of a step; on a CPU, which does everything at once, nothing."""

    def __init__(self, device: torch.device) -> None:
        self._event = None if device.type == "cpu" else torch.Event(device)

    def mark(self) -> None:
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


def _pace(ends: list[float]) -> float:
    """Return the seconds of a step: the mean without the first one, which compiles, as soon as there are others."""
    return (ends[-1] - ends[1]) / (len(ends) - 2) if len(ends) > 2 else ends[1] - ends[0]
