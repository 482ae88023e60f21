"""What the process that runs a round loop is doing now, in a file of the run, for whoever looks on."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from pathlib import Path
from types import TracebackType, UnionType
from typing import Any, Self

from nanofed.files import write_atomically

logger = logging.getLogger(__name__)

LIVE = "server.json"
SAID: dict[str, type | UnionType] = {
    "pid": int, "host": str, "since": float, "when": float, "phase": str, "round": int, "horizon": int | None,
    "clients": list, "merged": list, "refused": dict, "waiting_for": str,
}  # fmt: skip


class Live:
    """Keeps `server.json` of a run up to date while a round loop runs, as a context manager.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._since = time.time()
        self._said: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self.say(phase="starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.say(phase="ended" if error is None else "failed")

    def say(self, **figures: Any) -> None:
        """Write what the server is doing, for `nanofed status`; figures said before stay."""
        self._said |= figures
        known = {"pid": os.getpid(), "host": socket.gethostname(), "since": self._since, "when": time.time()}
        try:
            write_atomically(self._run / LIVE, json.dumps({**known, **self._said}) + "\n")
        except OSError as error:  # it is for people who look on; the run does not need it
            logger.debug("%s cannot be written: %s", self._run / LIVE, error)


def live(run: Path) -> dict[str, Any] | None:
    """Return what the server of a run said last, None if it said nothing that can be read."""
    try:
        said = json.loads((run / LIVE).read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(said, dict) and all(isinstance(said[name], SAID[name]) for name in SAID.keys() & said)
    return said if whole else None
