"""Lightning imported in half of the time that it takes by itself."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
from collections.abc import Iterator


def import_lightning() -> None:
    """Import Lightning without what a command of ours never uses.

    It imports torchmetrics, and that imports transformers where it is installed, for metrics of text: 2.7 of 6.2 s of CPU.
    The garbage collector goes through hundreds of thousands of new objects meanwhile, all of which stay (0.4 s), and would
    again whenever torch.compile traces a model (a quarter of that): they are taken out of its sight.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with _as_if_not_installed("transformers"):
            import lightning  # noqa: F401
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


@contextlib.contextmanager
def _as_if_not_installed(package: str) -> Iterator[None]:
    """Let whoever asks for a package's version hear that there is none; importing it works all the same."""
    known = importlib.metadata.version

    def version(distribution_name: str) -> str:
        if distribution_name == package:
            raise importlib.metadata.PackageNotFoundError(package)
        return known(distribution_name)

    importlib.metadata.version = version
    try:
        yield
    finally:
        importlib.metadata.version = known
