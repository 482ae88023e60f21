"""Runs of several ranks as people start them, with their processes found again by a mark in the environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from tests.parity.test_paths import arguments
from tests.support import REPOSITORY

MARK = "NANOFED_TEST_RUN"
TORCHRUN = ("-m", "torch.distributed.run")


def in_time(seconds: float) -> float:
    """Return the seconds to grant: what is promised, and three times as much where the machine is overloaded."""
    return seconds * (3 if os.getloadavg()[0] > 2 * (os.cpu_count() or 1) else 1)


def two_ranks(corpus: Path, runs: Path, name: str, *more: str) -> list[str]:
    """Arguments of a fit on two gloo ranks."""
    args = arguments(corpus, runs, name, "contiguous")
    return [*args, "--trainer.accelerator=cpu", "--trainer.devices=2", *more]


class Started:
    """A command, arguments of Python, and all processes that come of it, whose output goes to one log."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        self.mark = uuid.uuid4().hex
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", MARK: self.mark}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self, word: str = "") -> dict[int, int | None]:
        """Return the living processes with a word in their command line by id, with their rank; None for torchrun's agents."""
        found: dict[int, int | None] = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # ended meanwhile
                environment, command = process.environ(), process.cmdline()
                if environment.get(MARK) != self.mark or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                rank = int(environment.get("RANK", environment.get("LOCAL_RANK", "0")))
                if word in " ".join(command):
                    found[process.pid] = None if "torch.distributed.run" in command else rank
        return found

    def rank(self, number: int) -> int:
        """Return the process id of a rank."""
        return next(pid for pid, rank in self.processes().items() if rank == number)

    def wait(self, seconds: float) -> int:
        """Return the exit code of the command."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.output[-6000:]}") from None

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 200) -> None:
        """Wait until something is so, or the command has ended."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"no {what} after {seconds} s:\n{self.output[-6000:]}"
            assert self.process.poll() is None, f"ended before {what}:\n{self.output[-6000:]}"
            time.sleep(0.1)

    def wait_for_step(self, step: int) -> None:
        """Wait for a validation at a step, in a run that validates after every so many."""
        self.wait_until(lambda: f"step {step:>6,}/" in self.output, f"step {step}")

    def assert_nothing_left(self, seconds: float) -> None:
        """Wait until no process of the run lives."""
        end = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < end, f"left after {seconds} s: {left}\n{self.output[-6000:]}"
            time.sleep(0.1)
