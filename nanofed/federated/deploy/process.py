"""The processes that a run starts: started again when they end, and ended with it, however it ends."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from nanofed.federated.outcome import Outcome
from nanofed.federated.wire.plain import plain
from nanofed.files import keep_short
from nanofed.training.signals import ending_signals

logger = logging.getLogger(__name__)

PROC = Path("/proc")
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
STEADY_SECONDS = 60.0  # a process that lived so long starts again after the first pause
STOP_SECONDS = 5.0
LOG_BYTES = 32 << 20  # of a log; what was in it before is kept once, as NAME.1
TAIL_BYTES = 64 << 10  # of a log, in which the reason of an end is looked for


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
        seconds: The seconds after which those that have not ended by themselves are killed.
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


class Child:
    """A process that is started again when it ends, later each time that it did not live long; its reason is repeated.

    Args:
        name: What people call the process.
        command: The command line that starts it.
        environment: All of its environment, `marker` included.
        log: file to which all that it prints is appended; see `keep_short`.
        marker: `NAME=value`, which only this process and what it starts have in their environment.
        outcomes: The folder into which the process writes an `Outcome` before it ends; None where it writes none.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        marker: str,
        outcomes: Path | None = None,
    ) -> None:
        self.name = name
        self._command = command
        self._environment = environment
        self._log = log
        self._marker = marker
        self._outcomes = outcomes
        self._process: subprocess.Popen[bytes] | None = None
        self._pause = FIRST_PAUSE
        self._due = 0.0
        self.started = 0.0

    def keep(self) -> Outcome | None:
        """Start it where it is not there and its pause is over; return how it ended where it has just ended."""
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                keep_short(self._log, LOG_BYTES)
                return None
            lived = time.monotonic() - self.started
            self._pause = FIRST_PAUSE if lived > STEADY_SECONDS else min(LONGEST_PAUSE, 2 * self._pause)
            self.stop()  # what it has started may still be there
            self._due = time.monotonic() + self._pause
            said = None if self._outcomes is None else Outcome.read(self._outcomes)
            outcome = said or Outcome(code, last_line(self._log))
            logger.warning(
                "the %s ended with exit code %d after %.0f s; it is started again in %.0f s; %s says: %s",
                self.name, code, lived, self._pause, self._log, plain(outcome.reason),
            )  # fmt: skip
            return outcome
        if time.monotonic() >= self._due:
            self._start()
        return None

    def _start(self) -> None:
        self.started = time.monotonic()
        if self._outcomes is not None:
            Outcome.clear(self._outcomes)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def replace(self, reason: str) -> None:
        """Kill it; the next `keep` starts it at once."""
        logger.warning("the %s %s: it is started anew", self.name, reason)
        self.stop(0.0)
        self._due = 0.0

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """End it and what it has started."""
        if self._process is not None:
            stop_marked(self._process, self._marker, seconds)
            self._process = None

    @property
    def running(self) -> bool:
        """Whether it is there."""
        return self._process is not None and self._process.poll() is None


def last_line(log: Path) -> str:
    """Return the last line of a log, cut and escaped, for a person: what a process said before its end."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"its log cannot be read: {error.strerror}"
    return plain(([line for line in text.splitlines() if line.strip()] or ["it said nothing"])[-1])
