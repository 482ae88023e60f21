"""The training losses between two readings: kept on the device, read together, smoothed, and checked for NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nanofed.data.streams import DataState
from nanofed.errors import NanofedError

BETA = 0.9


class NonFiniteError(NanofedError):
    """The loss, the gradients or the weights are no longer finite: going on or saving would be worth nothing."""


@dataclass
class SmoothedLoss:
    """An exponential moving average (0.9) of the steps' losses, debiased as in Adam: what nanochat logs as `train/loss`."""

    biased: float = 0.0
    steps: int = 0

    def add(self, loss: float) -> None:
        """Take in the loss of the next step."""
        self.biased = BETA * self.biased + (1 - BETA) * loss
        self.steps += 1

    @property
    def value(self) -> float | None:
        """The average, nats a token; None before the first step."""
        return self.biased / (1 - BETA**self.steps) if self.steps else None


class _Step(NamedTuple):
    number: int
    losses: Sequence[Tensor]  # of its micro-batches, scalars on the device
    grad_norm: Tensor
    before: DataState | None
    after: DataState | None


class StepLoss(NamedTuple):
    """One optimizer step: its loss in nats a token over all ranks, and the gradients' norm before clipping."""

    step: int
    loss: float
    grad_norm: float


class LossWindow:
    """The steps since the last reading.

    Adding one waits for nothing. Reading waits for the device once, and where there are ranks for them: all must read after
    the same step. The mean over ranks and micro-batches is taken in fp64 in a fixed order, so that the values do not depend on
    where a run was cut.
    """

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._data: DataState | None = None

    def start(self, data: DataState | None) -> None:
        """Forget what was there; the next step's data begins at `data`."""
        self._steps = []
        self._data = data

    def add(self, step: int, losses: Sequence[Tensor], grad_norm: Tensor, data: DataState | None) -> None:
        """Add a full optimizer step: losses of its micro-batches, norm of its gradients, the data's place after it."""
        self._steps.append(_Step(step, losses, grad_norm.clone(), self._data, data))
        self._data = data

    def read(self) -> list[StepLoss]:
        """Return the steps since the last reading, oldest first.

        Raises:
            NonFiniteError: the loss or the gradients of a step are not finite; names the first such step and the rows that
                its batch came from. All ranks raise it.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return []
        flat = torch.stack([loss.float() for step in steps for loss in step.losses] + [s.grad_norm for s in steps])
        ranks = _gathered(flat)  # one row a rank
        out, first = [], 0
        norms = ranks[0][-len(steps) :]
        for step, norm in zip(steps, norms, strict=True):
            count = len(step.losses)
            of_ranks = [math.fsum(row[first : first + count]) / count for row in ranks]
            first += count
            out.append(StepLoss(step.number, math.fsum(of_ranks) / len(of_ranks), norm))
            if not math.isfinite(out[-1].loss + norm):
                raise self._error(out[-1], step, [not math.isfinite(loss) for loss in of_ranks])
        return out

    def _error(self, found: StepLoss, step: _Step, bad: list[bool]) -> NonFiniteError:
        rows = rows_between(step.before, step.after)
        if len(bad) > 1:  # each rank reads rows of its own: name those of the first whose loss is bad
            of_ranks: list[str] = [""] * len(bad)
            dist.all_gather_object(of_ranks, rows)
            rows = of_ranks[bad.index(True) if any(bad) else 0]
        what = f"loss is {found.loss}" if not math.isfinite(found.loss) else f"gradient norm is {found.grad_norm}"
        return NonFiniteError(f"the training {what} at step {found.step:,} (its batch: {rows})")


def _gathered(flat: Tensor) -> list[list[float]]:
    if not (dist.is_available() and dist.is_initialized()):
        return [flat.tolist()]
    parts = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, flat)
    return [row.tolist() for row in torch.stack(parts).cpu()]


def rows_between(before: DataState | None, after: DataState | None) -> str:
    """Say which rows of which shards a batch was made of: from the first that was not used up to the last one read."""
    if after is None:
        return "data unknown"
    places = [
        (place.epoch, place.shard, place.row)
        for state in (before.streams.values() if before else ())
        for place in (*state.pending, *([state.position] if state.position else []))
    ]
    ends = [(s.position.epoch, s.position.shard, s.position.row - 1) for s in after.streams.values() if s.position]
    if not ends:
        return "data unknown"
    end = max(ends)
    start = min(places, default=min(ends))
    epoch = f" of epoch {end[0]}" if end[0] else ""
    if start[1] == end[1]:
        return f"rows {start[2]} to {max(start[2], end[2])} of {end[1]}{epoch}"
    return f"row {start[2]} of {start[1]} to row {end[2]} of {end[1]}{epoch}"
