"""What the ranks of one trainer share beside gradients: decisions, errors and the first one's clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nanofed.data.streams import Batch
from nanofed.errors import NanofedError
from nanofed.federated.site.progress import Progress
from nanofed.training.loop import Stopwatch

T = TypeVar("T")

PATIENCE = timedelta(days=365)  # ranks wait for a round as long as it takes: their connections tell of the dead


class _Next(IntEnum):
    """What a rank finds where its next micro-batch should be; all ranks do what the greatest of them says."""

    BATCH = 0
    NO_MORE = 1
    ERROR = 2


class Agreed(NanofedError):
    """A round failed on one of several ranks, and all have heard: they are ready for the next one together.

    What a rank raises without that leaves the others waiting for it, and has to end them all.
    """


class Ranks:
    """One rank alone, or all those of the process group: then every rank makes the same calls in the same order.

    They talk through gloo, on the CPU: nothing here waits for a device.
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if several else None
        self.number = dist.get_rank() if several else 0
        self.size = dist.get_world_size() if several else 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that decides, answers and writes."""
        return self.number == 0

    def from_first(self, value: T) -> T:
        """Return the first rank's value; those of the others do not count."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in their order."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def greatest(self, number: float) -> float:
        """Return the greatest of all ranks' numbers."""
        if self._group is None:
            return number
        shared = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
        return float(shared)

    def mean(self, numbers: Iterable[float]) -> list[float]:
        """Return the means over ranks of a list of numbers."""
        shared = torch.tensor(list(numbers), dtype=torch.float64)
        if self._group is not None:
            dist.all_reduce(shared, group=self._group)
        return list((shared / self.size).tolist())

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank if one of them has an error.

        Raises:
            Agreed: It says the error of the first rank that has one; a rank alone raises the error itself.
        """
        if self._group is None:
            if error is not None:
                raise error
            return
        texts = self.gather(None if error is None else str(error) or type(error).__name__)
        for rank, text in enumerate(texts):
            if text is not None:
                everywhere = all(other == text for other in texts)
                raise Agreed(text if rank == 0 or everywhere else f"rank {rank}: {text}") from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do something on every rank, on some of them perhaps nothing; what fails on one has failed on all."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.agree(error)

    def batches(
        self, batches: Iterable[Batch], check: Callable[[], None], begun: Callable[[int], None] = lambda number: None
    ) -> Iterator[Batch]:
        """Yield this rank's micro-batches until a rank has none; all ranks, which take theirs at once, end at the same one.

        Args:
            batches: This rank's micro-batches.
            check: It is called on the first rank before each of them, and raises if the round is not wanted any more.
            begun: It is called with the number of those that have begun.
        """
        own = iter(batches)
        for number in itertools.count(1):
            batch, error = None, None
            try:
                if self.first:
                    check()
                batch = next(own, None)
            except Exception as caught:
                error = caught
            mine = _Next.ERROR if error is not None else _Next.NO_MORE if batch is None else _Next.BATCH
            outcome = self.greatest(mine)
            if outcome == _Next.ERROR:
                self.agree(error)
            if batch is None or outcome != _Next.BATCH:
                return
            begun(number)
            yield batch


class SharedStopwatch(Stopwatch):
    """The first rank's stopwatch on all ranks, which read it at the same points and so decide alike."""

    def __init__(self, ranks: Ranks, watch: Stopwatch) -> None:
        self._ranks = ranks
        self._watch = watch

    def elapsed(self) -> float:
        """Return the seconds since the start by the first rank's watch."""
        return self._ranks.greatest(self._watch.elapsed() if self._ranks.first else -1.0)


class Turn:
    """A stretch of training or evaluation under way, as the caller that asked for it sees it.

    Args:
        progress: It hears how far the work is.

    Attributes:
        arrived: The monotonic time in seconds at which the round's message arrived; None counts from the first step.
    """

    arrived: float | None = None

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress

    def check(self) -> None:
        """Say that something happens, and where a caller so wants end the work by an error; called between micro-batches.

        With several ranks it is called on the first one.
        """
        if self._progress is not None:
            self._progress.alive()

    def progress(self, steps: int) -> None:
        """Take note that so many full steps of the round are done; called with every micro-batch, on all ranks."""
        if self._progress is not None:
            self._progress.stepped(steps)
