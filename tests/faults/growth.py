"""Memory and file handles of processes that live long: sampled, and whether they grow."""

from __future__ import annotations

import contextlib
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

WARM_UP = 1 / 3  # of a process's life that does not count
LEAST_SAMPLES = 12  # of a life, to judge it


@dataclass(frozen=True)
class Sample:
    """A process at one time."""

    round: int  # of the run
    memory: float  # resident and its own, MB (10^6): neither of files nor shared
    handles: int  # open files and sockets


@dataclass(frozen=True)
class Growth:
    """How a process grew, after its first third: at the end is the median of the last third."""

    kind: str
    rounds: int  # that it lived, the first third too
    memory: float  # MB at the end
    memory_per_100_rounds: float  # MB, by the slope between the medians of the second and the last third
    handles: float  # at the end
    handles_per_100_rounds: float  # likewise

    def __str__(self) -> str:
        return (
            f"{self.kind:<24} {self.rounds:>5} rounds  {self.memory:>7.1f} MB "
            f"{self.memory_per_100_rounds:>+7.2f} per 100 rounds  "
            f"{self.handles:>4.0f} handles {self.handles_per_100_rounds:>+6.2f} per 100 rounds"
        )


class Watch:
    """Samples of processes, life by life."""

    def __init__(self) -> None:
        self._lives: dict[tuple[str, int], list[Sample]] = defaultdict(list)

    def sample(self, number: int, processes: Mapping[int, str]) -> None:
        """Take a sample of processes, id -> kind, in round `number`."""
        for pid, kind in processes.items():
            with contextlib.suppress(psutil.Error):  # gone by now
                process = psutil.Process(pid)
                used = process.memory_info()
                self._lives[kind, pid].append(Sample(number, (used.rss - used.shared) / 1e6, process.num_fds()))

    def growths(self, least_rounds: int) -> list[Growth]:
        """Return the growth of every process that lived for so many rounds, by kind."""
        out = []
        for (kind, _), life in sorted(self._lives.items()):
            first, last = life[0].round, life[-1].round
            if len(life) < LEAST_SAMPLES or last - first < least_rounds:
                continue
            start = first + WARM_UP * (last - first)
            middle = start + (last - start) / 2
            early = [sample for sample in life if start <= sample.round < middle]
            late = [sample for sample in life if sample.round >= middle]
            if not early or not late:
                continue
            rounds = statistics.mean(s.round for s in late) - statistics.mean(s.round for s in early)
            memory = [statistics.median(s.memory for s in part) for part in (early, late)]
            handles = [statistics.median(s.handles for s in part) for part in (early, late)]
            slopes = [100 / rounds * (after - before) for before, after in (memory, handles)]
            out.append(Growth(kind, last - first, memory[1], slopes[0], handles[1], slopes[1]))
        return out
