"""Saves that are killed: what the processes do that tests/faults/test_checkpoints.py starts."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import sys
from pathlib import Path
from typing import Any

from nanofed.training.checkpoint.folder import checkpoints, prune_checkpoints
from nanofed.training.checkpoint.format import find_checkpoint
from tests.small_checkpoint import number_in, save_small

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "fcntl.flock"}


def step(run: Path, number: int) -> Path:
    """Return the path of a step's checkpoint."""
    return run / "checkpoints" / f"step_{number:08d}"


def save_forever(run: Path, number: int, report: Path) -> None:
    """Save a new step, then the same one again, and so on; `report` says which save is done."""
    descriptor = os.open(report, os.O_WRONLY | os.O_CREAT)
    while True:
        number += 1
        save_small(step(run, number // 2), number)
        prune_checkpoints(run, 2)
        os.pwrite(descriptor, struct.pack("q", number), 0)


def reported(report: Path) -> int:
    """Return the last save that is done."""
    content = report.read_bytes() if report.exists() else b""
    return int(struct.unpack("q", content)[0]) if content else 0


def die_at(event: int, folder: Path) -> None:
    """Kill this process before its n-th operation on a file or folder below `folder`."""
    seen = 0

    def count(name: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        # What is told by a descriptor, or by a name beside one, is of a folder that was opened before.
        elsewhere = bool(args) and str(args[0]).startswith("/") and str(folder) not in str(args[0])
        if name in EVENTS and not elsewhere:
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def die_everywhere(folder: Path) -> int:
    """Let a save of a new step, one over it and a pruning die at every operation, one after another; return how many."""
    for event in range(1, 1000):
        run, done = folder / f"run{event}", folder / "done"
        run.mkdir()
        save_small(step(run, 1), 1, 100)
        done.write_text("1")
        child = os.fork()
        if child == 0:
            die_at(event, run)
            for number in (2, 3):
                save_small(step(run, 2), number, 100)
                done.write_text(str(number))
            prune_checkpoints(run, 1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        number = number_in(find_checkpoint(run))
        for path in checkpoints(run):
            number_in(path)
        assert int(done.read_text()) <= number <= int(done.read_text()) + 1, "a save that was done, or the one after it"
        save_small(step(run, 4), 4, 100)
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert left[-1] == "step_00000004" and not left[0].startswith("."), left
        prune_checkpoints(run, 2)
        assert [number_in(path) for path in checkpoints(run)] == [number, 4]
        shutil.rmtree(run)
        if status == 0:
            assert number == 3
            return event - 1
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError("no end of operations")
