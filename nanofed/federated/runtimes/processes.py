"""Ending what a run has started, however the run ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

PROC = Path("/proc")


@contextmanager
def ended_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack, as Ctrl-C does, so that what was started is stopped; the exit code is 143."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_marked(process: subprocess.Popen[bytes], marker: str, seconds: float) -> None:
    """Stop a process, and every other one that has `marker` in its environment: its children, wherever they are by now.

    Ray's processes leave the session and the parent that started them. Without /proc only the process itself is stopped.

    Args:
        process: asked to end first.
        marker: `NAME=value` that only this run's processes were started with.
        seconds: to end by themselves in; then they are killed.
    """
    deadline = time.monotonic() + seconds
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    while (left := marked(marker)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if process.poll() is None:
        process.kill()
    process.wait()


def marked(marker: str) -> list[int]:
    """Return the processes of this user that were started with `marker` in their environment."""
    found = []
    for folder in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone by now, or another user's
            if marker.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found
