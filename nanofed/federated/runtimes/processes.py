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

    with _handled({signal.SIGTERM: end}):
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block has ended: a second Ctrl-C must not leave processes behind."""
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    with _handled({signal.SIGINT: hold, signal.SIGTERM: hold}):
        yield
    for number in held[:1]:
        signal.raise_signal(number)


@contextmanager
def _handled(handlers: dict[signal.Signals, signal._HANDLER]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_marked(process: subprocess.Popen[bytes], marker: str, seconds: float) -> None:
    """Stop a process, and every other one that has `marker` in its environment: its children, wherever they are by now.

    Ray's processes leave the session and the parent that started them. Without /proc its session is all that is stopped.

    Args:
        process: leader of a session; asked to end first.
        marker: `NAME=value` that only this run's processes were started with.
        seconds: to end by themselves in; then they are killed.
    """
    deadline = time.monotonic() + seconds
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    while marked(marker) and time.monotonic() < deadline:
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    while left := marked(marker):  # again, for what they have started meanwhile
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    process.wait()


def marked(marker: str) -> list[int]:
    """Return the processes of this user that were started with `marker`, `NAME=value`, in their environment."""
    found = []
    for folder in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone by now, or another user's
            if marker.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found
