"""Ending what a run has started, however the run ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from nanofed.training.signals import ending_signals

PROC = Path("/proc")


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM (exit code 143) and SIGHUP (129) unwind the stack, as Ctrl-C does, so that what was started is stopped."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that closes and its shell send one each
        raise SystemExit(128 + number)

    with _handled({number: end for number in ending_signals() if number != signal.SIGINT}):
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold the signals that ask to end back until the block has ended: a second Ctrl-C must not leave processes behind."""
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    with _handled(dict.fromkeys(ending_signals(), hold)):
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
    """Stop a process and all that stems from it, wherever that is by now.

    Flower's and Ray's processes leave the session and the parent that started them, and some of Ray's overwrite their
    environment: what counts is every session in which a process has `marker` in its environment. Without /proc only the
    process's own session is stopped.

    Args:
        process: leader of a session; asked to end first.
        marker: `NAME=value` that only this run's processes were started with.
        seconds: to end by themselves in; then they are killed.
    """
    deadline = time.monotonic() + seconds
    sessions = {process.pid} | marked_sessions(marker)
    process.terminate()
    while (process.poll() is None or members(sessions)) and time.monotonic() < deadline:
        time.sleep(0.1)
        sessions |= marked_sessions(marker)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    while left := members(sessions):  # again, for what they have started meanwhile
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    process.wait()


def end_marked(marker: str, name: str = "") -> None:
    """Kill what a marked session has started, but for this process's own session.

    Args:
        marker: `NAME=value` in the environment of a process of the session.
        name: only processes with this in their command line.
    """
    while left := started_as(marker, name):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def started_as(marker: str, name: str) -> list[int]:
    """Return the processes of marked sessions, but for this process's own, that have `name` in their command line."""
    found = []
    for pid in members(marked_sessions(marker) - {os.getsid(0)}):
        with contextlib.suppress(OSError):
            if name.encode() in (PROC / str(pid) / "cmdline").read_bytes():
                found.append(pid)
    return found


def marked_sessions(marker: str) -> set[int]:
    """Return the sessions in which a process was started with `marker`, `NAME=value`, in its environment."""
    found = set()
    for pid in _processes():
        with contextlib.suppress(OSError):  # gone by now, or another user's
            if marker.encode() in (PROC / str(pid) / "environ").read_bytes().split(b"\0"):
                found.add(os.getsid(pid))
    return found


def members(sessions: Container[int]) -> list[int]:
    """Return the processes of sessions that have not ended."""
    found = []
    for pid in _processes():
        with contextlib.suppress(OSError):
            stat = (PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
            if int(stat[3]) in sessions and stat[0] != b"Z":
                found.append(pid)
    return found


def _processes() -> Iterator[int]:
    return (int(folder.name) for folder in PROC.glob("[0-9]*"))
