"""Python's cycle collector kept out of the optimizer steps, where its pauses would make all ranks wait for one."""

from __future__ import annotations

import contextlib
import gc


class Garbage(contextlib.ContextDecorator):
    """Holds the cycle collector back while its block, or a function that it decorates, runs; `collect` is called between steps.

    What is there when a block begins (modules, the model) is left out of every collection in it, so that one takes about a
    millisecond. Blocks may be nested; the outermost leaves the collector as it was found.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._was_enabled = False

    def __enter__(self) -> Garbage:
        if self._depth == 0:
            self._was_enabled = gc.isenabled()
            gc.disable()
            gc.freeze()
        self._depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            gc.unfreeze()
            if self._was_enabled:
                gc.enable()

    def collect(self) -> None:
        """Collect what the steps since the last call left behind; nothing outside the block."""
        if self._depth:
            gc.collect()
