"""How far the trainer is, and what its socket answers at once, whatever the main thread does."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from nanofed.federated.site.channel import ChannelError
from nanofed.federated.site.listener import Quick


class Progress:
    """Written by the main thread and read by those of the socket.

    `ping` answers:

    - `state`: `starting`, `idle`, `evaluating` or `training`.
    - `name`, `pid`, `ranks`.
    - `run`, `round`: under way, or the last one; "" and 0 before the first.
    - `steps`: full optimizer steps of it.
    - `quiet_seconds`: since something last happened while not idle; 0 when idle. The first step of a process may
      compile for minutes: `warm` says whether there has been one.
    - `tokens_per_second`: of the last round that was trained, 0 before.
    - `rounds`: answered with weights so far; `unwritten`: states that the disk did not take.

    Args:
        name: of the site.

    Attributes:
        abort: cancels the round that is under way with a reason, and tells whether there is one.
    """

    def __init__(self, name: str) -> None:
        self.abort: Callable[[str], bool] = lambda reason: False
        self._name = name
        self._hello: Callable[[], dict[str, Any]] | None = None
        self._is_ready = threading.Event()
        self._last = time.monotonic()
        self._accumulation = 1
        self._figures: dict[str, Any] = {
            "state": "starting",
            "name": name,
            "pid": os.getpid(),
            "ranks": 0,
            "run": "",
            "round": 0,
            "steps": 0,
            "warm": False,
            "tokens_per_second": 0.0,
            "rounds": 0,
            "unwritten": 0,
        }

    def answers(self) -> dict[str, Quick]:
        """Return what is answered at once, by kind of request."""
        return {"ping": self._ping, "abort": self._abort, "get_properties": self._properties}

    def check_name(self, config: dict[str, Any]) -> None:
        """Refuse a request that was meant for another site."""
        if config.get("client") != self._name:
            raise ChannelError(f"this is the trainer of site {self._name}, not of {str(config.get('client'))[:80]!r}")

    # The main thread

    def ready(self, hello: Callable[[], dict[str, Any]], ranks: int) -> None:
        """Say that the trainer is built."""
        self._hello = hello
        self._figures |= {"state": "idle", "ranks": ranks}
        self._is_ready.set()

    def begin(self, run: str, number: int, accumulation: int) -> None:
        """Say that a round has begun."""
        self._last = time.monotonic()
        self._accumulation = accumulation
        self._figures |= {"state": "training", "run": run, "round": number, "steps": 0}

    def evaluating(self, run: str, number: int) -> None:
        """Say that weights are being measured, before a round or for themselves."""
        self._last = time.monotonic()
        self._figures |= {"state": "evaluating", "run": run, "round": number, "steps": 0}

    def micro_batch(self, begun: int) -> None:
        """Say that so many micro-batches of the round have begun."""
        self._last = time.monotonic()
        steps = (begun - 1) // self._accumulation
        self._figures["steps"] = steps
        if steps:
            self._figures["warm"] = True

    def alive(self) -> None:
        """Say that something happened that is no micro-batch."""
        self._last = time.monotonic()

    def trained(self, steps: int, tokens_per_second: float) -> None:
        """Say what a round came to."""
        rounds = self._figures["rounds"] + 1
        self._figures |= {"steps": steps, "warm": True, "rounds": rounds}
        self._figures["tokens_per_second"] = tokens_per_second

    def saved(self, unwritten: int) -> None:
        """Say how many optimizer states the disk has not taken so far."""
        self._figures["unwritten"] = unwritten

    def idle(self) -> None:
        """Say that the trainer waits for the next round."""
        self._figures["state"] = "idle"

    # The socket's threads

    def _ping(self, config: dict[str, Any]) -> dict[str, Any]:
        figures = dict(self._figures)
        quiet = 0.0 if figures["state"] == "idle" else time.monotonic() - self._last
        return {**figures, "quiet_seconds": round(quiet, 3)}

    def _abort(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"aborted": self.abort(str(config.get("reason") or "it was told to stop")[:500])}

    def _properties(self, config: dict[str, Any]) -> dict[str, Any]:
        self.check_name(config)
        self._is_ready.wait()
        assert self._hello is not None
        return self._hello()
