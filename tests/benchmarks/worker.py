"""A process for each side, so that neither's memory, compiler or threads touch the other's; they take turns."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

from tests.benchmarks.sides import Setting


class WorkerError(RuntimeError):
    """What a worker's own traceback says."""


class Worker:
    """Runs a `Training` of a side, `ours` or `reference`, in a fresh process and calls its methods: `worker("steps", 5)`.

    Between calls the process is stopped (SIGSTOP): what makes batches ahead would otherwise do so, uncounted, in the time of
    the other side. The environment holds what differs from this process's.
    """

    def __init__(self, side: str, setting: Setting, environment: dict[str, str] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, side, setting), name=f"bench-{side}")
        with patch.dict(os.environ, {"OMP_NUM_THREADS": str(setting.threads), **(environment or {})}):
            self._process.start()
        theirs.close()

    def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method there, wait for it, and return what it returned.

        Raises:
            WorkerError: it raised, or the process died.
        """
        try:
            self._signal(signal.SIGCONT)
            self._connection.send((method, args, kwargs))
            ok, result = self._connection.recv()
        except (EOFError, BrokenPipeError):
            self._process.join(10)
            raise WorkerError(f"{self._process.name} died with exit code {self._process.exitcode}") from None
        self._signal(signal.SIGSTOP)
        if not ok:
            raise WorkerError(result)
        return result

    def _signal(self, number: signal.Signals) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)

    def close(self) -> None:
        """End the process."""
        self._signal(signal.SIGCONT)
        self._connection.close()  # which ends its loop
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end_with_parent() -> None:
    """Let Linux kill this process when the one that started it dies: while it is stopped it could not see that itself."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _serve(connection: Connection, side: str, setting: Setting) -> None:
    _end_with_parent()
    from tests.benchmarks.training import Training  # here, so that only this process pays for it

    training: Training | None = None
    while True:
        try:
            method, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            training = training or Training(side, setting)
            connection.send((True, getattr(training, method)(*args, **kwargs)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
