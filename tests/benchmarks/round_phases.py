"""From the marks of all processes to the phases of each round: which part of it the last client's answer waited for."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.round_memory import Sampler, kind

PHASES = (
    "push",  # the server sends the messages
    "SuperNode waits",  # for its next poll
    "download",
    "client starts",  # a worker sees its message
    "client pulls",  # its message, and where these are beside it, the weights
    "hand-over",  # up to the first step
    "train",
    "hand-back",
    "client pushes",  # its answer, and where they are beside it, the weights
    "upload",  # what is left of it
    "server pulls",
    "validate",
    "fold",
    "outer step",
    "checkpoint",
    "until next push",  # evaluate, encode, lease, see who is here
)


@dataclass(frozen=True)
class Mark:
    """A call in one process: seconds of the monotonic clock, and what `round_probe` noted of it."""

    name: str
    pid: int
    start: float
    end: float
    info: Any


@dataclass(frozen=True)
class Round:
    """One round, from the first push of its weights to the first push of the next."""

    start: float
    seconds: float
    phases: dict[str, float]
    trained: float  # seconds in which the last client trained, also before it had the round's weights
    bytes_down: int
    bytes_up: int

    @property
    def overhead(self) -> float:
        """Seconds in which the last client did not train."""
        return self.seconds - self.trained


class Trace:
    """All marks of a run."""

    def __init__(self, path: Path) -> None:
        self._marks = [Mark(*json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        started = [mark for mark in self._marks if mark.name == "process"]
        self._parents = {mark.pid: mark.info[0] for mark in started}
        self._kinds = {mark.pid: kind(mark.info[1]) for mark in started}  # a forked process is what it became last
        self._commands = {mark.pid: mark.info[1] for mark in started}

    def rounds(self) -> list[Round]:
        """Return the rounds but the last, whose end nothing marks.

        Raises:
            ValueError: a round lacks a mark that each has: somebody failed, or functions have other names by now.
        """
        starts: dict[object, float] = {}
        for index, mark in enumerate(sorted(self._of("serverapp", "push"), key=lambda mark: mark.start)):
            if mark.info and mark.info[0][0] == "train":
                starts.setdefault(mark.info[0][1] or index, mark.start)  # stock messages have no group
        times = sorted(starts.values())
        return [self._round(*window) for window in itertools.pairwise(times)]

    def _round(self, start: float, stop: float) -> Round:
        # A poll that brought the round's message may have begun before that was there.
        inside = [mark for mark in self._marks if start <= mark.end <= stop]

        def find(what: Sequence[str] | str, where: Callable[[Mark], bool]) -> Mark:
            names = [what] if isinstance(what, str) else what
            found = [mark for mark in inside if mark.name in names and where(mark)]
            if not found:
                raise ValueError(f"round at {start:.1f}: there is no mark {what!r} until {stop:.1f}; see the logs")
            return max(found, key=lambda mark: mark.end)

        def anyone(mark: Mark) -> bool:
            return True

        last = find("client push", anyone)  # of the client that answers last

        def client(mark: Mark) -> bool:
            return mark.pid == last.pid

        node = self._node(last.pid)

        def supernode(mark: Mark) -> bool:
            return mark.pid == node

        app = find("app", client)

        def trains(mark: Mark) -> bool:
            return app.start <= mark.start and mark.end <= app.end and client(mark)

        train = find("train", trains)
        server = [mark for mark in inside if self._kinds[mark.pid] == "serverapp"]
        checkpoints = [mark.end for mark in server if mark.name == "checkpoint"]
        validated = [mark.end for mark in server if mark.name == "validate"]
        folded = [mark.end for mark in server if mark.name == "fold"]
        pulled = find("pull", lambda mark: mark.info is not None).end
        ends = [
            max(
                mark.end for mark in server if mark.name == "push" and mark.info
            ),  # stock pushes no messages to evaluate
            find("download", supernode).start,
            find("download", supernode).end,
            min(mark.start for mark in inside if client(mark) and mark.name in ("client", "client pull")),
            find(["client pull", "fetch"], client).end,
            train.start,
            train.end,
            min((mark.start for mark in inside if mark.name == "deliver" and client(mark)), default=app.end),
            last.end,
            find("upload", supernode).end,
            pulled,
            max(validated, default=pulled),
            max(folded, default=pulled),
            find("outer", anyone).end,
            max(checkpoints, default=0.0),
            stop,
        ]
        phases, before = {}, start
        for name, end in zip(PHASES, ends, strict=True):
            phases[name] = max(0.0, end - before)  # what was over before the last phase ended took no time of its own
            before = max(before, end)

        def moved(*names: str) -> int:
            """Return the bytes of all sites: in messages, and beside them."""
            ends = ("supernode", "worker", "clientapp")
            at_nodes = [mark for mark in inside if self._kinds[mark.pid] in ends and mark.name in names]
            return sum(m.info for m in at_nodes if self._kinds[m.pid] == "supernode" or m.name in ("fetch", "deliver"))

        return Round(
            start=start,
            seconds=stop - start,
            phases=phases,
            trained=sum(
                max(0.0, min(mark.end, stop) - max(mark.start, start))
                for mark in self._marks
                if mark.name == "train" and client(mark)
            ),
            bytes_down=moved("pull objects", "fetch"),
            bytes_up=moved("push objects", "deliver"),
        )

    def _of(self, where: str, name: str) -> Iterable[Mark]:
        return (mark for mark in self._marks if mark.name == name and self._kinds[mark.pid] == where)

    def _node(self, client: int) -> int:
        """Return the SuperNode of a client: a stock client's ancestor, or the one whose port a worker calls."""
        if port := re.search(r'"supernode": ?"[^"]*:(\d+)"', self._commands[client]):
            nodes = (pid for pid, command in self._commands.items() if f"--port {port[1]} " in command)
            return max(pid for pid in nodes if self._kinds[pid] == "supernode")
        while self._kinds[client] != "supernode":
            client = self._parents[client]
        return client


def medians(rounds: Sequence[Round], memory: Sampler) -> dict[str, Any]:
    """Return the figures of the rounds after the first, and the first by itself."""
    first, *later = rounds
    later = later or [first]
    cpu = memory.cpu_between(later[0].start, later[-1].start + later[-1].seconds)
    return {
        "overhead_seconds": statistics.median(one.overhead for one in later),
        "overhead_seconds_first": first.overhead,
        "overhead_seconds_each": [one.overhead for one in rounds],
        "round_seconds": statistics.median(one.seconds for one in later),
        "trained_seconds": statistics.median(one.trained for one in later),
        "phases": {name: statistics.median(one.phases[name] for one in later) for name in PHASES},
        "phases_first": first.phases,
        "bytes_down": statistics.median(one.bytes_down for one in later),
        "bytes_up": statistics.median(one.bytes_up for one in later),
        "cpu_seconds": {name: seconds / len(later) for name, seconds in cpu.items()},
        "peak_rss_mb": dict(sorted(memory.peaks.items())),
        "peak_rss_mb_together": memory.together,
    }
