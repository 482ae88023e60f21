"""SIGTERM, SIGHUP and Ctrl-C: at once while there is nothing to lose, else a wish that the run grants at its next full step."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

HINT = b"\nfinishing this optimizer step, then saving; Ctrl-C again stops at once\n"


class Stopped(SystemExit):
    """The run was asked to stop, by a signal, and has: the exit code is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def ending_signals() -> list[signal.Signals]:
    """Return the signals that ask this process to end: SIGINT, SIGTERM, and SIGHUP where it is not ignored, as under nohup."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


class Signals:
    """Turns the `ending_signals` into `received` while its block runs.

    As long as `patient` is not set, a signal also ends the block there and then (SIGINT by KeyboardInterrupt, the others by
    `Stopped`): nothing is lost by that before the first optimizer step. A second SIGINT always does. Outside the
    main thread, where Python allows no handlers, nothing is changed.

    Attributes:
        received: the number of the first signal, None before.
        patient: whether a signal is only remembered: whoever trains looks at `received` at every full step.
        children: other ranks that this process has started. They are told by SIGTERM, whichever signal it was, since Ctrl-C
            reaches them from the terminal as well and must not count twice.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.patient = False
        self.children: Sequence[subprocess.Popen[bytes]] = ()
        self._interrupts = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in ending_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
        # Lightning exits with 1 where it saw a KeyboardInterrupt.
        interrupted = isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
        if interrupted or (isinstance(error, Stopped) and error.number == signal.SIGINT):
            raise KeyboardInterrupt from error

    def await_children(self, seconds: float = 20.0) -> None:
        """Wait for the other ranks of a run that ends, and kill those that do not: none outlives its first rank."""
        end = time.monotonic() + seconds
        for child in self.children:
            try:
                child.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and self.received is not None:
            return  # a terminal that closes and its shell send one each
        self._interrupts += number == signal.SIGINT
        if self.received is None:
            self.received = number
            for child in self.children:
                child.send_signal(signal.SIGTERM)
            if self.patient and number == signal.SIGINT:
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(2, HINT)  # a handler may not log: it may have interrupted the log itself
        if number == signal.SIGINT and (self._interrupts > 1 or not self.patient):
            raise KeyboardInterrupt
        if not self.patient:
            raise Stopped(number)
