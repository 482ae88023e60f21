"""The processes that a run starts: started again when they end, and ended with it, however it ends."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from nanofed.federated.outcome import Outcome
from nanofed.federated.wire.plain_text import plain
from nanofed.files import keep_short
from nanofed.training.signals import ending_signals

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
STEADY_SECONDS = 60.0  # a process that lived so long starts again after the first pause
STOP_SECONDS = 5.0
AT_ONCE_SECONDS = 2.0  # in which two signals ask for one end
LOG_BYTES = 32 << 20  # of a log; what was in it before is kept once, as NAME.1
TAIL_BYTES = 64 << 10  # of a log, in which the reason of an end is looked for


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM (exit code 143) and SIGHUP (129) unwind the stack, as Ctrl-C does, so that what was started is stopped.

    A terminal that closes and its shell send one each, and an impatient hand sends two: another one within `AT_ONCE_SECONDS` is
    the same wish, and must not end the unwinding that the first has begun.
    """
    asked = -AT_ONCE_SECONDS

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if time.monotonic() - asked < AT_ONCE_SECONDS:
            return
        asked = time.monotonic()
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    with _handled(dict.fromkeys(ending_signals(), end)):
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


def marked(marker: str, word: str = "", sessions: set[int] | None = None) -> list[psutil.Process]:
    """Return the living processes of every session, but this process's own, in which one was started with a mark.

    Flower's and Ray's processes leave the session and the parent that started them, and some of Ray's overwrite their
    environment, so one process with the mark stands for its session. A process that is gone by now or another user's is passed
    over, and on a Linux without /proc all are.

    Args:
        marker: `NAME=value`, which only what one command has started has in its environment.
        word: Only processes with this in their command line are returned.
        sessions: Sessions whose processes are returned as well; those found are added.
    """
    name, _, value = marker.partition("=")
    sessions = set() if sessions is None else sessions
    seen = []
    with suppress(FileNotFoundError):
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError, PermissionError):
                environment, session = process.environ(), os.getsid(process.pid)
                seen.append((process, session))
                if environment.get(name) == value:
                    sessions.add(session)
    found = []
    for process, session in seen:
        if session in sessions and session != os.getsid(0):
            with suppress(psutil.Error):
                if word in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found


def kill_marked(marker: str, word: str = "", sessions: set[int] | None = None) -> None:
    """Kill the processes that `marked` returns, and those that they have started meanwhile."""
    while left := marked(marker, word, sessions):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.1)


class SupervisedProcess:
    """A process in a session of its own, which ends with all that stems from it, wherever that is by now.

    Where it is kept, it is started again when it ends, later each time that it did not live long, and its reason is repeated.

    Args:
        name: What people call the process.
        command: The command line that starts it.
        environment: All of its environment.
        mark: The name of the variable of the environment whose value only this process and what it starts have.
        log: The file to which all that it prints is appended; see `keep_short`.
        folder: The process's working directory; None for this process's own.
        outcomes: The folder into which the process writes an `Outcome` before it ends; None where it writes none.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        mark: str,
        log: Path,
        *,
        folder: Path | None = None,
        outcomes: Path | None = None,
    ) -> None:
        self.name = name
        self.command = command
        self.started = 0.0
        self._environment = environment
        self._marker = f"{mark}={environment[mark]}"
        self._log = log
        self._folder = folder
        self._outcomes = outcomes
        self._process: subprocess.Popen[bytes] | None = None
        self._short_lives = 0
        self._due = 0.0

    @property
    def running(self) -> bool:
        """Whether it is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it."""
        self.started = time.monotonic()
        if self._outcomes is not None:
            Outcome.clear(self._outcomes)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        # A signal while it starts would leave behind what nobody knows yet.
        with undisturbed(), self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process, which ends the other in order
            )

    def keep(self) -> Outcome | None:
        """Start it where it is not there and its pause is over; return how it ended where it has just ended."""
        if self.running:
            keep_short(self._log, LOG_BYTES)
        elif self._process is not None:
            return self._ended(self._process.returncode)
        elif time.monotonic() >= self._due:
            self.start()
        return None

    def _ended(self, code: int) -> Outcome:
        lived = time.monotonic() - self.started
        self.stop()  # what it has started may still be there
        self._short_lives = 1 if lived > STEADY_SECONDS else self._short_lives + 1
        pause = pause_after(self._short_lives)
        self._due = time.monotonic() + pause
        said = None if self._outcomes is None else Outcome.read(self._outcomes)
        outcome = said or Outcome(code, last_line(self._log))
        logger.warning(
            "the %s ended with exit code %d after %.0f s; it is started again in %.0f s; %s says: %s",
            self.name, code, lived, pause, self._log, plain(outcome.reason),
        )  # fmt: skip
        return outcome

    def replace(self, reason: str) -> None:
        """Kill it; the next `keep` starts it at once."""
        logger.warning("the %s %s: it is started anew", self.name, reason)
        self.stop(0.0)
        self._due = 0.0

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Ask it to end, and kill what is left of it and of all that stems from it after some seconds."""
        if self._process is None:
            return
        deadline = time.monotonic() + seconds
        sessions = {self._process.pid}
        marked(self._marker, sessions=sessions)  # before their leaders, whose environment tells, are gone
        self._process.terminate()
        while (self._process.poll() is None or marked(self._marker, "", sessions)) and time.monotonic() < deadline:
            time.sleep(0.1)
        with suppress(ProcessLookupError):  # where no process can be looked at, its own session ends at least
            os.killpg(self._process.pid, signal.SIGKILL)
        kill_marked(self._marker, sessions=sessions)
        self._process.wait()
        self._process = None


def pause_after(failures: int) -> float:
    """Return the seconds until the next start after so many failures in a row: 1, twice as long each time, at most 60."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(failures - 1, 16))


def last_line(log: Path) -> str:
    """Return the last line of a log, cut and escaped, for a person: what a process said before its end."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"its log cannot be read: {error.strerror}"
    return plain(([line for line in text.splitlines() if line.strip()] or ["it said nothing"])[-1])
