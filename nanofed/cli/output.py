"""How the library's log lines reach a person at a terminal."""

from __future__ import annotations

import logging
import sys
import warnings

from nanofed import runtime
from nanofed.cli.imports import import_lightning


def show_progress() -> None:
    """Print nanofed's log lines as they are, and keep what other libraries say about themselves out of them."""
    import_lightning()  # sets the levels of its logs when it is first imported
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("nanofed")
    ours.handlers[:] = [handler]
    ours.setLevel(logging.INFO if runtime.is_first_rank() else logging.ERROR)  # what all ranks say is said once
    ours.propagate = False
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.fabric.utilities.seed", "flwr"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
