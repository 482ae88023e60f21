"""One round loop on one run folder: a lock that dies with its process, and beside it what the server is doing now.

Whatever runs the loop takes it; the service around a SuperLink has another one for its own life (`runtimes.deployment`).
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from nanofed.errors import NanofedError
from nanofed.files import write_atomically

logger = logging.getLogger(__name__)

LOCK = "server.lock"
LIVE = "server.json"


class Owner:
    """Holds a run folder for this process, as a context manager.

    Args:
        run: the folder.

    Raises:
        NanofedError: on entering: another process holds it; it is named.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._lock = FileLock(run / LOCK, timeout=0)
        self._since = time.time()
        self._said: dict[str, Any] = {}

    def __enter__(self) -> Self:
        try:
            self._lock.acquire()
        except Timeout as error:
            raise NanofedError(
                f"{self._run} is in use: {holder(self._run)}; end it first, or choose another --name"
            ) from error
        except OSError as error:
            raise NanofedError(f"{self._run / LOCK} cannot be written: {error.strerror}") from error
        self.say(phase="starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.say(phase="ended" if error is None else "failed")
        self._lock.release()

    def say(self, **figures: Any) -> None:
        """Write what the server is doing, for `nanofed status`; figures said before stay."""
        self._said |= figures
        known = {"pid": os.getpid(), "host": socket.gethostname(), "since": self._since, "when": time.time()}
        try:
            write_atomically(self._run / LIVE, json.dumps({**known, **self._said}) + "\n")
        except OSError as error:  # it is for people who look on; the run does not need it
            logger.debug("%s cannot be written: %s", self._run / LIVE, error)


def check_free(run: Path) -> None:
    """Refuse a run folder that a server is using now.

    Raises:
        NanofedError: it is; the process is named.
    """
    if not (run / LOCK).exists():
        return
    try:
        with FileLock(run / LOCK, timeout=0):
            return
    except Timeout as error:
        raise NanofedError(f"{run} is in use: {holder(run)}; end it first, or choose another --name") from error


def live(run: Path) -> dict[str, Any] | None:
    """Return what the server of a run said last, None if it said nothing that can be read."""
    try:
        said = json.loads((run / LIVE).read_text())
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def holder(run: Path) -> str:
    """Return which process uses a run folder, in words."""
    said = live(run) or {}
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(said["since"])) if "since" in said else "some time"
    return (
        f"a server runs on it, process {said.get('pid', 'unknown')} on {said.get('host', 'some host')}, since {since}"
    )
