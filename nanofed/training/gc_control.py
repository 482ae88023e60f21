"""Python's cycle collector kept out of the optimizer steps, where its pauses would make all ranks wait for one."""

from __future__ import annotations

import contextlib
import gc


class FrozenObjects(contextlib.ContextDecorator):
    """Keeps the objects that exist when its block begins out of all collections within the block.

    A collection takes a millisecond then instead of a quarter of a second. Blocks may be nested; the outermost one counts.
    The class also decorates functions.
    """

    _blocks = 0  # in this process

    def __enter__(self) -> FrozenObjects:
        if FrozenObjects._blocks == 0:
            gc.collect()  # garbage would be frozen, too, and unfrozen objects are hardly ever looked at again
            gc.freeze()
        FrozenObjects._blocks += 1
        return self

    def __exit__(self, *error: object) -> None:
        FrozenObjects._blocks -= 1
        if FrozenObjects._blocks == 0:
            gc.unfreeze()


class ManualCollection(contextlib.ContextDecorator):
    """Switches the cycle collector off within its block, except where `collect` is called and at the block's end.

    A process that runs many such blocks holds one `FrozenObjects` around them: a block then begins at once, and its last
    collection includes what was left behind between blocks. Blocks may be nested; the outermost one leaves the collector
    as it was found. The class also decorates functions.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._was_enabled = False
        self._frozen = FrozenObjects()

    def __enter__(self) -> ManualCollection:
        if self._depth == 0:
            self._was_enabled = gc.isenabled()
            gc.disable()
            self._frozen.__enter__()
        self._depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            gc.collect()
            self._frozen.__exit__()
            if self._was_enabled:
                gc.enable()

    def collect(self) -> None:
        """Collect what the steps since the last call left behind; outside the block this does nothing."""
        if self._depth:
            gc.collect()
