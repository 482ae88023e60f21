"""How the library's log lines reach a person at a terminal."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from nanofed import runtime, streams, terminal
from nanofed.errors import NanofedError

if TYPE_CHECKING:
    from nanofed.training.summary import Summary


class _Handler(logging.StreamHandler[TextIO]):
    def emit(self, record: logging.LogRecord) -> None:
        """Write a line of the log above the one that moves."""
        with terminal.without_line():
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Let what ends a command that is run for its output end it; a log line that cannot be made up ends nothing."""
        if isinstance(sys.exc_info()[1], streams.ReaderGone | NanofedError):
            raise  # noqa: PLE0704 (logging calls this while it handles the error)
        super().handleError(record)


def show_progress(*, lightning: bool = True) -> None:
    """Print nanofed's log lines as they are, and keep what other libraries say about themselves out of them.

    Args:
        lightning: this process will use it.
    """
    if lightning:
        _import_lightning()  # sets the levels of its logs when it is first imported
    handler = _Handler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("nanofed")
    ours.handlers[:] = [handler]
    ours.setLevel(logging.INFO if runtime.is_first_rank() else logging.ERROR)  # what all ranks say is said once
    ours.propagate = False
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.fabric.utilities.seed", "flwr"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")


def describe(summary: Summary) -> str:
    """Return what a run came to, in one line."""
    start, end = summary.bpb_start, summary.bpb_end
    early = f"; it ended before its horizon: {summary.ended_early}" if summary.ended_early else ""
    return (
        f"{summary.name}: {summary.tokens / 1e6:.2f} M tokens in {summary.seconds:.1f} s, "
        f"bits per byte {float('nan') if start is None else start:.4f} -> {float('nan') if end is None else end:.4f}{early}"
    )


def _import_lightning() -> None:
    """Import Lightning in half of the CPU time that it takes by itself (4.3 s instead of 8.0, medians of 5 in turns).

    Lightning imports torchmetrics, which imports transformers and matplotlib, where they are installed, for metrics of text and
    for plots. The new objects all stay, so the garbage collector is kept from going through them, now and whenever torch.compile
    traces a model.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with _as_if_not_installed("transformers", "matplotlib"):
            import lightning  # noqa: F401
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


@contextlib.contextmanager
def _as_if_not_installed(*packages: str) -> Iterator[None]:
    """Let whoever looks for packages in the block, or for their versions, hear that there are none; imported ones stay."""
    known = importlib.metadata.version

    def version(distribution_name: str) -> str:
        if distribution_name in packages:
            raise importlib.metadata.PackageNotFoundError(distribution_name)
        return known(distribution_name)

    hidden = [package for package in packages if package not in sys.modules]
    importlib.metadata.version = version
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: Python finds no such module
    try:
        yield
    finally:
        importlib.metadata.version = known
        for package in hidden:
            del sys.modules[package]
