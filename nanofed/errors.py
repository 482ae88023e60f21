"""Errors that are for people: each says what was wrong, where, and what to do, and knows its exit code."""

from __future__ import annotations

import subprocess
import traceback
from pathlib import Path


class NanofedError(Exception):
    """Something failed that a person can act on; the command line prints it as one line and exits with `exit_code`."""

    exit_code = 1


class ConfigError(NanofedError):
    """A wrong option, key, value or combination of them."""

    exit_code = 2


class DataError(NanofedError):
    """Data, a tokenizer or the network is not available, or a file is damaged."""

    exit_code = 3


MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


def in_one_line(error: BaseException) -> str:
    """Return what an error is to a person, whoever raised it.

    A NanofedError is written for people. Of others only those that the machine or its user can cause speak for themselves: of
    files, memory, devices and missing packages. Any other one is a bug of nanofed, and is named as one.
    """
    text = (str(error).strip().splitlines() or [""])[0][:300]
    kind = type(error).__name__
    if isinstance(error, NanofedError):
        return " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(word in text.lower() for word in MEMORY):
        return f"out of memory ({text or kind}): take a smaller data.device_batch_size or model.depth"
    if isinstance(error, OSError):
        names = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        reason = error.strerror or text or kind
        return f"{names}: {reason}" if names else reason
    if isinstance(error, ImportError):
        return f"{text}: the installation is not complete"
    from_outside = isinstance(error, RuntimeError | subprocess.SubprocessError)  # a kernel that a device lacks, too
    if from_outside and not isinstance(error, RecursionError):
        return text or kind
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    return f"this is a bug of nanofed: {kind}{where}: {text}" if text else f"this is a bug of nanofed: {kind}{where}"
