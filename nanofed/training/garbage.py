"""Python's cycle collector kept out of the optimizer steps, where its pauses would make all ranks wait for one."""

from __future__ import annotations

import contextlib
import gc


class Settled(contextlib.ContextDecorator):
    """Leaves what is there when its block, or a function that it decorates, begins out of all collections in it.

    One takes a millisecond then instead of a quarter of a second. Blocks may be nested; the outermost counts.
    """

    _blocks = 0  # in this process

    def __enter__(self) -> Settled:
        if Settled._blocks == 0:
            gc.collect()  # what is garbage by now would be left out, too, and what comes back at the end is hardly ever looked at
            gc.freeze()
        Settled._blocks += 1
        return self

    def __exit__(self, *error: object) -> None:
        Settled._blocks -= 1
        if Settled._blocks == 0:
            gc.unfreeze()


class Garbage(contextlib.ContextDecorator):
    """Holds the cycle collector back while its block, or a function that it decorates, runs; `collect` is called between steps.

    It collects at the end. A process that runs many such blocks is to be `Settled` around them: then that includes what was left
    behind between them, and a block begins at once. Blocks may be nested; the outermost leaves the collector as it was found.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._was_enabled = False
        self._settled = Settled()

    def __enter__(self) -> Garbage:
        if self._depth == 0:
            self._was_enabled = gc.isenabled()
            gc.disable()
            self._settled.__enter__()
        self._depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            gc.collect()
            self._settled.__exit__()
            if self._was_enabled:
                gc.enable()

    def collect(self) -> None:
        """Collect what the steps since the last call left behind; nothing outside the block."""
        if self._depth:
            gc.collect()
