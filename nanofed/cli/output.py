"""How the library's log lines reach a person at a terminal."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TYPE_CHECKING, TextIO

from nanofed import runtime, streams, terminal
from nanofed.errors import NanofedError
from nanofed.training.lightning_import import import_lightning

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
        import_lightning()  # sets the levels of its logs when it is first imported
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
