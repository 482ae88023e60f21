"""Where the time goes between a command and its first optimizer step. Imports nothing that takes time itself."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any


def compile_seconds() -> float:
    """Return the seconds that torch.compile took in this process so far, 0 where it is not even imported."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")
    return float(dynamo.calculate_time_spent().get("total_wall_time", 0.0)) if dynamo else 0.0


class Startup:
    """Seconds by the wall from its construction to the first step, each counted under the part that has ended.

    Args:
        clock: seconds, from anywhere.
        compiling: seconds spent compiling in this process so far: they are no part of what they interrupt.

    Attributes:
        seconds: part -> its seconds, in the order of their beginnings.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, compiling: Callable[[], float] = compile_seconds
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._compile_seconds = compiling
        self._mark = clock()
        self._compiled = compiling()

    def done(self, part: str) -> None:
        """Count the time since the last call, or since the start, under `part`, less what was compiled meanwhile."""
        now, compiled = self._clock(), self._compile_seconds()
        for name, spent in (
            (part, now - self._mark - (compiled - self._compiled)),
            ("compile", compiled - self._compiled),
        ):
            if name == part or spent > 0:
                self.seconds[name] = self.seconds.get(name, 0.0) + spent
        self._mark, self._compiled = now, compiled

    def __str__(self) -> str:
        """Write `first step after 9.3 s: imports 3.1, data 0.4, …`."""
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"first step after {sum(self.seconds.values()):.1f} s: {parts}"
