"""How far a client is: a site's worker writes it every half a second, and the supervisor that watches the worker reads it."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the supervisor of a worker needs no PyTorch
    from nanofed.federated.wire.messages import Instructions

logger = logging.getLogger(__name__)

WRITE_SECONDS = 0.5
PAGE_BYTES = 4096


class Progress:
    """Figures of the worker's main thread, which another thread writes into the supervisor's page.

    - `state`: `starting`, `idle`, `evaluating` or `training`.
    - `pid` and `ranks`.
    - `run` and `round`: under way, or the last one; "" and 0 before the first.
    - `began`: when the round's training began, on the machine's monotonic clock; `steps`: its full optimizer steps;
      `step_tokens`: the tokens of one.
    - `quiet_seconds`: since something last happened while not idle; 0 when idle. The first step of a process may
      compile for minutes: `warm` says whether there has been one.
    - `tokens_per_second`: of the round so far, and of the one before until its first step is done; 0 before that.
    - `rounds`: answered with weights so far; `unwritten`: optimizer states that the disk did not take.
    - `at`: when this was written, in seconds of the machine's monotonic clock.

    Args:
        page: path of the supervisor's `Page`; None where nobody watches from outside of this process.

    Attributes:
        figures: the figures, replaced as a whole with each change.
    """

    def __init__(self, page: str | None) -> None:
        self._last = time.monotonic()
        self.figures: dict[str, Any] = {
            "state": "starting",
            "pid": os.getpid(),
            "ranks": 0,
            "run": "",
            "round": 0,
            "began": 0.0,
            "steps": 0,
            "step_tokens": 0,
            "warm": False,
            "tokens_per_second": 0.0,
            "rounds": 0,
            "unwritten": 0,
        }
        if page is not None:
            file = os.open(page, os.O_WRONLY | os.O_CLOEXEC)
            threading.Thread(target=self._write, args=(file,), name="nanofed-progress", daemon=True).start()

    def say(self, **figures: Any) -> None:
        """Change figures."""
        self._last = time.monotonic()
        self.figures = {**self.figures, **figures}

    def begin(self, asked: Instructions) -> None:
        """Say that the training of a round begins."""
        tokens = asked.batch_tokens
        self.say(
            state="training", run=asked.run, round=asked.round, began=time.monotonic(), steps=0, step_tokens=tokens
        )

    def stepped(self, steps: int) -> None:
        """Say that a micro-batch begins, after so many full steps of the round."""
        figures = self.figures
        if steps > figures["steps"]:
            seconds = time.monotonic() - figures["began"]
            self.say(steps=steps, warm=True, tokens_per_second=steps * figures["step_tokens"] / seconds)
        else:
            self.alive()

    def alive(self) -> None:
        """Say that something happened that is no micro-batch."""
        self._last = time.monotonic()

    def trained(self, steps: int, tokens_per_second: float) -> None:
        """Say what a round came to."""
        self.say(steps=steps, warm=True, rounds=self.figures["rounds"] + 1, tokens_per_second=tokens_per_second)

    def _write(self, file: int) -> None:
        while True:
            figures, now = self.figures, time.monotonic()
            quiet = 0.0 if figures["state"] == "idle" else now - self._last
            text = json.dumps({**figures, "quiet_seconds": round(quiet, 3), "at": now})
            os.pwrite(file, text.encode().ljust(PAGE_BYTES), 0)
            time.sleep(WRITE_SECONDS)


class Page:
    """Where a worker writes how far it is: memory with a path, so that a full disk does not make it look dead.

    Args:
        folder: folder of the site, used on a machine that has no files in memory.

    Attributes:
        path: path under which the worker opens the page.
    """

    def __init__(self, folder: Path) -> None:
        if hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir():
            self._file = os.memfd_create("nanofed-progress")
            self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        else:
            self.path = str(folder / "progress.json")
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def read(self, since: float = 0.0) -> Mapping[str, Any] | None:
        """Return the last figures, None where none have been written since a time of the monotonic clock."""
        try:
            figures: dict[str, Any] = json.loads(os.pread(self._file, PAGE_BYTES, 0))
        except ValueError:  # nothing yet, or just being written
            return None
        return figures if figures["at"] >= since else None

    def close(self) -> None:
        """Let the memory go."""
        os.close(self._file)
